# SPDX-License-Identifier: BSD-3-Clause
"""The planner: which taps are live where, in which regions, in which units of work, at which cost.

Pure geometry on 64-bit integers, without torch. Bad input raises ValueError, sizes beyond 64 bits
OverflowError and an index out of range IndexError, each with the rule, what was expected and what
was got. Intervals are half open; pixels count in the order column, row, image.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Literal

Pass = Literal["forward", "grad_input", "grad_weight", "separable"]
Math = Literal["bfloat16", "float16", "tf32", "float32", "float64"]
Order = Literal["regions", "merged", "linear", "cheapest", "phases"]

class Interval:
    """[begin, end). Unpacks, hashes and compares like the tuple (begin, end)."""

    begin: Final[int]
    end: Final[int]
    size: Final[int]
    def __init__(self, begin: int, end: int) -> None: ...
    def __iter__(self) -> Iterator[int]: ...
    def __hash__(self) -> int: ...
    def __eq__(self, other: object) -> bool: ...

class Axis:
    """One axis of a branch: tap t reads position p + offset(t); a negative rate mirrors it."""

    size: Final[int]
    kernel: Final[int]
    rate: Final[int]
    def __init__(self, size: int, kernel: int, rate: int) -> None: ...
    def offset(self, tap: int) -> int: ...
    def live_positions(self, tap: int) -> Interval:
        """The positions at which the tap reads inside; empty where it never does."""

    def live_taps(self, positions: Interval | tuple[int, int]) -> Interval:
        """The taps that read inside at one of the positions at least."""

    def cuts(self) -> list[int]:
        """Where the set of live taps changes, with both ends of the axis."""

class Tap:
    """weight[:, :, row, col] of a branch, which meets the pixel at (y + dy, x + dx)."""

    branch: Final[int]
    row: Final[int]
    col: Final[int]
    dy: Final[int]
    dx: Final[int]
    def __eq__(self, other: object) -> bool: ...

class TapBlock:
    """The taps rows x cols of a branch: `first` is the offset of the first, `step` to the next."""

    branch: Final[int]
    rows: Final[Interval]
    cols: Final[Interval]
    first: Final[tuple[int, int]]
    step: Final[tuple[int, int]]
    size: Final[int]
    def __eq__(self, other: object) -> bool: ...

class Region:
    """A rectangle of the map and the taps to take in it.

    Unless `padded`, each of them reads inside the map at each pixel; if it is, what falls outside
    counts as zero.
    """

    rows: Final[Interval]
    cols: Final[Interval]
    live: Final[list[TapBlock]]
    padded: Final[bool]
    area: Final[int]
    tap_count: Final[int]
    @property
    def taps(self) -> list[Tap]:
        """The taps of `live` one by one: the order in which K runs through them."""

    def __eq__(self, other: object) -> bool: ...

class Tile:
    """What a kernel computes at a time: m x n of the output, k deep; m shrinks in steps of tail.

    In forward m counts pixels, n output channels, k input channels of one tap; in grad_input n
    counts input and k output channels; in grad_weight m counts output channels, n input channels
    and k pixels; in separable k counts input channels, each with all its taps. `tail` defaults to
    m.
    """

    m: Final[int]
    n: Final[int]
    k: Final[int]
    tail: Final[int]
    def __init__(
        self, m: int = 128, n: int = 256, k: int = 64, tail: int | None = None
    ) -> None: ...

class Unit:
    """An output tile m x n of a region, or the slice k (in blocks of tile.k) of its sum.

    Units with the same `tile` add up in the order of `slice`; one with an empty k writes zeros.
    """

    region: Final[int]
    tile: Final[int]
    slice: Final[int]
    slices: Final[int]
    @property
    def worker(self) -> int:
        """Whose share it is, or -1 in a plan that is not cut into shares."""

    m: Final[Interval]
    n: Final[Interval]
    k: Final[Interval]

class Plan:
    """The units of one pass, image by image, and the regions they index."""

    pass_: Final[Pass]
    tile: Final[Tile]
    regions: Final[list[Region]]
    units: Final[list[Unit]]
    @property
    def longest(self) -> int:
        """The k blocks of the longest unit."""

    @property
    def total(self) -> int:
        """The k blocks of all units."""

    def schedule(self, workers: int) -> Schedule:
        """List scheduling: each unit in turn goes to the worker that is free first."""

class Schedule:
    """Which worker does which units; a unit costs paid rows * k blocks + tile.m * 4.

    In separable a k block counts as the taps of the region + 4, and the 4 of tile.m as 16: the
    cost is in taps, of which a block's product is worth four.
    The plan's own shares if it has some for so many workers, else list scheduling.
    """

    @property
    def workers(self) -> list[list[int]]:
        """Per worker, the indices of its units in the order of the plan."""

    @property
    def busy(self) -> list[int]:
        """Per worker, the cost of its units."""

    @property
    def makespan(self) -> int:
        """The largest of `busy`."""

    @property
    def total(self) -> int:
        """The sum of `busy`."""

class Cost:
    """Tile-taps of each way to compute: one tile of pixels times one tap, whatever the channels.

    In separable a branch's 1x1 counts as four taps more.
    """

    @property
    def dense(self) -> float:
        """Every tap of every tile."""

    @property
    def linear(self) -> float:
        """Pixels in linear order, without the (tile, tap) pairs that are wholly dead."""

    @property
    def regions(self) -> float:
        """Exact rectangles."""

    @property
    def regions_tails(self) -> float:
        """The same, with the last tile of a region cut to a multiple of the tail."""

    @property
    def merged(self) -> float:
        """The best merge of them."""

    @property
    def merged_tails(self) -> float:
        """The best merge with tails."""

    @property
    def ideal(self) -> float:
        """The live multiply-adds alone."""

class WeightCost:
    """Block-taps (one block of pixels of the sum times one tap) of grad_weight."""

    dense: Final[float]
    live: Final[float]
    ideal: Final[float]

class Branch:
    """One atrous convolution: kernel (odd) and rate, per axis or one number for both."""

    kernel: Final[tuple[int, int]]
    rate: Final[tuple[int, int]]
    out_channels: Final[int]
    def __init__(
        self,
        kernel: int | tuple[int, int] = 1,
        rate: int | tuple[int, int] = 1,
        out_channels: int = 1,
    ) -> None: ...

class Problem:
    """A pyramid on x [batch, in_channels, height, width]: stride 1, "same" padding.

    1-D is height 1 with kernels (1, k). The channels matter to plans alone. In separable the
    kernels are depthwise, each before a 1x1 to out_channels; a branch without one has one of 1x1.
    """

    batch: Final[int]
    height: Final[int]
    width: Final[int]
    branches: Final[list[Branch]]
    in_channels: Final[int]
    def __init__(
        self,
        batch: int,
        height: int,
        width: int,
        branches: Sequence[Branch],
        in_channels: int = 1,
    ) -> None: ...
    def regions(self, branch: int, order: Order = "regions", tile: Tile = ...) -> list[Region]:
        """The regions of one branch in forward (at most nine for a 3x3 kernel)."""

    def joint_regions(self, order: Order = "regions", tile: Tile = ...) -> list[Region]:
        """The regions of grad_input, where all branches add into one output."""

    def region_at(
        self,
        branch: int | None,
        rows: Interval | tuple[int, int],
        cols: Interval | tuple[int, int],
    ) -> Region:
        """Any rectangle with the union of its live taps; branch None: all, for grad_input."""

    def tap_rectangles(self) -> list[Region]:
        """For grad_weight: per (branch, tap) the output pixels where it is live, perhaps none."""

    def plan(
        self,
        pass_: Pass = "forward",
        order: Order = "cheapest",
        tile: Tile = ...,
        processors: int = 0,
        shortest_slice: int = 8,
    ) -> Plan:
        """The work list. With `processors` > 0 the last two waves (all of grad_weight) go longest
        first, or, where that takes less time, few units are cut into equal shares along K, in
        slices of `shortest_slice` blocks or more."""

    def cost(self, pass_: Pass = "forward", pixels: int = 128, tail: int = 64) -> Cost:
        """What each way of computing any pass but grad_weight costs, in tiles of `pixels`."""

    def weight_cost(self, pixels: int = 64) -> WeightCost:
        """What grad_weight costs, in blocks of `pixels`."""

    def live_share(self, branch: int | None = None) -> float:
        """Live / all multiply-adds, of a branch or of the whole pyramid."""

class WorkList:
    """A plan as kernels read it: records of int32, as bytes, with the fields of the struct in
    csrc/plan/work_list.h that is named below, in its order."""

    @property
    def units(self) -> bytes:
        """WorkUnit, 14 fields each, worker by worker."""

    @property
    def worker_begin(self) -> bytes:
        """One number each: worker w has the units [worker_begin[w], worker_begin[w + 1])."""

    @property
    def regions(self) -> bytes:
        """WorkRegion, 10 fields each."""

    @property
    def taps(self) -> bytes:
        """WorkTap, 6 fields each."""

    @property
    def runs(self) -> bytes:
        """WorkRun, 11 fields each: the same taps in rectangles."""

    @property
    def launch_order(self) -> bytes:
        """One number each: the index of the unit to start next."""

    @property
    def workers(self) -> int:
        """Those that have units; 0 where there is nothing to do."""

    @property
    def partials(self) -> int:
        """Tiles of sums that the slices need."""

    @property
    def counters(self) -> int:
        """Tiles that have slices."""

    @property
    def tiles(self) -> int:
        """Output tiles."""

    @property
    def branch_tiles(self) -> list[tuple[int, int]]:
        """Per branch its output tiles, (first, count); grad_input's are all the first's."""

def work_list(
    problem: Problem,
    pass_: Pass = "forward",
    order: Order = "cheapest",
    tile: Tile = ...,
    workers: int = 1,
) -> WorkList:
    """The problem's plan, balanced for so many workers, of which fewer may get units.

    Raises ValueError where workers is not in [1, 2**24] or a number does not fit in 32 bits.
    """

class FusedChoice:
    """Whether CUDA's separable forward is computed by the fused kernel or through memory.

    Costs count taps of depthwise work on a pixel, summed over the branches with depthwise taps; the
    1x1 to a tile's width of output channels counts as four.
    """

    @property
    def shape(self) -> int:
        """Of the fused kernel's tiles, 0 the widest; -1 where it cannot run."""

    @property
    def halo_pixels(self) -> int:
        """Pixels that a tile reads, of the branch with most."""

    @property
    def most_taps(self) -> int:
        """Live taps of the branch with most."""

    @property
    def fused(self) -> float:
        """0 where it cannot run, as halo_pixels and most_taps."""

    stored: Final[float]
    @property
    def recomputed_batch_norm(self) -> float:
        """The cost where the depthwise results' statistics come first, and the results are then
        computed once more, fused or through memory."""

    @property
    def stored_batch_norm(self) -> float:
        """The same where the statistics' pass stores the results and another normalises them."""

    @property
    def why_not(self) -> str:
        """Why the fused kernel cannot run; empty where it can."""

    is_fused: Final[bool]
    recomputes_in_batch_norm: Final[bool]

def choose_fused(
    problem: Problem,
    math: Math,
    shared_bytes: int,
) -> FusedChoice:
    """The choice for blocks of at most so much shared memory.

    Raises ValueError for another math.
    """

class MinimalProduct:
    """weights[weight] . (first, centre, last tap) times the sum of coefficient * input over the
    pairs (position, coefficient); coefficient times that is added to each of the outputs."""

    weight: Final[int]
    inputs: Final[list[tuple[int, float]]]
    outputs: Final[list[tuple[int, float]]]

class MinimalPiece:
    """Positions and the products that they alone need."""

    products: Final[Interval]
    outputs: Final[list[int]]

class MinimalAxis:
    """The convolution along one axis in products. An output is their sum / denominator."""

    denominator: Final[int]
    weights: Final[list[tuple[float, float, float]]]
    products: Final[list[MinimalProduct]]
    pieces: Final[list[MinimalPiece]]

def minimal_axis(
    size: int,
    kernel: int,
    rate: int,
    *,
    pair: bool = False,
    triple: bool = False,
    overlapped: bool = False,
) -> MinimalAxis:
    """The fewest products with these kinds of blocks; csrc/plan/minimal.h explains them.

    Raises ValueError where kernel is not 1 or 3, rate < 1 or size not in [1, 2048].
    """

def output_noise(
    rows: tuple[int, int, int],
    columns: tuple[int, int, int],
    row_blocks: dict[str, bool],
    column_blocks: dict[str, bool],
    inputs: list[float],
    taps: list[float],
) -> tuple[list[float], list[float]]:
    """The squared noise of each output by minimal filtering and directly; csrc/plan/noise.h.

    rows and columns are size, kernel and rate, `inputs` [height * width] energies of pixels and
    `taps` the nine of a 3x3 kernel's taps.

    Raises ValueError where minimal_axis does or where an input's energy is missing.
    """

class PolyphaseForm:
    """Minimal filtering of both axes. A product of the rows and one of the columns are a GEMM row;
    `rows` and `columns` are the blocks, as keyword arguments of `minimal_axis`."""

    rows: Final[dict[str, bool]]
    columns: Final[dict[str, bool]]
    row_products: Final[int]
    column_products: Final[int]
    matrices: Final[int]

class PolyphaseChoice:
    """The cheapest form of a branch beside its live taps one by one, both in GEMM rows: one is
    in_channels * out_channels multiply-adds."""

    form: Final[PolyphaseForm | None]
    polyphase: Final[float]
    direct: Final[float]
    why_not: Final[str]
    is_polyphase: Final[bool]

def choose_polyphase(
    problem: Problem,
    branch: int,
    *,
    transform: float = 30,
    matrix: float = 5,
    prepare: float = 50,
    direct: float = 0.05,
    hold: float = 10,
    prepared: bool = True,
) -> PolyphaseChoice:
    """The choice for one branch; csrc/plan/polyphase.h has the formula's costs. Where there is no
    form, polyphase is 0 and why_not a sentence.

    Raises IndexError for a branch that is not there.
    """

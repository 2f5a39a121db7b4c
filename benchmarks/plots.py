# SPDX-License-Identifier: BSD-3-Clause
"""The two pictures of a results file: speed-up bars and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import MACHINE, Row, best, by_problem, of_contender

INK, MUTED, GRID = "#22272e", "#6b7280", "#e5e7eb"
COLOURS = {
    "aspp_ext": "#d9480f",
    "aspp_ext cuda": "#d9480f",
    "aspp_ext triton": "#e8930c",
    "aspp_ext cpu": "#d9480f",
    "eager NCHW": "#b6c6d8",
    "eager NCHW, search": "#a3a8cf",
    "eager NHWC": "#8ba6c4",
    "eager NHWC, search": "#7d84b8",
    "compile NCHW": "#5f86b0",
    "compile NHWC": "#3a6698",
    "ONNX Runtime": "#93b48b",
    "OpenVINO": "#5c8a55",
    "TensorRT": "#5c8a55",
}
GROUPS = {
    "aspp_ext": ("aspp_ext", "#d9480f", "o"),
    "aspp_ext cuda": ("aspp_ext cuda", "#d9480f", "o"),
    "aspp_ext triton": ("aspp_ext triton", "#e8930c", "D"),
    "aspp_ext cpu": ("aspp_ext cpu", "#d9480f", "o"),
    "pytorch": ("best of PyTorch", "#3a6698", "s"),
    "other": ("best of the other runtimes", "#5c8a55", "^"),
}
OURS = tuple(name for name in COLOURS if name.startswith("aspp_ext"))


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "xtick.color": MUTED,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return plt


def caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    if first.architecture:
        return f"{first.device}, torch {first.torch}, {first.date}"
    return f"{first.device}, {first.threads} threads, torch {first.torch}, {first.date}"


def contestants(group: Sequence[Row]) -> dict[str, Row]:
    """Timed rows by the name in the legend; of each aspp_ext that of its faster memory format."""
    timed = {row.contender: row for row in group if row.group != "ours" and row.p50_ms is not None}
    timed |= {name: row for name in OURS if (row := best(of_contender(group, name), "ours"))}
    return {name: timed[name] for name in COLOURS if name in timed}


def fastest(group: Sequence[Row]) -> dict[str, Row]:
    """The fastest timed row of each of `GROUPS`, of aspp_ext by implementation."""
    found = {
        key: best(of_contender(group, key), "ours") if key in OURS else best(group, key)
        for key in GROUPS
    }
    return {key: row for key, row in found.items() if row}


def in_columns(groups: Sequence[list[Row]]) -> list[list[list[Row]]]:
    """Splits the problems into two columns of about as many bars, or leaves them in one."""
    lengths = [len(contestants(group)) + 1.6 for group in groups]
    if sum(lengths) <= 30:
        return [list(groups)]
    cut = min(
        range(1, len(groups)), key=lambda place: max(sum(lengths[:place]), sum(lengths[place:]))
    )
    return [list(groups[:cut]), list(groups[cut:])]


def draw_bars(axes: Any, groups: Sequence[list[Row]]) -> float:
    """One column of bars, a problem's name above its bars; returns the lowest edge."""
    place = 0.0
    for group in groups:
        reference = best(group, "pytorch").p50_ms
        title = f"{group[0].level}: {group[0].title}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
        axes.text(0, place, title, va="center", fontsize=8, weight="bold", zorder=4, bbox=box)
        for name, row in contestants(group).items():
            place += 1.0
            speed = reference / row.p50_ms
            axes.barh(place, speed, height=0.86, color=COLOURS[name])
            text = f"{row.p50_ms:.3g} ms" if row.p50_ms < 100 else f"{row.p50_ms:.0f} ms"
            axes.annotate(
                text,
                (speed, place),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                weight="bold" if name in OURS else "normal",
                zorder=4,
                bbox=box,
            )
        place += 1.6
    return place - 1.0


def draw_speedup(rows: Sequence[Row], path: Path) -> None:
    """Horizontal bars: speed relative to the best of PyTorch, milliseconds at the bar's end."""
    plt = pyplot()
    groups = [group for group in by_problem(rows).values() if best(group, "pytorch")]
    if not groups:
        return
    columns = in_columns(groups)
    figure, grid = plt.subplots(1, len(columns), sharex=True, layout="constrained", squeeze=False)
    bottoms = [draw_bars(axes, column) for axes, column in zip(grid[0], columns, strict=True)]
    longest = max(
        best(group, "pytorch").p50_ms / row.p50_ms
        for group in groups
        for row in contestants(group).values()
    )
    for axes in grid[0]:
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=2)
        axes.set_yticks([])
        axes.set_ylim(max(bottoms), -0.8)
        axes.set_xlim(0, 1.12 * longest)
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xlabel("speed relative to the best of PyTorch (dashed line); longer is faster")
    figure.set_size_inches(6.0 * len(columns) + 1.0, 1.2 + 0.165 * max(bottoms))
    present = {name for group in groups for name in contestants(group)}
    shown = {name: colour for name, colour in COLOURS.items() if name in present}
    figure.legend(
        [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in shown.values()],
        list(shown),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
        columnspacing=1.0,
        handlelength=1.0,
    )
    figure.suptitle(f"Speed-up, {caption(rows)}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_roof(axes: Any, rows: Sequence[Row], left: float, right: float) -> None:
    """One roof per dtype: the copy's slope up to the matrix product's ceiling."""
    bandwidth = copy_bandwidth(rows)
    for row in rows:
        if row.level != MACHINE or row.gflop_per_s is None:
            continue
        peak = row.gflop_per_s
        points = sorted({left, min(max(peak / bandwidth, left), right), right})
        roof = [min(peak, bandwidth * point) for point in points]
        style = "-" if row.dtype == "float32" else (0, (5, 3))
        axes.plot(points, roof, color=MUTED, linewidth=1.4, linestyle=style, zorder=2)
        axes.annotate(
            f"{row.dtype} matrix product {peak:.0f} GFLOP/s",
            (peak / bandwidth, peak),
            (16, 4),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
        )


def copy_bandwidth(rows: Sequence[Row]) -> float:
    """GB/s of the measured copy."""
    return next(row.gb_per_s for row in rows if row.level == MACHINE and row.gb_per_s)


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """Useful GFLOP/s over useful FLOPs per compulsory byte, under the machine's measured roof."""
    plt = pyplot()
    points = [
        (group, 1e3 * group[0].useful_gflop / group[0].compulsory_mb, timed)
        for group in by_problem(rows).values()
        if group[0].useful_gflop and (timed := fastest(group))
    ]
    bandwidth = copy_bandwidth(rows)
    peaks = [row.gflop_per_s for row in rows if row.level == MACHINE and row.gflop_per_s]
    left, right = 0.5 * min(peaks) / bandwidth, 2.0 * max([x for _, x, _ in points] or [64.0])
    figure, axes = plt.subplots(figsize=(8.5, 5.8 + 0.17 * len(points)), layout="constrained")
    draw_roof(axes, rows, left, right)
    speeds = []
    for number, (_, x, timed) in enumerate(points, 1):
        heights = [row.gflop_per_s for row in timed.values()]
        speeds += heights
        axes.plot([x, x], [min(heights), max(heights)], color=GRID, zorder=1)
        for key, row in timed.items():
            _, colour, marker = GROUPS[key]
            axes.plot(
                x,
                row.gflop_per_s,
                marker,
                color=colour,
                markersize=7 if key in OURS else 5.5,
                markerfacecolor=colour if row.dtype == "float32" else "white",
                markeredgewidth=1.3,
                zorder=3,
            )
        axes.annotate(
            str(number),
            (x, max(heights)),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            weight="bold",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(left, right)
    axes.set_ylim(0.7 * min(speeds, default=min(peaks)), 1.5 * max([*speeds, *peaks]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("useful FLOPs per compulsory byte (hollow marks: not float32)")
    axes.set_ylabel("useful GFLOP/s")
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
        for key, (label, colour, marker) in GROUPS.items()
        if any(key in timed for _, _, timed in points)
    ]
    axes.legend(handles=handles, loc="lower left", frameon=False, fontsize=8)
    lines = [
        f"{n:>2}  {group[0].level}: {group[0].title}" for n, (group, *_) in enumerate(points, 1)
    ]
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, linespacing=1.5)
    figure.suptitle(
        f"Roofline, {caption(rows)}; copy {bandwidth:.0f} GB/s", fontsize=10, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_all(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draws STEM-speedup.png and STEM-roofline.png and returns their paths."""
    drawn = []
    for what, draw in (("speedup", draw_speedup), ("roofline", draw_roofline)):
        path = stem.with_name(f"{stem.name}-{what}.png")
        draw(rows, path)
        drawn.append(path)
    return drawn

# SPDX-License-Identifier: BSD-3-Clause
"""The table of bad inputs: what is wrong, in which operator, and the sentence that refuses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class T:
    """A tensor to be: ``device`` is "same", or "other" than the rest's."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "same"

    def __call__(self, device: str) -> torch.Tensor:
        if self.device == "other":
            device = "cpu" if device == "meta" else "meta"
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "same") -> T:
    return T(shape, dtype, device)


X = t(2, 6, 5, 7)
VALID: dict[str, dict[str, Any]] = {
    "atrous_pyramid": {
        "x": X,
        "weights": [t(4, 6, 1, 1), t(3, 6, 3, 3)],
        "rates": [1, 1, 2, 3],
        "scale": t(7),
        "shift": t(7),
        "relu": False,
    },
    "atrous_pyramid_grad_input": {
        "grad": t(2, 7, 5, 7),
        "weights": [t(4, 6, 1, 1), t(3, 6, 3, 3)],
        "rates": [1, 1, 2, 3],
    },
    "atrous_pyramid_grad_weight": {
        "grad": t(2, 7, 5, 7),
        "x": X,
        "kernels": [1, 1, 3, 3],
        "out_channels": [4, 3],
        "rates": [1, 1, 2, 3],
    },
    "atrous_separable_pyramid": {
        "x": X,
        "depthwise": [t(6, 1, 3, 3), t(0)],
        "pointwise": [t(4, 6, 1, 1), t(3, 6, 1, 1)],
        "rates": [2, 3, 1, 1],
        "between_scale": [t(6), t(0)],
        "between_shift": [t(6), t(0)],
        "between_relu": True,
        "scale": t(7),
        "shift": t(7),
        "relu": False,
    },
    "atrous_separable_pyramid_backward": {
        "grad": t(2, 7, 5, 7),
        "x": X,
        "depthwise": [t(6, 1, 3, 3), t(0)],
        "pointwise": [t(4, 6, 1, 1), t(3, 6, 1, 1)],
        "rates": [2, 3, 1, 1],
        "between_scale": [],
        "between_shift": [],
        "between_relu": False,
        "need_x": True,
        "need_depthwise": True,
        "need_pointwise": True,
        "need_between": False,
    },
    "aspp_inference": {
        "x": X,
        "depthwise": [t(0), t(6, 1, 3, 3)],
        "weights": [t(4, 6, 3, 3), t(3, 6, 1, 1)],
        "rates": [2, 2, 3, 3],
        "shift": t(7),
        "pool_weight": t(2, 6),
        "pool_shift": t(2),
        "project_weight": t(5, 9),
        "project_shift": t(5),
        "polyphase": False,
        "prepared": [t(0), t(0)],
        "channels_last": False,  # a tensor of one element would be a bool, if not a fake's
        "relu": True,
        "project_relu": False,
    },
}


@dataclass(frozen=True)
class Bad:
    op: str
    why: str
    sentence: str  # behind "<op>: "
    change: dict[str, Any] = field(default_factory=dict)
    # what the sentence calls the operator, where it is not `op`
    called: str = ""

    def message(self, device: str = "cpu") -> str:
        """Where x is on ``device``."""
        other = "cpu" if device == "meta" else "meta"
        sentence = self.sentence.replace("HERE", device).replace("OTHER", other)
        return f"{self.called or self.op}: {sentence}"

    @property
    def arguments(self) -> dict[str, Any]:
        return VALID[self.op] | self.change


DENSE, SEP, HEAD = "atrous_pyramid", "atrous_separable_pyramid", "aspp_inference"
GRAD_X, GRAD_W = "atrous_pyramid_grad_input", "atrous_pyramid_grad_weight"
SEP_BACK = "atrous_separable_pyramid_backward"
W0, W1 = VALID[DENSE]["weights"]
D0, NONE = VALID[SEP]["depthwise"]
P0, P1 = VALID[SEP]["pointwise"]
HUGE = 2**31
FLOATS = "must be float32, float64, bfloat16 or float16"
IMAGE = "x must be [N, C, H, W]"
EMPTY = "x needs at least one channel, row and column"
PER_BRANCH = "atrous_rates must have one rate per branch"
PER_OUTPUT = "must have one value per output channel (7)"
AT_LEAST = "must hold at least one branch, got an empty list"
ELSEWHERE = "must be on x's device HERE, got OTHER"
GRAD = "grad must have the output's shape [2, 7, 5, 7], got"
F64, F16, BF16 = torch.float64, torch.float16, torch.bfloat16


def _every_forward() -> list[Bad]:
    """What any operator with an image x and rates refuses."""
    found = []
    for op in (DENSE, SEP, HEAD):
        last = len(VALID[op]["rates"]) // 2 - 1
        rates = VALID[op]["rates"][:-1]
        found += [
            Bad(op, "x of rank 2", f"{IMAGE}, got shape [6, 5]", {"x": t(6, 5)}),
            Bad(op, "x of rank 5", f"{IMAGE}, got shape [1, 2, 6, 5, 7]", {"x": t(1, 2, 6, 5, 7)}),
            Bad(op, "x of integers",
                f"x {FLOATS}, got int64", {"x": t(2, 6, 5, 7, dtype=torch.int64)}),
            Bad(op, "x of bytes",
                f"x {FLOATS}, got uint8", {"x": t(2, 6, 5, 7, dtype=torch.uint8)}),
            Bad(op, "x of bools", f"x {FLOATS}, got bool", {"x": t(2, 6, 5, 7, dtype=torch.bool)}),
            Bad(op, "complex x",
                f"x {FLOATS}, got complex64", {"x": t(2, 6, 5, 7, dtype=torch.complex64)}),
            Bad(op, "8-bit float x",
                f"x {FLOATS}, got float8_e4m3fn", {"x": t(2, 6, 5, 7, dtype=torch.float8_e4m3fn)}),
            Bad(op, "no channels", f"{EMPTY}, got shape [2, 0, 5, 7]", {"x": t(2, 0, 5, 7)}),
            Bad(op, "no rows", f"{EMPTY}, got shape [2, 6, 0, 7]", {"x": t(2, 6, 0, 7)}),
            Bad(op, "no columns", f"{EMPTY}, got shape [2, 6, 5, 0]", {"x": t(2, 6, 5, 0)}),
            Bad(op, "too few rates",
                f"{PER_BRANCH}, got {last} for {last + 1} branches", {"rates": [1] * 2 * last}),
            Bad(op, "too many rates",
                f"{PER_BRANCH}, got {last + 2} for {last + 1} branches",
                {"rates": [1] * 2 * (last + 2)}),
            Bad(op, "no rates", f"{PER_BRANCH}, got 0 for {last + 1} branches", {"rates": []}),
            Bad(op, "rate 0", f"atrous_rates[{last}] must be >= 1, got 0", {"rates": [*rates, 0]}),
            Bad(op, "rate -3",
                f"atrous_rates[{last}] must be >= 1, got -3", {"rates": [*rates, -3]}),
            Bad(op, "rate 2**31",
                f"atrous_rates[{last}] must be <= 2147483647, got {HUGE}",
                {"rates": [*rates, HUGE]}),
            Bad(op, "rate 2**63 - 1",
                f"atrous_rates[{last}] must be <= 2147483647, got {2**63 - 1}",
                {"rates": [*rates, 2**63 - 1]}),
        ]  # fmt: skip
        for name in [n for n in ("scale", "shift") if n in VALID[op]]:
            found += [
                Bad(op, f"{name} too short", f"{name} {PER_OUTPUT}, got shape [6]", {name: t(6)}),
                Bad(op, f"{name} of rank 0", f"{name} {PER_OUTPUT}, got shape []", {name: t()}),
                Bad(op, f"{name} of rank 3",
                    f"{name} {PER_OUTPUT}, got shape [1, 2, 7]", {name: t(1, 2, 7)}),
                Bad(op, f"{name} for another batch",
                    f"{name} {PER_OUTPUT}, got shape [3, 7]", {name: t(3, 7)}),
                Bad(op, f"{name} in float64",
                    f"{name} must have x's dtype float32, got float64", {name: t(7, dtype=F64)}),
                Bad(op, f"{name} elsewhere",
                    f"{name} {ELSEWHERE}", {name: t(7, device="other")}),
            ]  # fmt: skip
    found += [
        Bad(op, "scale per sample", f"scale {PER_OUTPUT}, got shape [2, 7]", {"scale": t(2, 7)})
        for op in (DENSE, SEP)
    ]  # fmt: skip
    return found


_DENSE_WEIGHTS = [
    ("weight of rank 3", "weights[1] must be [O, C, kh, kw], got shape [3, 6, 3]", t(3, 6, 3)),
    ("weight of rank 0", "weights[1] must be [O, C, kh, kw], got shape []", t()),
    ("even kernel", "weights[1] must have odd kernel sizes, got 2x3", t(3, 6, 2, 3)),
    ("empty kernel", "weights[1] must have odd kernel sizes, got 3x0", t(3, 6, 3, 0)),
    ("no outputs",
     "weights[1] needs at least one output channel, got shape [0, 6, 3, 3]", t(0, 6, 3, 3)),
    ("other channels", "weights[1] has 5 input channels but x has 6", t(3, 5, 3, 3)),
    ("no inputs", "weights[1] has 0 input channels but x has 6", t(3, 0, 3, 3)),
    ("weight in float64",
     "weights[1] must have x's dtype float32, got float64", t(3, 6, 3, 3, dtype=F64)),
    ("weight of integers",
     "weights[1] must have x's dtype float32, got int32", t(3, 6, 3, 3, dtype=torch.int32)),
    ("weight elsewhere", f"weights[1] {ELSEWHERE}", t(3, 6, 3, 3, device="other")),
]  # fmt: skip

_SEPARABLE = [
    ("no branches",
     f"pointwise_weights {AT_LEAST}", {"depthwise": [], "pointwise": [], "rates": []}),
    ("fewer depthwise",
     "depthwise_weights must have one entry per branch, got 1 for 2 branches", {"depthwise": [D0]}),
    ("pointwise 3x3",
     "pointwise_weights[0] must be [O, C, 1, 1], got shape [4, 6, 3, 3]",
     {"pointwise": [t(4, 6, 3, 3), P1]}),
    ("pointwise 2x2",
     "pointwise_weights[0] must have odd kernel sizes, got 2x2",
     {"pointwise": [t(4, 6, 2, 2), P1]}),
    ("pointwise of rank 2",
     "pointwise_weights[1] must be [O, C, kh, kw], got shape [3, 6]", {"pointwise": [P0, t(3, 6)]}),
    ("pointwise channels",
     "pointwise_weights[1] has 4 input channels but x has 6", {"pointwise": [P0, t(3, 4, 1, 1)]}),
    ("pointwise in bfloat16",
     "pointwise_weights[1] must have x's dtype float32, got bfloat16",
     {"pointwise": [P0, t(3, 6, 1, 1, dtype=BF16)]}),
    ("no outputs",
     "pointwise_weights[1] needs at least one output channel, got shape [0, 6, 1, 1]",
     {"pointwise": [P0, t(0, 6, 1, 1)]}),
    ("even depthwise",
     "depthwise_weights[0] must have odd kernel sizes, got 3x4",
     {"depthwise": [t(6, 1, 3, 4), NONE]}),
    ("depthwise channels",
     "depthwise_weights[0] must be [6, 1, kh, kw], got shape [5, 1, 3, 3]",
     {"depthwise": [t(5, 1, 3, 3), NONE]}),
    ("depthwise not depthwise",
     "depthwise_weights[0] must be [6, 1, kh, kw], got shape [6, 6, 3, 3]",
     {"depthwise": [t(6, 6, 3, 3), NONE]}),
    ("depthwise in float64",
     "depthwise_weights[0] must have x's dtype float32, got float64",
     {"depthwise": [t(6, 1, 3, 3, dtype=F64), NONE]}),
    ("depthwise elsewhere",
     f"depthwise_weights[0] {ELSEWHERE}",
     {"depthwise": [t(6, 1, 3, 3, device="other"), NONE]}),
    ("depthwise of rank 3",
     "depthwise_weights[0] must be [O, C, kh, kw], got shape [6, 3, 3]",
     {"depthwise": [t(6, 3, 3), NONE]}),
]  # fmt: skip

_BETWEEN = [
    ("between too short",
     "between[0] must have one value per channel (6), got shape [5]", [t(5), t(0)], [t(6), t(0)]),
    ("between of rank 2",
     "between[0] must have one value per channel (6), got shape [6, 1]",
     [t(6), t(0)], [t(6, 1), t(0)]),
    ("between in float64",
     "between[0] must have x's dtype float32, got float64", [t(6, dtype=F64), t(0)], [t(6), t(0)]),
    ("between elsewhere",
     f"between[0] {ELSEWHERE}", [t(6), t(0)], [t(6, device="other"), t(0)]),
    ("between without depthwise",
     "between[1] must be None where the branch has no depthwise weight, got tensors",
     [t(6), t(6)], [t(6), t(6)]),
    ("fewer between",
     "between must have one entry per branch, got 1 for 2 branches", [t(6)], [t(6)]),
]  # fmt: skip

_HEAD = [
    ("other channels",
     "weights[0] has 5 input channels but x has 6", {"weights": [t(4, 5, 3, 3), t(3, 6, 1, 1)]}),
    ("fewer depthwise",
     "depthwise_weights must have one entry per branch, got 1 for 2 branches",
     {"depthwise": [NONE]}),
    ("shift per sample", f"shift {PER_OUTPUT}, got shape [2, 7]", {"shift": t(2, 7)}),
    ("pool_weight alone",
     "pool_weight and pool_shift must be given together", {"pool_shift": None}),
    ("pool_shift alone",
     "pool_weight and pool_shift must be given together", {"pool_weight": None}),
    ("pool channels", "pool_weight must be [Q, 6], got shape [2, 5]", {"pool_weight": t(2, 5)}),
    ("pool of rank 4",
     "pool_weight must be [Q, 6], got shape [2, 6, 1, 1]", {"pool_weight": t(2, 6, 1, 1)}),
    ("pool in float16",
     "pool_weight must have x's dtype float32, got float16", {"pool_weight": t(2, 6, dtype=F16)}),
    ("pool_shift too long",
     "pool_shift must have one value per output channel (2), got shape [3]", {"pool_shift": t(3)}),
    ("project columns",
     "project_weight must be [P, 9], got shape [5, 8]", {"project_weight": t(5, 8)}),
    ("project of rank 4",
     "project_weight must be [P, 9], got shape [5, 9, 1, 1]", {"project_weight": t(5, 9, 1, 1)}),
    ("project to nothing",
     "project_weight must be [P, 9], got shape [0, 9]",
     {"project_weight": t(0, 9), "project_shift": t(0)}),
    ("project elsewhere",
     f"project_weight {ELSEWHERE}", {"project_weight": t(5, 9, device="other")}),
    ("project_weight alone",
     "project_weight and project_shift must be given together", {"project_shift": None}),
    ("project_shift alone",
     "project_weight and project_shift must be given together", {"project_weight": None}),
    ("pool without a projection",
     "pool_weight and pool_shift must be None where project_weight is, got tensors",
     {"project_weight": None, "project_shift": None}),
    ("project_shift too short",
     "project_shift must have one value per output channel (5), got shape [4]",
     {"project_shift": t(4)}),
    ("project_shift for another batch",
     "project_shift must have one value per output channel (5), got shape [3, 5]",
     {"project_shift": t(3, 5)}),
    ("project_shift of rank 3",
     "project_shift must have one value per output channel (5), got shape [1, 2, 5]",
     {"project_shift": t(1, 2, 5)}),
    ("project_shift in float64",
     "project_shift must have x's dtype float32, got float64",
     {"project_shift": t(2, 5, dtype=F64)}),
    ("project_shift elsewhere",
     f"project_shift {ELSEWHERE}", {"project_shift": t(2, 5, device="other")}),
    ("fewer prepared",
     "prepared must be None or have one entry per branch, got 1 for 2 branches",
     {"prepared": [t(0)]}),
    ("nothing prepared",
     "prepared must be None or have one entry per branch, got 0 for 2 branches",
     {"prepared": []}),
]  # fmt: skip

_GRADIENTS = [
    Bad(GRAD_X, "grad of other channels", f"{GRAD} [2, 8, 5, 7]", {"grad": t(2, 8, 5, 7)}, DENSE),
    Bad(GRAD_X, "grad of rank 3",
        "grad must be [N, C, H, W], got shape [7, 5, 7]", {"grad": t(7, 5, 7)}),
    Bad(GRAD_X, "no branches", f"weights {AT_LEAST}", {"weights": [], "rates": []}, DENSE),
    Bad(GRAD_X, "rate 0", "atrous_rates[0] must be >= 1, got 0", {"rates": [0, 1, 2, 3]}, DENSE),
    Bad(GRAD_X, "rate 2**31",
        f"atrous_rates[0] must be <= 2147483647, got {HUGE}", {"rates": [HUGE, 1, 2, 3]}, DENSE),
    Bad(GRAD_X, "even kernel",
        "weights[1] must have odd kernel sizes, got 2x2", {"weights": [W0, t(3, 6, 2, 2)]}, DENSE),
    Bad(GRAD_W, "grad of another batch", f"{GRAD} [3, 7, 5, 7]", {"grad": t(3, 7, 5, 7)}, DENSE),
    Bad(GRAD_W, "grad of another height", f"{GRAD} [2, 7, 6, 7]", {"grad": t(2, 7, 6, 7)}, DENSE),
    Bad(GRAD_W, "grad in float64",
        "grad must have x's dtype float32, got float64", {"grad": t(2, 7, 5, 7, dtype=F64)}, DENSE),
    Bad(GRAD_W, "x of rank 3", f"{IMAGE}, got shape [6, 5, 7]", {"x": t(6, 5, 7)}),
    Bad(GRAD_W, "even kernel",
        "weights[1] must have odd kernel sizes, got 3x2", {"kernels": [1, 1, 3, 2]}, DENSE),
    Bad(GRAD_W, "no branches",
        f"weights {AT_LEAST}", {"kernels": [], "out_channels": [], "rates": []}, DENSE),
    Bad(SEP_BACK, "grad of another width", f"{GRAD} [2, 7, 5, 8]", {"grad": t(2, 7, 5, 8)}, SEP),
    Bad(SEP_BACK, "grad in bfloat16",
        "grad must have x's dtype float32, got bfloat16", {"grad": t(2, 7, 5, 7, dtype=BF16)}, SEP),
    Bad(SEP_BACK, "grad elsewhere",
        f"grad {ELSEWHERE}", {"grad": t(2, 7, 5, 7, device="other")}, SEP),
    Bad(SEP_BACK, "even depthwise",
        "depthwise_weights[0] must have odd kernel sizes, got 3x4",
        {"depthwise": [t(6, 1, 3, 4), NONE]}, SEP),
]  # fmt: skip

BAD = [
    *_every_forward(),
    Bad(DENSE, "no branches", f"weights {AT_LEAST}", {"weights": [], "rates": []}),
    *(Bad(DENSE, why, sentence, {"weights": [W0, w]}) for why, sentence, w in _DENSE_WEIGHTS),
    *(Bad(SEP, why, sentence, change) for why, sentence, change in _SEPARABLE),
    *(Bad(SEP, why, s, {"between_scale": a, "between_shift": b}) for why, s, a, b in _BETWEEN),
    *(Bad(HEAD, why, sentence, change) for why, sentence, change in _HEAD),
    *_GRADIENTS,
]  # fmt: skip

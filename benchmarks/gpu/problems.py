# SPDX-License-Identifier: BSD-3-Clause
"""What is timed on a GPU, and how fast it has to be."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.problems import Problem, Target

# name: input channels, height, width, rates, batch
SHAPES = {
    "large": (2048, 65, 65, (12, 24, 36), 8),
    "small": (2048, 33, 33, (6, 12, 18), 16),
    "single": (2048, 33, 33, (6, 12, 18), 1),
    "wide": (512, 64, 128, (6, 12, 18), 2),
}


def on_gpu(
    level: str,
    shape: str,
    mode: str = "inference",
    dtype: str = "bfloat16",
    head: str = "dense",
    device: str = "cuda",
) -> Problem:
    channels, height, width, rates, batch = SHAPES[shape]
    return Problem(
        *(level, head, channels, height, width, rates),
        batch=batch,
        dtype=dtype,
        mode=mode,
        device=device,
    )


def separable(level: str, shape: str, mode: str = "inference") -> Problem:
    return on_gpu(level, shape, mode, head="separable")


# In order of importance: where time runs out, the last ones are left out, by name. Batch 1 has no
# module in training: BatchNorm on the pooled branch needs two values. PyTorch's gradients of a
# depthwise convolution may take longest of all, hence their place.
PROBLEMS = (
    *(on_gpu("operator", shape, mode) for shape in SHAPES for mode in ("inference", "training")),
    *(separable("operator", shape) for shape in ("large", "single")),
    *(on_gpu("module", shape, "training") for shape in ("large", "small", "wide")),
    *(on_gpu("module", shape) for shape in ("large", "single")),
    *(on_gpu("operator", "large", dtype=dtype) for dtype in ("float16", "tf32", "float32")),
    *(separable("module", "large", mode) for mode in ("inference", "training")),
    separable("operator", "large", "training"),
)

# The CUDA kernels' (forward, forward + backward): how many times as fast as the best of PyTorch
SPEEDS = {"large": (1.0, 1.1), "small": (1.0, 1.1), "single": (2.0, 1.5), "wide": (1.0, 1.0)}

# The separable operator's, shape and mode: how many times as fast as the best of PyTorch and as
# eager NCHW
SEPARABLE_SPEEDS = {
    ("large", "inference"): (1.2, 2.5),
    ("single", "inference"): (2.5, 3.0),
    ("large", "training"): (1.2, 2.0),
}

CUDA, TRITON = "aspp_ext cuda", "aspp_ext triton"
TARGETS = (
    *(
        Target(on_gpu("operator", shape, mode), "pytorch", ratio, CUDA)
        for shape, ratios in SPEEDS.items()
        for mode, ratio in zip(("inference", "training"), ratios, strict=True)
    ),
    *(
        Target(on_gpu("module", shape, "training"), "pytorch", SPEEDS[shape][1], CUDA)
        for shape in ("large", "small", "wide")
    ),
    Target(on_gpu("operator", "large", "training"), "memory", 0.6, CUDA),
    Target(on_gpu("module", "large", "training"), "memory", 0.6, CUDA),
    *(
        Target(separable("operator", *where), against, ratio, CUDA)
        for where, ratios in SEPARABLE_SPEEDS.items()
        for against, ratio in zip(("pytorch", "eager NCHW"), ratios, strict=True)
    ),
    Target(separable("operator", "large"), "memory", 0.4, CUDA),
    Target(on_gpu("operator", "large"), "pytorch", 1.3, TRITON),
    Target(separable("operator", "large"), "pytorch", 1.3, TRITON),
    Target(separable("operator", "large"), "eager NCHW", 2.0, TRITON),
)


def for_a_dry_run(problem: Problem) -> Problem:
    """The same problem with few channels and a small map, on the CPU.

    Not smaller: of few numbers, how far two right results are apart is luck. There PyTorch's
    gradient of depthwise weights reads out of bounds in bfloat16 and channels_last.
    """
    depthwise_gradient = problem.separable and problem.mode == "training"
    return replace(
        problem,
        channels=problem.channels // 64,
        height=problem.height // 7,
        width=problem.width // 7,
        rates=tuple(rate // 6 for rate in problem.rates),
        out_channels=32,
        batch=1 if problem.batch == 1 else 8,
        dtype="float32" if depthwise_gradient else problem.dtype,
        device="cpu",
    )

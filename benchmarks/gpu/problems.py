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
    level: str, shape: str, mode: str = "inference", dtype: str = "bfloat16", device: str = "cuda"
) -> Problem:
    channels, height, width, rates, batch = SHAPES[shape]
    return Problem(
        *(level, "dense", channels, height, width, rates),
        batch=batch,
        dtype=dtype,
        mode=mode,
        device=device,
    )


# In order of importance: where time runs out, the last ones are left out, by name. Batch 1 has no
# module in training: BatchNorm on the pooled branch needs two values.
PROBLEMS = (
    *(on_gpu("operator", shape, mode) for shape in SHAPES for mode in ("inference", "training")),
    *(on_gpu("module", shape, "training") for shape in ("large", "small", "wide")),
    *(on_gpu("module", shape) for shape in ("large", "single")),
    *(on_gpu("operator", "large", dtype=dtype) for dtype in ("float16", "tf32", "float32")),
)

# (forward, forward + backward): how many times as fast as the best of PyTorch
SPEEDS = {"large": (1.0, 1.1), "small": (1.0, 1.1), "single": (2.0, 1.5), "wide": (1.0, 1.0)}

TARGETS = (
    *(
        Target(on_gpu("operator", shape, mode), "pytorch", ratio)
        for shape, ratios in SPEEDS.items()
        for mode, ratio in zip(("inference", "training"), ratios, strict=True)
    ),
    *(
        Target(on_gpu("module", shape, "training"), "pytorch", SPEEDS[shape][1])
        for shape in ("large", "small", "wide")
    ),
    Target(on_gpu("operator", "large", "training"), "memory", 0.6),
    Target(on_gpu("module", "large", "training"), "memory", 0.6),
)


def for_a_dry_run(problem: Problem) -> Problem:
    """The same problem with few channels and a small map, on the CPU.

    Not smaller: of few numbers, how far two right results are apart is luck.
    """
    return replace(
        problem,
        channels=problem.channels // 64,
        height=problem.height // 7,
        width=problem.width // 7,
        rates=tuple(rate // 6 for rate in problem.rates),
        out_channels=32,
        batch=1 if problem.batch == 1 else 8,
        device="cpu",
    )

# SPDX-License-Identifier: BSD-3-Clause
"""Faults to plant in the kernels' sources: each must be noticed by the kernel's own program.

``programs.py`` compiles a program with each of them, ``planted_faults.py`` runs it.
"""

from __future__ import annotations

from typing import NamedTuple

RACE = "WARNING: ThreadSanitizer: data race"
OUTSIDE = "heap-buffer-overflow"
WRONG = r"got \S+, expected"
"""What a program says of wrong bits."""
UNAWAITED = "committed but not waited for|got"
UNWRITTEN = "nothing has written byte"
"""What the kernel makes of it may be right."""


class Fault(NamedTuple):
    """What to replace in a file of csrc/cuda/kernels, by what, and how that is noticed."""

    file: str
    right: str
    wrong: str
    kernel: str
    """The only file that is compiled with the fault, in place of the right one."""
    arguments: tuple[int, ...]
    """Of the program, behind the seed."""
    variant: str = "plain"
    """The build that notices it."""
    says: str = WRONG
    quick: bool = False
    """Whether ``make test`` has it, not ``make prove`` alone."""


PYRAMID = {
    "dropped_barrier": Fault(
        "pyramid_sm80.cuh",
        "      ptx::sync_block();  // all have",
        "      // all have",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
        "thread",
        RACE,
    ),
    "missing_wait": Fault(
        "pyramid_sm80.cuh",
        "cp_async_wait<C::kStages - 2>",
        "cp_async_wait<C::kStages - 1>",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
        "plain",
        UNAWAITED,
        quick=True,
    ),
    "shifted_tap": Fault(
        "loaders.cuh",
        "shift_ = tap.dy * p_.width + tap.dx",
        "shift_ = tap.dy * p_.width + tap.dx + 1",
        "pyramid_bfloat16_sm80.cu",
        (60, 1, 0),
        quick=True,
    ),
    "tail_too_long": Fault(
        "epilogue.cuh",
        "const bool inside = row < unit.m_count;",
        "const bool inside = row <= unit.m_count;",
        "pyramid_bfloat16_sm80.cu",
        (60, 2, 0),
        "address",
        OUTSIDE,
    ),
    "tail_too_short": Fault(
        "epilogue.cuh",
        "const bool inside = row < unit.m_count;",
        "const bool inside = row + 1 < unit.m_count;",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
    ),
    "channels_too_long": Fault(
        "loaders.cuh",
        "const bool inside = channel < channels_;",
        "const bool inside = channel <= channels_;",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
    ),
    "padding_not_tested": Fault(
        "loaders.cuh",
        "if (region.padded != 0) {",
        "if (region.padded > 1) {",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
    ),
    "table_overwritten": Fault(
        "loaders.cuh",
        "    written_ ^= 1;",
        "",
        "pyramid_bfloat16_sm80.cu",
        (60, 2, 0),
        "thread",
        RACE,
    ),
    "missing_fence": Fault(
        "slices.cuh",
        "      ptx::fence_device();\n    }",
        "    }",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
        "thread",
        RACE,
    ),
    "slices_out_of_bounds": Fault(
        "slices.cuh",
        "slice < unit.slices; ++slice",
        "slice <= unit.slices; ++slice",
        "pyramid_bfloat16_sm80.cu",
        (60, 1, 0),
        "address",
        OUTSIDE,
    ),
    "unwritten_means_read": Fault(
        "combine_sm80.cu",
        "if (count == 0) continue;",
        "",
        "combine_sm80.cu",
        (60, 0, 0),
        says=UNWRITTEN,
        quick=True,
    ),
    "wrong_swizzle": Fault(
        "warp_math.cuh",
        "LaneA(m + lane % 16, lane / 16)",
        "LaneA(m + lane % 16, 1 - lane / 16)",
        "pyramid_bfloat16_sm80.cu",
        (60, 0, 0),
    ),
}
SEPARABLE = {
    "dropped_barrier": Fault(
        "separable_sm80.cuh",
        "ptx::sync_block();  // all have A and B",
        "// all have A and B",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        "thread",
        RACE,
    ),
    "missing_wait": Fault(
        "separable_sm80.cuh",
        "ptx::cp_async_wait<0>();",
        "ptx::cp_async_wait<1>();",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        "plain",
        UNAWAITED,
    ),
    "tables_not_complete": Fault(
        "fused_loads.cuh",
        "ptx::sync_block();  // the tables are complete",
        "// the tables are complete",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        "thread",
        RACE,
    ),
    "one_stage_of_pixels": Fault(
        "fused_loads.cuh",
        "load_pixels(block + 2);",
        "load_pixels(block + 1);",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        quick=True,
    ),
    "halo_ends_too_early": Fault(
        "fused_loads.cuh",
        "centre - halo.columns < unit.m_begin + unit.m_count",
        "centre - halo.columns + 1 < unit.m_begin + unit.m_count",
        "separable_bfloat16_sm80.cu",
        (80, 0),
    ),
    "rows_in_plain_order": Fault(
        "phases.cuh",
        "(from - phase * rows) * rate_",
        "(from - phase * rows)",
        "separable_bfloat16_sm80.cu",
        (80, 0),
    ),
    "phase_not_tested": Fault(
        "fused_loads.cuh",
        "const bool here = uint32_t(y) < uint32_t(p_.height) &&",
        "const bool here = y < p_.height &&",
        "separable_bfloat16_sm80.cu",
        (80, 0),
    ),
    "dead_tap_taken": Fault(
        "fused_rows.cuh",
        "everywhere_ &= taps_[i];",
        "",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        quick=True,
    ),
    "tail_too_long": Fault(
        "epilogue.cuh",
        "const bool inside = row < unit.m_count;",
        "const bool inside = row <= unit.m_count;",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        "address",
        OUTSIDE + "|got",
    ),
    "affine_of_the_next_block": Fault(
        "fused_rows.cuh",
        "add_between(sums, memory_.affine(block & 1))",
        "add_between(sums, memory_.affine(~block & 1))",
        "separable_bfloat16_sm80.cu",
        (80, 0),
    ),
    "weights_too_long": Fault(
        "fused_loads.cuh",
        "inside && row < rows);",
        "inside && row <= rows);",
        "separable_bfloat16_sm80.cu",
        (80, 0),
        "address",
        OUTSIDE,
    ),
}
DEPTHWISE = {
    "places_read_too_soon": Fault(
        "depthwise_sm80.cu",
        "  ptx::sync_block();\n  DepthwiseSums",
        "  DepthwiseSums",
        "depthwise_sm80.cu",
        (60, 0, 0),
        "thread",
        RACE,
    ),
    "places_overwritten": Fault(
        "depthwise_grad_weight_sm80.cu",
        "    ptx::sync_block();\n    find_places",
        "    find_places",
        "depthwise_grad_weight_sm80.cu",
        (60, 2, 0),
        "thread",
        RACE,
    ),
    "sums_read_too_soon": Fault(
        "depthwise.cuh",
        "  ptx::sync_block();\n  for (int place",
        "  for (int place",
        "between_grad_sm80.cu",
        (60, 1, 0),
        "thread",
        RACE,
    ),
    "means_read_too_soon": Fault(
        "depthwise_sm80.cu",
        "      ptx::sync_block();\n    };",
        "    };",
        "depthwise_sm80.cu",
        (60, 0, 0),
        "thread",
        RACE,
    ),
    "tail_too_long": Fault(
        "depthwise.cuh",
        "places[thread] = number < pixels ?",
        "places[thread] = number <= pixels ?",
        "depthwise_sm80.cu",
        (60, 0, 0),
        "address",
        OUTSIDE,
    ),
    "column_not_tested": Fault(
        "depthwise.cuh",
        "(live_rows >> i & 1) != 0 && uint32_t(x[i]) + dx < uint32_t(shape.width)",
        "(live_rows >> i & 1) != 0 && uint32_t(x[i]) + dx <= uint32_t(shape.width)",
        "depthwise_grad_input_sm80.cu",
        (60, 3, 0),
        quick=True,
    ),
    "dead_taps_read": Fault(
        "depthwise.cuh",
        "columns(depthwise_reach(branch.kernel_w, branch.rate_w, shape.width))",
        "columns(branch.kernel_w / 2)",
        "depthwise_sm80.cu",
        (60, 0, 0),
        "address",
        "signed integer overflow|got",
    ),
    "channels_too_long": Fault(
        "depthwise.cuh",
        "inside(channel < shape.pitch)",
        "inside(channel <= shape.pitch)",
        "depthwise_sm80.cu",
        (60, 0, 0),
        "address",
        OUTSIDE,
    ),
    "not_mirrored": Fault(
        "depthwise.cuh",
        "const int32_t dy = (kMirrored ? -row : row)",
        "const int32_t dy = row",
        "depthwise_grad_input_sm80.cu",
        (60, 3, 0),
        quick=True,
    ),
    "last_tile_forgotten": Fault(
        "depthwise_grad_weight_sm80.cu",
        "tiles * (part + 1) / p.parts",
        "(tiles * (part + 1) - 1) / p.parts",
        "depthwise_grad_weight_sm80.cu",
        (60, 2, 0),
        quick=True,
    ),
    "part_too_many": Fault(
        "depthwise_parts_sm80.cu",
        "part < p.parts; part",
        "part <= p.parts; part",
        "depthwise_parts_sm80.cu",
        (60, 1, 0),
        "address",
        OUTSIDE,
    ),
}
FAULTS = {
    "pyramid_check": PYRAMID,
    "separable_check": SEPARABLE,
    "depthwise_check": DEPTHWISE,
}
"""By the program that notices them."""

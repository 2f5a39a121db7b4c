# SPDX-License-Identifier: BSD-3-Clause
"""Pyramids as packages and people write them, and what only looks like one: all that ``fuse`` makes
of them computes what the module itself does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from aspp_ext.fuse import FuseReport, fuse, fuse_report, unfuse
from tests.zoo.hand_written import HAND_WRITTEN
from tests.zoo.look_alikes import LOOK_ALIKES
from tests.zoo.packages import REAL
from tests.zoo.rebuilt import REBUILT

# Pyramids of the zoo that are left alone, and what is said of them; "" where nothing is.
LEFT = {
    "detectron2_pool_window": "example_inputs may help",
    "separable_multiplier": "can be taken together",
    "depthwise_only": "can be taken together",
    "grouped": "can be taken together",
    "padded_before": "",
    "bottlenecked": "",
    "receptive_field_block": "",
    "channels_last_caller": "",
    "with_coordinates": "example_inputs may help",
}

# Of which the convolutions alone are.
SIBLINGS = {"window_of_map_size", "norm_cumulative"}
SIBLINGS |= {"deeplab2_pool_window", "panoptic_deeplab_pool_window"}

# Look-alikes of which a part is a pyramid and is fused, or all is whatever else happens.
FUSED = {"fallback", "optional_argument", "cast_inside", "straight_through", "stubbed"}
FUSED |= {"input_relu_after_first", "by_flag", "view_changed_later"}

QUICK = {
    *("founding", "sum_in_place", "list_in_forward", "preallocated", "two_pyramids", "act_prelu"),
    *(
        "norm_group",
        "shared_prelu",
        "dropout_inside",
        "unequal_widths",
        "mixed_kernels",
        "residual",
    ),
    *("separable_norm_relu", "separable_bias", "one_norm_for_all", "returns_dict", "siamese"),
    *("bare_parameters", "lines_in_a_decoder", "mmseg", "mmseg_separable", "detectron2", "nvidia"),
    *("detectors", "kazuto1011_v2", "monai", "resunet", "indexnet", "keras_hub", "daformer"),
}


def twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Of one state, whose norms are not the identity, in float64."""
    torch.manual_seed(0)
    original = make()
    for module in original.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    original = original.double()
    return original, copy.deepcopy(original)


def step(module: nn.Module, inputs: list[Tensor], *, in_list: bool, gradients: bool) -> Any:
    """Results, gradients and buffers of one call, or the error's class."""
    torch.manual_seed(1)
    module.zero_grad()
    given = [x.clone().requires_grad_(gradients) for x in inputs]
    try:
        with torch.set_grad_enabled(gradients):
            results = tree_leaves(module(given) if in_list else module(*given))
            results = [r for r in results if isinstance(r, Tensor)]
            if gradients:
                sum(
                    torch.linspace(-1, 1, r.numel()).to(r) @ r.flatten() for r in results
                ).backward()
    except Exception as error:
        return type(error)
    found = {f"result {i}": r.detach() for i, r in enumerate(results)}
    found |= {f"gradient {i}": x.grad for i, x in enumerate(given) if x.grad is not None}
    found |= {f"{n}.grad": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in module.named_buffers()}


def agree(original: nn.Module, ours: nn.Module, shapes: Any, in_list: bool) -> None:
    """In training, in eval mode with gradients and without, of two images, then of one."""
    modes = ((True, True), (False, True), (False, False))
    for batch in (2, 1):
        inputs = [torch.randn(batch, *shape[1:], dtype=torch.float64) for shape in shapes]
        for training, gradients in modes:
            results = [
                step(m.train(training), inputs, in_list=in_list, gradients=gradients)
                for m in (original, ours)
            ]
            if isinstance(results[0], type):
                assert results[0] is results[1]
                ours.load_state_dict(original.state_dict())  # who refuses late has begun
                continue
            assert results[0].keys() == results[1].keys()
            # What a norm cancels is rounding, beside the largest of all.
            largest = max(v.abs().max().item() for v in results[0].values() if v.numel())
            for name, value in results[0].items():
                tolerance = {"rtol": 1e-8, "atol": 1e-10 + 1e-12 * largest}
                torch.testing.assert_close(
                    results[1][name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
                )


def fused(module: nn.Module, inputs: Any, in_list: bool, of_one_size: bool) -> FuseReport:
    given = [torch.empty(shape, device="meta") for shape in inputs]
    needed = in_list or len(given) > 1 or of_one_size
    arguments = ((given,) if in_list else tuple(given)) if needed else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fuse(module, strict=False, example_inputs=arguments) is module
        return fuse_report(module, example_inputs=arguments)


def check(
    make: Callable[[], nn.Module], shapes: Any, in_list: bool, of_one_size: bool = False
) -> FuseReport:
    original, ours = twins(make)
    parameters = dict(ours.named_parameters())
    report = fused(ours, shapes, in_list, of_one_size)
    assert list(ours.state_dict()) == list(original.state_dict())
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    agree(original, ours, shapes, in_list)
    unfuse(ours)
    for one, other in zip(ours.modules(), original.modules(), strict=True):
        assert type(one) is type(other)
        assert vars(one).keys() == vars(other).keys()
    return report


@pytest.mark.quick(when=lambda name: name in QUICK)
@pytest.mark.parametrize("name", [*REBUILT, *HAND_WRITTEN])
def test_pyramids(name: str) -> None:
    case = (REBUILT | HAND_WRITTEN)[name]
    report = check(case.make, case.shapes, case.list_input)
    if not case.pyramid:
        assert not any(entry.fused for entry in report)
    elif name not in LEFT:
        assert any(entry.fused for entry in report), report
        assert all(entry.reason is None for entry in report), report
        assert (name in SIBLINGS) is any(entry.recognised == "siblings" for entry in report)
    else:
        assert not any(entry.fused for entry in report), report
        said = [entry.reason for entry in report]
        assert any(LEFT[name] in reason for reason in said) if LEFT[name] else not said


@pytest.mark.quick(when=lambda name: sorted(LOOK_ALIKES).index(name) % 3 == 0)
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes(name: str) -> None:
    case = LOOK_ALIKES[name]
    report = check(case.make, case.shapes, case.list_input)
    assert any(entry.fused for entry in report) is (name in FUSED), report


NOT_OF_MAPS = ("3-D", "Daf3dASPP", "pytorch-3d")
FIXED_SIZE = "pytorchcv AtrousSpatialPyramidPooling, fixed size"
NOT_ATROUS = "transformers MobileNetV2DeepLabV3Plus"


@pytest.mark.parametrize("name", REAL)
def test_real_classes(name: str) -> None:
    """Those of packages that are there: requirements-zoo.txt names them."""
    real = REAL[name]
    try:
        real.make()
    except ImportError as absent:
        pytest.skip(f"{real.package} is not here: {absent}")
    report = check(real.make, real.shapes, real.list_input, name == FIXED_SIZE)
    if any(part in name for part in NOT_OF_MAPS):
        assert [e.reason for e in report] == ["its convolutions are not of maps but of volumes"]
    elif name == NOT_ATROUS or not real.pyramid:
        assert report == []
    else:
        assert [(e.fused, e.reason) for e in report] == [(True, None)]
        assert (name == FIXED_SIZE) is (report[0].recognised == "siblings")

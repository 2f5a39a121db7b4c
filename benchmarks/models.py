# SPDX-License-Identifier: BSD-3-Clause
"""Whole third-party models with random weights, and the photograph they look at."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEEDS = {
    "torchvision deeplabv3_resnet50": ("torchvision", "skimage"),
    "smp DeepLabV3Plus resnet50": ("segmentation_models_pytorch", "skimage"),
}


class Logits(nn.Module):
    """A segmentation model as one function image -> logits; torchvision's returns a dictionary."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model = model
        self.head_name = head

    def forward(self, x: Tensor) -> Tensor:
        result = self.model(x)
        return result["out"] if isinstance(result, dict) else result

    @property
    def head(self) -> nn.Module:
        """The ASPP module inside the model, fused or not."""
        return self.model.get_submodule(self.head_name)

    def to_ours(self) -> nn.Module:
        """A copy of the model with its ASPP replaced by aspp_ext's."""
        import aspp_ext

        twin = copy.deepcopy(self)
        twin.model = aspp_ext.fuse(twin.model)
        return twin


def why_not(name: str) -> str | None:
    """Why the model cannot be built here, or None."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    return None


def photograph(size: int) -> Tensor:
    """scikit-image's astronaut (it is in the wheel), ImageNet normalisation, [1, 3, size, size]."""
    from skimage import data

    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    image = ((image - mean) / deviation).unsqueeze(0)
    return F.interpolate(image, size=(size, size), mode="bilinear", align_corners=False)


def build(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """The model in eval mode and the photograph as its input.

    Random weights with untouched BatchNorm statistics make activations explode through fifty
    layers; one pass over the photograph and its mirror image sets them to what the data has.
    """
    from aspp_ext import compat

    torchvision = compat.import_torchvision()
    if name.startswith("torchvision"):
        model = torchvision.models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=21
        )
        wrapped = Logits(model, "classifier.0")
    else:
        import segmentation_models_pytorch as smp

        model = smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=21)
        wrapped = Logits(model, "decoder.aspp.0")
    small = photograph(192)
    norms = [m for m in wrapped.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        wrapped.train()(torch.cat([small, small.flip(-1)]))
    for norm in norms:
        norm.momentum = 0.1
    return wrapped.eval(), photograph(size)


def head_share(model: Logits, x: Tensor, repeats: int = 5) -> float:
    """Share of an inference that is spent inside the model's ASPP head (medians of both times)."""
    marks: dict[str, float] = {}
    handles = [
        model.head.register_forward_pre_hook(lambda *_: marks.update(start=time.perf_counter())),
        model.head.register_forward_hook(lambda *_: marks.update(stop=time.perf_counter())),
    ]
    inside, total = [], []
    try:
        with torch.no_grad():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                model(x)
                total.append(time.perf_counter() - start)
                inside.append(marks["stop"] - marks["start"])
    finally:
        for handle in handles:
            handle.remove()
    return statistics.median(inside[1:]) / statistics.median(total[1:])  # the first warms up


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of pixels on which two logit maps [N, K, H, W] choose the same class."""
    return (a.argmax(1) == b.argmax(1)).float().mean().item()

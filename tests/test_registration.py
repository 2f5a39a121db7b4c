# SPDX-License-Identifier: BSD-3-Clause
"""What PyTorch's dispatcher knows of our operators, and what importing the package may not do."""

from __future__ import annotations

import pytest
import torch
from processes import said_by_python

import aspp_ext
from aspp_ext import _native

# A released schema may grow at its end, with defaults; it may not change otherwise.
SCHEMAS = {
    "atrous_pyramid": "(Tensor x, Tensor[] weights, int[] rates, Tensor? scale=None, "
    "Tensor? shift=None, bool relu=False, bool tf32=False, int polyphase=1) -> Tensor",
    "atrous_pyramid_statistics": "(Tensor x, Tensor[] weights, int[] rates, bool tf32=False) "
    "-> (Tensor, Tensor, Tensor)",
    "atrous_pyramid_grad_input": "(Tensor grad, Tensor[] weights, int[] rates, "
    "bool tf32=False, int polyphase=1) -> Tensor",
    "atrous_pyramid_grad_weight": "(Tensor grad, Tensor x, int[] kernels, int[] out_channels, "
    "int[] rates, bool tf32=False, int polyphase=1) -> Tensor[]",
    "polyphase_times": "(Tensor x, Tensor[] weights, int[] rates, int polyphase=1) -> Tensor",
    "polyphase_weights": "(Tensor[] weights, int[] rates, int height, int width, "
    "int polyphase=1) -> Tensor[]",
    "atrous_separable_pyramid": "(Tensor x, Tensor[] depthwise, Tensor[] pointwise, int[] rates, "
    "Tensor[] between_scale, Tensor[] between_shift, bool between_relu=False, "
    "Tensor? scale=None, Tensor? shift=None, bool relu=False, bool tf32=False) -> Tensor",
    "atrous_separable_pyramid_backward": "(Tensor grad, Tensor x, Tensor[] depthwise, "
    "Tensor[] pointwise, int[] rates, Tensor[] between_scale, Tensor[] between_shift, "
    "bool between_relu, bool need_x, bool need_depthwise, bool need_pointwise, "
    "bool need_between, bool tf32=False) -> (Tensor, Tensor[], Tensor[], Tensor[], Tensor[])",
    "atrous_depthwise_statistics": "(Tensor x, Tensor[] depthwise, int[] rates, "
    "bool store=False) -> (Tensor, Tensor, Tensor[])",
    "atrous_separable_norm": "(Tensor x, Tensor[] depthwise, Tensor[] pointwise, int[] rates, "
    "Tensor scale, Tensor shift, bool relu, Tensor[] stored, bool tf32=False) -> Tensor",
    "atrous_separable_norm_sums": "(Tensor grad, Tensor x, Tensor[] depthwise, "
    "Tensor[] pointwise, int[] rates, Tensor scale, Tensor shift, bool relu, bool tf32=False) "
    "-> (Tensor, Tensor)",
    "atrous_separable_norm_backward": "(Tensor grad, Tensor x, Tensor[] depthwise, "
    "Tensor[] pointwise, int[] rates, Tensor scale, Tensor shift, bool relu, Tensor a, Tensor b, "
    "bool need_x, bool need_depthwise, bool need_pointwise, bool tf32=False) "
    "-> (Tensor, Tensor[], Tensor[])",
    "aspp_inference": "(Tensor x, Tensor[] depthwise, Tensor[] weights, int[] rates, Tensor shift, "
    "Tensor? pool_weight, Tensor? pool_shift, Tensor? project_weight, Tensor? project_shift, "
    "int polyphase=1, Tensor[]? prepared=None, bool? channels_last=None, bool relu=True, "
    "bool project_relu=True) -> Tensor",
    "checksums": "(Tensor[] tensors) -> Tensor",
    "channel_statistics": "(Tensor y) -> (Tensor, Tensor)",
    "channel_sums": "(Tensor grad, Tensor y, Tensor mean) -> (Tensor, Tensor)",
    "channel_gradient": "(Tensor grad, Tensor y, Tensor mean, Tensor invstd, Tensor scale, "
    "Tensor total, Tensor product) -> Tensor",
    "cpu_isa": "() -> str",
    "use_cpu_isa": "(str isa) -> str",
    "separable_way": "(str way) -> str",
}
TRITON = "_triton"
STEPS_OF_A_NORM = [n for n in SCHEMAS if "_norm" in n or "depthwise_statistics" in n]
FOR_BENCHMARKS = ["polyphase_times"]  # called on plain tensors alone
WITHOUT_SIBLING = ["aspp_inference", "polyphase_weights", "checksums", "separable_way"]
WITHOUT_SIBLING += ["cpu_isa", "use_cpu_isa", *FOR_BENCHMARKS, *STEPS_OF_A_NORM]
WITHOUT_SIBLING += ["channel_statistics", "channel_sums", "channel_gradient"]
SIBLINGS = {f"{name}{TRITON}": SCHEMAS[name] for name in SCHEMAS if name not in WITHOUT_SIBLING}
SCHEMAS |= SIBLINGS
TENSOR_OPS = [name for name in SCHEMAS if "Tensor x" in SCHEMAS[name] or "grad" in name]
TENSOR_OPS = [name for name in TENSOR_OPS if name not in (*FOR_BENCHMARKS, "channel_gradient")]
ON_CUDA_ALONE = ["atrous_pyramid_statistics", *STEPS_OF_A_NORM]
WITH_AUTOCAST = ["atrous_pyramid", "atrous_separable_pyramid", "atrous_pyramid_statistics"]
WITH_AUTOCAST = [*WITH_AUTOCAST, *(f"{name}{TRITON}" for name in WITH_AUTOCAST), "aspp_inference"]
each_op = pytest.mark.parametrize("name", TENSOR_OPS)


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aspp_ext::{name}", key)


def test_the_library_is_loaded() -> None:
    assert _native.cpu_missing is None


def test_these_are_all_the_operators() -> None:
    ours = {
        s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if "aspp_ext::" in s.name
    }
    assert ours == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_accepts_every_old_call(name) -> None:
    old = torch._C.parse_schema(f"aspp_ext::{name}{SCHEMAS[name]}")
    new = getattr(torch.ops.aspp_ext, name).default._schema
    assert new.is_backward_compatible_with(old), f"{new}"


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_sibling_is_the_native_operator_by_another_name(name) -> None:
    native, own = (getattr(torch.ops.aspp_ext, n).default for n in (name[: -len(TRITON)], name))
    assert str(own._schema) == str(native._schema).replace("(", f"{TRITON}(", 1)
    assert own.tags == native.tags


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_sibling_has_a_kernel_on_gpus(name) -> None:
    assert has_kernel(name, "CUDA")


@each_op
@pytest.mark.parametrize("key", ["CPU", "Meta", "Autograd", "FuncTorchBatched"])
def test_kernel(name, key) -> None:
    absent = key == "CPU" and name in ON_CUDA_ALONE and not _native.emulated
    assert has_kernel(name, key) is not absent


@pytest.mark.parametrize("name", WITH_AUTOCAST)
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_autocast_kernel(name, key) -> None:
    assert has_kernel(name, key)


@each_op
def test_nothing_is_written_or_aliased(name) -> None:
    schema = getattr(torch.ops.aspp_ext, name).default._schema
    assert not schema.is_mutable
    assert all(a.alias_info is None for a in (*schema.arguments, *schema.returns))


def test_a_missing_autograd_kernel_is_an_error() -> None:
    """Through ``filterwarnings``: PyTorch itself only warns, once the backward pass gets there."""
    library = torch.library.Library("aspp_ext_probe", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: torch.from_numpy(2 * x.detach().numpy()), "CPU")
    y = torch.ops.aspp_ext_probe.twice(torch.ones(3, requires_grad=True))
    with pytest.raises(UserWarning, match="an autograd kernel was not registered"):
        y.sum().backward()
    library._destroy()


def test_import_is_light() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import aspp_ext;"
        "heavy = ('triton', 'torchvision', 'segmentation_models_pytorch', 'transformers', 'timm',"
        "         'numpy.testing', 'matplotlib', 'torch._dynamo', 'torch._inductor', 'pybind11');"
        "print([m for m in heavy if m in sys.modules and m not in before],"
        "      torch.cuda.is_initialized())"
    )
    assert said_by_python(code) == "[] False"


def test_import_is_silent_and_leaves_torch_alone() -> None:
    code = (
        "import torch; s = (torch.get_default_dtype(), torch.get_num_threads(),"
        " torch.is_grad_enabled(), torch.initial_seed()); import aspp_ext;"
        "assert s == (torch.get_default_dtype(), torch.get_num_threads(),"
        " torch.is_grad_enabled(), torch.initial_seed())"
    )
    assert said_by_python(code) == ""


def test_without_the_library_the_reference_runs(tmp_path) -> None:
    code = (
        "import torch, aspp_ext; x, w = torch.randn(1, 3, 5, 6), [torch.randn(2, 3, 3, 3)];"
        "y = aspp_ext.atrous_pyramid(x, w, [2]);"
        "assert torch.equal(y, aspp_ext.reference.atrous_pyramid(x, w, [2]));\n"
        "try: aspp_ext.atrous_pyramid(x, w, [2], backend='cpu')\n"
        "except RuntimeError as error: print(error)"
    )
    printed = said_by_python(code, ASPP_EXT_LIBRARY_DIR=str(tmp_path))
    assert printed.startswith(
        "atrous_pyramid: backend 'cpu' cannot run this: libaspp_cpu.so was not"
    )


@pytest.mark.parametrize("name", aspp_ext.__all__)
def test_public_names_are_there(name) -> None:
    assert getattr(aspp_ext, name) is not None

# SPDX-License-Identifier: BSD-3-Clause
"""Who runs a call where Triton's kernels could: with pretended GPUs, and no kernel that runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from dataclasses import replace

import pytest
import torch
from pretending import (
    DATE,
    HERE,
    LAST,
    Calls,
    know,
    on_cuda,
    pretend,
    pretend_a_gpu,
    problem,
    reasons,
    verdicts,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import aspp_ext
from aspp_ext import _gpu, _native, _triton, dispatch
from aspp_ext.__main__ import describe_libraries, describe_versions
from aspp_ext.dispatch import Problem, select
from aspp_ext.evidence import rulings
from aspp_ext.ops.pyramid_statistics import atrous_pyramid_statistics

OPS = ["atrous_pyramid", "atrous_separable_pyramid", "aspp_inference"]
each_op = pytest.mark.parametrize("op", OPS)
ORDER = ["cuda", "triton", "cpu", "reference"]


def unknown(op: str = "atrous_pyramid", precision: str = "tf32") -> str:
    return (
        f"nothing says yet that the Triton kernels are right for {op} in {precision} inference on "
        "this device; `python -m aspp_ext verify` finds out; backend='triton' or "
        "ASPP_EXT_BACKEND=triton runs the Triton kernels anyway"
    )


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    pretend_a_gpu(monkeypatch, tmp_path)
    return monkeypatch


@pytest.fixture
def device(pretended):
    with FakeTensorMode():
        yield pretended


@pytest.fixture
def proven(device):
    know(verdicts("triton"))
    return device


@pytest.fixture
def interpreter(pretended):
    pretended.setattr(_triton, "interpreted", True)
    return pretended


@each_op
def test_the_order(op) -> None:
    assert [i.name for i in dispatch.IMPLEMENTATIONS[op]] == ORDER


@each_op
def test_unknown_kernels_are_passed_by_but_can_be_named(op, device) -> None:
    assert reasons(problem(op))["triton"] == unknown(op)
    assert select(problem(op)).name == "reference"
    assert select(problem(op), "triton").name == "triton"
    device.setenv("ASPP_EXT_BACKEND", "triton")
    assert select(problem(op)).name == "triton"


@each_op
def test_an_entry_makes_them_the_default(op, proven) -> None:
    assert select(problem(op)).name == "triton"
    assert select(problem(op), "reference").name == "reference"


@each_op
def test_proven_kernels_in_cuda_come_first(op, proven) -> None:
    know(verdicts("triton") | verdicts("cuda"))
    assert select(problem(op)).name == "cuda"


ON_THE_CPU = (
    "it runs on GPUs; x is on cpu, where only Triton's interpreter does (TRITON_INTERPRET=1)"
)
REFUSED = {
    "missing": ("Triton is not installed", {}),
    "cpu": (ON_THE_CPU, {}),
    "meta": (ON_THE_CPU.replace("cpu", "meta"), {}),
    "another device": ("it runs on GPUs but x is on xpu", {}),
    "dtype": ("dtypes are float32, bfloat16 and float16, got float64", {"dtype": torch.float64}),
    "branches": ("branches go up to 64, got 65", {"branches": 65}),
    "pixels": ("pixels of the batch go up to 2147482624, got 2147483648",
        {"shape": (2**11, 3, 2**10, 2**10)}),
    "no device": ("there is no CUDA device to ask for its compute capability", {}),
    "capability": ("it needs compute capability 8.0, the device has 7.5", {}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
@each_op
def test_what_they_cannot_run_is_refused_in_words(op, why, proven) -> None:
    sentence, changed = REFUSED[why]
    call = problem(op, **changed)
    if why == "missing":
        proven.setattr(_triton, "missing", sentence)
    if why == "no device":
        proven.setattr(_gpu, "has_device", lambda: False)
    if why == "capability":
        pretend(proven, 7, 5)
    if why in ("cpu", "meta", "another device"):
        there = "xpu" if why == "another device" else why
        x, w = (torch.empty(1, 2, *size, device=there) for size in ((5, 4), (3, 3)))
        call = Problem(op, x, (w,))
    assert reasons(call)["triton"] == sentence
    assert select(call).name == ("cpu" if why in ("cpu", "meta") else "reference")
    with pytest.raises(RuntimeError) as refusal:
        select(call, "triton")
    assert str(refusal.value) == f"{op}: backend 'triton' cannot run this: {sentence}"


def test_the_limits_are_inclusive(proven) -> None:
    assert reasons(problem(branches=64))["triton"] is None
    assert reasons(problem(shape=(1, 1, 1, 2**31 - 2**10)))["triton"] is None
    pretend(proven, 8, 0)
    assert reasons(problem())["triton"] is None


@each_op
def test_rocm_is_asked_for_its_architecture_alone(op, device) -> None:
    def asked(device):
        raise AssertionError("it has no compute capability to speak of")

    device.setattr(torch.version, "hip", "6.4")
    device.setattr(_gpu, "capability", asked)
    device.setattr(_gpu, "amd_architecture", lambda device: "gfx942:sramecc+:xnack-")
    device.setattr(_native, "cuda_missing", "this PyTorch was built without CUDA")
    here = replace(HERE, architecture="gfx942")
    device.setattr(rulings, "environment_of", lambda device: here)
    assert reasons(problem(op))["triton"] == unknown(op)
    know(verdicts("triton"), here)
    assert select(problem(op)).name == "triton"


@pytest.mark.parametrize("where", ["cpu", "meta"])
@each_op
def test_the_interpreter_is_used_when_it_is_named(op, where, interpreter) -> None:
    x, w = torch.empty(1, 2, 5, 4, device=where), torch.empty(1, 2, 3, 3, device=where)
    call = Problem(op, x, (w,))
    unasked = (
        "Triton's interpreter is for tests; backend='triton' or ASPP_EXT_BACKEND=triton runs it"
    )
    assert reasons(call)["triton"] == unasked
    assert select(call).name == "cpu"
    assert select(call, "triton").name == "triton"
    with pytest.raises(RuntimeError, match="got float64"):
        select(Problem(op, x.double(), (w.double(),)), "triton")


def test_interpreted_kernels_are_not_a_gpu_s_default(proven) -> None:
    """A verified kernel that is interpreted would be right, and thousands of times slower."""
    proven.setattr(_triton, "interpreted", True)
    assert "interpreter is for tests" in str(reasons(problem())["triton"])
    assert select(problem()).name == "reference"


def absent(name, *rest):
    raise ImportError("no such file")


VERSIONS = {
    "3.6.0": None,
    "3.10.1+gitabc": None,
    "4.0": None,
    "unknown": None,
    "3.5.1": "it needs Triton 3.6 or newer, got 3.5.1",
    "2.3.1": "it needs Triton 3.6 or newer, got 2.3.1",
    None: "Triton is not installed",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_which_triton_will_do(version, monkeypatch) -> None:
    monkeypatch.setattr(_triton, "version", version)
    assert _triton._missing() == VERSIONS[version]


def test_what_else_is_needed(monkeypatch) -> None:
    monkeypatch.setattr(importlib, "import_module", absent)
    assert _triton._missing() == "the planner was not built (no such file)"
    monkeypatch.setattr(_native, "cpu_missing", "libaspp_cpu.so was not built")
    assert _triton._missing() == "libaspp_cpu.so was not built"


def test_the_version_is_that_of_the_distribution_which_is_there(monkeypatch) -> None:
    def version(distribution):
        if distribution != "pytorch-triton-rocm":
            raise importlib.metadata.PackageNotFoundError(distribution)
        return "3.4.0"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert _triton._version() == "3.4.0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _triton._version() is None


def test_every_function_runs_triton_s_operators(proven) -> None:
    x, w, v = on_cuda(2, 8, 9, 9, **LAST), on_cuda(4, 8, 3, 3, **LAST), on_cuda(4)
    d, p = on_cuda(8, 1, 3, 3), on_cuda(4, 8, 1, 1, **LAST)
    projected = (None, None, on_cuda(5, 4), on_cuda(5))
    with Calls() as calls:
        aspp_ext.atrous_pyramid(x, [w], [2], shift=v, activation="relu")
        aspp_ext.atrous_separable_conv2d(x, d, p, 2)
        y, mean, squares = atrous_pyramid_statistics(x, [w], [2])
        aspp_ext.aspp_inference(x, [None], [w], [2], v, *projected)
        aspp_ext.aspp_inference(x, [d], [p], [2], v, *projected)
    dense, separable = "atrous_pyramid_triton", "atrous_separable_pyramid_triton"
    statistics = "atrous_pyramid_statistics_triton"
    assert calls.names == [dense, separable, statistics, dense, dense, separable, dense]
    assert (y.shape, mean.shape, squares.shape) == ((2, 4, 9, 9), (4,), (4,))


class Layer(torch.nn.Module):
    def __init__(self, separable: bool) -> None:
        super().__init__()
        self.depthwise = torch.nn.Parameter(on_cuda(8, 1, 3, 3)) if separable else None
        self.weight = torch.nn.Parameter(on_cuda(4, 8, *((1, 1) if separable else (3, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.depthwise is None:
            return aspp_ext.atrous_pyramid(x, [self.weight], [2], activation="relu")
        return aspp_ext.atrous_separable_conv2d(x, self.depthwise, self.weight, 2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("separable", [True, False])
def test_the_choice_is_traced(separable, strict, pretended, fresh_compiler) -> None:
    know(verdicts("triton"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = Layer(separable), on_cuda(2, 8, 9, 10)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    name = "separable_pyramid" if separable else "pyramid"
    assert [c for c in calls if "aspp_ext" in c] == [f"aspp_ext.atrous_{name}_triton.default"]


def test_the_refusal_of_float64_is_traced(interpreter, fresh_compiler) -> None:
    def call(x, w):
        return aspp_ext.atrous_pyramid(x, [w], [2])

    x, w = torch.randn(1, 3, 5, 6).double(), torch.randn(2, 3, 3, 3).double()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, w), call(x, w))


@pytest.fixture
def described(device):
    """The pretended device as the kernels' host code sees it."""
    from aspp_ext.triton import target

    h200 = target.Target(torch.device("cuda"), "sm_90", 132, 232448)
    device.setattr(target, "target_of", lambda _: h200)
    return device


def tile_of(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("  tile"))
    return line.split(maxsplit=1)[1]


def test_explain_names_the_tile(described) -> None:
    """The first of those that the launch would choose among, and what the plan makes of it."""
    described.setenv("ASPP_EXT_BACKEND", "triton")
    rates = [1, 12, 24, 36]

    def tile(n=8, side=65, out=256, dtype=torch.bfloat16, separable=False) -> str:
        x = on_cuda(n, 2048, side, side, dtype=dtype)
        w = [on_cuda(out, 2048, k, k, dtype=dtype) for k in (1, *[1 if separable else 3] * 3)]
        d = [None, *(on_cuda(2048, 1, 3, 3, dtype=dtype) for _ in range(3))]
        return tile_of(aspp_ext.explain(x, w, rates, depthwise_weights=d if separable else None))

    assert re.fullmatch(
        r"128x256x64, 8 warps, \d stages: \d+ units on 132 processors(, \d+ of them .*)?", tile()
    )
    assert tile(n=1, side=17).endswith("of them slices of a sum")
    assert "x64x32" in tile(out=40, dtype=torch.float32)
    assert "units on 132 processors" in tile(separable=True)
    described.setenv("ASPP_EXT_TRITON_TUNE", "read")
    assert tile().endswith("another tile")


def test_explain_names_no_tile_of_what_does_not_run(device) -> None:
    assert "  tile" not in aspp_ext.explain(on_cuda(1, 8, 9, 9), [on_cuda(8, 8, 3, 3)], [2])


def test_explain_says_which_kernels_and_why(described) -> None:
    device = described
    x, w = on_cuda(1, 8, 9, 9), on_cuda(8, 8, 3, 3)
    assert f"triton     not unasked: {unknown()}" in aspp_ext.explain(x, [w], [2])
    device.setenv("ASPP_EXT_BACKEND", "triton")
    text = aspp_ext.explain(x, [w], [2])
    assert f"runs this (sm_90, in TF32), asked for by name: {unknown()}" in text
    path = know(verdicts("triton"))
    d, p = on_cuda(8, 1, 3, 3), on_cuda(4, 8, 1, 1)
    text = aspp_ext.explain(x, [p], [2], depthwise_weights=[d])
    seen = f"right, 1.42x as fast as the best of PyTorch ({DATE}, {path})"
    assert f"triton     runs this (sm_90, in TF32), {seen}" in text
    device.setattr(_triton, "interpreted", True)
    text = aspp_ext.explain(torch.empty(1, 8, 9, 9), [torch.empty(8, 8, 3, 3)], [2])
    assert "triton     runs this (interpreted)" in text


def test_the_report_says_what_triton_does(pretended) -> None:
    pretended.setattr(_triton, "version", None)
    assert dict(describe_versions())["triton"] == "not installed"
    pretended.setattr(_triton, "version", "3.1.0")
    assert dict(describe_versions())["triton"] == "3.1.0"
    for state in ("compiles its kernels", "interprets its kernels", "it needs Triton 3.6 or newer"):
        pretended.setattr(_triton, "interpreted", state.startswith("interprets"))
        pretended.setattr(_triton, "missing", state if state.startswith("it needs") else None)
        assert dict(describe_libraries())["triton"] == state

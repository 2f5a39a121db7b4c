# SPDX-License-Identifier: BSD-3-Clause
"""Who runs a call on CUDA, seen without a GPU: fake tensors, a pretended device and entry."""

from __future__ import annotations

import json
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
from processes import said_by_python
from torch._subclasses.fake_tensor import FakeTensorMode

import aspp_ext
from aspp_ext import _gpu, _native
from aspp_ext.__main__ import describe_implementations, describe_verified
from aspp_ext.dispatch import Problem, select
from aspp_ext.evidence import rulings


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    pretend_a_gpu(monkeypatch, tmp_path)
    return monkeypatch


@pytest.fixture
def device(pretended):
    """The same with tensors on it."""
    with FakeTensorMode():
        yield pretended


@pytest.fixture
def proven(device):
    know(verdicts("cuda"))
    return device


OPS = ["atrous_pyramid", "atrous_separable_pyramid", "aspp_inference"]
ANYWAY = "backend='cuda' or ASPP_EXT_BACKEND=cuda runs the CUDA kernels anyway"


def unknown(op: str = "atrous_pyramid", precision: str = "tf32", mode: str = "inference") -> str:
    return (
        f"nothing says yet that the CUDA kernels are right for {op} in {precision} {mode} on this "
        f"device; `python -m aspp_ext verify` finds out; {ANYWAY}"
    )


@pytest.mark.parametrize("op", OPS)
def test_unknown_kernels_are_passed_by_but_can_be_named(op, device) -> None:
    assert reasons(problem(op))["cuda"] == unknown(op)
    assert select(problem(op)).name == "reference"
    assert select(problem(op), "cuda").name == "cuda"
    device.setenv("ASPP_EXT_BACKEND", "cuda")
    assert select(problem(op)).name == "cuda"


@pytest.mark.parametrize("op", OPS)
def test_an_entry_makes_them_the_default_where_it_was_made(op, proven) -> None:
    assert reasons(problem(op))["cuda"] is None
    assert select(problem(op)).name == "cuda"
    assert select(problem(op), "reference").name == "reference"
    proven.setattr(rulings, "environment_of", lambda device: replace(HERE, driver="590.1"))
    rulings.forget()
    assert reasons(problem(op))["cuda"] == unknown(op)


REFUSED = {
    "library": ("libaspp_cuda.so was not built", {}),
    "device": ("it runs on CUDA devices but x is on cpu", {}),
    "branches": ("branches go up to 64, got 65", {"branches": 65}),
    "pixels": ("pixels of the batch go up to 2147482624, got 2147483648",
        {"shape": (2**11, 3, 2**10, 2**10)}),
    "no device": ("there is no CUDA device to ask for its compute capability", {}),
    "capability": ("it needs compute capability 8.0, the device has 7.5", {}),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("op", OPS)
def test_what_they_cannot_run_is_refused_in_words(op, why, proven) -> None:
    sentence, changed = REFUSED[why]
    call = problem(op, **changed)
    if why == "library":
        proven.setattr(_native, "cuda_missing", sentence)
    if why == "no device":
        proven.setattr(_gpu, "has_device", lambda: False)
    if why == "capability":
        pretend(proven, 7, 5)
    if why == "device":
        call = Problem(op, torch.empty(1, 2, 3, 4), (torch.empty(1, 2, 3, 3),))
    assert reasons(call)["cuda"] == sentence
    assert select(call).name == ("cpu" if why == "device" else "reference")
    with pytest.raises(RuntimeError) as refusal:
        select(call, "cuda")
    assert str(refusal.value) == f"{op}: backend 'cuda' cannot run this: {sentence}"


def test_the_limits_are_inclusive(proven) -> None:
    assert reasons(problem(branches=64))["cuda"] is None
    assert reasons(problem(shape=(1, 1, 1, 2**31 - 2**10)))["cuda"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pyramid_runs_as_itself(dtype, proven) -> None:
    x, w, shift = (on_cuda(*s, dtype=dtype) for s in ((2, 8, 9, 9), (4, 8, 3, 3), (4,)))
    with Calls() as calls:
        y = aspp_ext.atrous_pyramid(x, [w], [2], shift=shift, activation="relu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 9, 9), dtype, "cuda")
    tf32 = [True] if dtype == torch.float32 else []  # PyTorch's default for convolutions
    ((name, arguments),) = calls
    assert name == "atrous_pyramid"
    assert arguments[3:] == (None, shift, True, *tf32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_separable_pyramid_runs_as_itself(dtype, proven) -> None:
    sizes = ((2, 8, 9, 9), (8, 1, 3, 3), (4, 8, 1, 1), (4,))
    x, d, p, shift = (on_cuda(*s, dtype=dtype) for s in sizes)
    with Calls() as calls:
        y = aspp_ext.atrous_separable_conv2d(x, d, p, 2, shift=shift, activation="relu")
    assert (y.shape, y.dtype, y.device.type) == ((2, 4, 9, 9), dtype, "cuda")
    tf32 = [True] if dtype == torch.float32 else []
    ((name, arguments),) = calls
    assert name == "atrous_separable_pyramid"
    assert arguments[6:] == (False, None, shift, True, *tf32)


def test_a_head_with_branches_of_either_kind_runs_as_pyramids(proven) -> None:
    x, d = on_cuda(2, 8, 9, 9, **LAST), on_cuda(8, 1, 3, 3)
    p, w = on_cuda(4, 8, 1, 1, **LAST), on_cuda(4, 8, 3, 3, **LAST)
    separable, dense = "atrous_separable_pyramid", "atrous_pyramid"
    for depthwise, weights, names in (
        ([None, d], [p, p], [separable, dense]),
        ([None, d], [w, p], [dense, separable, dense]),
    ):
        rest = (on_cuda(8), None, None, on_cuda(5, 8), on_cuda(5))
        with Calls() as calls:
            y = aspp_ext.aspp_inference(x, depthwise, weights, [1, 2], *rest)
        assert (y.shape, calls.names) == ((2, 5, 9, 9), names)


def test_the_head_runs_as_two_pyramids(proven) -> None:
    x, w = on_cuda(2, 8, 9, 9, **LAST), on_cuda(4, 8, 3, 3, **LAST)
    rest = (on_cuda(4), None, None, on_cuda(5, 4), on_cuda(5))
    with Calls() as calls:
        y = aspp_ext.aspp_inference(x, [None], [w], [2], *rest)
    assert y.shape == (2, 5, 9, 9)
    assert y.is_contiguous(**LAST)
    assert calls.names == ["atrous_pyramid"] * 2
    assert [w.shape for _, c in calls for w in c[1]] == [(4, 8, 3, 3), (5, 4, 1, 1)]
    assert all(t.is_contiguous(**LAST) for _, c in calls for t in (c[0], *c[1]))


class Layer(torch.nn.Module):
    def __init__(self, separable: bool) -> None:
        super().__init__()
        self.depthwise = torch.nn.Parameter(on_cuda(8, 1, 3, 3)) if separable else None
        self.weight = torch.nn.Parameter(on_cuda(4, 8, *((1, 1) if separable else (3, 3))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.depthwise is None:
            return aspp_ext.atrous_pyramid(x, [self.weight], [2], activation="relu")
        step = aspp_ext.atrous_separable_conv2d
        return step(x, self.depthwise, self.weight, 2, activation="relu")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("separable", [True, False])
def test_the_choice_is_traced(separable, strict, pretended, fresh_compiler) -> None:
    """For any size: the limits of the kernels do not become limits of the program."""
    know(verdicts("cuda"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = Layer(separable), on_cuda(2, 8, 9, 10)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    with torch.no_grad():
        program = torch.export.export(layer, (x,), dynamic_shapes=(dims,), strict=strict)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    name = "atrous_separable_pyramid" if separable else "atrous_pyramid"
    ours = [node for node in calls if "aspp_ext" in str(node.target)]
    assert [str(node.target) for node in ours] == [f"aspp_ext.{name}.default"]
    assert ours[0].args[-4:] == (None, None, True, True)


INFO = _native.read_build_info()
LOADED = [
    (None, "13.0", "this PyTorch was built without CUDA"),
    ("12.8", "13.0", "libaspp_cuda.so is for CUDA 13.0 but this PyTorch has CUDA 12.8"),
    ("13.2", None, "libaspp_cuda.so was not built (see `python -m aspp_ext`)"),
]


@pytest.mark.parametrize(("torchs", "ours", "sentence"), LOADED)
def test_why_the_library_is_missing(torchs, ours, sentence, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ASPP_EXT_LIBRARY_DIR", str(tmp_path))
    (tmp_path / "_build_info.json").write_text(json.dumps({**INFO, "cuda": ours}))
    monkeypatch.setattr(torch.version, "cuda", torchs)
    assert _native._load_cuda() == sentence


WRONG = {"cuda": 13, "sources": 5, "torch": 3, "isas": [3], "version": {}, "emulated": "x"}
BROKEN = ["", "{", "[]", "{}", "[" * 100_000, "\xff"]
BROKEN += [json.dumps({**INFO, name: value}) for name, value in WRONG.items()]
BROKEN += [
    json.dumps({k: v for k, v in INFO.items() if k != name}) for name in ("compiler", "isas")
]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_build_info(text, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ASPP_EXT_LIBRARY_DIR", f"{tmp_path} ")
    (tmp_path / "_build_info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RuntimeError, match="must be as it was built, got a broken file"):
        _native.read_build_info()


def test_compat_is_there_after_an_import_of_the_package() -> None:
    assert said_by_python("import aspp_ext; print(aspp_ext.compat.__name__)") == "aspp_ext.compat"


def test_explain_says_which_device_and_why(device) -> None:
    x, w = on_cuda(1, 8, 9, 9), on_cuda(8, 8, 3, 3)
    assert f"cuda       not unasked: {unknown()}" in aspp_ext.explain(x, [w], [2])
    device.setenv("ASPP_EXT_BACKEND", "cuda")
    text = aspp_ext.explain(x, [w], [2])
    assert f"runs this (sm_90, in TF32), asked for by name: {unknown()}" in text
    path = know(verdicts("cuda"))
    text = aspp_ext.explain(x, [w], [2])
    seen = f"right, 1.42x as fast as the best of PyTorch ({DATE}, {path})"
    assert f"runs this (sm_90, in TF32), {seen}" in text


def test_explain_says_how_a_separable_forward_is_computed(device) -> None:
    """Where CUDA could run it."""
    x, d, p = on_cuda(1, 8, 9, 9), on_cuda(8, 1, 3, 3), on_cuda(4, 8, 1, 1)

    def said(x, d, p) -> list[str]:
        text = aspp_ext.explain(x, [p], [2], depthwise_weights=None if d is None else [d])
        return [line for line in text.splitlines() if line.startswith("  cuda    ")][1:]

    (line,) = said(x, d, p)
    assert line.startswith("  cuda    fused, ")
    (line,) = said(*(t.double() for t in (x, d, p)))
    assert line.startswith("  cuda    through memory: float64 ")
    assert not said(x, None, p)
    device.setattr(_native, "cuda_missing", "libaspp_cuda.so was not built")
    assert not said(x, d, p)


def test_the_report_lists_it(device) -> None:
    rows = dict(describe_implementations("cuda"))
    assert rows["atrous_pyramid: cuda"] == unknown()
    assert rows["atrous_pyramid: reference"] == "can run"
    nothing = "nothing yet; `python -m aspp_ext verify --device cuda:0` finds out"
    assert dict(describe_verified("cuda:0")) == {"cuda:0": nothing}
    path = know(verdicts("cuda", operators=["aspp_inference"], precisions=["tf32"]))
    assert dict(describe_implementations("cuda"))["aspp_inference: cuda"] == "can run"
    rows = dict(describe_verified("cuda:0"))
    speeds = ", ".join(f"{size} 1.42x (faster)" for size in rulings.CLASSES)
    row = "cuda, aspp_inference, tf32, inference"
    assert rows[row] == f"right, {speeds}, on {DATE}, {path}"
    assert rulings.fingerprint("cuda:0") in rows["fingerprint"]
    device.setenv("ASPP_EXT_VERIFIED", "off")
    rulings.forget()
    assert "nothing runs unasked" in dict(describe_verified("cuda:0"))["ASPP_EXT_VERIFIED"]

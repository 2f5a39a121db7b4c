# SPDX-License-Identifier: BSD-3-Clause
"""What follows for a call from what is known: which implementation runs, and why not another."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretending import DATE, FASTER, HERE, LAST, know, on_cuda, pretend_a_gpu, verdicts
from torch._subclasses.fake_tensor import FakeTensorMode

import aspp_ext
from aspp_ext import _native, _triton
from aspp_ext.dispatch import Problem, select
from aspp_ext.evidence import environment, rulings, store
from aspp_ext.evidence.entry import Cell, Entry, Speed, Verdict
from aspp_ext.ops import precision, separable

RIGHT = Verdict("right", 1.0, "", FASTER)
CELL = Cell("cuda", "atrous_pyramid", "bfloat16", "inference")


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A pretended GPU, with tensors on it, of which nothing is known."""
    pretend_a_gpu(monkeypatch, tmp_path)
    with FakeTensorMode():
        yield monkeypatch


def call(op: str = "atrous_pyramid", shape=(1, 8, 9, 9), dtype=torch.bfloat16, grad=False):
    x = on_cuda(*shape, dtype=dtype, requires_grad=grad)
    return Problem(op, x, (on_cuda(256, shape[1], 1, 1, dtype=dtype),))


CELLS = list(
    itertools.product(
        ("atrous_pyramid", "atrous_separable_pyramid"),
        ("float32", "bfloat16", "float16", "tf32"),
        ("inference", "training"),
    )
)


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_an_entry_is_about_its_cell_alone(cell, device) -> None:
    """A call runs as it says, and every other call by PyTorch."""
    know({Cell("cuda", *cell): RIGHT})
    for op, kind, mode in CELLS:
        device.setattr(precision, "switches", SimpleNamespace(convolution=kind == "tf32"))
        dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
        chosen = select(call(op, dtype=dtype, grad=mode == "training")).name
        assert chosen == ("cuda" if (op, kind, mode) == cell else "reference")


def test_training_is_where_a_gradient_may_be_asked_for(device) -> None:
    know(verdicts("cuda", modes=["inference"]))
    assert select(call()).name == "cuda"
    assert select(call(grad=True)).name == "reference"
    with torch.no_grad():
        assert select(call(grad=True)).name == "cuda"
    problem = call()
    problem.weights[0].requires_grad_()
    assert select(problem).name == "reference"


def test_a_gradient_of_what_is_between_is_training_too(device) -> None:
    x, d, p = on_cuda(1, 8, 9, 9, **LAST), on_cuda(8, 1, 3, 3), on_cuda(4, 8, 1, 1, **LAST)
    scale, shift = on_cuda(8, requires_grad=True), on_cuda(8)
    between = {"between": [(scale, shift)], "between_activation": "relu"}

    def mode(**keywords: Any) -> str:
        with pytest.raises(InterruptedError) as asked:
            aspp_ext.atrous_separable_pyramid(x, [d], [p], [2], **keywords)
        return str(asked.value)

    def ask(problem: Problem, backend: str | None) -> Any:
        raise InterruptedError(problem.mode)

    device.setattr(separable, "select", ask)
    assert (mode(), mode(**between)) == ("inference", "training")
    with torch.no_grad():
        assert mode(**between) == "inference"


def test_the_head_is_for_inference(device) -> None:
    know(verdicts("cuda"))
    assert select(call("aspp_inference")).name == "cuda"
    assert select(call("aspp_inference", grad=True)).name == "reference"
    (cell, size) = call("aspp_inference", grad=True).cell("cuda"), "small"
    assert "the head is for inference" in str(rulings.against("cuda:0", cell, size))


SIZES = {
    "small": (1, 320, 33, 33),
    "medium": (4, 2048, 33, 33),
    "large": (8, 2048, 65, 65),
}


@pytest.mark.parametrize("size", SIZES)
def test_a_class_of_sizes_is_decided_for_itself(size, device) -> None:
    speeds = {name: Speed(0.98, "even") for name in SIZES} | {size: Speed(1.5, "faster")}
    path = know(verdicts("cuda", Verdict("right", 1.0, "", speeds)))
    for name, shape in SIZES.items():
        problem = call(shape=shape)
        assert problem.size_class == name
        assert select(problem).name == ("cuda" if name == size else "reference")
        text = aspp_ext.explain(problem.x, problem.weights, [1])
        if name == size:
            assert f"right, 1.50x as fast as the best of PyTorch ({DATE}, {path})" in text
        else:
            assert (
                f"cuda       not unasked: 0.98x as fast as the best of PyTorch for {name} problems "
                f"of atrous_pyramid in bfloat16 inference ({DATE}, {path})"
            ) in text


def test_the_classes_are_by_work() -> None:
    assert rulings.size_class(0) == rulings.size_class(2**30 - 1) == "small"
    assert rulings.size_class(2**30) == rulings.size_class(2**32 - 1) == "medium"
    assert rulings.size_class(2**32) == rulings.size_class(2**60) == "large"
    assert rulings.size_class(1, lambda condition: False) == ""


@pytest.mark.parametrize("result", ["wrong", "crashed", "hung", "unavailable"])
def test_what_was_not_right_does_not_run(result, device) -> None:
    path = know(verdicts("cuda", Verdict(result, None, "result 0: 3 of 9 differ", FASTER)))
    assert select(call()).name == "reference"
    text = aspp_ext.explain(call().x, call().weights, [1])
    what = f"{result} for atrous_pyramid in bfloat16 inference ({DATE}, {path})"
    assert f"cuda       not unasked: {what}: result 0: 3 of 9 differ" in text


def test_what_was_not_timed_does_not_run(device) -> None:
    know(verdicts("cuda", Verdict("right", 1.0, "", {"medium": Speed(1.5, "faster")})))
    assert select(call()).name == "reference"
    text = aspp_ext.explain(call().x, call().weights, [1])
    assert "right, but not timed for small problems of atrous_pyramid" in text


def test_off_leaves_out_what_is_not_proven_everywhere(device) -> None:
    know(verdicts("cuda"))
    device.setenv(store.VARIABLE, "off")
    rulings.forget()
    assert select(call()).name == "reference"
    text = aspp_ext.explain(call().x, call().weights, [1])
    assert "ASPP_EXT_VERIFIED=off leaves out what was not proven everywhere" in text
    device.setenv("ASPP_EXT_BACKEND", "cuda")
    assert select(call()).name == "cuda"


def test_a_process_reads_once(device) -> None:
    select(call())
    path = store.write(Entry(HERE, DATE, verdicts("cuda")))
    assert path is not None
    assert select(call()).name == "reference"
    rulings.forget()
    assert select(call()).name == "cuda"
    path.unlink()
    assert select(call()).name == "cuda"


def commit(found: dict[Cell, Verdict], here: environment.Environment) -> None:
    store.COMMITTED.mkdir(exist_ok=True)
    text = Entry(here, "2025-12-31", found).text()
    (store.COMMITTED / f"{here.name}.json").write_text(text)
    rulings.forget()


def test_a_committed_entry_counts_for_correctness_on_its_architecture(device) -> None:
    """Its times only on its device; what was seen here goes before it."""
    other = replace(HERE, device="NVIDIA H100", processors=114, driver="1", cudnn="1")
    commit(verdicts("cuda"), other)
    assert "right, but not timed" in str(rulings.against("cuda:0", CELL, "small"))
    path = know({CELL: Verdict("unavailable", None, "out of memory")})
    assert "out of memory" in str(rulings.against("cuda:0", CELL, "small"))
    path.unlink()
    commit(verdicts("cuda"), replace(HERE, driver="1"))
    know({CELL._replace(mode="training"): Verdict("wrong", None, "")})
    assert rulings.against("cuda:0", CELL, "small") is None
    assert "wrong" in str(rulings.against("cuda:0", CELL._replace(mode="training"), "small"))
    assert "2025-12-31" in rulings.in_favour("cuda:0", CELL, "small")


def test_of_two_committed_entries_the_one_that_found_a_fault_counts(device) -> None:
    for driver, result in (("1", "right"), ("2", "wrong"), ("3", "right")):
        commit(verdicts("cuda", Verdict(result, None, "", FASTER)), replace(HERE, driver=driver))
    assert "wrong" in str(rulings.against("cuda:0", CELL, "small"))


NOT_OURS = {
    "another architecture": {"architecture": "sm_100"},
    "other kernels": {"kernels": {**HERE.kernels, "cuda": "9" * 16, "triton": "9" * 16}},
    "no digest": {"kernels": {}},
}


@pytest.mark.parametrize("fields", NOT_OURS.values(), ids=NOT_OURS)
def test_a_committed_entry_about_something_else_says_nothing(fields, device) -> None:
    commit(verdicts("cuda") | verdicts("triton"), replace(HERE, **fields))
    assert rulings.known("cuda:0") == {}


def test_a_committed_entry_of_triton_is_about_its_compiler(device) -> None:
    commit(verdicts("cuda") | verdicts("triton"), replace(HERE, triton="3.8.0"))
    assert {cell.implementation for cell in rulings.known("cuda:0")} == {"cuda"}


NATIVE = [
    ("sm_90", ["9.0a"], True),
    ("sm_90", ["8.0+PTX"], False),
    ("sm_86", ["8.0+PTX"], True),
    ("sm_80", ["8.6"], False),
    ("sm_103", ["10.0f"], True),
    ("sm_121", ["12.0f+PTX"], True),
    ("sm_100", ["9.0a", "8.0"], False),
    ("sm_91", ["9.0a"], False),
    ("sm_90", [], False),
]


@pytest.mark.parametrize(("architecture", "built", "native"), NATIVE)
def test_which_code_a_device_runs(architecture, built, native) -> None:
    """What PTX is compiled to on the spot is proven by nothing else."""
    assert environment.runs_natively(architecture, built) is native


def test_committed_entries_can_be_read() -> None:
    paths = sorted((environment.PACKAGE / "verified").glob("*.json"))
    assert [path for path, _ in store.committed()] == paths


def test_processes_that_choose_alike_have_one_fingerprint(device) -> None:
    nothing = rulings.fingerprint("cuda:0")
    know(verdicts("cuda"))
    first = rulings.fingerprint("cuda:0")
    know(verdicts("cuda", Verdict("right", 1.1, "", {n: Speed(2.0, "faster") for n in FASTER})))
    assert rulings.fingerprint("cuda:0") == first
    know(verdicts("cuda", Verdict("right", 1.1, "", {n: Speed(1.0, "even") for n in FASTER})))
    assert len({nothing, first, rulings.fingerprint("cuda:0")}) == 3


def on_the_gpu() -> aspp_ext.ASPP:
    model = aspp_ext.ASPP(4, [2], 3)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(on_cuda(*parameter.shape)))
    return model


def warned(model: torch.nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        aspp_ext.fuse(model)
    return [str(w.message) for w in caught]


def test_fuse_tells_once_of_the_command(device) -> None:
    (sentence,) = warned(on_the_gpu())
    assert sentence == (
        "aspp_ext.fuse: nothing says yet that aspp_ext's kernels are right and fast on cuda:0, so "
        "PyTorch computes there; `python -m aspp_ext verify --device cuda:0` finds out"
    )
    assert warned(on_the_gpu()) == []


@pytest.mark.parametrize("why", ["known", "off", "no kernels", "on the cpu"])
def test_fuse_does_not_tell_of_it(why, device) -> None:
    model = on_the_gpu()
    if why == "known":
        know({CELL: Verdict("wrong", None, "")})
    if why == "off":
        device.setenv(store.VARIABLE, "off")
    if why == "no kernels":
        device.setattr(_native, "cuda_missing", "libaspp_cuda.so was not built")
        device.setattr(_triton, "missing", "Triton is not installed")
    if why == "on the cpu":
        model = aspp_ext.ASPP(4, [2], 3)
    assert warned(model) == []


# Of the CPU's kernels, which run but where something speaks against them


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    pretend_a_gpu(monkeypatch, tmp_path)
    return monkeypatch


def on_the_cpu(shape=(1, 8, 9, 9)) -> Problem:
    return Problem(
        "atrous_pyramid", torch.empty(1).expand(shape), (torch.ones(256, shape[1], 1, 1),)
    )


def test_the_cpu_s_kernels_run_unasked(cpu) -> None:
    assert select(on_the_cpu()).name == "cpu"
    know(verdicts("cpu", Verdict("right", 1.0, "", {"small": Speed(0.99, "even")})))
    assert select(on_the_cpu()).name == "cpu"
    cpu.setenv(store.VARIABLE, "off")
    rulings.forget()
    assert select(on_the_cpu()).name == "cpu"


def test_but_not_where_they_are_slower(cpu) -> None:
    speeds = {"small": Speed(0.7, "slower"), "medium": Speed(1.2, "faster")}
    path = know(verdicts("cpu", Verdict("right", 1.0, "", speeds)))
    chosen = [select(on_the_cpu(shape)).name for shape in SIZES.values()]
    assert chosen == ["reference", "cpu", "cpu"]
    problem = on_the_cpu()
    text = aspp_ext.explain(problem.x, problem.weights, [1])
    assert (
        "cpu        not unasked: 0.70x as fast as the best of PyTorch for small problems of "
        f"atrous_pyramid in float32 inference ({DATE}, {path})"
    ) in text


@pytest.mark.parametrize("result", ["wrong", "crashed", "hung"])
def test_nor_where_they_are_wrong(result, cpu) -> None:
    know(verdicts("cpu", Verdict(result, None, "here")))
    assert select(on_the_cpu()).name == "reference"


# Where sizes are symbolic


def pyramid(x, w):
    return aspp_ext.atrous_pyramid(x, [w], [2])


@pytest.mark.parametrize("says", ["slower", "even"])
def test_a_compiled_call_of_any_size_has_one_answer(says, cpu, fresh_compiler) -> None:
    """And is compiled once: no guard of ours depends on a size or on the store."""
    know(verdicts("cpu", Verdict("right", 1.0, "", {n: Speed(0.7, says) for n in SIZES})))
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(pyramid, fullgraph=True, dynamic=True, backend=backend)
    w = torch.randn(4, 5, 3, 3)
    for size in (7, 9, 12, 33):
        x = torch.randn(2, 5, size, size + 1)
        torch.testing.assert_close(compiled(x, w), pyramid(x, w))
    (graph,) = seen
    ours = [n for n in graph.graph.nodes if "aspp_ext" in str(n.target)]
    assert bool(ours) == (says == "even")


def test_what_is_slower_in_one_class_alone_runs_where_the_size_is_not_known(cpu) -> None:
    know(verdicts("cpu", Verdict("right", 1.0, "", {"small": Speed(0.7, "slower")})))
    assert rulings.against("cpu", CELL._replace(implementation="cpu"), "small") is not None
    assert rulings.against("cpu", CELL._replace(implementation="cpu"), "") is None


def test_a_compiled_call_of_one_size_is_looked_up_by_it(cpu, fresh_compiler) -> None:
    speeds = {"small": Speed(0.7, "slower"), "medium": Speed(1.2, "faster")}
    know(verdicts("cpu", Verdict("right", 1.0, "", speeds)))
    graphs = []
    compiled = torch.compile(
        pyramid,
        fullgraph=True,
        dynamic=False,
        backend=lambda graph, inputs: graphs.append(graph) or graph.forward,
    )
    compiled(torch.randn(2, 5, 7, 8), torch.randn(4, 5, 3, 3))
    compiled(torch.randn(1, 1024, 33, 33), torch.randn(1024, 1024, 1, 1))
    ours = ["aspp_ext" in "".join(str(n.target) for n in g.graph.nodes) for g in graphs]
    assert ours == [False, True]


def test_a_traced_call_of_any_size_is_one_program(cpu) -> None:
    """By a tracer whose sizes are symbols in Python, too."""
    know(verdicts("cpu", Verdict("right", 1.0, "", {"small": Speed(0.7, "slower")})))
    x = torch.randn(2, 5, 7, 8)
    dims = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}

    class Layer(torch.nn.Module):
        def forward(self, x, w):
            return pyramid(x, w)

    given = (x, torch.randn(4, 5, 3, 3))
    with torch.no_grad():
        program = torch.export.export(
            Layer(), given, dynamic_shapes=(dims, None), strict=False
        ).module()
    for size in (5, 40):
        x = torch.randn(1, 5, size, size + 3)
        torch.testing.assert_close(program(x, given[1]), pyramid(x, given[1]))

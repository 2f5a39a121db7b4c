# SPDX-License-Identifier: BSD-3-Clause
"""The package purged from ``sys.modules`` and imported again, as notebooks and test runners do."""

from __future__ import annotations

import pytest
from marks import on_all, proven_emulated, proven_interpreted
from processes import said_by_python

pytestmark = [on_all, proven_emulated, proven_interpreted]

COMMON = """
import copy, gc, importlib, sys, warnings
import torch
from torch import func

warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
import aspp_ext

torch.manual_seed(0)
x, v, w, d, p = (
    torch.randn(s) for s in ((2, 3, 5, 6), (2, 3, 1, 1), (2, 3, 3, 3), (3, 1, 3, 3), (2, 3, 1, 1))
)


def modules():
    return [name for name in sys.modules if name.partition(".")[0] == "aspp_ext"]


def again():
    for name in modules():
        del sys.modules[name]
    return importlib.import_module("aspp_ext")


def seen(package):
    '''Values, gradients of each kind and fakes, of what the package computes.'''
    dense = lambda x, v, w: package.atrous_pyramid(x, [v, w], [1, 2], activation="relu")
    separable = lambda x, d, p: package.atrous_separable_pyramid(x, [d], [p], [2])
    found = []
    for call, inputs in ((dense, (x, v, w)), (separable, (x, d, p))):
        inputs = [t.clone().requires_grad_() for t in inputs]
        y = call(*inputs)
        grads = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
        batched = torch.autograd.grad(y, inputs, torch.ones(2, *y.shape), is_grads_batched=True)
        found += [y, *grads, *batched, *func.grad(lambda *i: call(*i).sum(), (0, 1))(*inputs)]
        found.append(func.vmap(lambda x: call(x[None], *inputs[1:]))(inputs[0]))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(call(*inputs).float())
        assert call(*[t.to("meta") for t in inputs]).shape == y.shape
    found.append(compute(package.ASPP(3, [2, 3], 4)))
    package.explain(x, [w], [2])
    return [t.detach() for t in found]


def compute(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module = copy.deepcopy(module)
    module.train()(x).sum().backward()
    grads = [parameter.grad.flatten() for parameter in module.parameters()]
    return torch.cat([*grads, module.eval()(x).flatten()])


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


first = seen(aspp_ext)
"""

PROGRAMS = {
    "a module that had not been called": """
module = aspp_ext.ASPP(3, [2, 3], 4).eval()
importlib.import_module("aspp_ext.modules.untouched")._known.clear()
again()
with torch.no_grad():
    module(x)
assert module._aspp_ext_folded.in_range
""",
    "a model that the old one fused": """
model = torch.nn.Sequential(aspp_ext.ASPP(3, [2, 3], 4))
from aspp_ext.compat import import_torchvision
import_torchvision()
from torchvision.models.segmentation.deeplabv3 import ASPP
model.append(aspp_ext.fuse(ASPP(3, [2, 3], 4)))
kept, kind = (type(m) for m in model)
result = compute(model[1])
package = again()
(entry,) = package.fuse_report(model[1])
assert entry.fused and "imported before" in entry.reason, entry
assert type(package.unfuse(model)[1]) is ASPP
assert torch.allclose(compute(model[1]), result, atol=1e-4)
model[1].__class__ = kind
model[1].polyphase = False
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    package.fuse(model)
assert "0: its class is of an aspp_ext that was imported before" in str(told[0].message)
assert type(model[0]) is kept and model[1].polyphase is False
del model[1].polyphase
assert type(model[1]) is not kind and package.fuse_report(model[1])[0].reason is None
assert torch.equal(compute(package.freeze(model[1])), result)
""",
    "the old one is kept": """
model, before = aspp_ext.ASPP(3, [2, 3], 4), aspp_ext
result = compute(model)
leaf = w.clone().requires_grad_()
recorded = aspp_ext.atrous_pyramid(x, [leaf], [2]).sum()
for _ in range(2):
    aspp_ext = again()
    assert aspp_ext.ASPP is not before.ASPP
    assert_same(seen(aspp_ext), first)
    assert_same(seen(before), first)
    assert torch.equal(compute(model), result)
recorded.backward()
torch.testing.assert_close(
    leaf.grad, torch.func.grad(lambda w: aspp_ext.atrous_pyramid(x, [w], [2]).sum())(w)
)
""",
    "the old one is gone": """
for _ in range(2):
    del aspp_ext
    aspp_ext = again()
    gc.collect()
    assert_same(seen(aspp_ext), first)
""",
    "modules are reloaded one by one": """
names = modules()
for name in (*names, *reversed(names)):
    if not name.endswith("_plan"):  # a native module, which Python does not load again
        importlib.reload(sys.modules[name])
assert_same(seen(aspp_ext), first)
assert_same(seen(again()), first)
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_works_as_before(name) -> None:
    said_by_python(f"{COMMON}{PROGRAMS[name]}")

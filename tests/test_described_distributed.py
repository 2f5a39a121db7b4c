# SPDX-License-Identifier: BSD-3-Clause
"""Modules that were fused by their structure, and siblings, under DDP and FSDP2."""

from __future__ import annotations

import pytest
from processes import said_by_python

PROGRAM = """
import copy, sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = [".", "tests"]
import aspp_ext
from tests.zoo.hand_written import HAND_WRITTEN
from tests.zoo.rebuilt import REBUILT

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))


def sharded(model):
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model, x):
    torch.manual_seed(1)
    y = model.train()(x)
    y.square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.no_grad():
        found = {"trained": y.detach(), "eval": model.eval()(x)}
    for name, t in model.state_dict().items():
        found[name] = getattr(t, "_local_tensor", t).clone()
    return found


def agree(plain, fused, x):
    expected, got = step(plain, x), step(fused, x)
    assert list(got) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-8, atol=1e-10)


name, wrap = sys.argv[1], globals()[sys.argv[2]]
case = (REBUILT | HAND_WRITTEN)[name]
torch.manual_seed(0)
plain = nn.Sequential(case.make().double())
fused = aspp_ext.fuse(copy.deepcopy(plain))
x = torch.randn(case.shapes[0], dtype=torch.double)
plain, fused = wrap(plain), wrap(fused)
agree(plain, fused, x)
with torch.autograd.profiler.profile() as profile:
    agree(plain, fused, x)
assert any("aspp_ext" in event.key for event in profile.key_averages())  # in its forward, too
assert [e.fused for e in aspp_ext.fuse_report(fused)] == [True]
aspp_ext.unfuse(fused)
agree(plain, fused, x)
dist.destroy_process_group()
"""


@pytest.mark.quick(when=lambda name, wrap: (name, wrap) == ("founding", "sharded"))
@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "sharded"])
@pytest.mark.parametrize("name", ["founding", "mobilevit", "norm_group", "window_of_map_size"])
def test_wrapped(name: str, wrap: str) -> None:
    said_by_python(f"import sys; sys.argv = ['', {name!r}, {wrap!r}]" + PROGRAM)

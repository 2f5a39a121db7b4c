# SPDX-License-Identifier: BSD-3-Clause
"""The fuzzer's problems of modules: whatever is done to a head, it stays the plain one's twin.

Nothing but the plain module says what is right; in float64 it is the oracle, too.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import fuzz_oracles as oracles
import torch
from aspp_pairs import smp, torchvision
from fuzz_checks import MODES, memory_format_of
from fuzz_draws import FAR_FROM_OVERFLOW, NORMAL, RANGES, Draws, smaller
from torch import Tensor, nn

import aspp_ext

CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of what batch norms in training have had a part in, relative to the largest."""


@dataclass
class Twins:
    """``plain`` of torchvision or smp, and ``ours``."""

    plain: nn.Module
    ours: nn.Module
    channels: int
    sizes: list[Sequence[int]]
    frozen: bool = False
    done: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "; ".join(self.done)

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.plain, self.ours

    @property
    def dtype(self) -> torch.dtype:
        return next(self.plain.parameters()).dtype

    def written(self) -> None:
        """Who has promised not to write says when he did: by a conversion."""
        if self.frozen:
            self.ours.train(self.ours.training)


def fused(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # of a module with parts that it leaves alone
        warnings.simplefilter("ignore")
        return aspp_ext.fuse(module, strict=False)


def odd_norms(d: Draws, module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps, norm.momentum = d.choice([1e-5, 1e-5, 1e-3]), d.choice([0.1, 0.1, 0.5, None])
            norm.weight.data.normal_()
            norm.bias.data.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 2)
            if d.maybe(0.3):
                at = d.randrange(norm.num_features)
                norm.running_var[at] = d.choice([0, 1e-6, 1e4])
                norm.weight.data[at] = d.choice([0, -1, 1e-3])


def twins(d: Draws) -> Twins:
    large = d.maybe(0.02)
    separable = smp is not None and d.maybe(0.5)
    of_smp = separable or (smp is not None and d.maybe(0.3))
    rates = [d.rate() for _ in range(3 if of_smp else d.choice([1, 2, 3, 3, 4]))]
    size = {"c": d.channels(), "o": d.channels(70)}
    smaller(d, size, lambda: size["c"] * size["o"], 4096)
    sizes: list[Sequence[int]] = [[d.batch(), *d.plane()] for _ in range(3)]
    if large:
        size, sizes = {"c": d.choice([64, 96]), "o": d.randint(24, 48)}, [[1, 24, 26], [1, 17, 17]]
    for i, drawn in enumerate(sizes):
        bound = dict(enumerate(drawn))
        if not large:
            smaller(d, bound, lambda b=bound: math.prod((*b.values(), *size.values())), 2 * 10**6)
        sizes[i] = list(bound.values())
    if of_smp:
        plain = smp.ASPP(size["c"], size["o"], rates, separable, 0.5)
    else:
        plain = torchvision.ASPP(size["c"], rates, size["o"])
    for layer in plain.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = d.choice([0.0, 0.0, 0.3])
            dropout = layer.p
    odd_norms(d, plain)
    plain.to(d.choice([torch.float64, torch.float64, torch.float32, torch.float32, torch.bfloat16]))
    plain.train(d.maybe(0.2))
    if d.maybe(0.4):
        keywords = {"dropout": dropout, "polyphase": d.maybe(0.7)}
        ours: nn.Module = aspp_ext.ASPP(
            size["c"], rates, size["o"], separable=separable, **keywords
        )
        ours.to(next(plain.parameters()).dtype).train(plain.training)
        ours.load_state_dict(plain.state_dict())
        for a, b in zip(norms(plain), norms(ours), strict=True):
            b.eps, b.momentum = a.eps, a.momentum
    else:
        ours = fused(copy.deepcopy(plain))
    made = Twins(plain, ours, size["c"], sizes)
    made.done.append(f"{type(plain).__module__} {size} {rates=} {separable=} {made.dtype}")
    return made


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


# --- What is done to both

Action = Callable[[Draws, Twins], str | None]


def own_memory(t: Twins) -> None:
    """For parameters that were expanded, into which nothing can be written."""
    for module in t.both:
        for parameter in module.parameters():
            if 0 in parameter.stride():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    t.written()


def write(d: Draws, t: Twins) -> str:
    """To some of a parameter or a buffer, which no version counter counts."""
    name = d.choice([n for n, v in t.plain.state_dict(keep_vars=True).items() if v.dim()])
    value = t.plain.state_dict()[name]
    block = tuple(
        slice(first := d.randrange(size), d.randint(first + 1, size)) for size in value.shape
    )
    way = d.choice(["zero", "scale", "add", "flip"])
    for module in t.both:
        there = module.state_dict(keep_vars=True)[name].data
        if way == "flip":
            there.copy_(there.flip(0))
        elif way == "add" and not name.endswith("running_var"):
            there[block] += 0.25
        else:
            there[block] *= 0 if way == "zero" else 1.5
    t.written()
    return f"{way} {name}{block}"


def replace_data(d: Draws, t: Twins) -> None:
    """Other memory for a parameter: of other strides, too."""
    name = d.choice([n for n, v in t.plain.named_parameters() if v.dim() == 4])
    expanded = d.maybe(0.5)
    for module in t.both:
        parameter = module.get_parameter(name)
        w = parameter.data * 1.5
        turned = w.transpose(0, 1).contiguous().transpose(0, 1)
        parameter.data = w[:1].expand_as(w) if expanded else turned
    t.written()


def load(d: Draws, t: Twins) -> None:
    state = {
        n: v + 0.5 * torch.rand_like(v) if v.is_floating_point() else v
        for n, v in t.plain.state_dict().items()
    }
    assign = d.maybe(0.3)
    for module in t.both:
        module.load_state_dict(copy.deepcopy(state), assign=assign)


def step(d: Draws, t: Twins) -> None:
    """By an optimiser, with gradients that are drawn."""
    grads = {n: torch.randn_like(p) for n, p in t.plain.named_parameters()}
    for module in t.both:
        for n, p in module.named_parameters():
            p.grad = grads[n].clone().view_as(p)
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        module.zero_grad(set_to_none=True)
    t.written()


def train(d: Draws, t: Twins) -> None:
    for module in t.both:
        module.train()


def evaluate(d: Draws, t: Twins) -> None:
    for module in t.both:
        module.eval()


def channels_last(d: Draws, t: Twins) -> None:
    for module in t.both:
        module.to(memory_format=torch.channels_last)


def contiguous_again(d: Draws, t: Twins) -> None:
    for module in t.both:
        module.to(memory_format=torch.contiguous_format)


def other_dtype(d: Draws, t: Twins) -> None:
    dtype = d.choice([torch.float64, torch.float32])
    for module in t.both:
        module.to(dtype)
    put_back(t.ours, t.plain.state_dict())  # statistics of the coarser one
    t.written()


def freeze(d: Draws, t: Twins) -> None:
    if not t.frozen and any(type(m).__module__.startswith("aspp_ext") for m in t.ours.modules()):
        aspp_ext.freeze(t.ours)
        t.frozen = True


def unfreeze(d: Draws, t: Twins) -> None:
    if t.frozen:
        aspp_ext.unfreeze(t.ours)
        t.frozen = False


def deepcopied(d: Draws, t: Twins) -> None:
    t.plain, t.ours = (copy.deepcopy(m) for m in t.both)


def pickled(d: Draws, t: Twins) -> None:
    t.ours = pickle.loads(pickle.dumps(t.ours))


def unfused_and_fused(d: Draws, t: Twins) -> None:
    unfreeze(d, t)
    t.ours = aspp_ext.unfuse(t.ours)
    compare(d, t)
    t.ours = fused(t.ours)


def fused_twice(d: Draws, t: Twins) -> None:
    t.ours = fused(t.ours)


def another_norm(d: Draws, t: Twins) -> None:
    """In an old one's place."""
    branch = d.randrange(len(t.plain.convs) - 1)
    for module in t.both:
        places = module.convs[branch]
        at = next(i for i, m in enumerate(places) if isinstance(m, nn.BatchNorm2d))
        norm = nn.BatchNorm2d(places[at].num_features).to(t.dtype).train(places[at].training)
        norm.running_mean += 0.5
        places[at] = norm
    t.written()


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def hook(d: Draws, t: Twins) -> None:
    """On a layer inside: what comes then only the layers compute."""
    name = d.choice([n for n, m in t.plain.named_modules() if n and not list(m.children())])
    for module in t.both:
        module.get_submodule(name).register_forward_hook(doubled)
    t.written()


def leaky(d: Draws, t: Twins) -> None:
    branch = d.randrange(len(t.plain.convs))
    for module in t.both:
        module.convs[branch][-1] = nn.LeakyReLU(0.5)
    t.written()


def other_constants(d: Draws, t: Twins) -> None:
    at = d.randrange(len(norms(t.plain)))
    for module in t.both:
        norms(module)[at].eps = 0.1
    t.written()


def nothing(d: Draws, t: Twins) -> None:
    """But another image."""


OFTEN: list[Action] = [write, write, nothing, load, train, evaluate, evaluate, channels_last]
SELDOM: list[Action] = [replace_data, step, contiguous_again, other_dtype, freeze, freeze, unfreeze]
SELDOM += [deepcopied, pickled, unfused_and_fused, fused_twice, another_norm, other_constants]
LAST: list[Action] = [hook, leaky]
"""After these the layers compute, so that there is less to see."""


# --- What has to be the same


def image(d: Draws, t: Twins) -> Tensor:
    n, h, w = d.choice(t.sizes)
    kind = RANGES if t.plain.training is False and d.maybe(0.15) else NORMAL
    x = d.image(kind, n, t.channels, h, w, most=FAR_FROM_OVERFLOW).to(t.dtype)
    x[x.isinf()] = torch.nan  # of infinity bilinear interpolation makes it, too
    return d.laid_out(x)


def attempt(module: nn.Module, x: Tensor, seed: int) -> Any:
    torch.manual_seed(seed)
    try:
        return module(x)
    except ValueError as error:  # of a batch of one in training
        return str(error)


def compare(d: Draws, t: Twins) -> None:
    """One call of each, and in some the gradients."""
    x, mode, seed = image(d, t), d.choice(list(MODES)), d.getrandbits(30)
    autocast = t.dtype == torch.float32 and not t.plain.training and d.maybe(0.1)
    wants_x = mode == "grad" and d.maybe(0.5)
    images = [x.clone(memory_format=torch.preserve_format).requires_grad_(wants_x) for _ in t.both]
    if not wants_x:
        images = [x, x]
    before = {n: v.clone() for n, v in t.plain.state_dict().items()}
    with MODES[mode](), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs, ours = (attempt(m, i, seed) for m, i in zip(t.both, images, strict=True))
    if isinstance(theirs, str):
        assert isinstance(ours, str), f"PyTorch refuses: {theirs}"
        for module in t.both:  # norms may have counted what was refused
            put_back(module, before)
        t.written()
        return
    assert isinstance(ours, Tensor), f"only ours refuses: {ours}"
    assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"dtype {ours.dtype}, expected {theirs.dtype}"
    assert ours.requires_grad == theirs.requires_grad, f"requires_grad {ours.requires_grad}"
    formats = [memory_format_of(y) for y in (ours, theirs)]
    assert None in formats or formats[0] == formats[1], f"{formats[0]}, expected {formats[1]}"
    why = why_different(t.plain, before, x, ours, theirs, seed)
    assert why is None, why
    check_buffers(t)
    if ours.requires_grad and t.dtype == torch.float64 and ours.numel() and x.abs().max() < 100:
        grad = torch.randn_like(theirs)
        found = []
        for y, module, i in zip((theirs, ours), t.both, images, strict=True):
            leaves = [p for p in (i, *module.parameters()) if p.requires_grad]
            found.append(torch.autograd.grad(y, leaves, grad, materialize_grads=True))
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            check_close(b, a, f"gradient {i}")


def check_buffers(t: Twins) -> None:
    for (name, a), b in zip(t.plain.named_buffers(), t.ours.buffers(), strict=True):
        check_close(b, a, name)


def check_close(got: Tensor, expected: Tensor, name: str) -> None:
    """To a rounding or so of the largest of them."""
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}"
    if not got.is_floating_point() or not got.numel():
        assert torch.equal(got, expected), f"{name}: {got} for {expected}"
        return
    limit = CLOSE[got.dtype] * (1 + expected.detach().abs().nan_to_num().max().item())
    torch.testing.assert_close(
        *(got, expected), rtol=0, atol=limit, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def put_back(module: nn.Module, state: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        buffer.data.copy_(state[name])


def why_different(
    module: nn.Module, state: dict[str, Tensor], x: Tensor, ours: Tensor, theirs: Tensor, seed: int
) -> str | None:
    """By the layers in float64, as they were before the call."""
    wide = {n: v.double() if v.is_floating_point() else v.clone() for n, v in state.items()}
    torch.manual_seed(seed)
    with torch.no_grad():
        exact = torch.func.functional_call(module, wide, x.double())
        if not module.training:
            magnitude = torch.func.functional_call(module, sizes(wide), x.double().abs())
            roundings = 64 if ours.dtype == torch.float64 else 4
            return oracles.why_wrong(ours, theirs, exact, magnitude, 2, roundings)
    if not ours.numel():
        return None
    worst, own = ((y - exact).abs().max().item() for y in (ours, theirs))
    limit = 3 * own + CLOSE[ours.dtype] * (1 + exact.abs().max().item())
    return f"in training off by {worst:.3g}, at most {limit:.3g}" if worst > limit else None


def sizes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With which all that is added up has one sign."""
    return {
        n: -v.abs() if n.endswith("running_mean") else v.abs() if v.is_floating_point() else v
        for n, v in state.items()
    }


def check(t: Twins, d: Draws) -> None:
    compare(d, t)
    for i in range(d.randint(2, 5)):
        action = d.choice(d.choice([OFTEN, OFTEN, SELDOM]) if i or d.maybe(0.9) else LAST)
        own_memory(t)
        said = action(d, t)
        t.done.append(action.__name__ + (f" {said}" if said else ""))
        compare(d, t)

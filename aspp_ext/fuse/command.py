# SPDX-License-Identifier: BSD-3-Clause
"""``python -m aspp_ext fuse package.module:factory``: what fuse makes of a model, as a table."""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from aspp_ext.compat import import_torchvision

from . import fuse, fuse_report

_ABOUT = """Makes the model, fuses it and prints what became of each pyramid in it. The exit status
is 1 where there is none, or one that could not be fused."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Of what follows ``python -m aspp_ext fuse``."""
    parser = argparse.ArgumentParser(prog="python -m aspp_ext fuse", description=_ABOUT)
    parser.add_argument("factory", metavar="PACKAGE.MODULE:FACTORY", help="what makes the model")
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="NAME=VALUE",
        help="its keyword arguments, as Python writes values: weights=None",
    )
    parser.add_argument(
        "--input",
        action="append",
        type=_shape,
        metavar="NxCxHxW",
        help="a tensor that the model takes, where a pyramid in it takes more than one map; again "
        "for each one",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit status."""
    options = parse(arguments[1:])
    model = _made(options.factory, options.arguments)
    given = options.input and tuple(torch.empty(shape, device="meta") for shape in options.input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which say what the table does
        fuse(model, strict=False, example_inputs=given)
    report = fuse_report(model, example_inputs=given)
    Console().print(report)
    return 0 if report and all(entry.reason is None for entry in report) else 1


def _made(factory: str, arguments: Sequence[str]) -> nn.Module:
    module, _, name = factory.partition(":")
    if not (module and name):
        sys.exit(f"fuse: a factory must be package.module:name, got {factory!r}")
    keywords = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            sys.exit(f"fuse: an argument must be name=value, got {argument!r}")
        try:
            keywords[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            keywords[key] = text
    try:
        if module.partition(".")[0] == "torchvision":
            import_torchvision()
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        model = found(**keywords)
    except Exception as error:
        sys.exit(f"fuse: {factory} makes no model: {type(error).__name__}: {error}")
    if not isinstance(model, nn.Module):
        sys.exit(f"fuse: {factory} must make a module, it made a {type(model).__name__}")
    return model


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be sizes like 1x3x65x65, got {text}") from None

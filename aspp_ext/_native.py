# SPDX-License-Identifier: BSD-3-Clause
"""Loads the native libraries, once, and remembers in words why one is absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch


def library_dir() -> Path:
    """Where the libraries are looked for; ``ASPP_EXT_LIBRARY_DIR`` points at another build."""
    return Path(os.environ.get("ASPP_EXT_LIBRARY_DIR", "").strip() or Path(__file__).parent)


def read_build_info() -> dict[str, Any]:
    """What setup.py wrote beside the libraries; empty where nothing was built.

    Raises:
        RuntimeError: the file is not what it wrote.
    """
    path = library_dir() / "_build_info.json"
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text("utf-8"))
        _check_build_info(read)
    except (OSError, ValueError, RecursionError) as error:
        raise RuntimeError(
            f"aspp_ext: {path} must be as it was built, got a broken file ({error}); build again"
        ) from None
    return read


def _check_build_info(read: Any) -> None:
    words = ("compiler", "torch", "version")
    right = (
        isinstance(read, dict)
        and all(isinstance(read.get(name), str) for name in words)
        and isinstance(read.get("cuda"), (str, type(None)))
        and isinstance(read.get("emulated"), bool)
        and all(isinstance(read.get(name), list) for name in ("architectures", "isas"))
        and all(isinstance(word, str) for word in (*read["architectures"], *read["isas"]))
        and isinstance(read.get("sources"), dict)
        and all(isinstance(word, str) for word in read["sources"].values())
    )
    if not right:
        raise ValueError("expected what setup.py writes")


def _load(name: str) -> str | None:
    path = library_dir() / f"lib{name}.so"
    # By an earlier import of the package: a second one of the name would define the operators anew.
    if path.name in {Path(loaded).name for loaded in torch.ops.loaded_libraries}:
        return None
    if not path.exists():
        return f"{path.name} was not built (see `python -m aspp_ext`)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} could not be loaded: {error}"
    return None


cpu_missing: str | None = _load("aspp_cpu")
"""None when the schemas and the CPU kernels are loaded."""


emulated = bool(read_build_info().get("emulated"))
"""Whether the CPU's pyramids are the CUDA kernels, run by csrc/cuda/emulation (for tests)."""


def _load_cuda() -> str | None:
    if cpu_missing is not None:
        return "libaspp_cpu.so, which holds the schemas, is missing"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    built = read_build_info().get("cuda")
    if built and built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"libaspp_cuda.so is for CUDA {built} but this PyTorch has CUDA {torch.version.cuda}"
    return _load("aspp_cuda")


cuda_missing: str | None = _load_cuda()
"""None when the CUDA kernels are loaded."""


def picked_isa() -> str:
    """The instruction set of the CPU's kernels, which is picked when they are loaded."""
    return torch.ops.aspp_ext.cpu_isa().removeprefix("isa_")


def use_isa(isa: str) -> str:
    """Run another instruction set's kernels, while nothing else is called.

    Args:
        isa: as ``ASPP_EXT_ISA``, or "" for this machine's best.

    Returns:
        What is picked: the baseline where this processor has not what was asked for.
    """
    torch.ops.aspp_ext.use_cpu_isa(isa)
    return picked_isa()

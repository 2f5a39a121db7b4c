# SPDX-License-Identifier: BSD-3-Clause
"""``setup.py build_ext --inplace`` for the GPU that is there, with what a torch for GPUs brings."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import setuptools
import torch


def torchs_pybind11() -> Any:
    """What setup.py asks the module pybind11 for: its headers lie inside torch, too."""
    module: Any = types.ModuleType("pybind11")
    module.get_include = lambda: str(Path(torch.__file__).parent / "include")
    return module


def main() -> None:
    if importlib.util.find_spec("pybind11") is None:
        sys.modules["pybind11"] = torchs_pybind11()
    # An older setuptools refuses pyproject.toml's licence, of which a build needs nothing.
    if int(setuptools.__version__.partition(".")[0]) < 77:
        setuptools.Distribution.parse_config_files = lambda *_, **__: None
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    os.environ |= {"ASPP_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
    runpy.run_path("setup.py", run_name="__main__")


if __name__ == "__main__":
    main()

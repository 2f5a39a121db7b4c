# SPDX-License-Identifier: BSD-3-Clause
"""What a result depends on besides the code: device, threads, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

from aspp_ext.evidence.environment import hyphenated, processor

ROOT = Path(__file__).resolve().parents[1]


def version(package: str) -> str:
    """The installed version, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The short commit of the checkout, with -dirty where its code differs, or "unknown".

    ASPP_EXT_COMMIT names it where the sources were copied without their history.
    """
    if named := os.environ.get("ASPP_EXT_COMMIT"):
        return named

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--", "aspp_ext", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts() -> dict[str, str | int]:
    """The columns that are the same in every row of a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "device": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
        "openvino": version("openvino"),
    }


def slug(device: str, threads: int) -> str:
    """The name of a results file of a processor."""
    return f"{hyphenated(device)}-{threads}t"

# SPDX-License-Identifier: BSD-3-Clause
"""Writes results files: one line a row, six significant digits."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Columns that a row lacks, or that are None there, are empty; others are not written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = row.items()
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values})

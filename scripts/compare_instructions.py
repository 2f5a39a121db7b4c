# SPDX-License-Identifier: BSD-3-Clause
"""Compares what tests/emulation/instructions.cu printed on a GPU with what its emulation printed.

Prints a line for each case and, last, how many agree. Exits with 1 when one that has to agree does
not, or is missing.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

Case = tuple[str, list[str]]  # how the results have to agree, and the results


def read(path: Path) -> dict[str, Case]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {name: (agreement, words) for name, agreement, *words in lines}


def as_float(word: str) -> float:
    return struct.unpack(">f", bytes.fromhex(word))[0]


def difference(hardware: Case | None, emulated: Case) -> tuple[bool, str]:
    """Whether a case is in order, and in words how the two results differ."""
    agreement, expected = emulated
    if hardware is None:
        return False, "missing"
    if hardware[0] != agreement or len(hardware[1]) != len(expected):
        return False, "the two programs are not of the same source"
    pairs = list(zip(hardware[1], expected, strict=True))
    unequal = [(i, got, want) for i, (got, want) in enumerate(pairs) if got != want]
    if not unequal:
        return True, "equal bits"
    if agreement.startswith("near:"):
        worst = max(abs(as_float(got) - as_float(want)) for _, got, want in unequal)
        text = f"{len(unequal)} of {len(pairs)} differ, by {worst:.3g} at most"
        return worst <= float(agreement.removeprefix("near:")), text
    place, got, want = unequal[0]
    text = f"{len(unequal)} of {len(pairs)} differ, first word {place}: {got} for {want}"
    return agreement == "note", text


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: compare_instructions.py HARDWARE EMULATED")
        return 2
    hardware, emulated = (read(Path(name)) for name in arguments)
    wrong = 0
    for name, case in emulated.items():
        right, text = difference(hardware.get(name), case)
        wrong += not right
        print(f"{'ok' if right else 'WRONG':5} {name:32} {case[0]:10} {text}")
    print(f"{len(emulated) - wrong} of {len(emulated)} cases agree")
    return 1 if wrong or not emulated else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

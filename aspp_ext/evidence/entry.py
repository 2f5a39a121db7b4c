# SPDX-License-Identifier: BSD-3-Clause
"""An entry: an environment, a date, and a verdict for each implementation, operator, precision and
mode. As text it is JSON, and text is not trusted: :func:`parse` checks every field."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, NamedTuple

from .environment import Environment

FORMAT = 1
BAD = ("wrong", "crashed", "hung")
RESULTS = ("right", *BAD, "unavailable")
MODES = ("inference", "training")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "float64")
SIZES = ("small", "medium", "large")
SAYS = ("faster", "even", "slower")
IMPLEMENTATIONS = ("cpu", "cuda", "triton")
MOST_VERDICTS = 1000
MOST_CHARACTERS = 1000
"""Of a string in an entry."""


class Cell(NamedTuple):
    """What a verdict is about. The CPU's implementation is named with its instruction set where
    that is not the one which this machine picks, like "cpu avx2"."""

    implementation: str
    operator: str
    precision: str
    mode: str

    @property
    def title(self) -> str:
        return ", ".join(self)


class Speed(NamedTuple):
    """Of one class of problems: the time of the best of PyTorch over ours."""

    ratio: float
    says: str  # of SAYS


@dataclasses.dataclass(frozen=True)
class Verdict:
    """On a cell; ``speeds`` by SIZES, where it was timed."""

    result: str  # of RESULTS
    error: float | None = None  # the largest, as a multiple of PyTorch's own
    why: str = ""
    speeds: dict[str, Speed] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    environment: Environment
    date: str  # YYYY-MM-DD
    verdicts: dict[Cell, Verdict]

    def text(self) -> str:
        """As JSON, of which each verdict is a line."""
        head = {
            "format": FORMAT,
            "date": self.date,
            "environment": dataclasses.asdict(self.environment),
        }
        lines = []
        for cell, verdict in self.verdicts.items():
            of_speed = {name: list(speed) for name, speed in verdict.speeds.items()}
            fields = {**cell._asdict(), **dataclasses.asdict(verdict), "speeds": of_speed}
            lines.append(f"  {json.dumps(fields, allow_nan=False)}")
        start = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
        return f'{start},\n "verdicts": [\n' + ",\n".join(lines) + "\n ]\n}\n"


class _Fields:
    """The fields of a JSON object, each of the kind that it has to be."""

    def __init__(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        self.value = value

    def get(self, name: str, kind: type) -> Any:
        found = self.value.get(name)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise ValueError(f"{name} must be {kind.__name__}, got {type(found).__name__}")
        return found

    def text(self, name: str, among: tuple[str, ...] | None = None) -> str:
        found = self.get(name, str)
        if len(found) > MOST_CHARACTERS or not (found.isprintable()):
            raise ValueError(f"{name} must be a line of at most {MOST_CHARACTERS} characters")
        if among is not None and found not in among:
            raise ValueError(f"{name} must be one of {', '.join(among)}, got {found!r}")
        return found

    def name(self, name: str) -> str:
        found = self.text(name)
        if not re.fullmatch(r"[a-z0-9_]+( [a-z0-9]+)?", found):
            raise ValueError(f"{name} must be a name, got {found!r}")
        return found

    def names(self, among: tuple[str, ...]) -> list[str]:
        """Of all fields, of which there may be no others."""
        if others := set(self.value) - set(among):
            raise ValueError(f"expected some of {', '.join(among)}, got {min(others)!r}")
        return list(self.value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {type(value).__name__}")
    if not 0 <= value < 1e12:  # nor NaN
        raise ValueError(f"expected a number that is not negative and finite, got {value}")
    return float(value)


def _environment(fields: _Fields) -> Environment:
    kernels = _Fields(fields.get("kernels", dict))
    strings = [f.name for f in dataclasses.fields(Environment) if f.type == "str"]
    return Environment(
        **{name: fields.text(name) for name in strings},
        processors=int(_number(fields.get("processors", int))),
        kernels={name: kernels.text(name) for name in kernels.names(IMPLEMENTATIONS)},
    )


def _verdict(fields: _Fields) -> Verdict:
    speeds, listed = {}, fields.get("speeds", dict)
    for name in _Fields(listed).names(SIZES):
        pair = listed[name]
        if not (isinstance(pair, list) and len(pair) == 2 and pair[1] in SAYS):
            raise ValueError(f"a speed must be [ratio, one of {', '.join(SAYS)}]")
        speeds[name] = Speed(_number(pair[0]), pair[1])
    error = fields.value.get("error")
    return Verdict(
        fields.text("result", RESULTS),
        None if error is None else _number(error),
        fields.text("why"),
        speeds,
    )


def parse(text: str) -> Entry:
    """The entry that :meth:`Entry.text` has written.

    Raises:
        ValueError: it is none; RecursionError: it is nested without end.
    """

    def refuse(constant: str) -> float:
        raise ValueError(f"expected JSON, got {constant}")

    top = _Fields(json.loads(text, parse_constant=refuse))
    if top.get("format", int) != FORMAT:
        raise ValueError(f"format must be {FORMAT}, got {top.value['format']}")
    listed = top.get("verdicts", list)
    if len(listed) > MOST_VERDICTS:
        raise ValueError(f"verdicts go up to {MOST_VERDICTS}, got {len(listed)}")
    verdicts = {}
    for each in listed:
        fields = _Fields(each)
        cell = Cell(
            fields.name("implementation"),
            fields.name("operator"),
            fields.text("precision", PRECISIONS),
            fields.text("mode", MODES),
        )
        verdicts[cell] = _verdict(fields)
    environment = _environment(_Fields(top.get("environment", dict)))
    return Entry(environment, top.text("date"), verdicts)

# SPDX-License-Identifier: BSD-3-Clause
"""Entries, and the store they lie in, whoever wrote what there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pretending import DATE, FASTER, HERE, on_cuda, pretend_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode

import aspp_ext
from aspp_ext.dispatch import Problem, select
from aspp_ext.evidence import entry, rulings, store
from aspp_ext.evidence.entry import Cell, Entry, Speed, Verdict

RIGHT = Verdict("right", 1.0, "", FASTER)
CELL = Cell("cuda", "atrous_pyramid", "bfloat16", "inference")
WHOLE = Entry(
    HERE,
    DATE,
    {
        CELL: Verdict("right", 1.25, "", {"small": Speed(0.5, "slower")}),
        CELL._replace(mode="training"): Verdict("wrong", None, "result 0: 3 of 9 numbers differ"),
        CELL._replace(precision="tf32"): Verdict("crashed", None, "signal SIGSEGV"),
    },
)


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A pretended GPU, with tensors on it, of which nothing is known."""
    pretend_a_gpu(monkeypatch, tmp_path)
    with FakeTensorMode():
        yield monkeypatch


# Entries


def test_an_entry_is_what_was_written() -> None:
    assert entry.parse(WHOLE.text()) == WHOLE
    assert entry.parse(Entry(HERE, DATE, {}).text()).verdicts == {}


def test_a_verdict_is_a_line() -> None:
    """So that two entries can be compared by eye, and by git."""
    lines = [line for line in WHOLE.text().splitlines() if '"implementation"' in line]
    assert len(lines) == len(WHOLE.verdicts)
    assert max(map(len, lines)) < 250


def changed(*path: str | int, to: object = None, without: bool = False) -> str:
    """The entry's text with something else, or nothing, in a place."""
    whole = json.loads(WHOLE.text())
    *parents, last = path
    inner = whole
    for name in parents:
        inner = inner[name]
    if without:
        del inner[last]
    else:
        inner[last] = to
    return json.dumps(whole)


FIELDS = [
    *(("environment", name) for name in json.loads(WHOLE.text())["environment"]),
    *(("verdicts", 0, name) for name in ("implementation", "operator", "precision", "mode")),
    *(("verdicts", 0, name) for name in ("result", "why", "speeds")),
    *(("date",), ("format",), ("verdicts",), ("environment",)),
]
BAD = {
    **{f"without {path[-1]}": changed(*path, without=True) for path in FIELDS},
    **{f"{path[-1]} is {to}": changed(*path, to=to) for path in FIELDS for to in (None, True, [3])},
    "another format": changed("format", to=entry.FORMAT + 1),
    "a result that there is not": changed("verdicts", 0, "result", to="rightish"),
    "a precision that there is not": changed("verdicts", 0, "precision", to="int8"),
    "a ratio that is no number": changed("verdicts", 0, "speeds", to={"small": ["1", "faster"]}),
    "a ratio below zero": changed("verdicts", 0, "speeds", to={"small": [-1.0, "faster"]}),
    "an error without end": changed("verdicts", 0, "error", to=1e300),
    "processors without number": changed("environment", "processors", to=10**400),
    "an error without number": changed("verdicts", 0, "error", to=10**400),
    "an implementation without a name": changed("verdicts", 0, "implementation", to=""),
    "an integer without end": f'{{"format": {"9" * 10000}}}',
    "a class that there is not": changed("verdicts", 0, "speeds", to={"huge": [1.0, "faster"]}),
    "an implementation that there is not": changed("environment", "kernels", to={"\n": "1"}),
    "NaN": WHOLE.text().replace("1.25", "NaN"),
    "Infinity": WHOLE.text().replace("1.25", "Infinity"),
    "a long string": changed("verdicts", 0, "why", to="x" * 2000),
    "a line that ends": changed("verdicts", 0, "why", to="fine\n  cuda  runs this"),
    "colours": changed("verdicts", 0, "why", to="\x1b[2J"),
    "too many verdicts": changed("verdicts", to=json.loads(WHOLE.text())["verdicts"] * 400),
    "half of it": WHOLE.text()[: len(WHOLE.text()) // 2],
    "no JSON": "right, all of it",
    "another JSON": "[1, 2]",
    "nothing": "",
    "depth": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_is_no_entry_is_not_there(text, tmp_path) -> None:
    with pytest.raises((ValueError, RecursionError)):
        entry.parse(text)
    path = tmp_path / "entry.json"
    path.write_text(text)
    assert store.read_entry(path) is None


# The store


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_an_entry(path: Path) -> None:
    other = path.with_name("elsewhere")
    other.write_text(WHOLE.text())
    path.symlink_to(other)


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 100)


def huge(path: Path) -> None:
    with path.open("w") as file:
        file.write(WHOLE.text())
        file.truncate(1 << 40)  # sparse


def long(path: Path) -> None:
    path.write_text(WHOLE.text() + " " * store.MOST_BYTES)


def unreadable(path: Path) -> None:
    path.write_text("")
    path.chmod(0)


def of_another_machine(path: Path) -> None:
    path.write_text(replace(WHOLE, environment=replace(HERE, processors=1)).text())


HOSTILE = [a_pipe, a_link_to_an_entry, a_link_to_itself, an_endless_device, a_folder, garbage]
HOSTILE += [huge, long, unreadable, of_another_machine]


@pytest.mark.parametrize("plant", HOSTILE, ids=lambda plant: plant.__name__)
def test_a_hostile_file_is_not_there(plant: Callable[[Path], None], device) -> None:
    place = store.folder()
    assert place is not None
    place.mkdir(parents=True)
    plant(place / f"{HERE.name}.json")
    assert store.find(HERE) is None
    x, w = on_cuda(1, 8, 9, 9), on_cuda(8, 8, 3, 3)
    assert select(Problem("atrous_pyramid", x, (w,))).name == "reference"
    assert "nothing says yet" in aspp_ext.explain(x, [w], [2])


@pytest.mark.parametrize("plant", HOSTILE, ids=lambda plant: plant.__name__)
def test_what_is_written_takes_a_hostile_file_s_place(plant, device) -> None:
    place = store.folder()
    assert place is not None
    place.mkdir(parents=True)
    path = place / f"{HERE.name}.json"
    plant(path)
    if plant is a_folder:
        with pytest.raises(OSError, match="directory"):
            store.write(WHOLE)
        return
    assert store.write(WHOLE) == path
    assert not path.is_symlink()
    assert store.find(HERE) == (path, WHOLE)


HOSTILE_PLACES = {
    "a file": lambda path: path.write_text("a file"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere/at/all"),
    "a folder nobody may read": lambda path: path.mkdir(0),
}


@pytest.mark.parametrize("plant", HOSTILE_PLACES.values(), ids=HOSTILE_PLACES)
def test_a_hostile_place_changes_nothing(plant, device, tmp_path) -> None:
    plant(tmp_path / "store")
    rulings.forget()
    assert rulings.known("cuda:0") == {}
    assert rulings.against("cuda:0", CELL, "small") is not None


def test_where_the_store_is(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(store.VARIABLE)
    assert store.folder() == Path("/somewhere/.cache/aspp_ext/verified")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert store.folder() == Path("/cache/aspp_ext/verified")
    monkeypatch.setenv(store.VARIABLE, "/shared/by/all")
    assert store.folder() == Path("/shared/by/all")
    monkeypatch.setenv(store.VARIABLE, "off")
    assert store.folder() is None
    assert store.write(WHOLE) is None


WRITER = """
import sys
from pathlib import Path
from aspp_ext.evidence import entry, store
text = Path(sys.argv[1]).read_text()
whole = entry.parse(text)
print("ready", flush=True)
for _ in range(200):
    store.write(whole)
"""


def test_a_writer_keeps_what_others_have_found_right(device) -> None:
    store.write(WHOLE)
    new = CELL._replace(implementation="triton")
    path = store.write(replace(WHOLE, verdicts={new: WHOLE.verdicts[CELL]}))
    assert path is not None
    found = store.read_entry(path)
    assert found is not None
    assert found.verdicts == {CELL: WHOLE.verdicts[CELL], new: WHOLE.verdicts[CELL]}


def test_what_nobody_could_read_is_not_written(device) -> None:
    path = store.write(WHOLE)
    bad = {CELL: replace(WHOLE.verdicts[CELL], error=1e300)}
    with pytest.raises(ValueError, match="expected a number"):
        store.write(replace(WHOLE, verdicts=bad))
    assert store.find(HERE) == (path, WHOLE)


def test_readers_see_whole_entries_while_others_write(device, tmp_path) -> None:
    """And nothing of the writers is left."""
    text = tmp_path / "entry.json"
    text.write_text(WHOLE.text())
    place = store.folder()
    assert place is not None
    store.write(WHOLE)
    command = [sys.executable, "-c", WRITER, str(text)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    done = False
    while not done:
        done = all(writer.poll() is not None for writer in writers)
        found = store.find(HERE)
        assert found is not None
        assert found[1] == WHOLE
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(p.name for p in place.iterdir()) == [".lock", f"{HERE.name}.json"]


def test_a_writer_waits_for_another_but_not_for_ever(device, monkeypatch) -> None:
    place = store.folder()
    assert place is not None
    monkeypatch.setattr(store, "MOST_WAIT_S", 0.05)
    began, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.locked(place):
            began.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    began.wait()
    assert store.write(WHOLE) is not None
    done.set()
    holder.join()


def test_a_store_keeps_so_many_entries(device, monkeypatch) -> None:
    monkeypatch.setattr(store, "MOST_FILES", 3)
    place = store.folder()
    assert place is not None
    for driver in range(6):
        path = store.write(replace(WHOLE, environment=replace(HERE, driver=str(driver))))
        assert path is not None
        os.utime(path, (driver, driver))
        (place / f"somebody's own {driver}.json").write_text("{}")
    assert len(list(place.glob("somebody's own *"))) == 6
    left = [store.read_entry(p) for p in place.glob(f"*-{'?' * 16}.json")]
    assert sorted(e.environment.driver for e in left if e is not None) == ["3", "4", "5"]

# SPDX-License-Identifier: BSD-3-Clause
"""Interleaved timing: every round runs every contender once, in a fresh random order.

A machine that slows down for a second then slows all contenders alike, and no contender always
runs after the same neighbour. Medians and quartiles are reported, never means or minima.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Stopwatch = Callable[[Callable[[], object]], tuple[float, float]]
"""Runs a call; returns the seconds its work took and the seconds until the call returned."""


def quantile(values: Sequence[float], share: float) -> float:
    """The linearly interpolated quantile `share` in [0, 1]."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def by_clock(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """The stopwatch of work that is done when the call returns."""

    def stopwatch(call: Callable[[], object]) -> tuple[float, float]:
        start = clock()
        call()
        seconds = clock() - start
        return seconds, seconds

    return stopwatch


BY_WALL_CLOCK = by_clock()


class CudaStopwatch:
    """Seconds between two events around a call's work, and until the call returned.

    The device first idles for about as long as the call took to return last time, so that it finds
    its work queued and the first number holds none of the host's time.
    """

    LONGEST_LEAD_S = 0.02

    def __init__(self) -> None:
        self.host_s: dict[int, float] = {}

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        lead_s = min(1.5 * self.host_s.get(id(call), 0.002), self.LONGEST_LEAD_S)
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2e9 * lead_s))
        start.record()
        began = time.perf_counter()
        call()
        host_s = time.perf_counter() - began
        stop.record()
        stop.synchronize()
        self.host_s[id(call)] = host_s
        return start.elapsed_time(stop) / 1e3, host_s


@dataclass(frozen=True)
class Timing:
    """The samples of one contender in seconds: of the work, and until the calls returned."""

    samples: tuple[float, ...]
    host: tuple[float, ...] = ()

    def quantile_ms(self, share: float) -> float:
        return 1e3 * quantile(self.samples, share)

    @property
    def host_ms(self) -> float:
        """Median of the time until a call returned."""
        return 1e3 * quantile(self.host, 0.5)

    @property
    def p25_ms(self) -> float:
        return self.quantile_ms(0.25)

    @property
    def p50_ms(self) -> float:
        return self.quantile_ms(0.5)

    @property
    def p75_ms(self) -> float:
        return self.quantile_ms(0.75)


def cache_flusher(megabytes: int = 128) -> Callable[[], object]:
    """Returns a function that walks through `megabytes` of memory: what is called next is cold."""
    buffer = torch.ones(megabytes * 2**18)  # float32
    return lambda: buffer.add_(1.0)


def l2_flusher(device: torch.device) -> Callable[[], object]:
    """The same of a GPU. Several times the L2 is read: unlike written lines, read ones need no
    write-back."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.ones(size, device=device).sum  # float32: 4 times L2


def rounds_within(budget_s: float, round_s: float, least: int, most: int) -> int:
    """How many rounds of `round_s` seconds fit the budget, between `least` and `most`.

    Where the least number would take more than twice the budget, three have to do.
    """
    if least * round_s > 2 * budget_s:
        least = min(least, 3)
    return max(least, min(most, int(budget_s / max(round_s, 1e-9))))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    warmup: int = 1,
    least_rounds: int = 5,
    most_rounds: int = 50,
    settle_s: float = 0.01,
    flush: Callable[[], object] | None = None,
    seed: int = 0,
    stopwatch: Stopwatch = BY_WALL_CLOCK,
    on_round: Callable[[int, int], object] | None = None,
) -> dict[str, Timing]:
    """Times every call in interleaved rounds and returns the samples of each.

    Args:
        calls: contender name -> function that does the work once and returns when it is done.
        budget_s: seconds to spend in all; sets the number of rounds within the two limits below.
        warmup: untimed calls of each contender before the first round, the last of which is
            measured to estimate the length of a round.
        least_rounds: rounds done even when they overrun the budget.
        most_rounds: rounds after which to stop even when budget is left.
        settle_s: pause before each call; worker threads of the runtime that ran before keep
            spinning for some milliseconds and would otherwise take the next contender's cores.
        flush: called before each timed call, after the pause (see `cache_flusher`).
        seed: of the order within the rounds.
        stopwatch: times one call.
        on_round: called with (rounds done, rounds planned).

    Raises:
        ValueError: when there is nothing to time or no round to do.
    """
    if not calls:
        raise ValueError("interleave: calls must name at least one contender, got none")
    if least_rounds < 1 or most_rounds < least_rounds:
        raise ValueError(
            "interleave: rounds must satisfy 1 <= least_rounds <= most_rounds, "
            f"got {least_rounds} and {most_rounds}"
        )

    def timed(call: Callable[[], object]) -> tuple[float, float]:
        if settle_s:
            time.sleep(settle_s)
        if flush is not None:
            flush()
        return stopwatch(call)

    round_s = 0.0
    for call in calls.values():
        for _ in range(max(1, warmup)):
            began = time.perf_counter()
            timed(call)
        round_s += time.perf_counter() - began
    rounds = rounds_within(budget_s, round_s, least_rounds, most_rounds)

    order = list(calls)
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for done in range(rounds):
        shuffle(order)
        for name in order:
            samples[name].append(timed(calls[name]))
        if on_round is not None:
            on_round(done + 1, rounds)
    return {name: Timing(*map(tuple, zip(*pairs, strict=True))) for name, pairs in samples.items()}


def fastest_seconds(
    call: Callable[[], object],
    budget_s: float,
    least: int = 3,
    stopwatch: Stopwatch = BY_WALL_CLOCK,
) -> float:
    """The shortest of many repetitions: for the machine's ceilings, which only noise can hide."""
    call()
    values: list[float] = []
    end = time.perf_counter() + budget_s
    while len(values) < least or time.perf_counter() < end:
        values.append(stopwatch(call)[0])
    return min(values)

"""Contenders take turns and are compared round by round, so a slow moment of the machine affects all of them.

This module needs no JAX, because a worker imports it in an interpreter that may not have it.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A turn is a number of calls in a row; it returns the seconds per call.
Turn = Callable[[int], float]

# Short calls are timed together: a turn has as many as last this long, and at most that many.
_TURN_SECONDS, _MOST_CALLS = 0.005, 100
FEWEST_ROUNDS, _MOST_ROUNDS = 7, 201


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def excludes(self, value: float) -> bool:
        """Whether both quartiles lie on the same side of it. If they do not, a difference is not supported."""
        return not self.low <= value <= self.high

    def format(self, form: str = ".2f", scale: float = 1) -> str:
        return f"{self.median * scale:{form}} ({self.low * scale:{form}} to {self.high * scale:{form}})"


def take_turns(turns: dict[Any, Turn], seconds: float, fewest_rounds: int = FEWEST_ROUNDS) -> dict[Any, list[float]]:
    """Seconds per call of each contender in each round.

    Args:
      turns: the first turn of each is not kept, since it may compile.
      seconds: the time for all rounds together.
      fewest_rounds: are taken even if that takes longer.
    """
    calls = {name: _calls(turn) for name, turn in turns.items()}
    order = random.Random(0)
    kept: dict[Any, list[float]] = {name: [] for name in turns}
    start, rounds = time.perf_counter(), 0
    while rounds < fewest_rounds or (rounds < _MOST_ROUNDS and time.perf_counter() - start < seconds):
        # We shuffle, so that no contender always follows the same one.
        for name in order.sample(list(turns), len(turns)):
            kept[name].append(turns[name](calls[name]))
        rounds += 1
    return kept


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """The ratio of the two values of each round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def mean_and_range(values: list[float]) -> str:
    """The geometric mean, then the lowest and the highest value; nothing if there are none."""
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def wall_turn(call: Callable[[], Any]) -> Turn:
    """Wall time of a function that makes one call and waits for it, on a CPU."""

    def turn(calls: int) -> float:
        # The first call is not timed: it finds the caches and threads as the contender before left them.
        call()
        return timed(call, calls)

    return turn


def timed(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def device_turn(call: Callable[[], Any]) -> Turn:
    """Time in kernels on a GPU, as CUPTI reports it: launches and gaps between kernels do not count.

    All calls get the same arrays, so small ones stay in the cache, and so do those of the copy.
    """
    from jax.experimental.mosaic.gpu import profiler

    def turn(calls: int) -> float:
        _, milliseconds = profiler.measure(call, iterations=calls)()
        if milliseconds is None:
            raise RuntimeError("CUPTI saw no kernel: the call ran on no GPU")
        return statistics.fmean(milliseconds if calls > 1 else [milliseconds]) / 1e3

    return turn


def _calls(turn: Turn) -> int:
    turn(1)
    return min(_MOST_CALLS, math.ceil(_TURN_SECONDS / turn(1)))

"""Contenders take turns; what they took is compared round by round, so that a slow moment of the machine hits all."""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A turn is that many calls in a row; it returns the seconds per call.
Turn = Callable[[int], float]

# A turn lasts at least so long, unless that takes too many calls: short calls are timed together.
_TURN_SECONDS, _MOST_CALLS = 0.005, 100
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 201


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def take_turns(turns: dict[Any, Turn], seconds: float) -> dict[Any, list[float]]:
    """Seconds per call of each contender in each round.

    Args:
      turns: compiled and warm is what has had one turn; the first is not kept.
      seconds: the time for all rounds together. There are at least 7 and at most 201.
    """
    calls = {name: _calls(turn) for name, turn in turns.items()}
    order = random.Random(0)
    kept: dict[Any, list[float]] = {name: [] for name in turns}
    start, rounds = time.perf_counter(), 0
    while rounds < _FEWEST_ROUNDS or (rounds < _MOST_ROUNDS and time.perf_counter() - start < seconds):
        # Shuffled, so that nobody always follows the same one.
        for name in order.sample(list(turns), len(turns)):
            kept[name].append(turns[name](calls[name]))
        rounds += 1
    return kept


def ratios(numerator: list[float], denominator: list[float]) -> Spread:
    """Of the two values of each round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else math.nan


def wall_turn(call: Callable[[], Any]) -> Turn:
    """Wall time of a function that makes one call and waits for it, on a CPU."""

    def turn(calls: int) -> float:
        # The first call is not timed: it finds the caches and threads as the contender before left them.
        call()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    return turn


def device_turn(call: Callable[[], Any]) -> Turn:
    """Time in kernels on a GPU, as CUPTI reports it: launches and gaps between kernels do not count.

    The arrays of all calls are the same ones, so that small ones stay in the cache, those of the copy too.
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

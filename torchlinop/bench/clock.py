"""A share of the time of a benchmark: it is asked between two pieces of work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Now = Callable[[], float]


class TimeSpentError(Exception):
    """The share is spent."""


@dataclass(frozen=True)
class Clock:
    """Runs out at ``end``, in seconds of ``now``."""

    end: float
    now: Now = time.monotonic

    @classmethod
    def of(cls, seconds: float, now: Now = time.monotonic) -> Clock:
        """One that runs for so many seconds from now."""
        return cls(now() + seconds, now)

    @property
    def left(self) -> float:
        """Seconds, never below zero."""
        return max(0.0, self.end - self.now())

    @property
    def spent(self) -> bool:
        return self.left == 0

    def refuse_late(self) -> None:
        """Raise TimeSpentError when the share is spent."""
        if self.spent:
            raise TimeSpentError("the time of this stage was spent")

    def repetitions(self, most: int, least: int = 1) -> Iterator[int]:
        """0, 1, ... most - 1; after ``least``, only as long as time is left."""
        for i in range(most):
            if i >= least and self.spent:
                return
            yield i


def shares(weights: Sequence[float], total: Clock) -> Iterator[Clock]:
    """A clock for every piece of work: its weight's part of what the earlier ones left over."""
    for i, weight in enumerate(weights):
        yield Clock.of(total.left * weight / sum(weights[i:]), total.now)

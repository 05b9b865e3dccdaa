"""Interleaved timing: ratios of times that neither a drifting machine nor the order of the cases biases."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

VISIT_SECONDS = 0.5  # least time that a visit measures
Work = Callable[[int], float]  # runs this many steps; returns the mean seconds of one


def interleave(
    work: Mapping[str, Work], rounds: int, progress: Callable[[int, float], None] | None = None
) -> dict[str, list[float]]:
    """Returns name -> the seconds per step of each round.

    Every round visits all cases in a random order. The first step of a visit is not timed: it fills the caches that the
    case before it used. `progress` is called after each round with its number, from 1, and the seconds left.
    """
    steps = {}
    for name, run in work.items():
        run(1)  # includes work that is done once
        steps[name] = max(1, round(VISIT_SECONDS / run(1)))
    order, shuffle = list(work), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in work}
    began = time.monotonic()
    for number in range(1, rounds + 1):
        shuffle(order)
        for name in order:
            work[name](1)
            seconds[name].append(work[name](steps[name]))
        if progress:
            progress(number, (time.monotonic() - began) / number * (rounds - number))
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """Returns (median, low, high) of the ratio of two cases of `interleave`, round by round.

    low and high bound the median with at least 95 % confidence for any distribution (order statistics; Conover,
    Practical Nonparametric Statistics, section 3.2). Below six rounds no such bounds exist, and they are the extremes.
    """
    from scipy.stats import binom  # takes half a second to import

    ratios = sorted(a / b for a, b in zip(seconds, reference, strict=True))
    outside = max(int(binom.ppf(0.025, len(ratios), 0.5)) - 1, 0)
    return statistics.median(ratios), ratios[outside], ratios[-1 - outside]

"""Rates of several things, measured in turns, so that what disturbs the machine disturbs all of them."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Run = Callable[[], int]  # one measured pass; returns how many images it made


def interleaved(
    runs: Mapping[str, Run], rounds: int, progress: Callable[[int, int], None]
) -> dict[str, list[float]]:  # fmt: skip
    """Images per second of wall time, of every run in each of `rounds` rounds.

    A first round compiles and warms, and is not counted. progress(passes done, in all).
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    total = len(runs) * (rounds + 1)
    for turn in range(rounds + 1):
        for number, (name, run) in enumerate(runs.items()):
            start = time.perf_counter()
            images = run()
            if turn:
                rates[name].append(images / (time.perf_counter() - start))
            progress(turn * len(runs) + number + 1, total)
    return rates


def even_batch(images: int, most: int, workers: int) -> int:
    """The size of a DataLoader's batches, at most `most`, with which all its workers get as many images."""
    return math.ceil(images / (workers * math.ceil(images / (workers * most))))


def paired(rates: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down leaves its ratio alone."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))

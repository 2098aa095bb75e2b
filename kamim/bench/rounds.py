"""Measures rates of several runs in turns, so that other load on the machine affects all of them alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

Run = Callable[[], int]  # one measured pass; returns its number of images


def interleaved(runs: Mapping[str, Run], rounds: int, progress: Callable[[int, int], None]) -> dict[str, list[float]]:
    """Returns images per second of wall time, of every run in each of `rounds` rounds.

    A first round compiles and warms up, and is not counted. progress: called with (passes done, passes in total).
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


def in_turn(
    groups: Sequence[tuple[Mapping[str, Run], int]], progress: Callable[[int, int], None]
) -> list[dict[str, list[float]]]:
    """Returns `interleaved` of each group of (runs, rounds), one group after the other."""
    passes = [len(runs) * (rounds + 1) for runs, rounds in groups]
    rates = []
    for number, (runs, rounds) in enumerate(groups):
        before = sum(passes[:number])
        rates.append(interleaved(runs, rounds, partial(_shifted, progress, before, sum(passes))))
    return rates


def _shifted(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def even_batch(images: int, most: int, workers: int) -> int:
    """Returns a batch size of at most `most` with which all workers of a DataLoader get the same number of images."""
    return math.ceil(images / (workers * math.ceil(images / (workers * most))))


def paired(rates: Sequence[float], others: Sequence[float]) -> float:
    """Returns the median of the rounds' ratios; a slow-down of a whole round does not change its ratio."""
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))

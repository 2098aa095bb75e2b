"""Intervals for accuracies: of one evaluation, of runs that differ by seed only, and of their paired differences.

Accuracies and results are in per cent; every interval covers 95 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

LEVEL = 0.95


def wilson(accuracy: float, samples: int) -> tuple[float, float]:
    """Wilson's score interval of an accuracy on `samples` images (Wilson 1927, by scipy.stats.binomtest).

    It covers the choice of the validation images, not that of the training seed.
    """
    right = round(accuracy / 100 * samples)
    low, high = stats.binomtest(right, samples).proportion_ci(LEVEL, method="wilson")
    return 100 * float(low), 100 * float(high)


def with_wilson(accuracy: float, samples: int) -> str:
    """Returns an accuracy and its Wilson interval as tables print them, such as "41.20 [39.7, 42.8]"."""
    low, high = wilson(accuracy, samples)
    return f"{accuracy:.2f} [{low:.1f}, {high:.1f}]"


@dataclass(frozen=True)
class Estimate:
    """Runs that differ by seed only. deviation: the sample standard deviation; None for a single run.

    half_width: of the t interval of the mean; None for a single run.
    """

    mean: float
    deviation: float | None
    half_width: float | None
    runs: int

    def __str__(self) -> str:
        """Returns mean ± standard deviation, as tables print it."""
        return f"{self.mean:.2f}" if self.deviation is None else f"{self.mean:.2f} ± {self.deviation:.2f}"

    def of(self, runs: int) -> str:
        """Returns mean ± standard deviation, with the number of runs if only some of `runs` have a value."""
        return str(self) if self.runs == runs else f"{self} ({self.runs} of {runs} runs)"


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of one value or more, with Student's t interval."""
    assert values
    count = len(values)
    if count == 1:
        return Estimate(values[0], None, None, 1)
    deviation = stdev(values)
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
    return Estimate(fmean(values), deviation, quantile * deviation / count**0.5, count)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Estimates values - baseline by seed: paired runs share initial weights, order, crops and masks."""
    return estimate([value - other for value, other in zip(values, baseline, strict=True)])

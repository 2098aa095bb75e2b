"""Intervals against published values and simulation."""

import numpy as np
import pytest

from kamim.reporting.intervals import estimate, paired_difference, wilson


def test_wilson_is_the_published_formula() -> None:
    """The closed form of Wilson (1927), written out."""
    for right, samples in ((0, 10), (7, 10), (3925, 3925), (1500, 3925)):
        p, z = right / samples, 1.959963984540054
        centre = (p + z**2 / (2 * samples)) / (1 + z**2 / samples)
        half = z / (1 + z**2 / samples) * np.sqrt(p * (1 - p) / samples + z**2 / (4 * samples**2))
        assert wilson(100 * p, samples) == pytest.approx((100 * (centre - half), 100 * (centre + half)), abs=1e-9)


def test_a_single_run_has_no_spread() -> None:
    one = estimate([41.5])
    assert (one.mean, one.deviation, one.half_width, str(one)) == (41.5, None, None, "41.50")


def test_three_runs_have_students_interval() -> None:
    three = estimate([40.0, 41.0, 42.0])
    assert str(three) == "41.00 ± 1.00"
    assert three.half_width == pytest.approx(4.302652729911275 / 3**0.5)  # t at 97.5 % with 2 degrees of freedom


def test_the_interval_covers_the_mean_in_95_of_100_studies() -> None:
    draws = np.random.default_rng(0).normal(40, 2, (2000, 3))
    covered = [abs(e.mean - 40) <= e.half_width for e in map(estimate, draws.tolist()) if e.half_width is not None]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_pairs_remove_what_seeds_share() -> None:
    shared = [30.0, 40.0, 50.0]
    difference = paired_difference([value + 1 for value in shared], shared)
    assert (difference.mean, difference.deviation) == pytest.approx((1.0, 0.0))
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], shared)

"""Counter-based random numbers: known answers, pinned values, independence of streams."""

import numpy as np
import pytest

from kamim.method import rng


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123 (kat_vectors, philox4x32 10)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert rng.philox4x32(*(np.uint64(v) for v in (*counter, *key))) == expected


def test_unit_is_pinned() -> None:
    """A change here changes every crop of every run ever made."""
    draws = [rng.unit(7, 3, 11, stream, 0) for stream in (rng.ORDER, rng.CROP, rng.FLIP, rng.MASK)]
    np.testing.assert_allclose(draws, PINNED_UNITS, rtol=0, atol=0)
    assert rng.permutation(7, 3, 10).tolist() == PINNED_ORDER


PINNED_UNITS = [0.03244720029855119, 0.4482038401848849, 0.8786185872157894, 0.029359128276688407]
PINNED_ORDER = [3, 6, 4, 9, 2, 0, 7, 5, 1, 8]


def test_units_are_uniform_and_streams_epochs_seeds_uncorrelated() -> None:
    index = np.arange(20_000)
    base = rng.units(0, 0, index, rng.CROP, 1)[:, 0]
    assert ((base >= 0) & (base < 1)).all()
    counts = np.histogram(base, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees: p = 0.0007
    others = {
        "stream": rng.units(0, 0, index, rng.FLIP, 1)[:, 0],
        "epoch": rng.units(0, 1, index, rng.CROP, 1)[:, 0],
        "seed": rng.units(1, 0, index, rng.CROP, 1)[:, 0],
        "draw": rng.units(0, 0, index, rng.CROP, 2)[:, 1],
        "index": rng.units(0, 0, index + 1, rng.CROP, 1)[:, 0],
        "large seed": rng.units(1 << 40, 0, index, rng.CROP, 1)[:, 0],
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03, name


def test_permutation_holds_every_index_once_and_changes_with_the_epoch() -> None:
    first, second = rng.permutation(0, 0, 1000), rng.permutation(0, 1, 1000)
    assert sorted(first) == list(range(1000))
    assert sorted(second) == list(range(1000))
    assert (first == second).mean() < 0.02
    assert (first == np.arange(1000)).mean() < 0.02

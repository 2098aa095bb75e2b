"""Block masks: their number, their distribution, and that they depend on seed, epoch and index only."""

import numpy as np
import pytest

from kamim.method.masking import block_masks, masked_count


@pytest.mark.parametrize(
    ("grid", "ratio", "count"), [(6, 0.6, 22), (6, 0.5, 18), (3, 0.6, 6), (6, 1.0, 36), (4, 0.01, 1)]
)
def test_exactly_the_ratio_is_masked(grid: int, ratio: float, count: int) -> None:
    assert masked_count(grid, ratio) == count
    assert (block_masks(0, 0, np.arange(50), grid, ratio).sum(axis=(1, 2)) == count).all()


def test_every_block_is_masked_equally_often_and_blocks_are_uncorrelated() -> None:
    masks = block_masks(0, 0, np.arange(20_000), 6, 0.6).reshape(-1, 36)
    assert np.abs(masks.mean(axis=0) - 22 / 36).max() < 0.015
    correlation = np.corrcoef(masks[:, 0], masks[:, 7])[0, 1]
    assert correlation == pytest.approx(-1 / 35, abs=0.03)


def test_a_mask_depends_on_seed_epoch_and_index_alone() -> None:
    alone = block_masks(1, 2, np.array([40]), 6, 0.6)[0]
    among = block_masks(1, 2, np.array([3, 40, 9]), 6, 0.6)[1]
    np.testing.assert_array_equal(alone, among)
    for other in (block_masks(2, 2, np.array([40]), 6, 0.6), block_masks(1, 3, np.array([40]), 6, 0.6)):
        assert (alone != other[0]).any()

"""Which samples make a step: nothing dropped, nothing repeated, whoever asks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plan import Plan


def epoch_of(plan: Plan, epoch: int = 0) -> list[int]:
    first = epoch * plan.steps_per_epoch
    return [int(i) for part in plan.micro_batches(first, first + plan.steps_per_epoch) for i in part.indices]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 16), st.integers(1, 5), st.booleans())
def test_ranks_and_micro_batches_share_out_the_same_global_order(
    samples: int, batch: int, micro: int, world: int, drop_last: bool
) -> None:
    if (drop_last and batch > samples) or batch < world:
        return
    whole = Plan(samples, batch, batch, seed=1, drop_last=drop_last)
    ranks = [Plan(samples, batch, micro, seed=1, drop_last=drop_last, rank=r, world=world) for r in range(world)]
    for step in range(whole.steps_per_epoch):
        (expected,) = whole.micro_batches(step, step + 1)
        parts = [part for plan in ranks for part in plan.micro_batches(step, step + 1)]
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), expected.indices)
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert all(
            len(part.indices) <= plan.largest_micro_batch <= micro
            for plan in ranks
            for part in plan.micro_batches(step, step + 1)
        )
        assert sum(part.last for part in parts) == world
    seen = epoch_of(whole)
    assert len(seen) == len(set(seen)) == (samples // batch * batch if drop_last else samples)


def test_epochs_differ_and_unshuffled_is_in_order() -> None:
    plan = Plan(50, 10, 10, seed=0)
    assert epoch_of(plan, 0) != epoch_of(plan, 1)
    assert epoch_of(plan, 1) == epoch_of(plan, 1)
    assert epoch_of(Plan(50, 10, 10, seed=0, shuffle=False)) == list(range(50))


def test_any_step_can_be_had_alone() -> None:
    plan = Plan(23, 5, 2, seed=3)
    run = list(plan.micro_batches(0, 12))
    for step in range(12):
        alone = [part.indices.tolist() for part in plan.micro_batches(step, step + 1)]
        assert alone == [part.indices.tolist() for part in run if part.step == step]


def test_more_ranks_than_samples_in_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size = 4: is less than the 8 ranks"):
        Plan(10, 4, 4, seed=0, world=8)


def test_a_batch_larger_than_the_store_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size = 64: is more than the store's 10 samples"):
        Plan(10, 64, 64, seed=0)

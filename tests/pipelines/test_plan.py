"""Which samples make a step: nothing dropped, nothing repeated, whoever asks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kamim.method import rng
from pipelines.plan import CHUNK, ORDERS, WINDOW, Order, Plan, chunked


def epoch_of(plan: Plan, epoch: int = 0) -> list[int]:
    first = epoch * plan.steps_per_epoch
    return [int(i) for part in plan.micro_batches(first, first + plan.steps_per_epoch) for i in part.indices]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 16),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(ORDERS),
)
def test_ranks_and_micro_batches_share_out_the_same_global_order(
    samples: int, batch: int, micro: int, world: int, drop_last: bool, order: Order
) -> None:
    if (drop_last and batch > samples) or batch < world:
        return
    whole = Plan(samples, batch, batch, 1, order, drop_last=drop_last)
    ranks = [Plan(samples, batch, micro, 1, order, drop_last=drop_last, rank=r, world=world) for r in range(world)]
    for step in range(whole.steps_per_epoch):
        (expected,) = whole.micro_batches(step, step + 1)
        parts = [part for plan in ranks for part in plan.micro_batches(step, step + 1)]
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), expected.indices)
        assert sum(part.loss_weight for part in parts) == pytest.approx(1)
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
    assert epoch_of(Plan(50, 10, 10, seed=0, order="stored")) == list(range(50))


@pytest.mark.parametrize("order", ORDERS)
def test_any_step_can_be_had_alone(order: Order) -> None:
    plan = Plan(23, 5, 2, 3, order)
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


SAMPLES = 5 * CHUNK * WINDOW + 3 * CHUNK + 17  # five windows, and a short chunk


def test_draws_stay_what_they_are() -> None:
    assert epoch_of(Plan(10, 5, 5, seed=0)) == [2, 8, 0, 5, 9, 7, 6, 3, 4, 1]
    np.testing.assert_array_equal(Plan(SAMPLES, 50, 50, seed=7).step_indices(1), rng.permutation(7, 0, SAMPLES)[50:100])
    assert chunked(0, 0, 50_000)[:6].tolist() == [15413, 26035, 39610, 35165, 46562, 36232]


def test_a_chunked_order_is_a_pure_permutation_that_differs_by_epoch_and_seed() -> None:
    orders = [chunked(seed, epoch, SAMPLES) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(SAMPLES))
    np.testing.assert_array_equal(orders[0], orders[3])
    assert all((orders[0][:CHUNK] != other[:CHUNK]).mean() > 0.9 for other in orders[1:3])


def test_a_chunked_order_reads_each_window_in_long_runs() -> None:
    plan = Plan(SAMPLES, 1, 1, 0, "chunked")
    assert plan.windows == 5
    parts = list(plan.micro_batches(0, SAMPLES))
    for number in range(5):
        samples = np.sort([part.indices[0] for part in parts if part.window == number])
        assert WINDOW * CHUNK <= len(samples) < (WINDOW + 2) * CHUNK
        runs = np.split(samples, np.flatnonzero(np.diff(samples) > 1) + 1)
        assert len(runs) <= WINDOW + 3
        assert sum(len(run) >= CHUNK for run in runs) >= len(runs) - 3  # all but the short chunk and those cut in two


def test_every_batch_of_a_chunked_order_is_drawn_from_many_chunks() -> None:
    """As many as 256 draws from the chunks of a window give, less five standard deviations or so."""
    expected = WINDOW * (1 - (1 - 1 / WINDOW) ** 256)
    plan = Plan(SAMPLES, 256, 256, 0, "chunked")
    chunks = [len(np.unique(plan.step_indices(step) // CHUNK)) for step in range(plan.steps_per_epoch)]
    assert min(chunks) > 0.85 * expected
    order = chunked(0, 0, SAMPLES)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.01  # neighbours in the order are none in the store


def test_a_store_of_less_than_two_windows_is_shuffled_as_a_whole() -> None:
    for samples in (1, CHUNK + 1, 2 * CHUNK * WINDOW - 1):
        np.testing.assert_array_equal(chunked(3, 4, samples), rng.permutation(3, 4, samples))

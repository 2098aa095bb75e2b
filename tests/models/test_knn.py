"""kNN, places and subsets, against scikit-learn and slow obvious twins."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.classification import multiclass_accuracy

from kamim import KamimError
from kamim.models.knn import knn
from kamim.models.target_rank import target_rank
from kamim.storage.store import Store
from pipelines.samples import n_per_class, some_per_class

CPU = torch.device("cpu")


def run(train, train_labels, val, val_labels, classes, **options):
    arrays = (torch.as_tensor(a) for a in (train, train_labels, val, val_labels))
    return knn(*arrays, classes, CPU, lambda done, total: None, **options)


def clusters(n: int, classes: int, seed: int, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=n)
    centres = np.random.default_rng(99).normal(size=(classes, 16))
    return (centres[labels] + spread * random.normal(size=(n, 16))).astype(np.float32), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_scikit_learn(temperature: float) -> None:
    (train, train_labels), (val, val_labels) = clusters(600, 8, 0), clusters(150, 8, 1)
    ours = run(train, train_labels, val, val_labels, 8, temperature=temperature, tile=64)
    for k in (5, 10, 20, 100):
        twin = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
        shares = twin.fit(train, train_labels).predict_proba(val)
        assert ours[str(k)]["top1"] == pytest.approx(100 * (shares.argmax(1) == val_labels).mean(), abs=1e-9)
        voted = np.take_along_axis(shares, val_labels[:, None], 1)[:, 0] > 0
        first = np.argsort(-shares, axis=1, kind="stable")[:, :5]
        assert ours[str(k)]["top5"] == pytest.approx(100 * ((first == val_labels[:, None]).any(1) & voted).mean())
    assert ours["5"]["top1"] != ours["100"]["top1"]  # else this would prove little


def slow_knn(train, train_labels, val, val_labels, classes, k):
    """Signs only, so that every similarity is exact and many are equal."""
    right = {1: 0, 5: 0}
    for query, label in zip(val, val_labels, strict=True):
        similarity = (train @ query / len(query)).astype(np.float64)
        order = sorted(range(len(train)), key=lambda i: (-similarity[i], i))[:k]
        votes = [sum(np.exp(similarity[i]) for i in order if train_labels[i] == c) for c in range(classes)]
        ranked = sorted(range(classes), key=lambda c: (-round(votes[c], 9), c))
        for top in right:
            right[top] += label in [c for c in ranked[:top] if votes[c] > 0]
    return {f"top{top}": 100 * count / len(val) for top, count in right.items()}


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 12), st.integers(1, 50))
def test_ties_go_to_the_first_whatever_the_tile(seed: int, n: int, m: int, tile: int) -> None:
    random = np.random.default_rng(seed)
    train, val = (random.choice([-1.0, 1.0], size=(size, 4)).astype(np.float32) for size in (n, m))
    train_labels, val_labels = random.integers(7, size=n), random.integers(7, size=m)
    ks = sorted({1, 1 + n // 2, n})
    ours = run(train, train_labels, val, val_labels, 7, ks=ks, temperature=1.0, tile=tile)
    for k in ks:
        expected = slow_knn(train, train_labels, val, val_labels, 7, k)
        assert ours[str(k)] == pytest.approx(expected, abs=1e-9), k


def test_the_nearer_of_two_equal_neighbours_stands_first() -> None:
    same = np.ones((3, 4), np.float32)
    for labels, top1 in (([2, 0, 1], 100.0), ([0, 2, 1], 0.0)):
        assert run(same, labels, same[:1], [2], 3, ks=(1,), tile=2)["1"]["top1"] == top1


def test_memory_mapped_bf16(tmp_path) -> None:
    features, labels = clusters(60, 4, 3)
    bf16 = torch.from_numpy(features).bfloat16()
    bf16.view(torch.int16).numpy().tofile(tmp_path / "features")
    mapped = torch.from_numpy(np.memmap(tmp_path / "features", np.int16, "r+", shape=(60, 16))).view(torch.bfloat16)
    expected = run(bf16.float(), labels, bf16.float(), labels, 4, ks=(5,))
    assert run(mapped, labels, mapped, labels, 4, ks=(5,), tile=7) == expected


def test_features_that_are_nan_are_never_right() -> None:
    features = torch.full((8, 4), float("nan"))
    assert run(features, [0] * 8, features, [0] * 8, 6, ks=(3,))["3"] == {"top1": 0.0, "top5": 0.0}


def test_k_must_fit() -> None:
    features, labels = clusters(19, 3, 0)
    with pytest.raises(ValueError, match="k = 20: must be 1 to 19"):
        run(features, labels, features, labels, 3, ks=(5, 20))
    with pytest.raises(ValueError, match="k = 0: "):
        run(features, labels, features, labels, 3, ks=(0,))


def test_places() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.7, 0.2], [float("nan"), 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    for label, expected in enumerate(([3, 4, 0], [0, 3, 1], [1, 2, 2], [2, 1, 3])):
        assert target_rank(scores, torch.full((3,), label)).tolist() == expected


def test_places_give_torchmetrics_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(500, 12, generator=generator), torch.randint(12, (500,), generator=generator)
    for k in (1, 5):
        expected = multiclass_accuracy(scores, labels, 12, top_k=k, average="micro")
        assert (target_rank(scores, labels) < k).float().mean() == pytest.approx(float(expected))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**63 - 1))
def test_n_per_class(n: int, classes: int, seed: int) -> None:
    labels = np.random.default_rng(seed % 1000).permutation(np.repeat(np.arange(classes), n + 3))
    chosen = n_per_class(labels, n, seed)
    assert np.bincount(labels[chosen], minlength=classes).tolist() == [n] * classes
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, n_per_class(labels, n, seed))


def test_n_per_class_takes_all_of_a_class_that_has_fewer() -> None:
    labels = np.array([3, 0, 3, 1, 3, 0, 3])
    chosen = n_per_class(labels, 2, 0)
    assert np.bincount(labels[chosen]).tolist() == [2, 1, 0, 2]


def test_n_per_class_varies_with_the_seed_and_takes_every_sample() -> None:
    labels = np.arange(60) % 3
    drawn = [n_per_class(labels, 4, seed) for seed in range(40)]
    assert set(np.concatenate(drawn).tolist()) == set(range(60))


def test_per_class_of_a_small_class(stores: dict[str, Path]) -> None:
    message = r"^per_class = 9: class 'astronaut' has 8 samples; choose at most 8$"
    with pytest.raises(KamimError, match=message):
        some_per_class(Store(stores["zarr"]), 9, 0)

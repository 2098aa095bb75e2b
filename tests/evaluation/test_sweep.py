"""The sweep against probes trained one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from kamim.evaluation import probe_sweep as module
from kamim.evaluation.options import SweepOptim
from kamim.evaluation.probe_sweep import Probes, sweep
from kamim.evaluation.results import SweepRow, best_by_readout, best_row
from kamim.method import rng
from kamim.models.readout import Readout
from kamim.training import schedule

CPU = torch.device("cpu")
N, M, D, CLASSES = 96, 40, 12, 7
LRS = (1e-3, 1e-2, 0.1)
OPTIM = SweepOptim(batch_size=32, micro_batch=32, epochs=6, warmup_epochs=2, weight_decay=0.2, min_lr=1e-5)


def data(n: int, seed: int, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, D, generator=generator), labels


def readouts(noise: float = 2.0) -> tuple[dict[Readout, tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor]:
    """Three readouts, deeper ones clearer, the last of another width."""
    (train, labels), (val, val_labels) = data(N, 0, noise), data(M, 1, noise)
    found = {
        Readout(block, "mean", "none"): (
            train + scale * torch.randn(N, D, generator=torch.Generator().manual_seed(block)),
            val,
        )
        for block, scale in ((1, 4.0), (2, 0.5))
    }
    return {**found, Readout(3, "cls", "token"): (train[:, :5], val[:, :5])}, labels, val_labels


def run(features, labels, val_labels, lrs=LRS, optim=OPTIM, seed=3):
    return sweep(features, labels, val_labels, CLASSES, lrs, optim, seed, CPU, lambda done, total: None)


def alone(features: torch.Tensor, labels: torch.Tensor, lr: float, seed: int) -> nn.Linear:
    """One probe, as plainly as can be."""
    torch.manual_seed(seed)
    probe = nn.Linear(features.shape[1], CLASSES)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, betas=OPTIM.betas, weight_decay=OPTIM.weight_decay)
    scheduler = schedule.cosine(optimizer, OPTIM, N // OPTIM.batch_size)
    step = 0
    for epoch in range(OPTIM.epochs):
        for batch in np.split(rng.permutation(seed, epoch, N), N // OPTIM.batch_size):
            loss = nn.functional.cross_entropy(probe(features[batch].float()), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            scheduler.step_update(step)
            optimizer.step()
            step += 1
    return probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_probe_equals_the_same_probe_alone(dtype: torch.dtype) -> None:
    features, labels, _ = readouts()
    pair = [train.to(dtype) for train, _ in list(features.values())[:2]]
    probes = Probes(pair, CLASSES, LRS, 5, CPU)
    probes.train(labels, OPTIM, 5, lambda: None)
    for r, train in enumerate(pair):
        for l, lr in enumerate(LRS):
            twin = alone(train, labels, lr, 5)
            torch.testing.assert_close(probes.weights[l][r].T, twin.weight, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(probes.biases[l][r, 0], twin.bias, atol=2e-5, rtol=1e-4)


def test_rows_are_the_accuracies_of_probes_alone() -> None:
    features, labels, val_labels = readouts()
    rows = run(features, labels, val_labels)
    assert len(rows) == len(features) * len(LRS)
    for row in rows:
        train, val = features[Readout(row.block, row.pooling, row.norm)]
        first = alone(train, labels, row.lr, 3)(val).argsort(dim=1, descending=True)
        for top in (1, 5):
            expected = 100 * (first[:, :top] == val_labels[:, None]).any(dim=1).double().mean()
            assert getattr(row, f"top{top}") == pytest.approx(float(expected))
    assert len({row.top1 for row in rows}) > 3


def test_groups_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, val_labels = readouts()
    whole = run(features, labels, val_labels)
    monkeypatch.setattr(module, "GROUP_BYTES", 1)
    seen: list[tuple[int, int]] = []
    apart = sweep(features, labels, val_labels, CLASSES, LRS, OPTIM, 3, CPU, lambda *at: seen.append(at))
    assert apart == whole
    assert seen == [(i + 1, 3 * 18) for i in range(3 * 18)]


def test_separable_features_reach_all_and_shuffled_labels_chance() -> None:
    (train, labels), (val, val_labels) = data(700, 0, noise=0.1), data(700, 1, noise=0.1)
    features = {Readout(1, "mean", "none"): (train, val)}
    optim = OPTIM.model_copy(update={"epochs": 20, "min_lr": 0.0})
    assert best_row(run(features, labels, val_labels, optim=optim)).top1 == 100
    shuffled = labels[torch.from_numpy(rng.permutation(1, 0, 700))]
    noise = {Readout(1, "mean", "none"): (data(700, 2, noise=100)[0], data(700, 3, noise=100)[0])}
    for row in run(noise, shuffled, val_labels, optim=optim):
        assert abs(row.top1 - 100 / CLASSES) < 6  # 4 standard deviations are 5.3


def test_the_same_seed_gives_the_same_rows_and_another_does_not() -> None:
    features, labels, val_labels = readouts()
    assert run(features, labels, val_labels) == run(features, labels, val_labels)
    assert run(features, labels, val_labels) != run(features, labels, val_labels, seed=4)


def test_memory_mapped_features(tmp_path) -> None:
    features, labels, val_labels = readouts()
    stored = {}
    for readout, pair in features.items():
        mapped = []
        for i, part in enumerate(pair):
            np.save(tmp_path / f"{readout.block}-{i}.npy", part.numpy())
            mapped.append(torch.from_numpy(np.load(tmp_path / f"{readout.block}-{i}.npy", mmap_mode="r+")))
        stored[readout] = (mapped[0], mapped[1])
    assert run(stored, labels, val_labels) == run(features, labels, val_labels)


def test_a_probe_that_diverges_is_wrong_and_alone() -> None:
    features, labels, val_labels = readouts()
    broken = {Readout(9, "mean", "none"): tuple(torch.full_like(f, torch.nan) for f in data(N, 0)[:1] + data(M, 1)[:1])}
    rows = run({**features, **broken}, labels, val_labels)
    assert all(row.top1 == row.top5 == 0 for row in rows if row.block == 9)
    assert [row for row in rows if row.block != 9] == run(features, labels, val_labels)


def test_a_batch_must_fit() -> None:
    features, labels, val_labels = readouts()
    with pytest.raises(ValueError, match="batch_size = 97: is more than the 96 training samples"):
        run(features, labels, val_labels, optim=OPTIM.model_copy(update={"batch_size": 97}))


def test_best_rows() -> None:
    def row(block: int, lr: float, top1: float, top5: float) -> SweepRow:
        return SweepRow(block, "mean", "none", lr, top1, top5)

    rows = [row(2, 0.1, 50, 80), row(1, 0.1, 30, 60), row(2, 0.2, 50, 90), row(1, 0.2, 30, 60)]
    assert best_row(rows) is rows[2]
    assert best_by_readout(rows) == [rows[1], rows[2]]

"""Stochastic depth: a function of seed, epoch, sample, block and branch, and of nothing else."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from runs import WORLD, config
from torch import Tensor, nn
from torch.nn.functional import one_hot

from kamim.config.pretrain import Compute, Optim
from kamim.evaluation import classifier_training as classify
from kamim.evaluation import finetune
from kamim.method import rng
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.models.stochastic_depth import DropPath, draw_paths
from kamim.training.checkpoint import Keep
from kamim.training.metrics import read
from kamim.training.objective import MaskedReconstruction
from kamim.training.pretrain import pretrain
from kamim.training.replay import replay
from kamim.training.trainer import Objective, Run, Trainer
from pipelines.batch import Batch, normalise

SEED, EPOCH, RATE = 5, 2, 0.5
CPU = torch.device("cpu")


def images_of(count: int, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def factor(index: int, block: int, branch: int, rate: float) -> float:
    """The slow, obvious twin: 0 or 1 / (1 - rate) for one sample, block and branch."""
    return 0.0 if rng.unit(SEED, EPOCH, index, rng.DROP_PATH, 2 * block + branch) < rate else 1 / (1 - rate)


@pytest.mark.parametrize(("name", "side"), [("vit_demo", 64), ("swin_tiny", 192)])
def test_each_sample_goes_through_the_branches_drawn_for_it(name: str, side: int) -> None:
    """Sample by sample, without any branch that is dropped."""
    torch.manual_seed(0)
    encoder = build_encoder(name, side, RATE)
    indices = np.array([40, 7, 300])
    images = normalise(images_of(3, side))
    draw_paths(encoder, SEED, EPOCH, indices, CPU)
    with torch.no_grad():
        made = encoder.train().forward_features(images)
    plain = build_encoder(name, side)
    plain.load_state_dict(encoder.state_dict())
    blocks = [module for module in plain.modules() if hasattr(module, "drop_path1")]
    rates = np.linspace(0, RATE, len(blocks))

    class Times(nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return self.value * x

    dropped = 0
    for row, index in enumerate(indices):
        for block, module in enumerate(blocks):
            for branch in (0, 1):
                value = factor(int(index), block, branch, rates[block])
                setattr(module, f"drop_path{branch + 1}", Times(value))
                dropped += value == 0
        with torch.no_grad():
            expected = plain.forward_features(images[row : row + 1])
        torch.testing.assert_close(made[row : row + 1], expected, rtol=1e-4, atol=1e-4)
    assert 0 < dropped < 6 * len(blocks)


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_rates_grow_as_timms(name: str) -> None:
    with torch.device("meta"):
        ours = [m for m in build_encoder(name, 192, 0.3).modules() if isinstance(m, DropPath)]
        full = timm.create_model(
            {"vit_tiny": "vit_tiny_patch16_224"}.get(name, "swin_tiny_patch4_window7_224"), drop_path_rate=0.3
        )
        theirs = [m.drop_prob for m in full.modules() if isinstance(m, timm.layers.DropPath)]
    assert [path.rate for path in ours] == theirs
    assert [path.draw for path in ours] == list(range(2, 24))
    assert [path.rate for path in ours] == pytest.approx([0.3 * (draw // 2) / 11 for draw in range(2, 24)])


def test_samples_are_dropped_as_often_as_the_rate_says() -> None:
    encoder = build_encoder("vit_demo", 64, RATE)
    draw_paths(encoder, SEED, EPOCH, np.arange(4000), CPU)
    paths = [module for module in encoder.modules() if isinstance(module, DropPath)]
    kept = np.array([(path.factors != 0).numpy() for path in paths if path.factors is not None])
    for path, row in zip(paths, kept, strict=True):
        assert path.factors is not None
        assert (1 - row.mean()) == pytest.approx(path.rate, abs=0.03)
        assert set(path.factors.tolist()) == {0.0, np.float32(1 / (1 - path.rate)).item()}
    correlation = np.corrcoef(kept) - np.eye(len(paths))
    assert np.abs(correlation).max() < 0.07  # 4 sigma: blocks and branches are drawn apart


def test_evaluation_drops_nothing_and_a_model_without_it_has_no_such_module() -> None:
    torch.manual_seed(0)
    with_it, without = build_encoder("vit_demo", 64, RATE), build_encoder("vit_demo", 64)
    without.load_state_dict(with_it.state_dict())
    images = normalise(images_of(2))
    with torch.no_grad():
        assert torch.equal(with_it.eval()(images), without.eval()(images))
    assert not any(isinstance(module, DropPath) for module in without.modules())


def test_the_branchs_dtype_stays() -> None:
    path = DropPath(0.5, 0)
    path.factors = torch.tensor([2.0, 0.0])
    made = path(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert made.dtype == torch.bfloat16
    assert made[:, 0, 0].tolist() == [2, 0]


def test_a_batch_without_draws_of_its_own_is_a_bug() -> None:
    encoder = build_encoder("vit_demo", 64, RATE).train()
    with pytest.raises(AssertionError, match="draw_paths"):
        encoder(normalise(images_of(2)))
    draw_paths(encoder, SEED, EPOCH, np.arange(3), CPU)
    with pytest.raises(AssertionError, match="draw_paths"):
        encoder(normalise(images_of(2)))


def test_a_compiled_model_follows_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every batch, and without compiling again for it."""
    torch.manual_seed(0)
    model = MaskedImageModel("vit_demo", 64, RATE).train()
    compiled = torch.compile(model, backend="aot_eager")
    mask = torch.tensor([[[True, False], [False, True]]])

    def both(indices: np.ndarray) -> tuple[Tensor, Tensor]:
        draw_paths(compiled, SEED, EPOCH, indices, CPU)
        given = normalise(images_of(len(indices))), mask.expand(len(indices), 2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(*given), model(*given)

    for size in (4, 3):  # the second one makes the size a variable
        both(np.arange(size))
    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    for first, size in ((10, 3), (20, 3), (30, 4), (40, 6)):
        made, expected = both(np.arange(first, first + size))
        torch.testing.assert_close(made, expected, rtol=1e-2, atol=1e-2)


def in_parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The same step in micro-batches of `size`."""
    for at in range(0, len(batch), size):
        rows = slice(at, at + size)
        yield replace(
            batch,
            images=batch.images[rows],
            labels=batch.labels[rows],
            indices=batch.indices[rows],
            loss_weight=len(batch.indices[rows]) / len(batch),
            last=at + size >= len(batch),
        )


def one_step(model: nn.Module, objective: Objective, batches: list[Batch], out: Path) -> tuple[float, list[Tensor]]:
    """Loss and gradients of a step."""
    gradients: list[Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
    )
    run = Run(out, "pretrain", {}, Optim(clip_grad=None), 20, 20, Keep(1))
    logged = Trainer(run, model, model, optimizer, objective, lambda *_: batches, WORLD).train_step(0, batches)
    return float(logged["loss"]), gradients


def pretrained(batches: list[Batch], tmp_path: Path) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one step of pretraining."""
    given = config(tmp_path, tmp_path, "weighting=null", f"model.drop_path={RATE}")
    torch.manual_seed(0)
    model = MaskedImageModel("vit_demo", 64, RATE)
    return one_step(model, MaskedReconstruction(given, model), batches, tmp_path)


def finetuned(batches: list[Batch], tmp_path: Path) -> tuple[float, list[Tensor]]:
    """Loss and gradients of one step of fine-tuning, without MixUp, whose partners are of the micro-batch."""
    torch.manual_seed(0)
    model = finetune.Classifier(build_encoder("vit_demo", 64, RATE), 3)

    def finish(batch: Batch) -> tuple[Tensor, Tensor]:
        return normalise(batch.images), one_hot(batch.labels, 3).float()

    objective = classify.CrossEntropy(model, lambda images: images, finish, Compute(), SEED)
    return one_step(model, objective, batches, tmp_path)


@pytest.mark.parametrize("trained", [pretrained, finetuned])
def test_micro_batches_do_not_change_a_step(
    trained: Callable[[list[Batch], Path], tuple[float, list[Tensor]]], tmp_path: Path
) -> None:
    whole = Batch(images_of(12), None, torch.arange(12) % 3, np.arange(30, 42), EPOCH, 0, last=True, loss_weight=1.0)
    loss, gradients = trained([whole], tmp_path)
    for size in (7, 4, 1):
        other, others = trained(list(in_parts(whole, size)), tmp_path)
        assert other == pytest.approx(loss, rel=1e-5)
        for one, another in zip(gradients, others, strict=True):
            torch.testing.assert_close(another, one, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_a_replayed_step_is_the_runs(stores: dict[str, Path], tmp_path: Path) -> None:
    given = config(tmp_path / "run", stores["zarr"], f"model.drop_path={RATE}", "optim.micro_batch=5", "optim.epochs=2")
    pretrain(given, lambda done, total, metrics: None)
    assert replay(tmp_path / "run", 3, "cpu").loss == pytest.approx(read(tmp_path / "run")[3]["loss"], abs=1e-6)

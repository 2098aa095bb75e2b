"""Attentive probes against plain twins, what they learn, and their training on cached tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.evaluation import attentive
from kamim.evaluation.attentive import CachedTokens, build_head, even_micro_batch, fitted
from kamim.evaluation.context import EvalContext
from kamim.evaluation.evaluate import evaluate
from kamim.evaluation.evaluated_model import planned_model
from kamim.evaluation.modes import MODES
from kamim.evaluation.options import Attentive, AttentiveOptim, Evaluation
from kamim.method import rng
from kamim.models.masked_image_model import build_encoder
from kamim.models.readout import Readout, fixed, prefix, tokens_after, width
from kamim.reporting import plots
from kamim.storage.store import Store
from kamim.training import checkpoint, schedule
from kamim.training.pretrain import pretrain
from kamim.training.trainer import Trainer
from pipelines.plan import Plan
from pipelines.samples import all_samples

CPU = torch.device("cpu")
T, D, QUERIES, CLASSES = 9, 12, 4, 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class EfficientProbe(nn.Module):
    """Efficient probing as its paper describes it: every token is projected, then one query after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.ParameterList(torch.zeros(D) for _ in range(QUERIES))
        self.value = nn.Linear(D, D, bias=False)
        self.norm = nn.BatchNorm1d(D, eps=1e-6, affine=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.value(tokens).chunk(QUERIES, dim=2)
        outputs = []
        for query, part in zip(self.queries, parts, strict=True):
            weights = ((tokens * query).sum(dim=2) / D**0.5).softmax(dim=1)
            outputs.append((weights[..., None] * part).sum(dim=1))
        return self.head(self.norm(torch.cat(outputs, dim=1)))


class Abmilp(nn.Module):
    """AbMILP, one image after the other."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(D, D) for _ in range(depth - 1))
        self.score = nn.Linear(D, 1)
        self.norm = nn.BatchNorm1d(D, eps=1e-6, affine=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = []
        for image in tokens:
            x = image
            for layer in self.hidden:
                x = layer(x).tanh()
            weights = self.score(x)[:, 0].softmax(dim=0)
            pooled.append(weights @ image)
        return self.head(self.norm(torch.stack(pooled)))


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D, eps=1e-6, affine=False)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(sum(tokens.unbind(dim=1)) / T))


def twin_of(pooling: Any, head: attentive.AttentiveHead, depth: int = 1) -> nn.Module:
    """The plain module with the head's weights."""
    twin = {"ep": EfficientProbe, "abmilp": lambda: Abmilp(depth), "mean": Mean}[pooling]()
    weights = dict(head.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            kind, _, rest = name.partition(".")
            if kind == "queries":
                parameter.copy_(weights["pooling.queries"][int(rest)])
            elif kind == "hidden":
                layer, field = rest.split(".")
                parameter.copy_(weights[f"pooling.score.{2 * int(layer)}.{field}"])
            else:
                ours = {"value": "pooling.value", "head": "linear", "score": f"pooling.score.{2 * (depth - 1)}"}[kind]
                parameter.copy_(weights[f"{ours}.{rest}"])
    return twin


@pytest.mark.parametrize(("pooling", "depth"), [("ep", 1), ("abmilp", 1), ("abmilp", 2), ("mean", 1)])
def test_a_head_equals_its_twin_in_output_and_gradients(pooling: Any, depth: int) -> None:
    head = build_head(pooling, D, CLASSES, QUERIES, depth, seed=1)
    if pooling == "ep":
        nn.init.normal_(head.pooling.queries)  # weights far from uniform
    twin, tokens = twin_of(pooling, head, depth), noise(7, T, D)
    assert torch.equal(
        torch.tensor(sum(p.numel() for p in twin.parameters())), torch.tensor(sum(p.numel() for p in head.parameters()))
    )
    targets = torch.arange(7) % CLASSES
    for module in (head, twin):
        nn.functional.cross_entropy(module(tokens), targets).backward()
    torch.testing.assert_close(head.linear.weight.grad, twin.head.weight.grad, rtol=1e-4, atol=1e-6)
    if pooling == "ep":
        torch.testing.assert_close(head.pooling.value.weight.grad, twin.value.weight.grad, rtol=1e-4, atol=1e-6)
        rows = torch.stack([query.grad for query in twin.queries])
        torch.testing.assert_close(head.pooling.queries.grad, rows, rtol=1e-4, atol=1e-6)
    if pooling == "abmilp":
        torch.testing.assert_close(head.pooling.score[-1].weight.grad, twin.score.weight.grad, rtol=1e-4, atol=1e-6)
    for module in (head, twin):  # with the running statistics of that one batch
        module.eval()
    torch.testing.assert_close(head(tokens), twin(tokens), rtol=1e-5, atol=1e-6)


def test_under_autocast_only_the_pooling_is_rounded() -> None:
    tokens = noise(64, T, D).to(torch.bfloat16)
    head = build_head("ep", D, CLASSES, QUERIES, 1, seed=1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head(tokens)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, head(tokens), rtol=0.02, atol=0.02)
    assert not torch.equal(rounded, head(tokens))


def test_a_head_begins_as_the_code_of_efficient_probing() -> None:
    head = build_head("ep", 384, 10, 32, 1, seed=0)
    assert sorted(name for name, _ in head.named_parameters()) == [
        "linear.bias",
        "linear.weight",
        "pooling.queries",
        "pooling.value.weight",
    ]
    assert head.pooling.queries.shape == (32, 384)
    assert float(head.pooling.queries.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert (head.batch.eps, head.batch.affine) == (1e-6, False)
    assert float(head.pooling.value.weight.detach().abs().max()) == pytest.approx(384**-0.5, rel=0.01)
    # of ViT-B and 1000 classes: the "Trainable Parameters" of its log of SimMIM
    assert sum(p.numel() for p in build_head("ep", 768, 1000, 32, 1, 0).parameters()) == 1_383_400


def test_a_head_is_a_function_of_its_seed_and_draws_from_no_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_head("ep", D, CLASSES, QUERIES, 1, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["pooling.queries"], other["pooling.queries"])


@pytest.mark.parametrize("pooling", ["ep", "abmilp"])
def test_attention_sums_to_one_and_follows_the_tokens(pooling: Any) -> None:
    head = build_head(pooling, D, CLASSES, QUERIES, 2, seed=1)
    tokens = noise(3, T, D)
    attention = head.pooling.attention(tokens)
    assert attention.shape == (3, QUERIES if pooling == "ep" else 1, T)
    torch.testing.assert_close(attention.sum(dim=2), torch.ones(attention.shape[:2]))
    order = torch.randperm(T, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head.pooling.attention(tokens[:, order]), attention[:, :, order])


def test_batches_are_those_of_the_plan_with_their_own_tokens_and_labels() -> None:
    tokens, labels = noise(10, T, D).to(torch.bfloat16), torch.arange(10) * 3
    plan = Plan(10, 4, 3, seed=2)
    cached = CachedTokens(tokens, labels, CPU)
    batches = list(cached.batches(plan)(1, 4))
    assert [b.step for b in batches] == [1, 1, 2, 2, 3, 3] and [len(b) for b in batches] == [3, 1] * 3
    for batch, part in zip(batches, plan.micro_batches(1, 4), strict=True):
        assert np.array_equal(batch.indices, part.indices)
        assert torch.equal(batch.labels, torch.from_numpy(3 * part.indices))
        assert torch.equal(cached.read(batch.indices), tokens[part.indices])
        assert len(batch.stand_in()) == 1 and batch.stand_in().loss_weight == 0


@pytest.mark.parametrize(
    ("batch", "micro", "world", "expected"),
    [(4096, 256, 1, 256), (257, 256, 1, 129), (50, 256, 1, 50), (4096, 256, 3, 228), (10, 4, 2, 3)],
)
def test_micro_batches_are_even(batch: int, micro: int, world: int, expected: int) -> None:
    assert even_micro_batch(AttentiveOptim(batch_size=batch, micro_batch=micro), world) == expected


@pytest.mark.parametrize(("batch", "micro", "world"), [(8, 1, 1), (5, 2, 1), (3, 256, 2), (9, 4, 2)])
def test_a_micro_batch_of_one_sample_is_an_error(batch: int, micro: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"micro_batch = {micro}: steps of {batch} samples leave a micro-batch of one"):
        even_micro_batch(AttentiveOptim(batch_size=batch, micro_batch=micro), world)


def test_a_step_takes_no_more_than_there_is_and_the_rate_follows() -> None:
    given = Attentive(blr=0.2)
    assert (given.optim.batch_size, fitted(given, 9469).optim.lr) == (4096, 0.2 * 16)
    small = fitted(given, 64).optim
    assert (small.batch_size, small.lr, small.epochs) == (64, 0.05, 90)


@pytest.mark.parametrize("name", ["vit_demo", "swin_tiny"])
def test_all_patch_tokens_of_a_block_can_be_read(name: str) -> None:
    resolution = 32 if name == "vit_demo" else 192
    encoder, images = build_encoder(name, resolution).eval(), noise(1, 3, resolution, resolution)
    for block in (1, 3):
        with torch.no_grad():
            tokens = tokens_after(encoder, images, block)
        flat = fixed(encoder, tokens, Readout(block, "tokens", "none"))
        d = width(encoder, block)
        assert torch.equal(flat.unflatten(1, (-1, d)), tokens[:, prefix(encoder) :])
        torch.testing.assert_close(
            flat.unflatten(1, (-1, d)).mean(1), fixed(encoder, tokens, Readout(block, "mean", "none"))
        )


def test_the_rate_is_that_of_the_code_of_efficient_probing() -> None:
    """lr_sched.py: lr * epoch / 10, then half a cosine over the other 80 epochs, by fractions of an epoch."""
    optim, per_epoch = AttentiveOptim(lr=1.6), 7
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = schedule.cosine(optimizer, optim, per_epoch)
    for step in range(90 * per_epoch):
        epoch = step / per_epoch
        expected = 1.6 * epoch / 10 if epoch < 10 else 0.8 * (1 + np.cos(np.pi * (epoch - 10) / 80))
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-9), step


@pytest.fixture(scope="module")
def store(stores: dict[str, Path]) -> Path:
    return stores["zarr"]


@pytest.fixture(scope="module")
def pretrained(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    short = ("optim.epochs=1", "optim.warmup_epochs=0", "panel_epochs=null")
    assert pretrain(runs.config(out, store, *short), lambda *_: None).finished
    return out


SHORT = ("compute.device=cpu", "batch_size=10", "attentive.optim.epochs=6", "attentive.optim.warmup_epochs=2")


def evaluation(spec: Path | str, store: Path, *more: str, **given: Any) -> Evaluation:
    return load(Evaluation, None, [*SHORT, *more], {"checkpoint": (str(spec),), "train": store, "val": store, **given})


def run(config: Evaluation) -> dict[str, Any]:
    (result,) = evaluate(config, ["attentive"], lambda title: lambda done, total, values: None)
    return result.as_json()


@pytest.fixture(scope="module")
def evaluated(pretrained: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("eval")
    return out, run(evaluation(pretrained, store, "attentive.blr=4", out=out))


def cached(folder: Path) -> Tensor:
    """Tokens that an evaluation has left: [24, 16, 128]."""
    stored = torch.from_numpy(np.fromfile(folder / "6-tokens-none", np.int16)).view(torch.bfloat16)
    return stored.view(24, 16, 128).float()


def lars(parameters: list[nn.Parameter], speeds: list[Tensor], lr: float) -> None:
    """One step of util/lars.py in words of our own: momentum 0.9, the rate of matrices in proportion to their norm."""
    for parameter, speed in zip(parameters, speeds, strict=True):
        assert parameter.grad is not None
        trust = 0.001 * parameter.norm() / parameter.grad.norm() if parameter.ndim > 1 else 1.0
        speed.mul_(0.9).add_(trust * parameter.grad)
        with torch.no_grad():
            parameter -= lr * speed
        parameter.grad = None


def test_a_probe_ends_where_its_twin_does(evaluated: tuple[Path, dict[str, Any]], store: Path) -> None:
    """The whole mode against a plain loop: tokens, order, rates, LARS, batch norm and accuracy."""
    out, result = evaluated
    tokens, labels = cached(out / "run/attentive/train"), torch.from_numpy(Store(store).images.labels)
    head = build_head("ep", 128, 3, 32, 1, seed=0)
    queries, speeds = head.pooling.queries, [torch.zeros_like(p) for p in head.parameters()]
    values = head.pooling.value.weight
    for epoch in range(6):
        lr = 4 * 24 / 256 * (epoch / 2 if epoch < 2 else (1 + np.cos(np.pi * (epoch - 2) / 4)) / 2)
        batch = rng.permutation(0, epoch, 24)
        x, outputs = tokens[batch], []
        for q in range(32):
            weights = ((x * queries[q]).sum(dim=2) / 128**0.5).softmax(dim=1)
            outputs.append((weights[..., None] * (x @ values[4 * q : 4 * q + 4].T)).sum(dim=1))
        nn.functional.cross_entropy(head.linear(head.batch(torch.cat(outputs, dim=1))), labels[batch]).backward()
        lars(list(head.parameters()), speeds, lr)
    found = checkpoint.latest(out / "run/attentive/ep")
    assert found is not None and found.step == 6
    for name, tensor in load_file(found.path / "model.safetensors").items():
        torch.testing.assert_close(
            tensor, head.state_dict()[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    logits = head.eval()(cached(out / "run/attentive/val"))
    top1 = 100 * float((logits.argmax(dim=1) == labels).double().mean())
    assert result["poolings"]["ep"]["top1"] == pytest.approx(top1)
    assert top1 > 40  # three classes: it has learned


def test_a_result_names_all_that_led_to_it(
    evaluated: tuple[Path, dict[str, Any]], pretrained: Path, store: Path
) -> None:
    _, result = evaluated
    assert [result[key] for key in ("mode", "protocol", "block", "pooling", "norm", "epochs")] == [
        "attentive",
        "ep",
        6,
        "tokens",
        "none",
        6,
    ]
    assert list(result["poolings"]) == ["ep", "abmilp", "mean"]
    assert (result["options"]["optim"]["batch_size"], result["options"]["optim"]["lr"]) == (24, 4 * 24 / 256)
    assert run(evaluation(pretrained, store, "attentive.blr=4")) == result
    other = run(evaluation(pretrained, store, "attentive.blr=4", "seed=1"))
    assert other["poolings"] != result["poolings"]


def test_the_page_has_the_attention_and_the_comparison(
    evaluated: tuple[Path, dict[str, Any]], pretrained: Path, store: Path
) -> None:
    out, _ = evaluated
    with np.load(out / "run/attentive/attention.npz") as arrays:
        assert {name: arrays[name].shape for name in arrays.files} == {
            "originals": (6, 64, 64, 3),
            "ep": (6, 32, 4, 4),
            "abmilp": (6, 1, 4, 4),
        }
        np.testing.assert_allclose(arrays["ep"].sum(axis=(2, 3)), 1, rtol=1e-5)
    alone = (out / "index.html").read_text()
    assert "<th>samples a step</th><th>rate</th>" in alone and "<td>24</td><td>0.375</td>" in alone
    assert "Features or pooling" in alone and alone.count("data:image/png") == 2
    evaluate(evaluation(pretrained, store, "knn.block=2", "knn.k=[1]", out=out), ["knn"], lambda title: lambda *_: None)
    page = (out / "index.html").read_text()
    assert "<th>kNN, best k</th><th>mean</th><th>abmilp</th><th>ep</th>" in page
    assert "run: the modes read different features" in page and "knn block 2, norm none" in page


@pytest.mark.parametrize("pooling", ["ep", "abmilp"])
def test_a_stopped_probe_resumes_to_the_same_result(
    pooling: str,
    evaluated: tuple[Path, dict[str, Any]],
    pretrained: Path,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = ("attentive.blr=4", "attentive.checkpoint_epochs=1", f"attentive.poolings=[{pooling}]")
    config = evaluation(pretrained, store, *given, out=tmp_path)
    train_step = Trainer.train_step

    def killed(trainer: Trainer, step: int, micro_batches: Any) -> Any:
        if step == 3:
            raise SystemError("killed")
        return train_step(trainer, step, micro_batches)

    with monkeypatch.context() as patched, pytest.raises(SystemError):
        patched.setattr(Trainer, "train_step", killed)
        run(config)
    run(config)
    one, other = (checkpoint.latest(folder / "run/attentive" / pooling) for folder in (evaluated[0], tmp_path))
    assert one is not None and other is not None and one.weights == other.weights


def test_baselines_can_be_probed(pretrained: Path, store: Path, tmp_path: Path) -> None:
    for spec in (f"random:{pretrained}", f"pixels:{pretrained}"):
        run(evaluation(spec, store, "attentive.optim.epochs=3", "attentive.poolings=[abmilp]", out=tmp_path))
    assert "pixels run: the weight of each token" in (tmp_path / "index.html").read_text()
    result = run(evaluation(pretrained, store, "attentive.poolings=[mean]", "attentive.norm=final", out=tmp_path))
    assert list(result["poolings"]) == ["mean"]


def test_queries_must_divide_the_width(pretrained: Path, store: Path) -> None:
    with pytest.raises(ValueError, match=r"attentive.queries = 24: does not divide 128, the width of block 6 of run"):
        run(evaluation(pretrained, store, "attentive.queries=24"))
    with pytest.raises(ValueError, match=r"micro_batch = 1: .*; choose another"):
        run(evaluation(pretrained, store, "attentive.optim.micro_batch=1"))


def test_a_sheet_shows_weights_relative_to_the_uniform_one() -> None:
    originals = np.full((1, 8, 8, 3), 100, np.uint8)
    attention = np.array([[[0.0, 0.25], [0.75, 0.0]]])
    figure = plots.attention_sheet(originals, [("one", attention)], "")
    drawn = figure.axes[1].images[0].get_array()
    assert drawn.shape == (8, 8, 3)
    colours = {place: tuple(drawn[place].tolist()) for place in ((0, 0), (0, 7), (7, 0), (7, 7))}
    assert colours[0, 0] == colours[7, 7] and drawn[0, 0].sum() < drawn[0, 7].sum() < drawn[7, 0].sum()
    brighter = plots.attention_sheet(originals, [("one", attention * 2)], "").axes[1].images[0].get_array()
    assert (brighter[7, 0] == drawn[7, 0]).all() and brighter[0, 7].sum() > drawn[0, 7].sum()


def test_a_sweep_can_plan_a_probe_of_a_run_that_is_not_trained_yet(store: Path) -> None:
    samples = all_samples(Store(store))
    model = planned_model("x", load(Pretrain, None, ["data.store=s", "out=o", "model.name=swin_tiny"]))
    context = EvalContext(evaluation("x", store), runs.WORLD, samples, samples)
    assert MODES["attentive"].plan(context, model).settings.block == 4
    refused = EvalContext(evaluation("x", store, "attentive.queries=36"), runs.WORLD, samples, samples)
    with pytest.raises(ValueError, match="does not divide 768, the width of block 4 of x"):
        MODES["attentive"].plan(refused, model)

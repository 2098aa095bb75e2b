"""Attentive probes against plain twins, what they learn, and their training on cached tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kamim.evaluation import attentive
from kamim.evaluation.attentive import CachedTokens, build_head, even_micro_batch
from kamim.evaluation.config import AttentiveOptim
from kamim.models.masked_image_model import build_encoder
from kamim.models.readout import Readout, fixed, prefix, tokens_after, width
from kamim.training import schedule
from pipelines.plan import Plan

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
        "linear.bias", "linear.weight", "pooling.queries", "pooling.value.weight",
    ]  # fmt: skip
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
        assert len(batch.stand_in()) == 1 and batch.stand_in().share == 0


@pytest.mark.parametrize(("batch", "micro", "world", "expected"), [
    (4096, 256, 1, 256), (257, 256, 1, 129), (50, 256, 1, 50), (4096, 256, 3, 228), (9, 4, 2, 3),
])  # fmt: skip
def test_micro_batches_are_even(batch: int, micro: int, world: int, expected: int) -> None:
    assert even_micro_batch(batch, micro, world) == expected


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

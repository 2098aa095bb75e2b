"""The analysis room: constructed truths, slow twins, parity with the reference's notebooks, and the command."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Attention
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.testing import CliRunner

from kamim.analysis import embed, measures, tables
from kamim.analysis.analysed_model import AnalysedModel, timm_encoder
from kamim.analysis.analyze import load_analysed_model
from kamim.analysis.collect import Curves, attention_block, collect_curves, collect_samples, query_cell, token_block
from kamim.analysis.plan import plan
from kamim.analysis.request import FIGURES, Chosen, Request, parse_figures
from kamim.analysis.run import file_stem
from kamim.cli import app
from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.models.attention import (
    attention_distance,
    blocks,
    patch_attention,
    token_distances,
    uniform_distance,
    watched,
)
from kamim.models.masked_image_model import MaskedImageModel, build_encoder
from kamim.reporting import page
from kamim.training import checkpoint
from pipelines.batch import Batch, normalise

SIDE, PATCH = 12, 16
REFERENCE = Path(__file__).parents[3] / "shared/data/analysis.npz"
RESULTS = Path(__file__).parents[1] / "fixtures/results.json"


def offset_attention(side: int, dy: int, dx: int) -> Tensor:
    """Every query attends to the token (dy, dx) from it, wrapping around: [N, N]."""
    rows, columns = np.divmod(np.arange(side * side), side)
    key = (rows + dy) % side * side + (columns + dx) % side
    return torch.from_numpy(np.eye(side * side)[key])


def softmax_attention(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)


# Constructed attention


def test_identity_attention_has_no_distance_and_full_information() -> None:
    identity = torch.eye(SIDE**2)
    distances = token_distances(SIDE, PATCH)
    assert attention_distance(patch_attention(identity, 0), distances) == 0
    assert measures.normalised_mutual_information(identity, 0) == pytest.approx(1, abs=1e-5)


def test_uniform_attention_has_the_mean_distance_and_no_information() -> None:
    uniform = torch.full((SIDE**2, SIDE**2), 1 / SIDE**2)
    distances = token_distances(SIDE, PATCH)
    found = float(attention_distance(patch_attention(uniform, 0), distances))
    assert found == pytest.approx(uniform_distance(SIDE, PATCH), rel=1e-6)
    assert found == pytest.approx(99.75292158, abs=1e-6)
    assert measures.normalised_mutual_information(uniform, 0) == pytest.approx(0, abs=1e-12)


def test_fixed_offset_has_a_known_distance() -> None:
    attention = patch_attention(offset_attention(SIDE, 0, 1), 0)
    found = float(attention_distance(attention, token_distances(SIDE, PATCH)))
    assert found == pytest.approx(PATCH * (11 * 1 + 1 * 11) / 12)  # one column of twelve wraps around
    assert measures.normalised_mutual_information(attention, 0) == pytest.approx(1, abs=1e-5)


def test_all_queries_on_one_half_have_no_information() -> None:
    attention = torch.zeros(SIDE**2, SIDE**2)
    attention[:, : SIDE**2 // 2] = 2 / SIDE**2
    assert measures.normalised_mutual_information(attention, 0) == pytest.approx(0, abs=1e-12)


def test_class_token_is_dropped_and_rows_renormalised() -> None:
    attention = softmax_attention(2, 10, 10)
    kept = patch_attention(attention, 1)
    assert kept.shape == (2, 9, 9)
    torch.testing.assert_close(kept.sum(dim=-1), torch.ones(2, 9, dtype=torch.float64))
    torch.testing.assert_close(kept[0, 0] / kept[0, 0, 0], (attention[0, 1, 1:] / attention[0, 1, 1]).double())


@pytest.mark.parametrize("queries", [slice(3, 4), slice(None)])
def test_a_query_with_all_its_weight_on_the_class_token_attends_uniformly(queries: slice) -> None:
    attention = softmax_attention(10, 10)
    attention[queries] = torch.eye(10)[0]
    expected = attention[1:, 1:].double() / attention[1:, 1:].double().sum(dim=-1, keepdim=True)
    expected[expected.isnan()] = 1 / 9
    kept = patch_attention(attention, 1)
    torch.testing.assert_close(kept, expected)
    distances = token_distances(3, 16)
    assert attention_distance(kept, distances) == pytest.approx(slow_distance(expected.numpy(), 3, 16))
    nmi = float(measures.normalised_mutual_information(attention, 1))
    assert nmi == pytest.approx(slow_nmi(expected.numpy()), abs=1e-6)


# Slow twins


def slow_distance(attention: np.ndarray, side: int, patch: float) -> float:
    total = 0.0
    for q, row in enumerate(attention):
        for k, weight in enumerate(row):
            (qy, qx), (ky, kx) = divmod(q, side), divmod(k, side)
            total += weight * patch * np.sqrt((qy - ky) ** 2 + (qx - kx) ** 2)
    return total / len(attention)


def slow_nmi(attention: np.ndarray) -> float:
    n = len(attention)
    joint = (attention + 1e-8) / (attention + 1e-8).sum(axis=1, keepdims=True) / n
    key = joint.sum(axis=0)
    information = sum(joint[q, k] * np.log(joint[q, k] / (key[k] / n)) for q in range(n) for k in range(n))
    return information / np.sqrt(np.log(n) * -(key * np.log(key)).sum())


def test_attention_measures_equal_their_twins() -> None:
    attention = softmax_attention(3, 16, 16) ** 3
    attention = attention / attention.sum(dim=-1, keepdim=True)
    distances = attention_distance(attention.double(), token_distances(4, 16))
    nmi = measures.normalised_mutual_information(attention, 0)
    for i in range(3):
        one = attention[i].double().numpy()
        assert float(distances[i]) == pytest.approx(slow_distance(one, 4, 16), rel=1e-6)
        assert float(nmi[i]) == pytest.approx(slow_nmi(one), rel=1e-6)


def test_spectrum_equals_its_twin() -> None:
    tokens = torch.randn(2, 6, 6, 3, generator=torch.Generator().manual_seed(1))
    found = measures.log_amplitude(tokens)
    assert found.shape == (2, 3)
    for image in range(2):
        for f in range(3):
            at = np.exp(-2j * np.pi * f * np.add.outer(np.arange(6), np.arange(6)) / 6)
            amplitudes = [abs((tokens[image, :, :, c].numpy() * at).sum()) for c in range(3)]
            assert float(found[image, f]) == pytest.approx(np.mean([np.log(a + 1e-6) for a in amplitudes]), abs=1e-5)


# Known spectra


@pytest.mark.parametrize("side", [5, 6, 12])
def test_constant_map_has_only_the_lowest_frequency(side: int) -> None:
    found = measures.log_amplitude(torch.full((1, side, side, 2), 3.0))[0].numpy()
    np.testing.assert_allclose(found[0], np.log(3 * side**2), rtol=1e-6)
    np.testing.assert_allclose(found[1:], np.log(1e-6), atol=1e-3)


@pytest.mark.parametrize("f", [0, 1, 5])
def test_diagonal_wave_is_found_at_its_frequency(f: int) -> None:
    phase = 2 * np.pi * f * np.add.outer(np.arange(12), np.arange(12)) / 12
    found = measures.log_amplitude(torch.from_numpy(np.cos(phase))[None, :, :, None])[0]
    assert int(found.argmax()) == f
    assert float(found[f]) == pytest.approx(np.log(144 if f == 0 else 72), abs=1e-6)


def test_checkerboard_lies_beyond_the_half_diagonal_of_an_even_grid() -> None:
    board = torch.from_numpy((-1.0) ** np.add.outer(np.arange(12), np.arange(12)))
    found = measures.log_amplitude(board[None, :, :, None])[0]
    np.testing.assert_allclose(found.numpy(), np.log(1e-6), atol=1e-3)  # the released code leaves Nyquist out


# Geometry


def test_cka_of_equal_rotated_and_orthogonal_features() -> None:
    one = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3))).Q
    found = measures.linear_cka([one], [one, 3 * one @ rotation + 1])
    np.testing.assert_allclose(found, [[1, 1]], rtol=1e-6)
    basis = torch.linalg.qr(torch.cat([torch.ones(8, 1), torch.randn(8, 4)], dim=1)).Q[:, 1:]
    assert measures.linear_cka([basis[:, :2]], [basis[:, 2:]])[0, 0] == pytest.approx(0, abs=1e-10)


def test_cka_equals_its_twin() -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(20, width, generator=generator).double() for width in (5, 7))
    a, b = (f - f.mean(dim=0) for f in (x, y))
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert measures.linear_cka([x], [y])[0, 0] == pytest.approx(float(expected))


def test_correlation_knows_what_does_not_vary() -> None:
    a, b = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(5))
    found = measures.correlation(a, b)
    np.testing.assert_allclose(found, [np.corrcoef(a[i], b[i])[0, 1] for i in range(4)], atol=1e-6)
    assert measures.correlation(torch.ones(3), a[0, :3]).isnan()


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(5, 2, (400, 3))
    resampled = measures.bootstrap_means(values, seed=1)
    assert resampled.shape == (measures.RESAMPLES, 3)
    low, high = measures.interval(resampled)
    np.testing.assert_allclose(high - low, 2 * 1.96 * 2 / np.sqrt(400), rtol=0.15)
    assert (low < values.mean(axis=0)).all() and (values.mean(axis=0) < high).all()
    np.testing.assert_array_equal(resampled, measures.bootstrap_means(values, seed=1))
    assert (resampled != measures.bootstrap_means(values, seed=2)).any()


def test_pca_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    flat = random.normal(size=(60, 2)) * [5, 1] @ np.linalg.qr(random.normal(size=(8, 8)))[0][:2]
    xy, shares = embed.pca(flat)
    assert shares.sum() == pytest.approx(1)
    between = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    np.testing.assert_allclose(np.linalg.norm(xy[:, None] - xy[None], axis=2), between, atol=1e-9)


def test_tsne_separates_what_is_separate_and_repeats() -> None:
    random = np.random.default_rng(0)
    clouds = np.concatenate([random.normal(size=(30, 5)), random.normal(size=(30, 5)) + 40])
    xy = embed.tsne(clouds, seed=0)
    centres = xy[:30].mean(axis=0), xy[30:].mean(axis=0)
    assert np.linalg.norm(xy[:30] - centres[0], axis=1).max() < np.linalg.norm(centres[0] - centres[1]) / 2
    np.testing.assert_array_equal(xy, embed.tsne(clouds, seed=0))
    with pytest.raises(ValueError, match="figures = 3: 10 tokens are too few"):
        embed.tsne(clouds[:10], seed=0)


# Parity with the reference's notebooks


@pytest.mark.skipif(not REFERENCE.is_file(), reason="needs shared/data/analysis.npz")
def test_measures_equal_the_reference() -> None:
    reference = np.load(REFERENCE)
    attention = torch.from_numpy(reference["attention"])
    distance = attention_distance(patch_attention(attention, 1), token_distances(SIDE, PATCH))
    np.testing.assert_allclose(distance, reference["attention_distance_px"], atol=1e-5, rtol=0)
    nmi = measures.normalised_mutual_information(attention, 1)
    np.testing.assert_allclose(nmi, reference["nmi"], atol=1e-5, rtol=0)
    expected = reference["fourier_relative_log_amplitude"]
    for latents, curve in zip(torch.from_numpy(reference["latents"]), expected, strict=True):
        amplitude = measures.log_amplitude(latents[:, 1:].unflatten(1, (SIDE, SIDE)))
        kept = Curves(images=len(latents), spectrum={0: amplitude.sum(dim=0)}, sides={0: SIDE})
        np.testing.assert_allclose(tables.fourier(kept)["curves"][0], curve, atol=1e-5, rtol=0)


# Attention on the side


def swin() -> SwinTransformer:
    """3 stages with shifted windows that mask, and a table of position biases that is not nearly zero."""
    torch.manual_seed(0)
    made = SwinTransformer(
        img_size=64, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 4), num_classes=0
    )
    for block in blocks(made):
        nn.init.normal_(block.attn.relative_position_bias_table)
    return made.eval()


def vit(name: str = "vit_demo") -> VisionTransformer:
    torch.manual_seed(0)
    made = build_encoder(name, 64).eval()
    assert isinstance(made, VisionTransformer)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return made


def vit_with_more() -> VisionTransformer:
    """Registers, and queries and keys that are normalised."""
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=64, embed_dim=32, depth=3, num_heads=4, qk_norm=True, reg_tokens=2, num_classes=0
    ).eval()


def vit_with_biases() -> VisionTransformer:
    """Relative position biases that its blocks share."""
    torch.manual_seed(0)
    made = build_encoder("vit_base_relpos", 64).eval()
    made.blocks = made.blocks[:2]
    nn.init.normal_(made.rel_pos_bias.relative_position_bias_table)
    return made


@pytest.mark.parametrize("make", [vit, vit_with_more, vit_with_biases, swin])
def test_attention_on_the_side_equals_timms_unfused(make) -> None:
    encoder, images = make(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    layers = blocks(encoder)
    for layer in layers:
        layer.attn.fused_attn = True  # timm's default for a ViT
    beside: dict[int, Tensor] = {}
    with torch.no_grad():
        expected_output = encoder.forward_features(images)
        with watched(encoder, lambda *_: None, lambda depth, weights, *_: beside.update({depth: weights})):
            torch.testing.assert_close(encoder.forward_features(images), expected_output, rtol=0, atol=0)
        inside: dict[int, Tensor] = {}
        for depth, layer in enumerate(layers, start=1):
            layer.attn.fused_attn = False
            layer.attn.attn_drop.register_forward_pre_hook(lambda _, given, d=depth: inside.update({d: given[0]}))
        encoder.forward_features(images)
    assert sorted(beside) == sorted(inside) == list(range(1, len(layers) + 1))
    for depth in inside:
        torch.testing.assert_close(beside[depth], inside[depth], rtol=1e-4, atol=1e-6)
    varied = [float((weights - weights.mean(dim=-2, keepdim=True)).abs().max()) for weights in inside.values()]
    assert max(varied) > 0.01  # else any attention would do
    if make is swin:
        assert any(layer.attn_mask is not None for layer in layers)


def test_watching_reports_every_depth_and_leaves_no_hook() -> None:
    encoder, images = vit_with_more(), torch.randn(2, 3, 64, 64)
    seen: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def on_attention(depth: int, _: Tensor, given: Tensor, output: Tensor) -> None:
        inputs[depth], outputs[depth] = given, output

    with watched(encoder, lambda d, t: seen.update({d: t}), on_attention), torch.no_grad():
        encoder.forward_features(images)
    assert sorted(seen) == [0, 1, 2, 3] and all(t.shape == (2, 4, 4, 32) for t in seen.values())
    with torch.no_grad():
        tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
        for depth, block in enumerate(encoder.blocks, start=1):
            torch.testing.assert_close(seen[depth - 1].flatten(1, 2), tokens[:, 3:])
            torch.testing.assert_close(inputs[depth], block.norm1(tokens))
            torch.testing.assert_close(outputs[depth], block.attn(block.norm1(tokens)))
            tokens = block(tokens)
    hooked = [m for m in encoder.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


def test_curves_do_not_depend_on_batches_and_kept_numbers_are_few() -> None:
    encoder = vit()
    model = AnalysedModel("a", encoder, 64, None, {})
    pixels = torch.randint(0, 256, (6, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    counts = torch.randint(0, 65, (6, 8, 8), dtype=torch.int16, generator=torch.Generator().manual_seed(0))

    def batches(size: int) -> list[Batch]:
        at = [slice(i, i + size) for i in range(0, 6, size)]
        return [Batch(pixels[s], counts[s], torch.zeros(0), np.arange(6)[s], 0, 0, True, 1.0) for s in at]

    whole, parts = (collect_curves(model, batches(size), torch.device("cpu"), lambda _: None) for size in (6, 2))
    for one, other in zip(tables.attention(model, whole, 0), tables.attention(model, parts, 0), strict=True):
        for key in ("mean", "spread"):
            if key in one:
                np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(tables.features(whole)["rank"], tables.features(parts)["rank"], rtol=1e-4)
    assert whole.distance[1][0].shape == whole.nmi[6][0].shape == (6, 4)
    assert tables.weight_correlation(whole, 0)["mean"].shape == (6,)
    np.testing.assert_allclose(tables.fourier(whole)["frequency"][0], [0, 0.5])


def test_samples_are_those_of_the_papers_figures() -> None:
    """Figure 3: what leaves the last block but one. 8 to 10: what the last attention is given, and its output."""
    encoder = vit()
    model = AnalysedModel("a", encoder, 64, None, {})
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = Batch(pixels, None, torch.zeros(0), np.arange(2), 0, 0, True, 1.0)
    with torch.no_grad():
        states = [encoder._pos_embed(encoder.patch_embed(normalise(pixels)))]
        for block in encoder.blocks:
            states.append(block(states[-1]))
        for layer, shown, attended in ((None, 5, 6), (2, 2, 2)):
            found = collect_samples(model, [batch], layer, None, [(0.5, 0.5)], torch.device("cpu"), lambda _: None)
            assert (found.token_block, found.block) == (shown, attended)
            np.testing.assert_allclose(found.tokens, states[shown][:, 1:], atol=1e-5)
            block = encoder.blocks[attended - 1]
            given = block.norm1(states[attended - 1])
            np.testing.assert_allclose(found.before, given[:, 1:], atol=1e-5)
            np.testing.assert_allclose(found.after, block.attn(given)[:, 1:], atol=1e-5)
            assert found.maps.shape == (2, 1, 4, 4)


# Subjects


def test_block_and_query_of_the_figures() -> None:
    assert [attention_block(depth, None) for depth in (1, 6, 12, 24)] == [1, 6, 12, 24]  # index 11 of 12, from 0
    assert [token_block(depth, None) for depth in (1, 6, 12, 24)] == [1, 5, 11, 23]  # hidden_states[11] of 0 to 12
    assert attention_block(12, 11) == token_block(12, 11) == 11
    assert query_cell((0.5, 0.0), 12) == (0, 6) and query_cell((0.99, 0.99), 12) == (11, 11)


def test_timm_models_by_name_and_file(tmp_path: Path) -> None:
    encoder = timm_encoder("vit_tiny_patch16_224", seed=1)
    assert isinstance(encoder, VisionTransformer) and isinstance(encoder.blocks[0].attn, Attention)
    file = tmp_path / "weights.safetensors"
    save_file({**encoder.state_dict(), "head.weight": torch.zeros(2, 2)}, file)
    again = timm_encoder(f"vit_tiny_patch16_224@{file}", seed=2)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))
    for spec, message in {
        "resnet18": "timm:resnet18: a ResNet has no attention that the analysis knows",
        "vit_no_such": "timm:vit_no_such: Unknown model",
        "vit_tiny_patch16_224@nowhere": "nowhere: no such file",
        f"vit_small_patch16_224@{file}": r"another architecture \(blocks.0.attn.proj.bias is \(192,\) in the file",
    }.items():
        with pytest.raises(ValueError, match=message):
            timm_encoder(spec, seed=0)


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, stores: dict[str, Path]) -> dict[str, Path]:
    """Two checkpoints, as a run would have saved them, untrained: vit_demo at 64 px and a Swin at 192 px."""
    found = {}
    for name, side in (("vit_demo", 64), ("swin_tiny", 192)):
        out = tmp_path_factory.mktemp("runs") / name
        given = [f"data.store={stores['zarr']}", f"data.resolution={side}", f"model.name={name}", f"out={out}"]
        torch.manual_seed(0)
        model = MaskedImageModel(name, side)
        optimizer = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        checkpoint.save(
            out,
            1,
            "pretrain",
            load(Pretrain, None, given).model_dump(mode="json"),
            model,
            optimizer,
            checkpoint.Keep(1),
        )
        found[name] = out
    return found


def analyze(*arguments: str) -> str:
    """What the command says; a failure's text where it fails."""
    done = CliRunner().invoke(app, ["analyze", *arguments])
    assert done.exit_code in (0, 1), done.output
    return done.output


def test_all_figures_of_two_vits(runs: dict[str, Path], stores: dict[str, Path], tmp_path: Path) -> None:
    given = (
        "--checkpoint",
        f"A={runs['vit_demo']}",
        "--checkpoint",
        f"B=random:{runs['vit_demo']}",
        "--store",
        str(stores["zarr"]),
        "--images",
        "20",
        "--query",
        "0.1,0.9",
        "--layer",
        "2",
        "--head",
        "3",
    )
    probes = [tmp_path / "block-6.json", tmp_path / "block-3.json"]
    (probe,) = (r for r in json.loads(RESULTS.read_text()) if (r["mode"], r["name"]) == ("linprobe", "KAMIM"))
    for file, block, top1 in zip(probes, (6, 3), (51.5, 40.0), strict=True):
        path = str(checkpoint.read(runs["vit_demo"]).path)
        file.write_text(json.dumps([{**probe, "checkpoint": path, "block": block, "top1": top1}]))
    shown = [option for file in probes for option in ("--probe", str(file))]
    said = analyze(*given, *shown, "--out", str(tmp_path / "one"))
    assert "figure probe without B: needs a probe" in said
    assert re.search(r"A: attention distance [\d.]+ px, uniform attention [\d.]+ px; .* NMI 0\.", said)
    stems = {"figure-02-64px"} | {file_stem(figure) for figure in FIGURES if figure != "2"}
    wanted = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")} | {"analysis.json", "index.html", ".kamim"}
    assert {file.name for file in (tmp_path / "one").iterdir()} == wanted
    numbers = json.loads((tmp_path / "one/analysis.json").read_text())
    assert numbers["figures"].keys() == set(FIGURES) - {"2"}
    assert len(numbers["figures"]["6"]["A"]["mean"]) == 6
    assert numbers["uniform_attention"]["A"]["uniform_distance"] == pytest.approx(uniform_distance(4, 16))
    assert numbers["figures"]["probe"] == {"A": {"block": [3, 6], "top1": [40.0, 51.5]}}
    assert np.array(numbers["figures"]["5"]["B"]["maps"]).shape == (3, 1, 4, 4)
    assert {numbers["figures"][figure]["A"]["block"] for figure in ("3", "8", "9", "10")} == {2}
    assert np.array(numbers["figures"]["cka"]["A"]["B"]).shape == (7, 7)
    html = (tmp_path / "one/index.html").read_text()
    assert html.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_the_same_command_gives_the_same_bytes(runs: dict[str, Path], stores: dict[str, Path], tmp_path: Path) -> None:
    for out in ("one", "two"):
        given = ("--checkpoint", f"A={runs['vit_demo']}", "--store", str(stores["zarr"]), "--figures", "3,6")
        analyze(*given, "--images", "4", "--seed", "7", "--out", str(tmp_path / out))
    assert len(list((tmp_path / "one").iterdir())) == 2 * 2 + 3
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_swin_is_shown_where_that_is_defined(runs: dict[str, Path], stores: dict[str, Path], tmp_path: Path) -> None:
    given = ("--checkpoint", f"S={runs['swin_tiny']}", "--store", str(stores["zarr"]), "--images", "3")
    said = analyze(*given, "--figures", "2,4", "--out", str(tmp_path))
    assert "error" not in said
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert [len(curve) for curve in numbers["figures"]["4"]["S"]["curves"]] == [24] * 3 + [12] * 2 + [6] * 6 + [3] * 2
    both = analyze(*given, "--checkpoint", f"V={runs['vit_demo']}", "--figures", "6", "--out", str(tmp_path))
    assert "figure 6 without S: needs a ViT" in both
    assert "error: --figures 7: needs a ViT" in analyze(*given, "--figures", "7", "--out", str(tmp_path))


def test_bad_input_is_one_line(
    runs: dict[str, Path], stores: dict[str, Path], marked_store: Path, tmp_path: Path
) -> None:
    store, vit_run = ("--store", str(stores["zarr"])), ("--checkpoint", f"A={runs['vit_demo']}")
    out = ("--out", str(tmp_path / "out"))
    for given, message in [
        ((*store, *vit_run, *vit_run), "--checkpoint: A is the name of two"),
        ((*store, "--checkpoint", "K="), "must be [NAME=]CHECKPOINT"),
        ((*store, "--checkpoint", "R=timm:resnet18"), "a ResNet has no attention"),
        ((*store, *vit_run, "--figures", "1"), "--figures 1: '1' is none; must be all, or some of 2,3,4,5,6,7,8,9,10"),
        ((*store, *vit_run, "--images", "25"), "has 24; choose 2 to 24"),
        ((*store, *vit_run, "--images", "1"), "choose 2 to 24"),
        ((*store, *vit_run, "--classes", "cat,coffee,chelsea"), "'cat' is not one of the 3 of"),
        ((*store, *vit_run, "--classes", "coffee,chelsea"), "must be 3 different ones"),
        ((*store, *vit_run, "--layer", "7"), "--layer 7: A has layers 1 to 6"),
        ((*store, *vit_run, "--layer", "7", "--figures", "3"), "--layer 7: A has layers 1 to 6"),
        ((*store, *vit_run, "--head", "0"), "--head 0: A has heads 1 to 4"),
        ((*store, *vit_run, "--query", "0.5"), "--query 0.5: must be two numbers"),
        ((*store, *vit_run, "--query", "0.5,1"), "from 0 to below 1"),
        ((*store, *vit_run, "--probe", str(tmp_path / "none.json")), "none.json: not a result of kamim eval --json"),
        ((*store, *vit_run, "--figures", "probe"), "--figures probe: needs a probe"),
        (("--store", str(marked_store), *vit_run, "--figures", "3"), "--figures 3: needs labels of 3 classes"),
        ((*store, "--checkpoint", "T=timm:vit_tiny_patch16_224", "--figures", "2"), "needs a checkpoint of kamim"),
    ]:
        said = analyze(*given, *out)
        assert said.startswith("error: ") and message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


def test_figures_that_nobody_can_show_are_left_out(runs: dict[str, Path]) -> None:
    kamims, swin_model = (load_analysed_model(f"{name}={runs[name]}", seed=0) for name in ("vit_demo", "swin_tiny"))
    bare = AnalysedModel("bare", kamims.encoder, 64, None, {})
    unlabelled = Chosen(np.arange(4), np.arange(3), np.zeros(3, np.int64), ())
    planned, notes = plan(Request(), [bare], unlabelled)
    assert planned.keys() == set(FIGURES) - {"2", "3", "9", "10", "probe"}
    assert "figure 9 without bare: needs labels of 3 classes, which the store does not have" in notes
    planned, _ = plan(Request(), [swin_model, kamims], unlabelled)
    assert planned["2"] == planned["4"] == [swin_model, kamims] and planned["6"] == planned["weights"] == [kamims]


def test_figures_and_json() -> None:
    assert parse_figures("all") is None
    assert parse_figures("10, 2,cka") == ("2", "10", "cka")
    assert page.plain({"a": np.array([1.5, np.nan]), "b": (np.int64(3), "x", None)}) == {
        "a": [1.5, None],
        "b": [3, "x", None],
    }


def test_an_analysed_model_knows_its_tokens(runs: dict[str, Path]) -> None:
    model = load_analysed_model(f"A={runs['vit_demo']}", seed=0)
    assert (model.is_vit, model.grid, model.patch, model.prefix, model.depth) == (True, 4, 16, 1, 6)

"""The report and what it quotes of the paper."""

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from kamim.config.pretrain import Pretrain
from kamim.config.schema import load
from kamim.evaluation import evaluated_model, tasks
from kamim.evaluation.modes import read_result
from kamim.evaluation.options import Evaluation
from kamim.evaluation.report import paper
from kamim.evaluation.report.page import CHOICE, save_report
from kamim.evaluation.results import EvalSettings
from kamim.reporting import page
from kamim.reporting.plots import reconstruction_sheet
from kamim.storage.flatten import flatten
from kamim.training.checkpoint import Checkpoint
from kamim.training.run_folder import _FREE

CONFIGS = Path(__file__).parents[2] / "configs"
READ = {"block": 8, "pooling": "mean", "norm": "none"}
WHOLE = SimpleNamespace(count=1_281_167, job=SimpleNamespace(dataset="imagenet", encoding="jpeg"))  # a manifest
EPOCH = 625  # steps of 2048; with the last, short one 626


def pretraining(*overrides: str, preset: str = "vit_base_kamim", step: int = 100 * EPOCH) -> dict[str, Any]:
    """What a result says of a run of a preset on the whole of ImageNet."""
    config = load(Pretrain, CONFIGS / f"pretrain/{preset}.yaml", overrides)
    found = Checkpoint(Path("runs/x"), "pretrain", step, config.model_dump(mode="json"), True, "ab" * 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kamim.evaluation.evaluated_model.read_manifest", lambda path: WHOLE)
        run = evaluated_model._pretraining(found)
    assert run is not None
    return run


def options(mode: str, *overrides: str) -> dict[str, Any]:
    """The options of a mode for a ViT, as a result has them."""
    given = ["checkpoint=[x]", "val=y", *(f"{mode}.{override}" for override in overrides)]
    chosen = getattr(load(Evaluation, None, given), mode)
    vit = SimpleNamespace(encoder=None)
    return tasks._clipped(chosen, vit).model_dump(mode="json")  # type: ignore[no-any-return,type-var]


def about(name: str = "KAMIM", **changes: Any) -> dict[str, Any]:
    """A checkpoint just as the paper's ViT-B, evaluated on ImageNet."""
    return {
        "name": name,
        "checkpoint": f"runs/{name}/checkpoints/step-62500",
        "architecture": "vit_base",
        "step": 62500,
        "weights": "ab" * 32,
        "reconstructs": True,
        "seed": 0,
        "classes": 1000,
        "protocol": "paper",
        "options": {},
        "pretraining": pretraining(),
        "train": {"store": "stores/train", "dataset": "imagenet", "images": 1_281_167, "fingerprint": "cd" * 32},
        "val": {"store": "stores/val", "dataset": "imagenet", "images": 50_000, "fingerprint": "ef" * 32},
        **changes,
    }


def linprobe(*overrides: str, **changes: Any) -> dict[str, Any]:
    given = {"mode": "linprobe", **READ, "epochs": 100, "options": options("linprobe", *overrides)}
    return about(**{**given, "top1": 30.1, "top5": 55.2, **changes})


def finetune(*overrides: str, **changes: Any) -> dict[str, Any]:
    given = {"mode": "finetune", "epochs": 100, "options": options("finetune", *overrides)}
    return about(**{**given, "top1": 76.1, "top5": 93.2, **changes})


def reconstruct(**changes: Any) -> dict[str, Any]:
    found = {"paper": {"psnr": 11.987, "ssim": 0.1012}, "honest": {"psnr": 17.254, "ssim": 0.3456}}
    return about(**{"mode": "reconstruct", "mask_ratio": 0.4, **found, **changes})


def quoted(result: dict[str, Any]) -> paper.Quote:
    return paper.quoted(TypeAdapter(EvalSettings).validate_python(result))


def save(results: list[dict[str, Any]], file: Path, **pictures: list[tuple[bytes, str]]) -> None:
    save_report([read_result(result) for result in results], pictures, file)


def changed(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(result)
    *parents, last = path.split(".")
    inner = result
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return result


def test_the_paper_is_quoted_where_the_setting_is_the_same() -> None:
    assert quoted(linprobe()) == {"top1": (33.97, "Table 1")}
    assert quoted(finetune()) == {"top1": (77.30, "Table 1")}
    assert quoted(changed(linprobe(), "pretraining.weighting", None)) == {"top1": (16.12, "Table 1")}
    assert quoted(linprobe(norm="joint")) == {"top1": (37.72, "Table 5")}
    assert quoted(changed(finetune(), "pretraining.weighting.detector", "orb")) == {"top1": (77.17, "Table 4")}
    assert quoted(changed(linprobe(), "pretraining.weighting.patch_size", 32)) == {"top1": (31.73, "Table 2")}
    swin = linprobe("optim.clip_grad=1.0", architecture="swin_base", block=4)
    assert quoted(swin) == {"top1": (18.16, "Table 1")}
    assert quoted(changed(swin, "options.optim.clip_grad", None)) == {}  # the released code clips a Swin's
    assert quoted(reconstruct(train=None)) == {"psnr": (12.063, "section 4.7"), "ssim": (0.1076, "section 4.7")}
    cifar = {"store": "s", "fingerprint": "", "dataset": "cifar10"}
    transfer = linprobe(train={**cifar, "images": 50_000}, val={**cifar, "images": 10_000})
    assert quoted(transfer) == {"top1": (72.63, "Table 3")}
    there = changed(changed(transfer, "pretraining.dataset", "cifar10"), "pretraining.samples", 50_000)
    assert quoted(there) == {"top1": (59.01, "Table 3")}


@pytest.mark.parametrize(
    "preset", sorted(p.stem for p in (CONFIGS / "pretrain").glob("*_*im*.yaml") if "relpos" not in p.stem)
)
def test_presets_are_quoted(preset: str) -> None:
    """All that stand for the paper's runs, be they as long as its text says or as its code trains."""
    released = preset.endswith("_released_code")
    architecture, method = preset.removesuffix("_released_code").rsplit("_", 1)
    column = ("simmim", "kamim").index(method)
    read = {"block": 4 if architecture.startswith("swin") else 8, "architecture": architecture}
    clip = "optim.clip_grad=1.0" if architecture.startswith("swin") else "optim.clip_grad=null"
    run = pretraining(preset=preset, step=110 * (EPOCH + 1) if released else 100 * EPOCH)
    row = paper.TABLE_1[architecture]
    for schedule in ((), ("optim.epochs=110", "optim.cosine_epochs=100")):
        assert quoted(linprobe(clip, *schedule, **read, pretraining=run)) == {"top1": (row[column], "Table 1")}
        assert quoted(finetune(clip, *schedule, **read, pretraining=run)) == {"top1": (row[2 + column], "Table 1")}
    assert quoted(linprobe(clip, **read, pretraining={**run, "complete": False})) == {}


OTHER_RUNS = {  # every key that shapes a run, and another value than the paper's
    "data.resolution": "96",
    "data.crop_scale": "[0.2, 1.0]",
    "data.crop_ratio": "[1.0, 1.0]",
    "data.flip_v": "false",
    "data.flip_h": "false",
    "data.order": "chunked",
    "data.on_error": "skip",
    "model.drop_path": "0.1",
    "model.positions": "sincos",
    "method": "mae",
    "mask.patch_size": "16",
    "mask.ratio": "0.75",
    "weighting.detector": "akaze",
    "weighting.footprint": "point",
    "weighting.patch_size": "24",
    "weighting.temperature": "0.3",
    "weighting.keypoints": "online",
    "weighting.normalize": "true",
    "optim.lr": "1e-4",
    "optim.weight_decay": "0.1",
    "optim.betas": "[0.9, 0.95]",
    "optim.clip_grad": "5.0",
    "optim.batch_size": "4096",
    "optim.epochs": "200",
    "optim.warmup_epochs": "5",
    "optim.cosine_epochs": "90",
    "optim.warmup_lr": "0",
    "optim.min_lr": "0",
    "optim.duration": "62500 steps",
    "optim.warmup": "1 epochs",
    "optim.cosine": "50 epochs",
    "optim.decay_all": "false",
    "norm_pix_loss": "true",
    "init_from": "x.pth",
}
ELSEWHERE = {"data.store", "model.name", "decoder", "seed", "data.drop_last"}  # compared by other means, or free


def keys(tree: dict[str, Any]) -> set[str]:
    return {key for key, _ in flatten(tree)}


def test_every_key_that_shapes_a_run_is_compared() -> None:
    """All but those that a resumed run may change."""
    config = load(Pretrain, CONFIGS / "pretrain/vit_base_kamim.yaml")
    shaping = keys(config.model_dump(mode="json", exclude=_FREE))
    assert shaping == OTHER_RUNS.keys() | ELSEWHERE
    assert quoted(linprobe(pretraining=pretraining("seed=1", "data.drop_last=false", step=100 * (EPOCH + 1)))) != {}


@pytest.mark.parametrize("key", OTHER_RUNS)
def test_no_other_run_is_quoted(key: str) -> None:
    run = {**pretraining(f"{key}={OTHER_RUNS[key]}"), "complete": True}
    for result in (linprobe(pretraining=run), finetune(pretraining=run), reconstruct(pretraining=run)):
        assert quoted(result) == {}


def test_online_keypoints_are_the_released_codes_on_originals_alone() -> None:
    run = pretraining("weighting.keypoints=online")
    assert run["images"] == "jpeg" and quoted(linprobe(pretraining=run)) == {}
    assert quoted(linprobe(pretraining={**run, "images": "original"})) == {"top1": (33.97, "Table 1")}


OTHER_OPTIONS = {  # likewise of an evaluation; `optim` of both
    "optim.algorithm": "sgd",
    "optim.lr": "1e-3",
    "optim.weight_decay": "0",
    "optim.betas": "[0.9, 0.95]",
    "optim.clip_grad": "1.0",
    "optim.batch_size": "1024",
    "optim.epochs": "90",
    "optim.warmup_epochs": "5",
    "optim.cosine_epochs": "90",
    "optim.warmup_lr": "0",
    "optim.min_lr": "0",
}
OTHER_PROBES = OTHER_OPTIONS | {"augment": "crop", "init_std": "0.01"}
OTHER_TUNINGS = OTHER_OPTIONS | {"drop_path": "0.1", "layer_decay": "0.75", "ema": "0.9999"}
OF_RESULTS = {"protocol": "mae", "block": 12, "pooling": "cls", "norm": "token"}  # results hold them beside `options`
FREE = {"optim.micro_batch", "checkpoint_epochs", "keep_checkpoints"}


def test_every_option_that_shapes_an_evaluation_is_compared() -> None:
    assert keys(options("linprobe")) - FREE == OTHER_PROBES.keys() | OF_RESULTS.keys()
    assert keys(options("finetune")) - FREE == OTHER_TUNINGS.keys()


@pytest.mark.parametrize("key", OTHER_PROBES)
def test_no_other_probe_is_quoted(key: str) -> None:
    assert quoted(linprobe(f"{key}={OTHER_PROBES[key]}")) == {}


@pytest.mark.parametrize("key", OTHER_TUNINGS)
def test_no_other_fine_tuning_is_quoted(key: str) -> None:
    assert quoted(finetune(f"{key}={OTHER_TUNINGS[key]}")) == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *OF_RESULTS.items(),
        ("pretraining", None),
        ("architecture", "vit_demo"),
        ("pretraining.complete", False),
        ("pretraining.dataset", "imagefolder"),
        ("pretraining.samples", 100_000),
        ("pretraining.samples", None),
        ("train.images", 10_000),
        ("val.images", 1000),
        ("val.dataset", "cifar10"),
        ("train.dataset", "cifar10"),
        ("mode", "knn"),
    ],
)
def test_and_nowhere_else(path: str, value: Any) -> None:
    assert quoted(changed(linprobe(), path, value)) == {}


@pytest.mark.parametrize("key", ["data", "model", "samples", "images", "weighting", "optim"])
def test_a_result_that_does_not_say_how_its_checkpoint_was_trained_is_not_quoted(key: str, tmp_path: Path) -> None:
    """As those of earlier versions, which load none the less."""
    run = {k: v for k, v in pretraining("weighting.keypoints=online").items() if k != key}
    old = linprobe(pretraining=run)
    assert quoted(old) == {}
    save([old], tmp_path / "report.html")
    assert "30.10 [29.7, 30.5]" in read(tmp_path / "report.html").text


def test_reconstructions_are_quoted_at_the_notebooks_ratio_alone() -> None:
    assert quoted(reconstruct(mask_ratio=0.6)) == {}
    assert quoted(changed(reconstruct(), "pretraining.weighting.detector", "orb")) == {}
    assert quoted(reconstruct(architecture="vit_small")) == {}


def test_every_number_of_the_tables_can_be_found() -> None:
    found = [key[0] for key in paper.QUOTES]
    imagenet, others = 5 * 2 + (12 - 1) + 2, 6 * 2
    assert (found.count("finetune"), found.count("linprobe")) == (imagenet + others, imagenet + others + 2)
    assert found.count("reconstruct") == 2


class Checker(HTMLParser):
    """Collects text and attributes; every element that opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def read(file: Path) -> Checker:
    checker = Checker()
    checker.feed(file.read_text())
    checker.close()
    assert not checker.open
    return checker


def everything(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Every mode for every checkpoint."""
    rows = [
        {"block": b, "pooling": p, "norm": n, "lr": lr, "top1": 20 + b - 0.1 * b * b + 50 * lr, "top5": 60.0}
        for b in range(1, 13)
        for p in ("cls", "mean")
        for n in ("none", "token")
        for lr in (1e-3, 1e-2)
    ]
    results = []
    for i, name in enumerate(names):
        k = {str(k): {"top1": 20.0 + i - k / 50, "top5": 45.0 + i} for k in (5, 10, 20, 100)}
        shifted = [{**row, "top1": row["top1"] + 3 * i} for row in rows]
        best = max(shifted, key=lambda row: row["top1"])
        results += [
            linprobe(name=name, top1=30.12 + i),
            finetune(name=name),
            about(name=name, mode="knn", protocol="linprobe", **READ, k=k),
            about(name=name, mode="probe-sweep", rows=shifted, best=best),
            reconstruct(name=name),
        ]
    return results


def sheet() -> bytes:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    masks = random.random((4, 32, 32)) < 0.5
    return page.png(reconstruction_sheet(images, masks, [("SimMIM", images // 2), ("KAMIM", images)], "noise"))


def test_report_shows_everything_and_needs_nothing(tmp_path: Path) -> None:
    names = ("random", "SimMIM", "<script>alert('&')</script>")
    save(everything(names), tmp_path / "report.html", reconstruct=[(sheet(), "what each makes of 4 images & noise")])
    found = read(tmp_path / "report.html")
    assert {"script", "link", "iframe"}.isdisjoint(found.tags)
    assert not [
        v for k, v in found.attributes if k in ("href", "srcset") or (k == "src" and not str(v).startswith("data:"))
    ]
    assert "http" not in (tmp_path / "report.html").read_text()
    assert found.tags.count("img") == 3
    assert found.tags.count("h2") == 5
    expected = [
        *names,
        "33.97 (Table 1)",
        "32.12 [31.7, 32.5]",
        "17.254",
        "12.063 (section 4.7)",
        "0.1012",
        "top-1, k = 100",
        "0.005",
        "train.fingerprint",
        "cd" * 32,
        "ef" * 32,
        "ab" * 32,
        "options.optim.lr",
        "pretraining.mask.ratio",
        "what each makes of 4 images & noise",
        CHOICE,
    ]
    assert set(expected) <= set(found.text)
    json.dumps(everything(names))  # what --json writes is what the report reads


def test_report_of_one_mode_without_the_papers_column(tmp_path: Path) -> None:
    save([linprobe(architecture="vit_demo", pretraining=None)], tmp_path / "report.html")
    found = read(tmp_path / "report.html")
    assert "Linear probe" in found.text and "Nearest neighbours" not in found.text
    assert "paper's" not in found.text and "30.10 [29.7, 30.5]" in found.text
    assert CHOICE not in found.text
    assert "img" not in found.tags


def test_columns_that_say_nothing_are_left_out() -> None:
    assert page.table(("a", "b", "c"), [("1", "", "x"), ("2", "", "")]).count("<th>") == 2

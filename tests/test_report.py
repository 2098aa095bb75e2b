"""The report and what it quotes of the paper."""

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kamim import page
from kamim.config import PretrainOptim, Weighting
from kamim.evaluation import paper
from kamim.evaluation.paper import quoted
from kamim.evaluation.report import save_report
from kamim.plots import reconstruction_sheet

OPTIM = {**paper.OPTIM, "micro_batch": 2048}
READ = {"block": 8, "pooling": "mean", "norm": "none"}


def about(name: str = "KAMIM", **changes: Any) -> dict[str, Any]:
    """A checkpoint just as the paper's ViT-B, evaluated on ImageNet."""
    weighting = Weighting().model_dump(mode="json")
    return {
        "name": name, "checkpoint": f"runs/{name}/checkpoints/step-62500", "architecture": "vit_base", "step": 62500,
        "weights": "ab" * 32, "reconstructs": True, "seed": 0, "classes": 1000, "protocol": "paper",
        "pretraining": {
            "method": "kamim", "dataset": "imagenet", "weighting": weighting, "epochs": 100, "resolution": 192,
            "complete": True, "mask": {"patch_size": 32, "ratio": 0.6}, "norm_pix_loss": False, "init_from": None,
            "optim": PretrainOptim().model_dump(mode="json"),
        },
        "train": {"store": "stores/train", "dataset": "imagenet", "images": 1_281_167, "fingerprint": "cd" * 32},
        "val": {"store": "stores/val", "dataset": "imagenet", "images": 50_000, "fingerprint": "ef" * 32},
        **changes,
    }  # fmt: skip


def linprobe(**changes: Any) -> dict[str, Any]:
    options = {"augment": "paper", "optim": OPTIM}
    return about(
        **{"mode": "linprobe", **READ, "epochs": 100, "options": options, "top1": 30.1, "top5": 55.2, **changes}
    )


def finetune(**changes: Any) -> dict[str, Any]:
    options = {"drop_path": 0.1, "layer_decay": None, "ema": None, "optim": OPTIM}
    return about(**{"mode": "finetune", "epochs": 100, "options": options, "top1": 76.1, "top5": 93.2, **changes})


def reconstruct(**changes: Any) -> dict[str, Any]:
    found = {"paper": {"psnr": 11.987, "ssim": 0.1012}, "honest": {"psnr": 17.254, "ssim": 0.3456}}
    return about(**{"mode": "reconstruct", "mask_ratio": 0.4, **found, **changes})


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
    assert quoted(linprobe(architecture="swin_base", block=4)) == {"top1": (18.16, "Table 1")}
    assert quoted(reconstruct(train=None)) == {"psnr": (12.063, "section 4.7"), "ssim": (0.1076, "section 4.7")}
    cifar = {"store": "s", "fingerprint": "", "dataset": "cifar10"}
    transfer = linprobe(train={**cifar, "images": 50_000}, val={**cifar, "images": 10_000})
    assert quoted(transfer) == {"top1": (72.63, "Table 3")}
    assert quoted(changed(transfer, "pretraining.dataset", "cifar10")) == {"top1": (59.01, "Table 3")}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("pretraining", None), ("architecture", "vit_demo"), ("architecture", "vit_tiny"), ("protocol", "mae"),
        ("block", 12), ("norm", "token"), ("pooling", "cls"), ("options.optim.epochs", 90), ("options.augment", "crop"),
        ("pretraining.optim.epochs", 300), ("pretraining.complete", False), ("pretraining.dataset", "imagefolder"),
        ("pretraining.resolution", 224), ("pretraining.mask.ratio", 0.75), ("pretraining.weighting.footprint", "point"),
        ("pretraining.weighting.temperature", 0.3), ("pretraining.weighting.normalize", True),
        ("pretraining.optim.decay_all", False), ("pretraining.optim.duration", "90 epochs"),
        ("pretraining.norm_pix_loss", True), ("pretraining.init_from", "x.pth"),
        ("train.images", 10_000), ("val.images", 1000), ("val.dataset", "cifar10"), ("train.dataset", "cifar10"),
        ("mode", "knn"),
    ],
)  # fmt: skip
def test_and_nowhere_else(path: str, value: Any) -> None:
    ours = quoted(changed(linprobe(), path, value))
    if path == "architecture" and value == "vit_tiny":
        assert ours == {"top1": (13.75, "Table 1")}
    else:
        assert ours == {}


def test_reconstructions_are_quoted_at_the_notebooks_ratio_alone() -> None:
    assert quoted(reconstruct(mask_ratio=0.6)) == {}
    assert quoted(changed(reconstruct(), "pretraining.weighting.detector", "orb")) == {}
    assert quoted(reconstruct(architecture="vit_small")) == {}


def test_every_number_of_the_tables_can_be_found() -> None:
    modes = [key[0] for key in paper.QUOTES]
    imagenet, others = 5 * 2 + (12 - 1) + 2, 6 * 2
    assert (modes.count("finetune"), modes.count("linprobe")) == (imagenet + others, imagenet + others + 2)
    assert modes.count("reconstruct") == 2


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
        for b in range(1, 13) for p in ("cls", "mean") for n in ("none", "token") for lr in (1e-3, 1e-2)
    ]  # fmt: skip
    results = []
    for i, name in enumerate(names):
        k = {str(k): {"top1": 20.0 + i - k / 50, "top5": 45.0 + i} for k in (5, 10, 20, 100)}
        shifted = [{**row, "top1": row["top1"] + 3 * i} for row in rows]
        results += [
            linprobe(name=name, top1=30.12 + i), finetune(name=name),
            about(name=name, mode="knn", protocol="dino", **READ, k=k),
            about(name=name, mode="probe-sweep", rows=shifted), reconstruct(name=name),
        ]  # fmt: skip
    return results


def sheet() -> bytes:
    random = np.random.default_rng(0)
    images = random.integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    masks = random.random((4, 32, 32)) < 0.5
    return page.png(reconstruction_sheet(images, masks, [("SimMIM", images // 2), ("KAMIM", images)], "noise"))


def test_report_shows_everything_and_needs_nothing(tmp_path: Path) -> None:
    names = ("random", "SimMIM", "<script>alert('&')</script>")
    save_report(everything(names), [(sheet(), "what each makes of 4 images & noise")], tmp_path / "report.html")
    found = read(tmp_path / "report.html")
    assert {"script", "link", "iframe"}.isdisjoint(found.tags)
    assert not [
        v for k, v in found.attributes if k in ("href", "srcset") or (k == "src" and not str(v).startswith("data:"))
    ]
    assert "http" not in (tmp_path / "report.html").read_text()
    assert found.tags.count("img") == 3
    assert found.tags.count("h2") == 5
    expected = [
        *names, "33.97 (Table 1)", "32.12", "17.254", "12.063 (section 4.7)", "0.1012", "top-1, k = 100", "0.005",
        "train.fingerprint", "cd" * 32, "ef" * 32, "ab" * 32, "options.optim.lr", "pretraining.mask.ratio",
        "what each makes of 4 images & noise",
    ]  # fmt: skip
    assert set(expected) <= set(found.text)
    json.dumps(everything(names))  # what --json writes is what the report reads


def test_report_of_one_mode_without_the_papers_column(tmp_path: Path) -> None:
    save_report([linprobe(architecture="vit_demo", pretraining=None)], [], tmp_path / "report.html")
    found = read(tmp_path / "report.html")
    assert "Linear probe" in found.text and "Nearest neighbours" not in found.text
    assert "paper's" not in found.text and "30.10" in found.text
    assert "img" not in found.tags


def test_columns_that_say_nothing_are_left_out() -> None:
    assert page.table(("a", "b", "c"), [("1", "", "x"), ("2", "", "")]).count("<th>") == 2

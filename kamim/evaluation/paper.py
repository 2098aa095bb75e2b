"""The paper's numbers (Krishna and Subramanyam, Keypoint Aware Masked Image Modelling), and when ours may stand beside.

Accuracies are top-1 in per cent on a validation split.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Method:
    """SimMIM, or KAMIM with a detector, w_ps and T."""

    detector: str | None = None
    patch_size: int = 8
    temperature: float = 0.25


SIMMIM, KAMIM = Method(), Method("fast")
IN_IMAGENET = ("imagenet", "imagenet")  # pretrained on, evaluated on

# SimMIM's linear probe, KAMIM's, SimMIM's fine-tuning, KAMIM's
TABLE_1 = MappingProxyType({
    "vit_tiny": (12.37, 13.75, 70.49, 70.41),
    "vit_small": (20.99, 22.68, 76.8, 77.02),
    "vit_base": (16.12, 33.97, 76.78, 77.30),
    "swin_tiny": (14.37, 14.53, 77.94, 78.12),
    "swin_base": (20.42, 18.16, 79.58, 80.02),
})  # fmt: skip
# (w_ps, T): linear probe, fine-tuning
TABLE_2 = MappingProxyType({
    (8, 0.1): (32.97, 77.59), (8, 0.25): (33.97, 77.29), (8, 0.5): (31.95, 77.11), (8, 1.0): (23.93, 76.94),
    (16, 0.1): (31.38, 77.43), (16, 0.25): (33.05, 77.48), (16, 0.5): (30.82, 77.06), (16, 1.0): (29.51, 77.13),
    (32, 0.1): (25.71, 77.09), (32, 0.25): (31.73, 77.41), (32, 0.5): (30.91, 77.41), (32, 1.0): (25.73, 77.18),
})  # fmt: skip
# (pretrained on, evaluated on): as Table 1
TABLE_3 = MappingProxyType({
    ("inaturalist2021", "inaturalist2021"): (6.92, 17.60, 79.8, 80.48),
    ("places365", "places365"): (26.04, 40.47, 53.2, 53.03),
    ("cifar10", "cifar10"): (62.83, 59.01, 94.13, 94.12),
    ("cifar100", "cifar100"): (37.46, 35.67, 78.92, 77.26),
    ("imagenet", "cifar10"): (61.65, 72.63, 97.03, 97.43),
    ("imagenet", "cifar100"): (36.49, 51.77, 84.58, 85.07),
})  # fmt: skip
TABLE_4 = MappingProxyType({"sift": (31.31, 77.37), "orb": (32.36, 77.17)})
TABLE_5 = MappingProxyType({SIMMIM: 20.51, KAMIM: 37.72})  # linear probes behind a LayerNorm
SECTION_4_7 = MappingProxyType({SIMMIM: (12.058, 0.1095), KAMIM: (12.063, 0.1076)})  # PSNR, SSIM

# What else is the same. Where the paper is silent, the released code's.
PRETRAINING = {
    "complete": True, "resolution": 192, "mask": {"patch_size": 32, "ratio": 0.6}, "norm_pix_loss": False,
    "init_from": None, "optim": {
        "lr": 8e-4, "weight_decay": 0.05, "batch_size": 2048, "epochs": 100, "warmup_epochs": 10, "duration": None,
        "warmup": None, "cosine": None, "decay_all": True,
    },
}  # fmt: skip
OPTIM = {
    "algorithm": "adamw", "lr": 5e-3, "weight_decay": 0.05, "batch_size": 2048, "epochs": 100, "warmup_epochs": 10,
    "cosine_epochs": None, "clip_grad": None,
}  # fmt: skip
EVALUATION: Mapping[str, Mapping[str, Any]] = {
    "linprobe": {"protocol": "paper", "pooling": "mean", "options": {"augment": "paper", "optim": OPTIM}},
    "finetune": {"protocol": "paper", "options": {"drop_path": 0.1, "layer_decay": None, "ema": None, "optim": OPTIM}},
    "reconstruct": {"mask_ratio": 0.4},
}
IMAGES = {  # of whole training and validation splits
    "imagenet": (1_281_167, 50_000), "inaturalist2021": (2_686_843, 100_000), "places365": (1_803_460, 36_500),
    "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000),
}  # fmt: skip
REJECTS = 0.001  # images that a store may lack and still be the whole


Quote = dict[str, tuple[float, str]]  # top1, or psnr and ssim: the paper's number, and where it stands


def quoted(result: Mapping[str, Any]) -> Quote:
    """What the paper says of the same setting; {} where it has no such.

    result: of `kamim eval`, with its pretraining {dataset, resolution, weighting, mask, optim, complete}.
    """
    mode, architecture, pretraining = result["mode"], result["architecture"], result.get("pretraining") or {}
    same = mode in EVALUATION and _agrees(EVALUATION[mode], result) and _agrees(PRETRAINING, pretraining)
    if not same or not _whole(result):
        return {}
    if mode == "linprobe" and result["block"] != (8 if architecture.startswith("vit") else 4):
        return {}
    where = (pretraining["dataset"], result["val"]["dataset"])
    return QUOTES.get((mode, architecture, _method(pretraining), where, result.get("norm", "none")), {})


def _agrees(asked: Any, found: Any) -> bool:
    """Whether found holds all that is asked, at every depth."""
    if isinstance(asked, Mapping):
        return isinstance(found, Mapping) and all(k in found and _agrees(v, found[k]) for k, v in asked.items())
    return bool(asked == found)


def _whole(result: Mapping[str, Any]) -> bool:
    """Whether the stores are whole splits of one data set. Nothing trains for a reconstruction."""
    dataset = result["val"]["dataset"]
    if dataset not in IMAGES:
        return False

    def whole(store: Mapping[str, Any], images: int) -> bool:
        return store["dataset"] == dataset and (1 - REJECTS) * images <= store["images"] <= images

    train, val = IMAGES[dataset]
    return whole(result["val"], val) and (result["mode"] == "reconstruct" or whole(result["train"], train))


def _method(pretraining: Mapping[str, Any]) -> Method | None:
    """None for one that the paper does not have."""
    weighting = pretraining["weighting"]
    if weighting is None:
        return SIMMIM
    if weighting["footprint"] != "ring" or weighting["normalize"]:
        return None
    return Method(weighting["detector"], weighting["patch_size"], weighting["temperature"])


Where = tuple[str, str]  # pretrained on, evaluated on
Key = tuple[str, str, Method | None, Where, str]  # mode, architecture, method, where, norm


def _both(
    architecture: str, method: Method, where: Where, linprobe: float, finetune: float, table: int
) -> Iterator[tuple[Key, Quote]]:
    for mode, value in (("linprobe", linprobe), ("finetune", finetune)):
        yield (mode, architecture, method, where, "none"), {"top1": (value, f"Table {table}")}


def _quotes() -> Iterator[tuple[Key, Quote]]:
    """Later ones stand over earlier: Table 1 where Table 2 differs in its last digit."""
    for detector, pair in TABLE_4.items():
        yield from _both("vit_base", Method(detector), IN_IMAGENET, *pair, 4)
    for (patch_size, temperature), pair in TABLE_2.items():
        yield from _both("vit_base", Method("fast", patch_size, temperature), IN_IMAGENET, *pair, 2)
    in_imagenet = {(architecture, IN_IMAGENET): (row, 1) for architecture, row in TABLE_1.items()}
    elsewhere = {("vit_base", where): (row, 3) for where, row in TABLE_3.items()}
    for (architecture, where), (row, table) in (in_imagenet | elsewhere).items():
        yield from _both(architecture, SIMMIM, where, *row[::2], table)
        yield from _both(architecture, KAMIM, where, *row[1::2], table)
    for method, top1 in TABLE_5.items():
        yield ("linprobe", "vit_base", method, IN_IMAGENET, "joint"), {"top1": (top1, "Table 5")}
    for method, (psnr, ssim) in SECTION_4_7.items():
        found = {"psnr": (psnr, "section 4.7"), "ssim": (ssim, "section 4.7")}
        yield ("reconstruct", "vit_base", method, IN_IMAGENET, "none"), found


QUOTES: Mapping[Key, Quote] = MappingProxyType(dict(_quotes()))

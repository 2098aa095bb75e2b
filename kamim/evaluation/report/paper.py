"""The paper's numbers (Krishna and Subramanyam, Keypoint Aware Masked Image Modelling), and their settings.

Accuracies are top-1 in per cent on a validation split. A number is quoted beside a result only if every key that shapes
pretraining and evaluation equals the paper's or, where its text is silent, the released code's: the tables below.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kamim.evaluation.results import EvalSettings
from kamim.method.geometry import CROP_RATIO


@dataclass(frozen=True)
class Method:
    """SimMIM, or KAMIM with a detector, w_ps and T."""

    detector: str | None = None
    patch_size: int = 8
    temperature: float = 0.25


SIMMIM, KAMIM = Method(), Method("fast")
IN_IMAGENET = ("imagenet", "imagenet")  # pretrained on, evaluated on

# SimMIM's linear probe, KAMIM's, SimMIM's fine-tuning, KAMIM's
TABLE_1 = MappingProxyType(
    {
        "vit_tiny": (12.37, 13.75, 70.49, 70.41),
        "vit_small": (20.99, 22.68, 76.8, 77.02),
        "vit_base": (16.12, 33.97, 76.78, 77.30),
        "swin_tiny": (14.37, 14.53, 77.94, 78.12),
        "swin_base": (20.42, 18.16, 79.58, 80.02),
    }
)
# (w_ps, T): linear probe, fine-tuning
TABLE_2 = MappingProxyType(
    {
        (8, 0.1): (32.97, 77.59),
        (8, 0.25): (33.97, 77.29),
        (8, 0.5): (31.95, 77.11),
        (8, 1.0): (23.93, 76.94),
        (16, 0.1): (31.38, 77.43),
        (16, 0.25): (33.05, 77.48),
        (16, 0.5): (30.82, 77.06),
        (16, 1.0): (29.51, 77.13),
        (32, 0.1): (25.71, 77.09),
        (32, 0.25): (31.73, 77.41),
        (32, 0.5): (30.91, 77.41),
        (32, 1.0): (25.73, 77.18),
    }
)
# (pretrained on, evaluated on): as Table 1
TABLE_3 = MappingProxyType(
    {
        ("inaturalist2021", "inaturalist2021"): (6.92, 17.60, 79.8, 80.48),
        ("places365", "places365"): (26.04, 40.47, 53.2, 53.03),
        ("cifar10", "cifar10"): (62.83, 59.01, 94.13, 94.12),
        ("cifar100", "cifar100"): (37.46, 35.67, 78.92, 77.26),
        ("imagenet", "cifar10"): (61.65, 72.63, 97.03, 97.43),
        ("imagenet", "cifar100"): (36.49, 51.77, 84.58, 85.07),
    }
)
TABLE_4 = MappingProxyType({"sift": (31.31, 77.37), "orb": (32.36, 77.17)})
TABLE_5 = MappingProxyType({SIMMIM: 20.51, KAMIM: 37.72})  # linear probes behind a LayerNorm
SECTION_4_7 = MappingProxyType({SIMMIM: (12.058, 0.1095), KAMIM: (12.063, 0.1076)})  # PSNR, SSIM

IMAGES = {  # images of whole training and validation splits
    "imagenet": (1_281_167, 50_000),
    "inaturalist2021": (2_686_843, 100_000),
    "places365": (1_803_460, 36_500),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
}
REJECTS = 0.001  # share of images that a store may lack and still count as whole

# Keys that must be equal, at every depth; a tuple holds alternatives. Not compared: seeds, paths, keys that a resumed
# may change, and drop_last, which is false in the released code and true in the presets.
SCHEDULES = ({"epochs": 100, "cosine_epochs": None}, {"epochs": 110, "cosine_epochs": 100})  # the text's, the code's
_PRETRAINING_OPTIM = {
    "lr": 8e-4,
    "weight_decay": 0.05,
    "betas": [0.9, 0.999],
    "clip_grad": 1.0,
    "batch_size": 2048,
    "warmup_epochs": 10,
    "warmup_lr": 1e-6,
    "min_lr": 1e-5,
    "duration": None,
    "warmup": None,
    "cosine": None,
    "decay_all": True,
}
PRETRAINING = {
    "complete": True,
    "norm_pix_loss": False,
    "init_from": None,
    "mask": {"patch_size": 32, "ratio": 0.6},
    "data": {
        "resolution": 192,
        "crop_scale": [0.67, 1.0],
        "crop_ratio": list(CROP_RATIO),
        "flip_v": True,
        "flip_h": True,
        "order": "shuffled",
        "on_error": "stop",
    },
    "model": {"drop_path": 0.0},
    "optim": tuple(_PRETRAINING_OPTIM | schedule for schedule in SCHEDULES),
}
OTHER_METHODS, POSITIONS = ("mae", "kamim-mae"), (None, "learned")  # runs of before name no positions
WEIGHTING = {"footprint": "ring", "normalize": False}  # of KAMIM; detector, w_ps and T are the Method's
# From the store, or detected online on crops of the originals: crops of resized images have other keypoints.
KEYPOINTS = ({"weighting": {"keypoints": "store"}}, {"weighting": {"keypoints": "online"}, "images": "original"})
BLOCK = MappingProxyType({"vit": 8, "swin": 4})  # block that a linear probe reads
CLIP_GRAD = MappingProxyType({"vit": None, "swin": 1.0})  # largest gradient norm of a linear probe and of fine-tuning
_OPTIM = {
    "algorithm": "adamw",
    "lr": 5e-3,
    "weight_decay": 0.05,
    "betas": [0.9, 0.999],
    "batch_size": 2048,
    "warmup_epochs": 10,
    "warmup_lr": 2.5e-6,
    "min_lr": 2.5e-6,
}


def evaluation(architecture: str) -> Mapping[str, Mapping[str, Any]]:
    """Returns the settings that must be equal for each mode, for a ViT or a Swin."""
    family = architecture.partition("_")[0]
    optim = tuple(_OPTIM | schedule | {"clip_grad": CLIP_GRAD[family]} for schedule in SCHEDULES)
    probe = {"augment": "paper", "init_std": None, "optim": optim}
    tuned = {"drop_path": 0.0, "layer_decay": None, "ema": None, "optim": optim}
    return {
        "linprobe": {"protocol": "paper", "block": BLOCK[family], "pooling": "mean", "options": probe},
        "finetune": {"protocol": "paper", "options": tuned},
        "reconstruct": {"mask_ratio": 0.4},
    }


Quote = dict[str, tuple[float, str]]  # top1, or psnr and ssim: the paper's number, and its table or section


def quoted(settings: EvalSettings) -> Quote:
    """Returns the paper's numbers for the same setting; {} if it has none, or if settings lack a compared key."""
    mode, architecture, pretraining = settings.mode, settings.architecture, settings.pretraining or {}
    if architecture not in TABLE_1 or not _agrees(PRETRAINING, pretraining):
        return {}
    modes = evaluation(architecture)
    if mode not in modes or not _agrees(modes[mode], settings.as_json()) or not _whole(settings, pretraining):
        return {}
    where = (pretraining["dataset"], settings.val.dataset)
    return QUOTES.get((mode, architecture, _method(pretraining), where, settings.norm or "none"), {})


def _agrees(required: Any, value: Any) -> bool:
    """Returns whether value has everything in `required`, at every depth; of a tuple, one alternative."""
    if isinstance(required, tuple):
        return any(_agrees(alternative, value) for alternative in required)
    if isinstance(required, Mapping):
        return isinstance(value, Mapping) and all(k in value and _agrees(v, value[k]) for k, v in required.items())
    return bool(required == value)


def _whole(settings: EvalSettings, pretraining: Mapping[str, Any]) -> bool:
    """Returns whether all stores are whole splits, train and val of one data set; reconstruction has no train."""

    def whole(dataset: str, images: int | None, split: int) -> bool:
        return dataset in IMAGES and (1 - REJECTS) * IMAGES[dataset][split] <= (images or 0) <= IMAGES[dataset][split]

    train, val = settings.train, settings.val
    if settings.mode != "reconstruct" and (
        train is None or train.dataset != val.dataset or not whole(train.dataset, train.images, 0)
    ):
        return False
    return whole(pretraining["dataset"], pretraining.get("samples"), 0) and whole(val.dataset, val.images, 1)


def _method(pretraining: Mapping[str, Any]) -> Method | None:
    """Returns the method of a run, or None if it is not in the paper."""
    weighting = pretraining.get("weighting", {})
    if pretraining.get("method") in OTHER_METHODS or pretraining.get("positions") not in POSITIONS:
        return None
    if weighting is None:
        return SIMMIM
    if not _agrees(WEIGHTING, weighting) or not _agrees(KEYPOINTS, pretraining):
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
    """Yields quotes; later ones override earlier ones: Table 1 overrides Table 2, which differs in its last digit."""
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
        quote = {"psnr": (psnr, "section 4.7"), "ssim": (ssim, "section 4.7")}
        yield ("reconstruct", "vit_base", method, IN_IMAGENET, "none"), quote


QUOTES: Mapping[Key, Quote] = MappingProxyType(dict(_quotes()))

"""kamim: Keypoint Aware Masked Image Modelling.

The public names below are imported when they are first used, so that `import kamim` takes no time. Which package holds
what: docs/architecture.md.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"


class KamimError(ValueError):
    """What a user can mend. Its message is one line: what was given, what is allowed, what to do."""


_PUBLIC = {
    "Store": "kamim.storage.store",
    "Plan": "pipelines.plan",
    "Crop": "pipelines.loader",
    "Loader": "pipelines.loader",
    "SampleError": "pipelines.loader",
    "Batch": "pipelines.batch",
    "CachedCounts": "pipelines.counts",
    "OnlineCounts": "pipelines.counts",
    "keypoint_weights": "kamim.method.weighting",
    "counts_to_weights": "kamim.method.weighting",
    "masked_l1": "kamim.method.loss",
    "MaskedImageModel": "kamim.models.masked_image_model",
    "Trainer": "kamim.training.trainer",
    "Pretrain": "kamim.config.pretrain",
    "Evaluation": "kamim.evaluation.options",
    "load": "kamim.config.schema",
    "pretrain": "kamim.training.pretrain",
    "evaluate": "kamim.evaluation.evaluate",
}

__all__ = ["KamimError", "__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'kamim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

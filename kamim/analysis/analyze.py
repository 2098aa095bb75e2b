"""Loads stores and checkpoints for the analyses."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.analysis.analysed_model import AnalysedModel, timm_encoder
from kamim.analysis.request import Request
from kamim.analysis.run import analyse
from kamim.evaluation.evaluated_model import load_model
from kamim.storage import lock
from kamim.storage.store import Store
from pipelines.batch import Batch
from pipelines.counts import OnlineCounts
from pipelines.loader import Loader
from pipelines.plan import Plan


class _StoreImages:
    """The images of a store as a Source. Keypoints are detected on the pixels that the model sees."""

    def __init__(self, store: Store):
        self.name = str(store.path)
        self.labels = store.images.labels
        self.classes = store.manifest.classes
        self._store = store

    def batches(self, indices: np.ndarray, resolution: int, size: int, cell: int | None) -> Iterable[Batch]:
        size = min(size, len(indices))
        plan = Plan(len(indices), size, size, seed=0, shuffle=False, drop_last=False, listed=np.asarray(indices))
        counter = None if cell is None else OnlineCounts("fast", "ring", cell)
        return Loader(self._store, plan, resolution, counter=counter).steps(0, plan.steps_per_epoch)


def load_analysed_model(spec: str, seed: int) -> AnalysedModel:
    """Loads NAME=CHECKPOINT, as load_model does, or timm:MODEL[@FILE]. Raises KamimError for anything else."""
    name, equals, source = spec.partition("=")
    if not (name and equals and source):
        raise KamimError(f"checkpoint = {spec}: must be NAME=CHECKPOINT, such as KAMIM=runs/demo/kamim")
    if source.startswith("timm:"):
        encoder = timm_encoder(source.removeprefix("timm:"), seed)
        about = {"checkpoint": source, "architecture": source.removeprefix("timm:").partition("@")[0]}
        return AnalysedModel(name, encoder, encoder.patch_embed.img_size[0], None, about)
    loaded = load_model(source)
    model = loaded.model if loaded.has_head else None
    return AnalysedModel(name, loaded.model.encoder, loaded.model.resolution, model, asdict(loaded.origin))


def run_analysis(
    specs: Sequence[str], store: Store, request: Request, out: Path, progress: Callable[[int, int], None]
) -> list[str]:
    """Writes figures, numbers and a page to `out`; returns the lines to print."""
    names = [spec.partition("=")[0] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise KamimError(f"checkpoint = {name}=...: given twice; every checkpoint needs a name of its own")
    models = [load_analysed_model(spec, request.seed) for spec in specs]
    with lock.alone(out, "out"):
        return analyse(models, _StoreImages(store), request, out, progress)

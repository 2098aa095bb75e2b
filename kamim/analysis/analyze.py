"""Stores and checkpoints for the analyses."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from kamim import KamimError
from kamim.analysis.request import Request
from kamim.analysis.run import analyse
from kamim.analysis.subjects import Subject, timm_encoder
from kamim.evaluation.subject import load_model
from kamim.storage import lock
from kamim.storage.store import Store
from pipelines.batch import Batch
from pipelines.counts import OnlineCounts
from pipelines.loader import Loader
from pipelines.plan import Plan


class _StoreImages:
    """kamim.analysis.request.Source, of a store. Keypoints are found online, on the very pixels the model sees."""

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


def load_subject(spec: str, seed: int) -> Subject:
    """NAME=CHECKPOINT, with what load_model takes, timm:MODEL or timm:MODEL@FILE. Raises ValueError for another."""
    name, equals, source = spec.partition("=")
    if not (name and equals and source):
        raise KamimError(f"--checkpoint {spec}: must be NAME=CHECKPOINT, such as KAMIM=runs/demo/kamim")
    if source.startswith("timm:"):
        encoder = timm_encoder(source.removeprefix("timm:"), seed)
        about = {"checkpoint": source, "architecture": source.removeprefix("timm:").partition("@")[0]}
        return Subject(name, encoder, encoder.patch_embed.img_size[0], None, about)
    found = load_model(source)
    model = found.model if found.has_head else None
    return Subject(name, found.model.encoder, found.model.resolution, model, found.about)


def run_analysis(
    specs: Sequence[str], store: Store, request: Request, out: Path, progress: Callable[[int, int], None]
) -> list[str]:
    """`kamim analyze`: figures, numbers and a page in `out`; returns what to say."""
    names = [spec.partition("=")[0] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise KamimError(f"--checkpoint {name}=...: given twice; every checkpoint needs a name of its own")
    subjects = [load_subject(spec, request.seed) for spec in specs]
    with lock.alone(out, "--out"):
        return analyse(subjects, _StoreImages(store), request, out, progress)

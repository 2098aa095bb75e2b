"""Loads the checkpoints of an analysis and runs it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from kamim.analysis.analysed_model import AnalysedModel, timm_encoder
from kamim.analysis.request import Request, check_names
from kamim.analysis.run import COMMAND, NUMBERS, PAGE, TITLE, analyse
from kamim.evaluation.evaluated_model import load_model
from kamim.models.file_kind import named
from kamim.reporting import page
from kamim.storage import lock
from kamim.storage.ownership import check_results, refuse_links
from kamim.storage.store import Store


def load_analysed_model(spec: str, seed: int) -> AnalysedModel:
    """Loads [NAME=]CHECKPOINT, as load_model does, or timm:MODEL[@FILE]. Raises KamimError for anything else."""
    name, source = named(spec)
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
    check_names(specs)
    check_results(out, COMMAND, lambda out: page.title_of(out / PAGE) == TITLE)
    refuse_links((*(out / name for name in (PAGE, NUMBERS)), *out.glob("figure-*")))
    models = [load_analysed_model(spec, request.seed) for spec in specs]
    with lock.alone(out, "out"):
        return analyse(models, store, request, out, progress)

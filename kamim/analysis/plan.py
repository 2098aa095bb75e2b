"""Selects the models that each figure can show."""

from collections.abc import Sequence

from kamim import KamimError
from kamim.analysis import embed
from kamim.analysis.analysed_model import AnalysedModel
from kamim.analysis.collect import WEIGHT_CELL
from kamim.analysis.request import CLASSES, FIGURES, Chosen, Request

NEED_VIT = {"5", "6", "7", "8", "9", "10"}
NEED_CLASSES = {"3", "9", "10"}
NEED_SKLEARN = {"3", "8", "9", "10"}
NEED_LAYER = {"3", "5", "8", "9", "10"}


def probed(model: AnalysedModel, request: Request) -> list[tuple[int, float]]:
    """Returns (block, top-1 in per cent) of the request's probes of this very checkpoint, by block."""
    own = [probe for probe in request.probes if probe.settings.checkpoint == model.about["checkpoint"]]
    return sorted((probe.settings.block or 0, probe.measured.top1) for probe in own)


def _shown(
    figure: str, models: Sequence[AnalysedModel], chosen: Chosen, request: Request
) -> tuple[list[AnalysedModel], str]:
    """Returns the models that `figure` can show, and the reason why it cannot show others."""
    if figure == "probe":
        return [m for m in models if probed(m, request)], "needs a probe, kamim eval's result for the checkpoint"
    if figure in NEED_CLASSES and not chosen.titles:
        return [], f"needs labels of {CLASSES} classes, which the store does not have"
    if figure == "2":
        return [m for m in models if m.model is not None], "needs a checkpoint of kamim, which has a pixel head"
    if figure == "weights":
        reason = f"needs a ViT, for images of a multiple of {WEIGHT_CELL} px"
        return [m for m in models if m.is_vit and m.resolution % WEIGHT_CELL == 0], reason
    if figure in NEED_VIT:
        return [m for m in models if m.is_vit], "needs a ViT, whose tokens all attend to each other"
    return list(models), ""


def plan(
    request: Request, models: Sequence[AnalysedModel], chosen: Chosen
) -> tuple[dict[str, list[AnalysedModel]], list[str]]:
    """Returns {figure: models it shows}, and notes on omissions. Raises KamimError if a requested one shows none."""
    planned, notes = {}, []
    for figure in request.figures or FIGURES:
        if figure == "probe" and not request.probes and request.figures is None:
            continue  # not requested
        able, reason = _shown(figure, models, chosen, request)
        if able:
            planned[figure] = able
        elif request.figures:
            raise KamimError(f"figures = {figure}: {reason}")
        if len(able) < len(models):
            left = ", ".join(m.name for m in models if m not in able)
            notes.append(f"figure {figure} without {left}: {reason}")
    for model in {m.name: m for figure in NEED_LAYER & planned.keys() for m in planned[figure]}.values():
        _check("layer", request.layer, model, model.depth)
    for model in planned.get("5", []):
        _check("head", request.head, model, model.encoder.blocks[0].attn.num_heads)
    if NEED_SKLEARN & planned.keys():
        embed.check()
    return planned, notes


def _check(option: str, value: int | None, model: AnalysedModel, most: int) -> None:
    """Raises KamimError for a layer or head that the model does not have."""
    if value is not None and not 1 <= value <= most:
        raise KamimError(f"{option} = {value}: {model.name} has {option}s 1 to {most}")

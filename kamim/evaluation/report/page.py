"""Writes the results of `kamim eval`, of several checkpoints side by side, as one HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kamim
from kamim.evaluation.modes import MODES
from kamim.evaluation.report.comparison import compared
from kamim.evaluation.report.paper import quoted
from kamim.evaluation.results import EvalSettings, Result, headline, majority_lines
from kamim.evaluation.sections import PAPER_HEADER
from kamim.reporting import page
from kamim.storage.flatten import flat_text

TITLE = "kamim evaluation"
CHOICE = (
    "The best k of kNN and the best block, pooling, norm and rate of the sweep are chosen on the validation images "
    "themselves, so they are biased upwards."
)


def chosen_on_val(modes: Iterable[str]) -> bool:
    """Returns whether any of these modes' headline is the best of several on the validation store, as in CHOICE."""
    return any(MODES[mode].chosen_on_val for mode in modes)


def save_report(
    results: Sequence[Result[Any]], pictures: Mapping[str, Sequence[tuple[bytes, str]]], file: Path
) -> None:
    """Writes one self-contained page, with the checkpoints in the order of `results`. pictures: (PNG, caption) by mode.

    The paper's numbers appear next to ours if the setting is the same (kamim.evaluation.report.paper.quoted).
    """
    about = (
        f"kamim {kamim.__version__}. Accuracies are top-1 in per cent on the validation store, unless named, with "
        "Wilson's 95 % interval. It describes the choice of the validation images, not that of the training seed."
    )
    parts = [page.paragraph(about), _glance(results), *map(page.paragraph, majority_lines(results))]
    if chosen_on_val(r.settings.mode for r in results):
        parts.append(page.paragraph(CHOICE))
    parts.append(_checkpoints([r.settings for r in results]))
    if any(quoted(r.settings) for r in results):
        parts.append(page.paragraph(f"Columns {PAPER_HEADER}: what the paper reports for the same setting."))
    parts += compared(results)
    for name, mode in MODES.items():
        of_mode = [r for r in results if r.settings.mode == name]
        if of_mode:
            parts += [page.heading(mode.title), *mode.section(of_mode)]
            parts += [page.picture(png, name, caption) for png, caption in pictures.get(name, ())]
            parts += [
                page.folded(f"{r.settings.name}: settings and fingerprints", _settings(r.settings)) for r in of_mode
            ]
    page.save_page(TITLE, parts, file)


def _checkpoints(settings: Sequence[EvalSettings]) -> page.Part:
    return page.table(
        ("checkpoint", "architecture", "step", "pretraining", "file"),
        [
            (name, s.architecture, str(s.step), _pretraining(s.pretraining), s.checkpoint)
            for name, s in {s.name: s for s in settings}.items()
        ],
    )


def _glance(results: Sequence[Result[Any]]) -> page.Part:
    """Returns a table of one number for each checkpoint and mode."""
    headlines = {(r.settings.name, r.settings.mode): headline(r) for r in results}
    names = dict.fromkeys(r.settings.name for r in results)
    return page.table(
        ("checkpoint", *(mode.column for mode in MODES.values())),
        [(name, *(headlines.get((name, mode), "") for mode in MODES)) for name in names],
    )


def _pretraining(run: Mapping[str, Any] | None) -> str:
    return "" if run is None else f"{run['method']} on {run['dataset'] or 'unknown'}, {run['epochs']} epochs"


def _settings(settings: EvalSettings) -> page.Part:
    """Returns a table of everything that led to a result, nested keys joined by dots."""
    return page.table(("key", "value"), flat_text(settings.as_json()))

"""Compares kNN, linear and attentive probes of a checkpoint: whether its features differ, or their pooling."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from kamim.evaluation.report import figures
from kamim.evaluation.results import Result
from kamim.reporting import page
from kamim.reporting.intervals import with_wilson

GAP = (
    "All of these read frozen features and differ in what they learn: kNN nothing, linear and mean a linear layer on "
    "pooled tokens, abmilp and ep also which tokens count. mean, abmilp and ep are trained alike; linear also has "
    "augmentation and another optimiser. So what a "
    "checkpoint gains from mean to ep is information that its tokens hold and their mean does not show. If ep closes "
    "the gap between two checkpoints, they differ in how their tokens pool; as far as the gap remains under ep, they "
    "differ in their features."
)


def _pooling(name: str) -> Callable[[Any], float | None]:
    return lambda measured: measured.poolings[name].top1 if name in measured.poolings else None


# Column: its mode, and a function from the mode's measurement to top1 in per cent.
COLUMNS: Mapping[str, tuple[str, Callable[[Any], float | None]]] = {
    "kNN, best k": ("knn", lambda measured: measured.score),
    "linear": ("linprobe", lambda measured: measured.score),
    "mean": ("attentive", _pooling("mean")),
    "abmilp": ("attentive", _pooling("abmilp")),
    "ep": ("attentive", _pooling("ep")),
}


def compared(results: Sequence[Result[Any]]) -> Iterator[page.Part]:
    """Yields parts of the page: the meaning of a gap, a table and a plot, if a checkpoint has an attentive probe."""
    names = list(dict.fromkeys(r.settings.name for r in results if r.settings.mode == "attentive"))
    if not names:
        return
    of_names = {name: {r.settings.mode: r for r in results if r.settings.name == name} for name in names}
    accuracies = {
        name: {
            column: top1
            for column, (mode, top1_of) in COLUMNS.items()
            if mode in by_mode and (top1 := top1_of(by_mode[mode].measured)) is not None
        }
        for name, by_mode in of_names.items()
    }
    yield page.heading("Features or pooling")
    yield page.paragraph(GAP)
    yield page.table(
        ("checkpoint", *COLUMNS),
        [
            (
                name,
                *(
                    with_wilson(row[column], of_names[name][mode].settings.val.images) if column in row else ""
                    for column, (mode, _) in COLUMNS.items()
                ),
            )
            for name, row in accuracies.items()
        ],
    )
    modes = {mode for mode, _ in COLUMNS.values()}
    for name, by_mode in of_names.items():
        read = {
            mode: f"block {r.settings.block}, norm {r.settings.norm}" for mode, r in by_mode.items() if mode in modes
        }
        if len(set(read.values())) > 1:
            yield page.paragraph(
                f"{name}: the modes read different features, so that a gap is not of pooling alone: "
                f"{'; '.join(f'{mode} {what}' for mode, what in read.items())}."
            )
    figure = figures.poolings(accuracies)
    yield page.picture(page.png(figure), "accuracy by pooling", "Top-1 by how the features are read.")

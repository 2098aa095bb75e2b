"""The report's sections, one for each kind of result, as parts of a page (kamim.reporting.page)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kamim.evaluation.report import figures
from kamim.evaluation.report.paper import quoted
from kamim.evaluation.results import (
    Accuracy,
    AttentiveAccuracy,
    EvalSettings,
    FewShotAccuracy,
    KnnAccuracy,
    Reconstructions,
    Result,
    Robustness,
    Segmentation,
    ShapeBias,
    SweepAccuracy,
    SweepRow,
    best_by_readout,
)
from kamim.reporting import page
from kamim.reporting.intervals import with_wilson
from kamim.reporting.plots import BRIGHTEST, attention_sheet, reconstruction_sheet, segmentation_sheet

PAPER_HEADER = "paper's"
ATTENTION = "attention.npz"  # originals, and the attention [n, Q, g, g] of each probe that learns one, by its name
SHOWN_QUERIES = 6
PICTURE = "segmentations.npz"  # images, truth, predicted and classes, for plots.segmentation_sheet
SHOWN = "shown.npz"  # originals, masks and made (the reconstructions), for plots.reconstruction_sheet


def classified(results: Sequence[Result[Accuracy]]) -> Iterator[page.Part]:
    """Yields a table of linear probes or of fine-tuning."""
    header = ("checkpoint", "protocol", "block", "pooling", "norm", "epochs", "top-1", PAPER_HEADER, "top-5")
    yield page.table(
        header,
        [
            (
                s.name,
                s.protocol,
                *(_text(value) for value in (s.block, s.pooling, s.norm, s.epochs)),
                with_wilson(measured.top1, s.val.images),
                quote(s, "top1"),
                _percent(measured.top5),
            )
            for s, measured in ((r.settings, r.measured) for r in results)
        ],
    )


def attentive_probes(results: Sequence[Result[AttentiveAccuracy]]) -> Iterator[page.Part]:
    """Yields a table with a row for each checkpoint and pooling; a step may take fewer samples than was configured."""
    yield page.table(
        ("checkpoint", "pooling", "block", "norm", "epochs", "samples a step", "rate", "top-1", "top-5"),
        [
            (
                s.name,
                name,
                _text(s.block),
                _text(s.norm),
                _text(s.epochs),
                _text(s.options["optim"]["batch_size"]),
                f"{s.options['optim']['lr']:g}",
                with_wilson(accuracy.top1, s.val.images),
                _percent(accuracy.top5),
            )
            for s, measured in ((r.settings, r.measured) for r in results)
            for name, accuracy in measured.poolings.items()
        ],
    )


def attention_sheets(folders: Sequence[tuple[str, Path]]) -> Iterator[tuple[bytes, str]]:
    """Yields (PNG, caption) of the attention that probes have learned. folders: (checkpoint, folder of its task)."""
    for name, folder in folders:
        with np.load(folder / ATTENTION) as arrays:
            originals, maps = arrays["originals"], {key: arrays[key] for key in arrays.files if key != "originals"}
        rows = [(key, attention.mean(axis=1)) for key, attention in maps.items()]
        if "ep" in maps:
            rows += [
                (f"query {i}", maps["ep"][:, i - 1]) for i in range(1, min(SHOWN_QUERIES, maps["ep"].shape[1]) + 1)
            ]
        if rows:
            caption = (
                f"{name}: the weight of each token, from black for none to bright for {BRIGHTEST:g} times the uniform "
                "weight or more. Of ep the mean over its queries, and the first of them, in no order."
            )
            yield page.png(attention_sheet(originals, rows, "")), caption


def neighbours(results: Sequence[Result[KnnAccuracy]]) -> Iterator[page.Part]:
    """Yields a table and a curve of accuracies by k."""
    ks = sorted({k for r in results for k in r.measured.k})
    yield page.table(
        ("checkpoint", "protocol", "block", "pooling", "norm", *(f"top-1, k = {k}" for k in ks), "top-5, largest k"),
        [
            (
                s.name,
                s.protocol,
                _text(s.block),
                _text(s.pooling),
                _text(s.norm),
                *(with_wilson(accuracies[k].top1, s.val.images) if k in accuracies else "" for k in ks),
                _percent(accuracies[max(accuracies)].top5),
            )
            for s, accuracies in ((r.settings, r.measured.k) for r in results)
        ],
    )
    figure = figures.neighbours({r.settings.name: r.measured for r in results})
    yield page.picture(page.png(figure), "kNN accuracy by k", "Top-1 by the number of neighbours that vote.")


def swept(results: Sequence[Result[SweepAccuracy]]) -> Iterator[page.Part]:
    """Yields a table of the best probes, a curve by depth, and every readout's best probe."""
    header = ("checkpoint", "block", "pooling", "norm", "rate", "top-1", "top-5")
    yield page.table(header, [(r.settings.name, *_row(r.measured.best, r.settings.val.images)) for r in results])
    figure = figures.depth({r.settings.name: r.measured.rows for r in results})
    caption = (
        "Top-1 of linear probes on cached features by depth, at the learning rate that is best on this very split."
    )
    yield page.picture(page.png(figure), "probe accuracy by depth", caption)
    for r in results:
        rows = [_row(row, r.settings.val.images) for row in best_by_readout(r.measured.rows)]
        yield page.folded(f"{r.settings.name}: every readout at its best rate", page.table(header[1:], rows))


def _row(row: SweepRow, images: int) -> tuple[str, ...]:
    top1 = with_wilson(row.top1, images)
    return (str(row.block), row.pooling, row.norm, f"{row.lr:g}", top1, _percent(row.top5))


def reconstructed(results: Sequence[Result[Reconstructions]]) -> Iterator[page.Part]:
    """Yields a table for each convention."""
    header = ("checkpoint", "PSNR (dB)", PAPER_HEADER, "SSIM", PAPER_HEADER)
    whole_image = [(r.settings, r.measured.paper) for r in results if r.measured.paper]
    if whole_image:
        yield page.paragraph("Paper's convention: whole images, normalised units.")
        yield page.table(
            header,
            [
                (s.name, f"{m.psnr:.3f}", quote(s, "psnr", 3), f"{m.ssim:.4f}", quote(s, "ssim", 4))
                for s, m in whole_image
            ],
        )
    masked_only = [(r.settings, r.measured.honest) for r in results if r.measured.honest]
    if masked_only:
        yield page.paragraph("Honest units: masked pixels only, in [0, 1].")
        yield page.table(header, [(s.name, f"{m.psnr:.3f}", "", f"{m.ssim:.4f}", "") for s, m in masked_only])


def reconstruction_sheets(folders: Sequence[tuple[str, Path]]) -> Iterator[tuple[bytes, str]]:
    """Yields (PNG, caption) of reconstructions side by side. folders: (checkpoint, folder of its task).

    Checkpoints share a picture if they have the same images and masks.
    """
    sheets: dict[tuple[bytes, bytes], list[tuple[str, np.ndarray]]] = {}
    shown: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray]] = {}
    for name, folder in folders:
        with np.load(folder / SHOWN) as arrays:
            originals, masks, reconstructions = (arrays[key] for key in ("originals", "masks", "made"))
        same = originals.tobytes(), masks.tobytes()
        shown[same] = originals, masks
        sheets.setdefault(same, []).append((name, reconstructions))
    for same, rows in sheets.items():
        yield page.png(reconstruction_sheet(*shown[same], rows, "")), "Original, masked, and each reconstruction."


def segmented(results: Sequence[Result[Segmentation]]) -> Iterator[page.Part]:
    """Yields a table of means, and one of every class."""
    yield page.table(
        ("checkpoint", "protocol", "block", "epochs", "mIoU", "over classes", "pixel accuracy"),
        [
            (
                s.name,
                s.protocol,
                _text(s.block),
                _text(s.epochs),
                _percent(measured.miou),
                measured.classes,
                _percent(measured.pixel_accuracy),
            )
            for s, measured in ((r.settings, r.measured) for r in results)
        ],
    )
    classes = dict.fromkeys(name for r in results for name in r.measured.iou)
    rows = [(name, *(_share(r.measured.iou.get(name)) for r in results)) for name in classes]
    yield page.folded("IoU by class", page.table(("class", *(r.settings.name for r in results)), rows))


def segmentation_sheets(folders: Sequence[tuple[str, Path]]) -> Iterator[tuple[bytes, str]]:
    """Yields (PNG, caption) of predictions below the truth. folders: (checkpoint, folder of its task).

    Checkpoints share a picture if they have the same images and masks.
    """
    sheets: dict[tuple[bytes, bytes], list[tuple[str, np.ndarray]]] = {}
    shown: dict[tuple[bytes, bytes], tuple[np.ndarray, np.ndarray, list[str]]] = {}
    for name, folder in folders:
        with np.load(folder / PICTURE) as arrays:
            images, truth, predicted, classes = (arrays[key] for key in ("images", "truth", "predicted", "classes"))
        same = images.tobytes(), truth.tobytes()
        shown[same] = images, truth, classes.tolist()
        sheets.setdefault(same, []).append((name, predicted))
    for same, rows in sheets.items():
        caption = "Validation images, their true classes (white: none), and what each checkpoint predicts."
        yield page.png(segmentation_sheet(*shown[same], rows)), caption


def few_labels(results: Sequence[Result[FewShotAccuracy]]) -> Iterator[page.Part]:
    """Yields a table and a curve of accuracies by the number of labelled images."""
    yield page.table(
        ("checkpoint", "block", "pooling", "norm", "labels of a class", "images", "linear, top-1", "kNN, top-1"),
        [
            (
                s.name,
                _text(s.block),
                _text(s.pooling),
                _text(s.norm),
                str(shot.per_class or "all"),
                str(shot.images),
                _spread(shot.linear, shot.linear_spread),
                _spread(shot.knn, shot.knn_spread),
            )
            for s, shots in ((r.settings, r.measured.shots) for r in results)
            for shot in shots
        ],
    )
    figure = figures.few_labels({r.settings.name: (r.settings.classes, r.measured) for r in results})
    caption = "Top-1 by labelled images of each class; mean and standard deviation over draws of the images."
    yield page.picture(page.png(figure), "accuracy by labels", caption)


def corrupted(results: Sequence[Result[Robustness]]) -> Iterator[page.Part]:
    """Yields a table of means and a curve for each corruption."""
    kinds = list(dict.fromkeys(row.corruption for r in results for row in r.measured.corrupted))
    rows = []
    for s, m in ((r.settings, r.measured) for r in results):
        for name, clean, mean in (("linear", m.linear, m.mean_linear), ("knn", m.knn, m.mean_knn)):
            of_kinds = [[getattr(row, name) for row in m.corrupted if row.corruption == kind] for kind in kinds]
            means = (_percent(sum(values) / len(values)) if values else "" for values in of_kinds)
            rows.append((s.name, name, with_wilson(clean, s.val.images), *means, _percent(mean)))
    yield page.table(("checkpoint", "classifier", "clean", *kinds, "mean"), rows)
    figure = figures.corrupted({r.settings.name: r.measured for r in results})
    yield page.picture(page.png(figure), "accuracy by corruption", "Top-1 by corruption and strength; 0 is clean.")


def shape_biases(results: Sequence[Result[ShapeBias]]) -> Iterator[page.Part]:
    """Yields a table of decisions, and the bias by category."""
    measured = [(r.settings.name, r.measured) for r in results]
    yield page.table(
        ("checkpoint", "shape bias (%)", "shape", "texture", "other"),
        [(name, _share(m.shape_bias), str(m.shape), str(m.texture), str(m.other)) for name, m in measured],
    )
    categories = dict.fromkeys(category for _, m in measured for category in m.by_category)
    rows = [(category, *(_share(m.by_category.get(category)) for _, m in measured)) for category in categories]
    yield page.folded("By shape", page.table(("category", *(name for name, _ in measured)), rows))


def _spread(mean: float, spread: float) -> str:
    return f"{mean:.2f} ± {spread:.2f}" if spread else _percent(mean)


def _share(value: float | None) -> str:
    return "" if value is None else _percent(value)


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _percent(value: float) -> str:
    return f"{value:.2f}"


def quote(settings: EvalSettings, name: str, digits: int = 2) -> str:
    """Returns the paper's number for the same setting and where it is printed; empty if there is none."""
    value, where = quoted(settings).get(name, (None, ""))
    return "" if value is None else f"{value:.{digits}f} ({where})"

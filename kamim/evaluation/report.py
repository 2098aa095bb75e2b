"""Results of `kamim eval`, of several checkpoints side by side, as one HTML page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kamim
from kamim.evaluation import figures
from kamim.evaluation.paper import quoted
from kamim.evaluation.probe_sweep import best, best_by_readout
from kamim.reporting import page
from kamim.storage.flatten import flat_text

Result = Mapping[str, Any]
FOUND = ("top1", "top5", "k", "rows", "best", "paper", "honest")  # what a result holds beside its settings
PAPER_HEADER = "paper's"
CHOSEN = ("knn", "probe-sweep")  # modes whose headline is the best of several on the validation store
CHOICE = (
    "The best k of kNN and the best block, pooling, norm and rate of the sweep are chosen on the validation images "
    "themselves, which flatters."
)


def save_report(results: Sequence[Result], pictures: Sequence[tuple[bytes, str]], file: Path) -> None:
    """One page, self-contained. pictures: (PNG, caption), shown with the reconstructions.

    The paper's numbers stand beside ours where the setting is the same (kamim.evaluation.paper.quoted).
    """
    about = (
        f"kamim {kamim.__version__}. Accuracies in per cent on the validation store; top-1 where nothing else is said."
    )
    parts = [page.paragraph(about), _glance(results)]
    if any(result["mode"] in CHOSEN for result in results):
        parts.append(page.paragraph(CHOICE))
    parts.append(_checkpoints(results))
    if any(quoted(result) for result in results):
        parts.append(page.paragraph(f"Columns {PAPER_HEADER}: what the paper reports where its setting is the same."))
    for mode, (title, section) in SECTIONS.items():
        mine = [result for result in results if result["mode"] == mode]
        if mine:
            parts += [page.heading(title), *section(mine)]
            parts += [page.picture(png, mode, caption) for png, caption in pictures if mode == "reconstruct"]
            parts += [page.folded(f"{r['name']}: settings and fingerprints", _settings(r)) for r in mine]
    page.save_page("kamim evaluation", parts, file)


def _checkpoints(results: Sequence[Result]) -> str:
    unique = {result["name"]: result for result in results}
    return page.table(
        ("checkpoint", "architecture", "step", "pretraining", "file"),
        [
            (name, r["architecture"], str(r["step"]), _pretraining(r.get("pretraining")), r["checkpoint"])
            for name, r in unique.items()
        ],
    )


def _glance(results: Sequence[Result]) -> str:
    """One number a mode."""
    found = {(r["name"], r["mode"]): HEADLINES[r["mode"]][1](r) for r in results if r["mode"] in HEADLINES}
    names = dict.fromkeys(r["name"] for r in results)
    return page.table(
        ("checkpoint", *(title for title, _ in HEADLINES.values())),
        [(name, *(found.get((name, mode), "") for mode in HEADLINES)) for name in names],
    )


def _pretraining(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['method']} on {found['dataset'] or 'unknown'}, {found['epochs']} epochs"


def _classified(results: Sequence[Result]) -> Iterator[str]:
    """linprobe, finetune."""
    header = ("checkpoint", "protocol", "block", "pooling", "norm", "epochs", "top-1", PAPER_HEADER, "top-5")
    yield page.table(
        header,
        [
            (
                r["name"], r["protocol"], *(str(r.get(key, "")) for key in ("block", "pooling", "norm", "epochs")),
                _percent(r["top1"]), _quote(r, "top1"), _percent(r["top5"]),
            ) for r in results
        ],
    )  # fmt: skip


def _neighbours(results: Sequence[Result]) -> Iterator[str]:
    ks = sorted({int(k) for r in results for k in r["k"]})
    yield page.table(
        ("checkpoint", "protocol", "block", "pooling", "norm", *(f"top-1, k = {k}" for k in ks), "top-5, largest k"),
        [
            (
                r["name"], r["protocol"], str(r["block"]), r["pooling"], r["norm"],
                *(_percent(r["k"][str(k)]["top1"]) if str(k) in r["k"] else "" for k in ks),
                _percent(r["k"][max(r["k"], key=int)]["top5"]),
            ) for r in results
        ],
    )  # fmt: skip
    drawn = figures.neighbours({r["name"]: r["k"] for r in results})
    yield page.picture(page.png(drawn), "kNN accuracy by k", "Top-1 by the number of neighbours that vote.")


def _swept(results: Sequence[Result]) -> Iterator[str]:
    header = ("checkpoint", "block", "pooling", "norm", "rate", "top-1", "top-5")
    yield page.table(header, [(r["name"], *_row(best(r["rows"]))) for r in results])
    drawn = figures.depth({r["name"]: r["rows"] for r in results})
    caption = (
        "Top-1 of linear probes on cached features by depth, at the learning rate that is best on this very split."
    )
    yield page.picture(page.png(drawn), "probe accuracy by depth", caption)
    for r in results:
        rows = [_row(row) for row in best_by_readout(r["rows"])]
        yield page.folded(f"{r['name']}: every readout at its best rate", page.table(header[1:], rows))


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    readout = (str(row[key]) for key in ("block", "pooling", "norm"))
    return (*readout, f"{row['lr']:g}", _percent(row["top1"]), _percent(row["top5"]))


def _reconstructed(results: Sequence[Result]) -> Iterator[str]:
    conventions = {
        "paper": "Paper's convention: whole images, normalised units.",
        "honest": "Honest units: masked pixels only, in [0, 1].",
    }
    for convention, words in conventions.items():
        mine = [r for r in results if convention in r]
        if mine:
            yield page.paragraph(words)
            yield page.table(
                ("checkpoint", "PSNR (dB)", PAPER_HEADER, "SSIM", PAPER_HEADER),
                [(r["name"], *_similarity(r, convention)) for r in mine],
            )


def _similarity(result: Result, convention: str) -> Iterator[str]:
    for name, digits in (("psnr", 3), ("ssim", 4)):
        yield f"{result[convention][name]:.{digits}f}"
        yield _quote(result, name, digits) if convention == "paper" else ""


def _percent(value: float) -> str:
    return f"{value:.2f}"


def _quote(result: Result, name: str, digits: int = 2) -> str:
    value, where = quoted(result).get(name, (None, ""))
    return "" if value is None else f"{value:.{digits}f} ({where})"


def _settings(result: Result) -> str:
    """All that led to a result: every key but what was found, nested keys joined by dots."""
    return page.table(("key", "value"), flat_text({key: result[key] for key in result if key not in FOUND}))


HEADLINES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "linprobe": ("linear probe", lambda r: _percent(r["top1"])),
    "finetune": ("fine-tuned", lambda r: _percent(r["top1"])),
    "knn": ("kNN, best k on val", lambda r: _percent(max(found["top1"] for found in r["k"].values()))),
    "probe-sweep": ("probe sweep, best on val", lambda r: _percent(best(r["rows"])["top1"])),
    "reconstruct": ("PSNR, honest (dB)", lambda r: f"{r['honest']['psnr']:.2f}" if "honest" in r else ""),
}
SECTIONS: Mapping[str, tuple[str, Callable[[Sequence[Result]], Iterator[str]]]] = {
    "linprobe": ("Linear probe", _classified),
    "finetune": ("Fine-tuning", _classified),
    "knn": ("Nearest neighbours", _neighbours),
    "probe-sweep": ("Probe sweep", _swept),
    "reconstruct": ("Reconstruction", _reconstructed),
}

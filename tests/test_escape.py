"""Untrusted names are shown as text in terminals, logs, pages, pictures and tables."""

import ast
import csv
import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import build_store, make_store
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from test_architecture import MODULES, name
from typer.testing import CliRunner

from kamim.analysis import figures as analysis
from kamim.cli import app, console
from kamim.cli.progress import bar
from kamim.evaluation.report import figures as evaluation
from kamim.evaluation.results import Accuracy, KnnAccuracy, SweepRow
from kamim.models import interop
from kamim.models.masked_image_model import MaskedImageModel
from kamim.reporting import page
from kamim.reporting.table import Table
from kamim.storage.escape import cell, literal, one_line, printable, text_of
from kamim.storage.manifest import seal
from kamim.storage.store import Store
from kamim.training import checkpoint, metrics

HOSTILE = (
    r"$\bad$",
    "\x1b[31mred\x1b[0m",
    "[bold]rich[/]",
    ":smile:",
    "=HYPERLINK(1)",
    "@SUM(1)",
    "<script>alert(1)</script>",
    "_hidden",
    "two\nlines",
    "\u202egnp.exe",
    "\x9b31m",
    "caf\udce9",
    "\ud800",
    "\x00",
    "|",
    "'=1",
    "100 %s {0}",
)
UNSAFE = re.compile("[^\\S\n ]|[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_text_is_one_printable_line() -> None:
    assert printable("caf\udce9\n\x1b[2J\u202e\ud800.jpg") == r"caf\xe9\n\x1b[2J\u202e\ud800.jpg"
    assert printable("é 图.jpg") == "é 图.jpg"
    assert one_line(ValueError("a\n  b\x1b[0m")) == r"a b\x1b[0m"


@given(st.text())
def test_text_of_any_name_is_printable_and_can_be_encoded(text: str) -> None:
    assert printable(text).isprintable()
    printable(text).encode()


@given(st.one_of(st.text(), st.text(alphabet="'=+-@a")))
def test_cells_are_no_formulas_and_come_back(text: str) -> None:
    assert cell(text)[:1] not in ("=", "+", "-", "@")
    assert text_of(cell(text)) == text


@pytest.mark.parametrize("text", HOSTILE)
def test_figures_show_names_as_they_are(text: str) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], label=literal(text))
    axes.set_title(literal(text))
    legend = axes.legend()
    figure.savefig(io.BytesIO(), format="png")
    for shown in (axes.title, *legend.get_texts()):
        assert shown.get_parse_math()
        drawn, is_math = shown._preprocess_math(shown.get_text())
        assert (drawn.strip(), is_math) == (printable(text), False)
    assert len(legend.get_texts()) == 1


def test_every_figure_takes_names_as_text() -> None:
    """Titles and labels of checkpoints and classes: none is mathtext, and none is left out of a legend."""
    bad, title = r"$\bad$", r"_$\class$"
    xy, depth = np.random.default_rng(0).random((6, 4, 2)), np.linspace(0, 1, 3)
    classes = {"classes": (title,) * 3, "label": np.arange(6) % 3, "block": 1, "variance": depth[:2]}
    curve = {"mean": depth, "spread": depth, "low": depth, "high": depth, "uniform": 1.0, "grid": "4x4"}
    tokens = {**classes, "before": xy, "after": xy, "before_variance": depth, "after_variance": depth}
    flat = {**tokens, "before": xy[0], "after": xy[1]}
    pair = {**tokens, "before": xy[:2], "after": xy[:2], "classes": (title,) * 2}
    row = SweepRow(1, "mean", "none", 0.1, 1.0, 2.0)
    image = np.zeros((2, 8, 8, 3), np.uint8)
    of_classes = [
        analysis.classes({bad: {**classes, "xy": xy[:, 0]}}),
        analysis.two_images({bad: pair}),
        analysis.many_images({bad: tokens}),
    ]
    drawn = [
        *of_classes,
        analysis.transformation({bad: flat}),
        analysis.fourier({bad: {"curves": [depth] * 2, "frequency": [depth] * 2}}),
        analysis.by_depth({bad: curve}, "px", "uniform {:.0f} {grid}"),
        analysis.weight_correlation({bad: curve}),
        analysis.maps({bad: {"maps": np.ones((2, 1, 4, 4))}}, image, [(0.5, 0.5)]),
        analysis.features({bad: {"rank": depth, "uniformity": depth}}),
        analysis.similarity({bad: {bad: np.eye(3)}}),
        analysis.probe({bad: {"block": [1, 2], "top1": [1.0, 2.0]}}),
        analysis.reconstructions(image, image[..., 0] > 0, [(bad, image)], bad),
        evaluation.depth({bad: [row]}),
        evaluation.neighbours({bad: KnnAccuracy({5: Accuracy(1.0, 2.0)})}),
        evaluation.poolings({bad: {"mean": 1.0, "ep": 2.0}}),
    ]
    for number, figure in enumerate(drawn):
        figure.savefig(io.BytesIO(), format="png", dpi=20)
        texts = [text.get_text().strip() for text in figure.findobj(Text)]
        assert any(literal(bad) in text for text in texts), number
        assert figure not in of_classes or any(literal(title).strip() in text for text in texts), number
        assert not any(re.search(r"(?<!\\)\$(bad|class)", text) for text in texts), number


@pytest.mark.parametrize("text", HOSTILE)
def test_consoles_show_names_as_they_are(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for which in (console.out_console, console.err_console):
        which.print(f"a {text}")
    logging.getLogger("kamim.test").handlers.clear()
    shown = "".join(capsys.readouterr())
    assert shown == f"a {printable(text)}\n" * 2


def test_messages_are_shortened_and_output_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Both ends stay: a message begins with the file and ends with the remedy."""
    for value in ("x" * 10**6, "x " * 10**6, "\x1b" * 10**6):
        message = f"file.json: {value} is unknown; remove it"
        console.err_console.print(message)
        console.out_console.print(message)
        shown = capsys.readouterr()
        assert len(shown.out) > 10**6 > 4 * 10**4 > len(shown.err) == len(one_line(message)) + 1
        assert one_line(message).startswith("file.json: ") and one_line(message).endswith("; remove it")
    name = "/data/" + "sub-folder/" * 30 + "file.json"
    assert one_line(f"{name}: no such file") == f"{name}: no such file"


@pytest.mark.parametrize("text", HOSTILE)
def test_bars_show_names_as_they_are(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(
        "kamim.cli.progress.err_console", Console(file=stream, force_terminal=True, width=200, color_system=None)
    )
    with bar(text) as update:
        update(1, 2, text)
    assert stream.getvalue().count(printable(text)) >= 2


def test_warnings_are_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console._explain_faults()
    record = logging.LogRecord("kamim", logging.WARNING, "", 0, "%s: damaged", ("\x1b[31m\n\ud800",), None)
    assert logging.lastResort is not None
    logging.lastResort.handle(record)
    assert stream.getvalue() == "\\x1b[31m \\ud800: damaged\n"
    metrics.warn(tmp_path, "\x1b[31m\n\ud800")
    assert (tmp_path / "log.txt").read_text().endswith("\\x1b[31m \\ud800\n")


def test_pages_and_tables_hold_text(tmp_path: Path) -> None:
    parts = [
        page.paragraph("".join(HOSTILE)),
        page.heading("".join(HOSTILE)),
        page.bullets(HOSTILE),
        page.table(HOSTILE, [HOSTILE]),
        page.picture(b"", "\"'" + HOSTILE[0], HOSTILE[6]),
        page.folded(HOSTILE[6], page.paragraph(HOSTILE[6])),
    ]
    page.save_page("".join(HOSTILE), parts, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and UNSAFE.search(text) is None and 'alt="&#34;&#39;' in text
    assert text.count("&lt;script") == 2 + 8 and "<p>" in text
    table = Table(HOSTILE, (HOSTILE, ("-1.50", *HOSTILE[1:])))
    markdown = table.markdown()
    assert markdown.count("\n") == 4 and UNSAFE.search(markdown) is None
    assert re.search(r"(?<!\\)<", markdown) is None
    assert len(re.findall(r"(?<!\\)\|", markdown)) == 4 * (len(HOSTILE) + 1)
    assert Table(("[a](https://b)",), ((r"[a]\(b)",),)).markdown() == "| [a]\\(https://b) |\n| --- |\n| [a]\\\\(b) |\n"
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert [text_of(shown) for shown in rows[1]] == list(map(printable, HOSTILE))
    assert rows[2][0] == "-1.50"  # a number is no formula
    assert not [shown for shown in (*rows[0], *rows[1]) if shown[:1] in ("=", "+", "-", "@")]


def test_only_templates_make_markup(tmp_path: Path) -> None:
    """A string that is no part is escaped, and neither code nor template exempts any text."""
    page.save_page("title", ["<b>", page.folded("", "<i>")], tmp_path / "page.html")  # type: ignore[list-item,arg-type]
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in text and "&lt;i&gt;" in text and "<b>" not in text and "<i>" not in text
    for file in MODULES:
        assert "Markup(" not in file.read_text(), file
    for template in (Path(page.__file__).parent / "templates").iterdir():
        assert not re.search(r"safe|autoescape|Markup", template.read_text()), template


@pytest.fixture(scope="module")
def hostile_store(class_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose folder and classes have hostile names, as far as file system and manifest allow."""
    root = tmp_path_factory.mktemp("hostile")
    store = build_store(class_folder, root / "s\x1b[31m$\\bad$[red]", detectors=("fast",))
    manifest = Store(store).manifest.model_copy(update={"classes": (HOSTILE[0], HOSTILE[1], HOSTILE[7])})
    seal(store, manifest.model_dump_json(indent=2).encode())
    return store


def test_rejects_are_no_formulas_and_the_store_comes_apart(photos: list[np.ndarray], tmp_path: Path) -> None:
    from preprocess.assemble import stored_rejects

    names = ("=1+1.jpg", "@a.jpg", "-a.jpg", "'=a.jpg", "'a.jpg", "\x1b[31m.jpg")
    for bad in names:
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / bad).write_bytes(b"no image")
    Image.fromarray(photos[0][:90, :90]).save(tmp_path / "source/good.png")
    store = make_store(tmp_path / "source", tmp_path / "store")
    with (store / "rejects.csv").open(newline="") as file:
        rows = [row[0] for row in csv.reader(file)][1:]
    assert not [row for row in rows if row[0] in "=+-@" or not row.isprintable()]
    listed = [reject[0] for shard in stored_rejects(store, Store(store).manifest) for reject in shard]
    assert sorted(listed) == sorted(map(printable, names))


def outputs(result: object, folder: Path) -> Iterator[tuple[str, str]]:
    """Returns all text that a command printed or wrote to files."""
    yield "output", result.output  # type: ignore[attr-defined]
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix in (".html", ".md", ".json", ".txt"):
            yield file.name, file.read_text()


def test_commands_show_hostile_names(hostile_store: Path, tmp_path: Path) -> None:
    torch_free = MaskedImageModel("vit_demo", 64)
    made = checkpoint.save_imported(
        tmp_path / "c\x1b[31m", interop.Foreign("vit_demo", 64, torch_free.state_dict(), True)
    )
    bad = rb"\x1b[31m$\bad$[red]<i>".decode("unicode_escape")
    store, named = str(hostile_store), [f"{bad}={made}", f"_b={made}"]
    out = str(tmp_path / "out")
    commands = {
        "info": ["store", "info", store],
        "json": ["store", "info", store, "--json"],
        "verify": ["store", "verify", store],
        "preview": ["store", "preview", store, "--out", f"{tmp_path}/p.png"],
        "lacks": ["store", "preview", store, "--out", f"{tmp_path}/p.png", "--detector", "orb"],
        "analyze": [
            "analyze",
            *(part for spec in named for part in ("--checkpoint", spec)),
            "--store",
            store,
            "--out",
            out,
            "--images",
            "8",
            "--figures",
            "2,9",
        ],
        "eval": [
            "eval",
            "--mode",
            "knn",
            "--checkpoint",
            named[0],
            "--checkpoint",
            named[1],
            "--val",
            store,
            "--train",
            store,
            "--out",
            f"{tmp_path}/evaluation",
            "per_class=4",
            "knn.k=[3]",
            "compute.device=cpu",
        ],
    }
    for what, arguments in commands.items():
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == (1 if what == "lacks" else 0), (what, result.output)
        for where, text in outputs(result, tmp_path):
            assert UNSAFE.search(text) is None, (what, where)
            assert "<i>" not in text or where.endswith(".json") or where == "output", (what, where)
    assert json.loads(CliRunner().invoke(app, commands["json"]).output)["path"] == store


def test_nobody_else_prints() -> None:
    """All output goes through the two consoles, and one module writes rejects.csv and one all other CSV files.

    Two modules are scripts that run in a separate process and print for their caller.
    """
    scripts = ("preprocess.sources.devkit", "preprocess.sources.parquet_footers")
    for file in (file for file in MODULES if name(file) not in scripts):
        for node in ast.walk(ast.parse(file.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in ("print", "Console", "sys.stdout.write", "sys.stderr.write"), file
            assert called != "csv.writer" or name(file) in ("preprocess.assemble", "kamim.reporting.table"), file

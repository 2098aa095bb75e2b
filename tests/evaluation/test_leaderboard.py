"""Leaderboards: which results share a row, a column and a mean, and what happens to files that are no results."""

import copy
import csv
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_escape import HOSTILE, UNSAFE
from typer.testing import CliRunner

from kamim import KamimError
from kamim.cli import app
from kamim.evaluation.report.leaderboard import Leaderboard, find
from kamim.evaluation.report.leaderboard_page import (
    checkpoints_table,
    full_table,
    recipes_table,
    save,
    scores_table,
    seeds_numbers,
    seeds_table,
)
from kamim.runtime import machine
from kamim.storage.escape import printable, text_of

WRITTEN: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fixtures/results.json").read_text())
VAL = {"store": "stores/other", "dataset": "imagefolder", "images": 24, "fingerprint": "cd" * 32}


def result(name: str, seed: int | None, top1: float, mode: str = "linprobe", **changes: Any) -> dict[str, Any]:
    """A result of a run with a seed of its own; keys with dots change nested values."""
    content = copy.deepcopy(next(content for content in WRITTEN if content["mode"] == mode))
    content |= {"name": name, "weights": None if seed is None else f"{seed:064x}", "command": f"kamim eval {name}"}
    content |= {} if seed is None else {"run_seed": seed}
    if mode == "linprobe":
        content["top1"] = top1
    if mode == "reconstruct":
        content["honest"]["psnr"] = top1
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return content


def board(folder: Path, *contents: dict[str, Any]) -> Leaderboard:
    """Writes results as evaluations in folders of their own do, and reads them back."""
    for number, content in enumerate(contents):
        file = folder / f"eval{number:02}" / "run" / content["mode"] / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    results, skipped = find([folder])
    assert (len(results), skipped) == (len(contents), [])
    return Leaderboard(results)


def cells(made: Leaderboard, section: int = 0) -> list[dict[str, str]]:
    """The rows of the page's two tables of checkpoints, joined."""
    tables = scores_table(made, made.sections[section]), checkpoints_table(made.sections[section])
    scores, about = ([dict(zip(table.header, row, strict=True)) for row in table.rows] for table in tables)
    return [{**of_scores, **of_checkpoint} for of_scores, of_checkpoint in zip(scores, about, strict=True)]


def test_a_row_is_a_checkpoint_and_the_best_comes_first(tmp_path: Path) -> None:
    made = board(
        tmp_path,
        result("a", 1, 20.0),
        result("b", 2, 30.0),
        result("b", 2, 17.5, "reconstruct", train=None),
        result("c", 3, 0.0, "reconstruct", train=None),
    )
    assert [len(section) for section in made.sections] == [2, 1]  # c was trained on nothing
    best, second = cells(made)
    assert best == {
        "checkpoint": "b",
        "architecture": "vit_demo",
        "resolution": "64",
        "step": "2",
        "seed": "2",
        "evaluation seed": "0",
        "linear probe": "30.00 [14.9, 49.2]",
        "PSNR, honest (dB)": "17.50",
        "weights": "0" * 8,
    }
    assert (second["checkpoint"], second["linear probe"], second["PSNR, honest (dB)"]) == ("a", "20.00 [9.2, 40.5]", "")
    table = full_table(made, made.sections[0])
    whole = dict(zip(table.header, table.rows[0], strict=True))
    assert (whole["linear probe"], whole["weights"], whole["command"]) == ("30.00", f"{2:064x}", "kamim eval b")
    assert (whole["val"][:8], len(whole["val"]), whole["val images"]) == ("acfff127", 64, "24")


@pytest.mark.parametrize(
    "other", [{"val": VAL}, {"val__images": 12}, {"train": {**VAL, "fingerprint": "ab" * 32}}, {"train__images": 12}]
)
def test_other_samples_are_in_another_section(other: dict[str, Any], tmp_path: Path) -> None:
    made = board(tmp_path, result("a", 1, 20.0), result("a", 1, 30.0, **other), result("b", 2, 40.0, **other))
    assert [[row.names for row in section] for section in made.sections] == [["a"], ["b", "a"]]
    assert made.repeated == []
    save(made, [], tmp_path / "out")
    markdown = (tmp_path / "out/table.md").read_text()
    assert len(re.findall(r"^## [12]\. Trained on .*; evaluated on .*", markdown, re.MULTILINE)) == 2


def test_other_options_are_in_another_column(tmp_path: Path) -> None:
    made = board(tmp_path, result("a", 1, 20.0), result("a", 1, 30.0, options__norm="joint", norm="joint"))
    (row,) = cells(made)
    assert tuple(row[f"linear probe [{n}]"].split()[0] for n in (1, 2)) == ("20.00", "30.00")
    assert recipes_table(made).rows == (("linear probe [1]", "norm=none"), ("linear probe [2]", "norm=joint"))
    lacks = result("b", 2, 25.0)
    del lacks["options"]["norm"]
    made = board(tmp_path / "old", result("a", 1, 20.0), lacks)
    assert recipes_table(made).rows[1] == ("linear probe [2]", "norm=not recorded")


def test_means_are_over_runs_that_differ_by_seed_only(tmp_path: Path) -> None:
    """As numpy computes them, in any order of the files, beside runs that are no repetitions."""
    scores = {0: 20.0, 1: 23.5, 2: 21.25}
    contents = [
        *(result(f"s{seed}", seed, score) for seed, score in scores.items()),
        result("s0", 0, 12.0, "reconstruct", train=None),
        result("s1", 1, 14.0, "reconstruct", train=None),
        result("longer", 4, 50.0, pretraining__epochs=2),
        result("temperature", 5, 60.0, pretraining__weighting__temperature=1.0),
        result("step", 6, 70.0, step=3),
        {**result("old", 7, 80.0), "run_seed": None},
        result("elsewhere", 8, 90.0, val=VAL),
    ]
    random.Random(0).shuffle(contents)
    made = board(tmp_path, *contents)
    section = next(section for section in made.sections if len(section) > 1)
    groups = made.repetitions(section)
    table = seeds_table(made, groups)
    assert table.header == ("checkpoints", "seeds", "linear probe", "PSNR, honest (dB)")
    ((names, seeds, probe, psnr),) = table.rows
    values = np.array(list(scores.values()))
    assert (sorted(names.split(", ")), seeds) == (["s0", "s1", "s2"], "0, 1, 2")
    assert probe == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    assert psnr == f"13.00 ± {np.std([12.0, 14.0], ddof=1):.2f} (2 of 3 runs)"
    in_full = seeds_numbers(made, groups)
    numbers = dict(zip(in_full.header, in_full.rows[0], strict=True))
    assert numbers["linear probe: mean"] == f"{values.mean():.4f}"
    assert numbers["linear probe: standard deviation"] == f"{values.std(ddof=1):.4f}"
    assert (numbers["linear probe: runs"], len(numbers["train"]), len(numbers["val"])) == ("3", 64, 64)


def test_random_weights_of_several_seeds_have_a_mean(tmp_path: Path) -> None:
    contents = [untrained(f"r{seed}", seed, 10.0 + seed) for seed in (0, 1)]
    made = board(tmp_path, *contents, untrained("pixels", None, 5.0))
    assert [row["seed"] for row in cells(made)] == ["1", "0", ""]
    ((group),) = made.repetitions(made.sections[0])
    assert seeds_table(made, [group]).rows == (("r1, r0", "0, 1", f"10.50 ± {2**-0.5:.2f}"),)


def untrained(name: str, seed: int | None, top1: float, **changes: Any) -> dict[str, Any]:
    """A result of raw pixels (seed None) or of random weights, of a run of the same name."""
    kind = "pixels" if seed is None else "random"
    origin = {"weights": None, "pretraining": None, "step": 0, "checkpoint": f"{kind}:runs/{name}"}
    architecture = "pixels" if seed is None else "vit_demo"
    return {**result(name, seed, top1, **changes), **origin, "architecture": architecture}


def test_pixels_and_untrained_weights_of_several_runs_are_one_row(tmp_path: Path) -> None:
    same = [untrained(name, seed, 10.0) for seed in (None, 1) for name in ("a", "b")]
    made = board(tmp_path, *same, untrained("c", 2, 11.0))
    assert [(row["checkpoint"], row["seed"]) for row in cells(made)] == [("c", "2"), ("a", ""), ("a", "1")]
    assert len(made.repeated) == 2


def test_pixels_that_were_measured_otherwise_keep_their_rows(tmp_path: Path) -> None:
    """The size of their patches is that of the run's model, which results do not record."""
    made = board(
        tmp_path, untrained("a", None, 10.0), untrained("b", None, 12.0), untrained("c", None, 9.0, resolution=96)
    )
    assert [row["checkpoint"] for row in cells(made)] == ["b", "a", "c"] and made.repeated == []


def test_the_page_and_the_table_have_the_majority_class_and_no_command_in_a_row(tmp_path: Path) -> None:
    command = f"kamim eval {'x' * 3000}"
    made = board(
        tmp_path, *({**result(f"r{n}", n, 20.0 + n, majority_top1=37.5), "command": command} for n in range(3))
    )
    save(made, [], tmp_path / "out")
    page, markdown, table = ((tmp_path / "out" / name).read_text() for name in ("index.html", "table.md", "table.csv"))
    assert page.count("majority class: top-1 37.50 [") == markdown.count("majority class: top-1 37.50 [") == 1
    assert command not in markdown and table.count(command) == 3
    before, _, folded = page.partition("Command lines")
    assert command not in before and folded.count(command) == 3
    assert page.count("<details>") == 2 and max(map(len, markdown.splitlines())) < 200


def test_runs_of_one_seed_have_no_mean(tmp_path: Path) -> None:
    """They differ by something that results do not record."""
    made = board(tmp_path, result("a", 1, 20.0), result("b", 2, 30.0), result("c", 3, 40.0, run_seed=1))
    assert made.repetitions(made.sections[0]) == []


def test_results_of_earlier_versions_are_blank(tmp_path: Path) -> None:
    made = board(tmp_path, *WRITTEN[:5])
    (row,) = cells(made)
    assert "seed" not in row and "command" not in full_table(made, made.sections[0]).header
    assert row["linear probe"] and row["PSNR, honest (dB)"]
    new = board(tmp_path / "both", {**WRITTEN[0], "run_seed": 3, "command": "kamim eval"}, *WRITTEN[1:5])
    assert [row["seed"] for row in cells(new)] == ["3"]  # the same weights


def report(*arguments: Path | str) -> Any:
    return CliRunner().invoke(app, ["report", "eval", *map(str, arguments)])


def test_damaged_results_are_named_and_counted(tmp_path: Path) -> None:
    board(tmp_path, result("a", 1, 20.0), result("a", 1, 20.0), result("b", 2, 30.0))
    damaged = {
        "cut": '{"mode": "knn"',
        "mode": '{"mode": "telepathy"}',
        "list": "[]",
        "deep": "[" * 100_000,
        "bytes": b"\xff",
        "over": json.dumps(result("c", 3, 100.5)),
        "under": json.dumps(result("c", 3, -0.5)),
        "none": json.dumps(result("c", 3, 50.0, val__images=0)),
        "nan": json.dumps(result("c", 3, float("nan"))),
        "keys": '{"mode": "knn", "name": "x"}',
        "empty": json.dumps({**result("d", 4, 0.0, "knn"), "k": {}}),
    }
    for name, content in damaged.items():
        (tmp_path / "damaged" / name).mkdir(parents=True)
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "damaged" / name / "result.json").write_bytes(data)
    done = report(tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("skipped: ") == len(damaged) + 1 == len(done.stderr.splitlines())
    for name in damaged:
        assert f"skipped: {tmp_path}/damaged/{name}/result.json: " in done.stderr
    assert f"skipped: {tmp_path}/eval01/run/linprobe/result.json: is of the same checkpoint" in done.stderr
    for name in ("index.html", "table.md"):
        text = (tmp_path / "out" / name).read_text()
        assert f"Left out: {len(damaged) + 1}" in text and "damaged/cut/result.json" in text
    none = report(tmp_path / "damaged", "--out", tmp_path / "none")
    assert (none.exit_code, len(none.stderr.splitlines())) == (1, 1)
    assert f"none of {len(damaged)} results can be read; the first is {tmp_path}/damaged/bytes" in none.stderr
    assert not (tmp_path / "none").exists()


ODD = (-5, -1.7e308, 1.7e308, 2**54 - 1, 10**30, 10**309, 10**400)  # of no result's numbers, whatever they count
LATER: list[dict[str, Any]] = [
    {
        "mode": "few-shot",
        "shots": [{"per_class": 1, "images": 3, "linear": 50.0, "linear_spread": 1.0, "knn": 40.0, "knn_spread": 2.0}],
    },
    {
        "mode": "corruptions",
        "linear": 50.0,
        "knn": 40.0,
        "corrupted": [{"corruption": "blur", "strength": 1, "linear": 30.0, "knn": 20.0}],
    },
    {"mode": "segment", "miou": 50.0, "pixel_accuracy": 60.0, "iou": {"cat": 50.0}},
    {"mode": "shape-bias", "shape": 3, "texture": 1, "other": 0, "by_category": {"cat": 75.0}, "shape_bias": 75.0},
]


def numbers_of(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all numbers of a result, except those of settings that are only shown."""
    if isinstance(content, dict | list):
        inside = content.items() if isinstance(content, dict) else enumerate(content)
        return [
            path
            for key, inner in inside
            if key not in ("options", "pretraining")
            for path in numbers_of(inner, (*at, key))
        ]
    return [at] if type(content) in (int, float) else []


def test_one_odd_result_is_left_out(tmp_path: Path) -> None:
    """Each number of every kind of result, out of its range; seeds may have any number that a seed can be."""
    probe = result("a", 1, 20.0)
    about = {key: value for key, value in probe.items() if key not in ("top1", "top5")}
    board(tmp_path / "good", probe, result("a", 2, 30.0))
    odd = 0
    for kind in [*WRITTEN, *({**about, **later} for later in LATER)]:
        for *parents, last in numbers_of(kind):
            for value in ODD:
                if (value == -5 and last in ("psnr", "ssim")) or (last in ("seed", "run_seed") and value == 2**54 - 1):
                    continue
                content = copy.deepcopy(kind)
                inner = content
                for parent in parents:
                    inner = inner[parent]
                inner[last] = value
                file = tmp_path / "odd" / str(odd) / "result.json"
                file.parent.mkdir(parents=True)
                file.write_text(json.dumps(content))
                odd += 1
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    for key in ("options", "pretraining"):
        (tmp_path / key).mkdir()
        (tmp_path / key / "result.json").write_text(json.dumps({**probe, key: deep}))
    assert odd > 700
    results, skipped = find([tmp_path])
    assert (len(results), len(skipped)) == (2, odd + 2)
    assert max(map(len, skipped)) < 1000
    (rows,) = Leaderboard(results).sections
    assert [row.scores["linear probe"] for row in rows] == [30.0, 20.0]


@pytest.mark.parametrize("value", [-1.0, 100.5])
def test_accuracies_are_of_a_hundred_in_every_mode(value: float, tmp_path: Path) -> None:
    percents = ("linear", "knn", "linear_spread", "knn_spread", "miou", "pixel_accuracy", "cat", "shape_bias", "top1")
    for number, later in enumerate(LATER):
        for *parents, last in numbers_of(later):
            if last in percents:
                content = copy.deepcopy({**result("a", 1, 20.0), **later})
                inner = content
                for parent in parents:
                    inner = inner[parent]
                inner[last] = value
                file = tmp_path / f"{number}-{last}" / "result.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(content))
    with pytest.raises(KamimError, match="none of"):
        find([tmp_path])


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    board(tmp_path / "evals", result("a", 1, 20.0))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, said in (
        ([tmp_path / "evals", tmp_path / "empty"], f"{tmp_path}/empty: holds no result.json; give folders that"),
        ([tmp_path / "evals", tmp_path / "none"], f"{tmp_path}/none: no such file or folder"),
        ([tmp_path / "evals", "--out", tmp_path / "file"], f"--out {tmp_path}/file: is a file; choose a folder"),
    ):
        done = report(*arguments)
        assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1), done.output
        assert said in done.stderr


def test_nested_folders_count_once_and_files_follow_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board(tmp_path, result("a", 1, 20.0), result("b", 2, 30.0))
    monkeypatch.chdir(tmp_path)
    done = report(".", tmp_path, tmp_path / "eval00", "eval00/run/linprobe")
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout.split() == [
        f"leaderboard/{name}" for name in ("index.html", "table.md", "table.csv", "seeds.csv")
    ]
    rows = list(csv.DictReader((tmp_path / "leaderboard/table.csv").open(newline="")))
    assert [(row["checkpoint"], row["linear probe"], row["weights"]) for row in rows] == [
        ("b", "30.00", f"{2:064x}"),
        ("a", "20.00", f"{1:064x}"),
    ]
    assert report("eval00").exit_code == 0
    assert not (tmp_path / "leaderboard/seeds.csv").exists()


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Of checkpoints, stores, data sets, architectures, options and commands, in every file."""
    names = [name for name in HOSTILE if not re.search("[\ud800-\udfff]", name)]  # in a result, these are damage
    contents = [
        {
            **result(name, number, number, options__augment=name, architecture=name, command=name),
            "val": {"store": name, "dataset": name, "images": 24, "fingerprint": name},
        }
        for number, name in enumerate(names)
    ]
    board(tmp_path, *contents)
    done = report(tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    for file in (tmp_path / "out").iterdir():
        assert UNSAFE.search(file.read_text()) is None, file
    page, markdown = ((tmp_path / "out" / name).read_text() for name in ("index.html", "table.md"))
    assert "<script" not in page and "&lt;script" in page and "<script" not in markdown.replace("\\<", "")
    rows = list(csv.reader((tmp_path / "out/table.csv").open(newline="")))
    assert not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "-", "@")]
    assert {text_of(row[0]) for row in rows[1:]} == set(map(printable, names))


def test_the_command_line_is_kamims(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/venv/bin/kamim", "kamim", "/venv/lib/kamim/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, "eval", "a b=c", "--out", "\x1b[31m\udce9"])
        assert machine.command_line() == "kamim eval 'a b=c' --out '\\x1b[31m\\xe9'"
    for program in ("", "-c", "/venv/bin/pytest", "/other/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program])
        assert machine.command_line() is None

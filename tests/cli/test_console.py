"""How errors name options, and what every command sets before it imports anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kamim.cli
from kamim.cli import console
from kamim.cli.evaluate import evaluate
from kamim.cli.preprocess import preprocess


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("resolution = 8: must be 16 to 1024", "--resolution 8: must be 16 to 1024"),
        ("crop_scale = 2.0,1.0: needs 0 < smallest", "--crop-scale 2.0,1.0: needs 0 < smallest"),
        (
            "encoding = raw: images for resolution = 900; take encoding=jpeg",
            "--encoding raw: images for --resolution 900; take --encoding jpeg",
        ),
        ("source: is missing", "--source: is missing"),
        ("dataset: needs source=DIR", "dataset: needs --source DIR"),  # an argument has no option
        ("data.resolution = 8: must be", "data.resolution = 8: must be"),  # a key of a configuration
        ("unknown = 1: resolution: 3", "unknown = 1: resolution: 3"),
        ("/a/out=3/b: damaged", "/a/out=3/b: damaged"),  # a path
    ],
)
def test_parameters_become_options(message: str, line: str) -> None:
    assert console.as_typed(message, console.options_of(preprocess)) == line


def test_options_have_the_names_that_are_typed() -> None:
    assert console.options_of(evaluate)["json_out"] == "--json"
    assert console.options_of(evaluate)["config"] == "--config"
    assert "overrides" not in console.options_of(evaluate)


def test_a_configuration_that_is_printed_is_read_back(tmp_path: Path) -> None:
    for command, given in {
        "eval": ["--checkpoint", "a=run", "--train", "t", "--val", "v", "knn.k=[3, 4]"],
        "sweep": ["table2", "out=elsewhere"],
        "pretrain": ["-c", "demo", "seed=7"],
    }.items():
        first = CliRunner().invoke(kamim.cli.app, [command, *given, "--print-config"])
        assert first.exit_code == 0, first.output
        (tmp_path / "config.yaml").write_text(first.stdout)
        file = [str(tmp_path / "config.yaml")] if command == "sweep" else ["-c", str(tmp_path / "config.yaml")]
        again = CliRunner().invoke(kamim.cli.app, [command, *file, "--print-config"])
        assert again.stdout == first.stdout


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep(given: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads the variable when torch is imported, which importing the command line must not do."""
    monkeypatch.setattr(kamim.cli, "app", lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    kamim.cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == used
    assert (
        subprocess.run(
            [sys.executable, "-c", "import sys, kamim.cli; sys.exit('torch' in sys.modules)"],
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).returncode
        == 0
    )

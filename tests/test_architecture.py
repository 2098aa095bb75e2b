"""Rules of the repository. lint-imports checks the direction of imports (pyproject.toml)."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(file for package in ("kamim", "preprocess", "pipelines") for file in (ROOT / package).glob("**/*.py"))


def name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_nothing_is_unpickled() -> None:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called not in ("pickle.load", "pickle.loads") and not called.endswith(".extractall"), file
                assert "allow_pickle" not in given, file
                assert called != "torch.load" or given.get("weights_only") == "True", file


def test_tracked_files_are_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "tests/fixtures"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert sum((ROOT / file).stat().st_size for file in listed.stdout.split()) < 1 << 20

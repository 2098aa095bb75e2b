"""Imports run one way (docs/architecture.md), and the repository keeps its own rules."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(file for room in ("kamim", "preprocess", "pipelines") for file in (ROOT / room).glob("**/*.py"))
KNOWS_EVERYBODY = ("kamim.cli", "kamim.compose", "kamim.demo", "kamim.bench", "kamim.__main__")
KERNELS = {  # and what each may know
    "kamim.kernels": set(),
    "kamim.words": set(),
    "kamim.rng": {"kamim.kernels"},
    "kamim.geometry": {"kamim.kernels", "kamim.rng"},
    "kamim.masking": {"kamim.kernels", "kamim.rng"},
    "kamim.keypoints": {"kamim.kernels", "kamim.words", "kamim.geometry"},
    "kamim.weighting": set(),
    "kamim.batch": set(),
    "kamim.paged": set(),
    "kamim.beton": {"kamim.paged"},
    "kamim.store": {"kamim.beton", "kamim.paged", "kamim.keypoints", "kamim.geometry"},
}


def name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imported(file: Path) -> Iterator[str]:
    """Modules of this project that a file imports, anywhere in it."""
    known = {name(module) for module in MODULES}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (member for member in members if member in known)
            if node.module in known:
                yield node.module


@pytest.mark.parametrize("file", MODULES, ids=name)
def test_imports_point_one_way(file: Path) -> None:
    module, found = name(file), set(imported(file))
    if module in KERNELS:
        assert found <= KERNELS[module]
    if module.startswith("kamim.detectors"):
        assert {other for other in found if not other.startswith("kamim.detectors")} <= {
            "kamim.keypoints",
            "kamim.kernels",
        }
    if module.startswith(KNOWS_EVERYBODY):
        return
    rooms = {other.partition(".")[0] for other in found}
    if module.startswith("kamim."):
        assert rooms <= {"kamim"}
    if module.startswith("preprocess"):
        assert "pipelines" not in rooms
    if module.startswith("pipelines"):
        assert "preprocess" not in rooms
    assert not any(other.startswith(KNOWS_EVERYBODY) for other in found)


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

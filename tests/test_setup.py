"""`make setup`: system packages are installed with sudo only after a question that names them."""

import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUBS = {
    "id": "echo 1000",
    "pkg-config": "exit 1",
    "sudo": 'echo "sudo $*" >>"$CALLS"',
    "apt-get": "exit 0",
    "python": """case "$1$2" in
-mvenv) mkdir -p .venv/bin; for name in python pip; do
    printf '#!/bin/sh\\n' >.venv/bin/$name; chmod +x .venv/bin/$name; done ;;
esac""",
}


@pytest.mark.parametrize(("typed", "installs"), [(None, False), ("\n", False), ("n\n", False), ("y\n", True)])
def test_sudo_is_used_after_a_yes_only(typed: str | None, installs: bool, tmp_path: Path) -> None:
    """typed: at a terminal; None: there is none."""
    (tmp_path / "clone/.ci").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / ".ci/setup", tmp_path / "clone/.ci/setup")
    (tmp_path / "clone/pyproject.toml").write_text("")
    for name, code in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": "python",
        "CALLS": str(tmp_path / "calls"),
    }
    main, terminal = pty.openpty()
    os.write(main, (typed or "").encode())
    done = subprocess.run(
        ["bash", str(tmp_path / "clone/.ci/setup")],
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL if typed is None else terminal,
    )
    os.close(main)
    os.close(terminal)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").exists() == installs
    assert ("libturbojpeg0-dev pkg-config g++ python3-dev python3-venv with sudo" in done.stderr) == (typed is not None)
    if not installs:
        assert "kamim uses the zarr image store. To install FFCV, run:" in done.stderr

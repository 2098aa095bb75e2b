"""Compiled code is never older than the sources it was made of."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from kamim.method import kernels

CALLER = """
from kamim.callee import callee
from kamim.method.kernels import kernel

@kernel
def caller():
    return callee()
"""
CALLEE = """
from kamim.method.kernels import kernel

@kernel
def callee():
    return {}
"""
ASK = "from kamim.caller import caller; print(caller(), sum(caller.stats.cache_hits.values()))"


def test_a_kernel_is_compiled_anew_when_what_it_calls_in_another_file_changes(tmp_path: Path) -> None:
    package = tmp_path / "kamim"
    package.mkdir()
    shutil.copy(kernels.__file__, package)
    (package / "__init__.py").touch()
    (package / "caller.py").write_text(CALLER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for answer, cached in ((1, 0), (1, 1), (2, 0)):
        (package / "callee.py").write_text(CALLEE.format(answer))
        run = [sys.executable, "-c", ASK]
        printed = subprocess.run(run, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        assert printed.split() == [str(answer), str(cached)]

"""All that kamim uses of numba beside its public interface, for which pyproject.toml bounds numba's version."""

import ast
import inspect
import tomllib

import numba
import numpy as np
import pytest
from numba.core.caching import FunctionCache
from numba.core.cpu import CPUContext
from numba.core.errors import NumbaError
from numba.np import arrayobj
from packaging.requirements import Requirement

from kamim.method.kernels import ROOT, bare_kernel, kernel

PUBLIC = {"numba", "numba.extending"}
PRIVATE = {"numba.np.arrayobj": {"make_array"}}  # modules that are imported, and the names taken from them


def test_no_other_module_of_numba_is_imported() -> None:
    imported: dict[str, set[str]] = {}
    for package in ("kamim", "pipelines", "preprocess"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numba"):
                    imported.setdefault(node.module or "", set()).update(name.name for name in node.names)
                if isinstance(node, ast.Import):
                    assert all(name.name == "numba" or not name.name.startswith("numba.") for name in node.names), file
    assert {module: names for module, names in imported.items() if module not in PUBLIC} == PRIVATE


def test_the_private_parts_are_there() -> None:
    """Arrays as LLVM sees them (simd), functions that count no references, and the cache that may be full (kernels)."""
    assert callable(arrayobj.make_array)
    assert callable(CPUContext.get_dummy_value)
    assert list(inspect.signature(FunctionCache.save_overload).parameters) == ["self", "sig", "data"]
    assert isinstance(kernel(lambda: 0)._cache, FunctionCache)


def test_a_bare_kernel_counts_no_references() -> None:
    """numba refuses to compile an allocation in it, since what it allocates is counted."""

    @bare_kernel
    def allocates():  # type: ignore[no-untyped-def]
        return len(np.empty(3))

    with pytest.raises(NumbaError, match="array"):
        allocates()


def test_the_installed_numba_is_within_the_bounds() -> None:
    """The upper bound is the next minor version, since numba may change its private parts in any."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bounds,) = (r.specifier for r in map(Requirement, declared) if r.name == "numba")
    assert numba.__version__ in bounds
    assert any(bound.operator == "<" for bound in bounds)

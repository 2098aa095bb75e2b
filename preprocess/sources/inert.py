"""What a pickle of plain data holds, without unpickling it: its opcodes are followed, nothing it names is called."""

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np

_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_KNOWN = (*_ARRAY, "numpy ndarray", "numpy dtype")
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINSTRING", "BINSTRING", "BINUNICODE"}
)  # of one argument, the value itself


@dataclass
class _Called:
    """Stands for what a pickle would make by a call."""

    name: str
    arguments: Any
    state: Any = None


class _Mark:
    pass


def contents(data: bytes | memoryview) -> dict[str, Any]:
    """The dict of names, numbers, lists and uint8 arrays in a pickle of protocol 2, as Python 2's cPickle wrote them.

    Strings are str (latin-1). Raises ValueError for anything else.
    """
    try:
        found = _follow(data)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a pickle of plain data: {error}") from error
    if not isinstance(found, dict):
        raise ValueError("not a pickle of a dict")
    return {name: _array(value) if isinstance(value, _Called) else value for name, value in found.items()}


def _follow(data: bytes | memoryview) -> Any:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        at = max(n for n, value in enumerate(stack) if value is _Mark)
        taken = stack[at + 1 :]
        del stack[at:]
        return taken

    for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
        match opcode.name:
            case name if name in _VALUES:
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                stack.append(_Mark)
            case "TUPLE":
                stack.append(tuple(to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = to_mark()
                stack[-1].extend(values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                values = to_mark()
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" if argument in _KNOWN:
                stack.append(argument)
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_Called(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "PROTO" | "STOP":
                pass
            case _:
                raise ValueError(f"{opcode.name} {argument!r:.60} is not allowed")
    return stack[-1]


def _array(made: _Called) -> np.ndarray:
    """The state of a numpy array is its (version, shape, dtype, whether in Fortran's order, bytes)."""
    if made.name not in _ARRAY or not isinstance(made.state, tuple) or len(made.state) != 5:
        raise ValueError(f"{made.name} is not a numpy array")
    _, shape, dtype, fortran, data = made.state
    if not isinstance(dtype, _Called) or dtype.name != "numpy dtype" or dtype.arguments[0] != "u1":
        raise ValueError("an array of other numbers than uint8")
    pixels = np.frombuffer(data.encode("latin-1"), np.uint8)
    if pixels.size != math.prod(shape):
        raise ValueError(f"an array of shape {shape} with {pixels.size} bytes")
    return pixels.reshape(shape, order="F" if fortran else "C")

"""Four machine operations that numba does not offer, for loops that LLVM vectorises.

Loads and stores are little-endian, of 8 bytes at any offset. Nothing checks bounds: the caller ensures them.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_16, _32, _64 = (ir.IntType(bits) for bits in (16, 32, 64))


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    data = make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), _64.as_pointer())


@intrinsic
def load8(typing, data, offset):
    """Loads the 8 bytes of data (uint8 [n], contiguous) at `offset` as a uint64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args), align=1)

    return types.uint64(data, types.intp), code


@intrinsic
def store8(typing, data, offset, word):
    """Stores the 8 bytes of `word` (uint64) to data (uint8 [n], contiguous) at `offset`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature, args), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), code


@intrinsic
def pointer16(typing, address):
    """Returns a pointer to the uint16 at `address` (uint64), as numba.carray takes it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _16.as_pointer())

    return types.CPointer(types.uint16)(types.uint64), code


@intrinsic
def high16(typing, a, b):
    """Returns the upper 16 bits of the product of two uint16: one instruction for a whole SIMD register."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_16, [_16, _16, _32])
        multiply = builder.module.declare_intrinsic("llvm.umul.fix", (_16,), kind)
        return builder.call(multiply, [*args, ir.Constant(_32, 16)])

    return types.uint16(types.uint16, types.uint16), code

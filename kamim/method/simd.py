"""Four machine operations that numba has no name for, so that compilers use whole registers of bytes.

Loads and stores are little-endian, of 8 bytes at any offset; the caller sees to it that they lie within the array.
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
    """The 8 bytes of data (uint8 [n], contiguous) from `offset` on: uint64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_address(context, builder, signature, args), align=1)

    return types.uint64(data, types.intp), code


@intrinsic
def store8(typing, data, offset, word):
    """Writes the 8 bytes of `word` (uint64) to data (uint8 [n], contiguous) from `offset` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _address(context, builder, signature, args), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.uint64), code


@intrinsic
def pointer16(typing, address):
    """What numba.carray makes an array of: a pointer to the uint16 at `address` (uint64)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _16.as_pointer())

    return types.CPointer(types.uint16)(types.uint64), code


@intrinsic
def high16(typing, a, b):
    """The upper 16 bits of the product of two uint16: one instruction for a whole register of them."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_16, [_16, _16, _32])
        multiply = builder.module.declare_intrinsic("llvm.umul.fix", (_16,), kind)
        return builder.call(multiply, [*args, ir.Constant(_32, 16)])

    return types.uint16(types.uint16, types.uint16), code

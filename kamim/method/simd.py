"""Machine operations that numba does not offer, for loops that LLVM vectorises.

Loads and stores are little-endian, of 8 bytes at any offset. Nothing checks bounds: the caller ensures them.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_8, _16, _32, _64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))


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
def pointer8(typing, address):
    """Returns a pointer to the uint8 at `address` (uint64), as numba.carray takes it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _8.as_pointer())

    return types.CPointer(types.uint8)(types.uint64), code


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


@intrinsic
def less16(typing, a, b):
    """Returns a - b of two uint16, or 0 if it is negative: one instruction for a register full of them."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        subtract = builder.module.declare_intrinsic("llvm.usub.sat", (_16,), ir.FunctionType(_16, [_16, _16]))
        return builder.call(subtract, args)

    return types.uint16(types.uint16, types.uint16), code


@intrinsic
def stream64(typing, source, to, offset):
    """Copies 64 bytes from `offset` of one array to the same place of another (uint8 [n], contiguous) past the caches.

    `to` at `offset` must be aligned to 64 bytes. Another thread sees the bytes once both have taken the same lock.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = ir.VectorType(_64, 8).as_pointer()
        from_, to_ = (
            builder.bitcast(builder.gep(make_array(kind)(context, builder, array).data, [args[2]]), line)
            for kind, array in zip(signature.args, args[:2], strict=False)
        )
        stored = builder.store(builder.load(from_, align=1), to_, align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_32, 1)]))
        return context.get_dummy_value()

    return types.void(source, to, types.intp), code


@intrinsic
def prefetch(typing, address):
    """Prefetches the cache line at an address (uint64). Any number is allowed: a prefetch does not fault."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _32, _32, _32])
        function = builder.module.declare_intrinsic("llvm.prefetch", (pointer.type,), kind)
        builder.call(function, [pointer, *(ir.Constant(_32, n) for n in (0, 2, 1))])
        return context.get_dummy_value()

    return types.void(types.uint64), code


@intrinsic
def call(typing, function, arguments):
    """Calls the C function at an address (uint64). arguments: a tuple of int32, int64 and uint64, the latter also for
    pointers. Returns its int."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer, values = ir.IntType(32), builder.extract_value
        given = [values(args[1], i) for i in range(len(signature.args[1]))]
        kind = ir.FunctionType(integer, [value.type for value in given])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)

    return types.int32(types.uint64, arguments), code

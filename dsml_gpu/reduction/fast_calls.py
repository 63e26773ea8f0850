"""How Python calls the loops of `fast`: over whole operands, or piece by piece, each counted before it is written.

The loops are C functions, so what is here compiles once for all of them, whatever they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: Of a loop as C has it: addresses (pointer to the first), sources, destinations, bytes of each operand, divisor.
LOOP = types.void(types.CPointer(types.uintp), types.intp, types.intp, types.intp, types.intp)
ADDRESSES = types.Array(types.uintp, 1, "C")

_WORD = ir.IntType(64)


@dataclass(frozen=True, slots=True)
class Calls:
    """Functions of the address of a loop and its arguments. They release the GIL.

    Attributes:
        whole: see `fast.Loop.whole`.
        in_pieces: see `fast.Loop.in_pieces`.
    """

    whole: Callable[[int, np.ndarray, int, int, int], None]
    in_pieces: Callable[..., int]


@intrinsic
def _call(context: Any, loop: Any, addresses: Any, sources: Any, destinations: Any, nbytes: Any, divisor: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        loop, *rest = arguments
        function = ir.FunctionType(ir.VoidType(), [argument.type for argument in rest])
        builder.call(builder.inttoptr(loop, function.as_pointer()), rest)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, *[types.intp] * 4), generate


@intrinsic
def _fence(context: Any) -> Any:
    """What was read and written before it, was so before all that comes after it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _load_word(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _WORD.as_pointer()), "acquire", 8)

    return types.uint64(types.uintp), generate


@intrinsic
def _store_word(context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        address, value = arguments
        builder.store_atomic(value, builder.inttoptr(address, _WORD.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), generate


@cache
def calls() -> Calls:
    """Compiled in a third of a second, once in a process."""
    whole = numba.njit(types.void(types.uintp, ADDRESSES, *[types.intp] * 3), nogil=True)(_whole)
    signature = types.intp(
        types.uintp, ADDRESSES, *[types.intp] * 3, types.uintp, types.intp, types.intp, types.uintp, types.intp, ADDRESSES
    )
    return Calls(whole, numba.njit(signature, nogil=True)(_in_pieces))


def _whole(loop: Any, addresses: Any, nsources: Any, nbytes: Any, divisor: Any) -> None:
    _call(loop, addresses.ctypes.data, nsources, addresses.size - nsources, nbytes, divisor)


def _in_pieces(
    loop: Any,
    addresses: Any,
    nsources: Any,
    nbytes: Any,
    divisor: Any,
    slots: Any,
    nslots: Any,
    piece_bytes: Any,
    counter: Any,
    counted: Any,
    required: Any,
) -> Any:
    ndestinations = addresses.size - nsources
    reduced, copied = np.empty(nsources + 1, np.uintp), np.empty(1 + ndestinations, np.uintp)
    for start in range(0, nbytes, piece_bytes):
        offset, length = np.uintp(start), min(piece_bytes, nbytes - start)
        slot = slots + np.uintp(counted % nslots * piece_bytes)
        for index in range(nsources):
            reduced[index] = addresses[index] + offset
        reduced[nsources] = copied[0] = slot
        for index in range(ndestinations):
            copied[1 + index] = addresses[nsources + index] + offset
        _call(loop, reduced.ctypes.data, nsources, 1, length, divisor)
        _fence()
        for index in range(required.size):
            if not _load_word(required[index]):
                return counted
        counted += 1
        _store_word(counter, np.uint64(counted))
        _fence()
        _call(loop, copied.ctypes.data, 1, ndestinations, length, 1)
    return counted

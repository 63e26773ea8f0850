"""Loops for the host that numba compiles. Importing this imports numba: about 0.5 s, and 64 MB of memory.

A loop takes any number of sources and destinations, in one pass over memory. That makes it faster than numpy for every
type, and not for the half types alone: the sum of four buffers into all four, 2 MiB each and in place, took 0.19 ms instead
of 0.50 in float64, 0.19 instead of 0.46 in float32, 0.22 instead of 0.52 in int8 and 0.19 instead of 0.55 in int64. Only
two sources and one destination of other than half types are as fast in numpy. Of multiplications by a weight likewise only
the half types gain.

It is written in vectors, through LLVM's vector types, and not as scalars for the compiler to vectorise, for two reasons. A
compiler that cannot know whether a destination is one of the sources tests it, and takes scalars where it is: a sum in
place would run at 0.5 GB/s. And numba has no half types on a CPU, while LLVM converts them with the processor's
instructions. All operands of a vector are loaded before any is stored, so a destination may be a source; and loads and
stores ask for no alignment.

Nothing here allows the compiler to change a result: no fast-math flags, so no contraction to fused multiply-add either.

numba can keep compiled code in a folder; here it does not. A loop compiles in 0.3 s, once in a process, and only where
somebody reduces that type. The folder would have to be writable, and its files fit one processor and one numba only.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import ml_dtypes
import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic, models, register_model

from dsml_gpu.reduction.fast_calls import ADDRESSES, LOOP, calls

log = logging.getLogger(__name__)

#: ``weigh(source, destination, weight)``: two uint8 arrays of the same size, the same memory or not overlapping, and a
#: float32 that is none of the NaNs with something in the lower half. Releases the GIL.
Weighing = Callable[[np.ndarray, np.ndarray, np.generic], None]

#: What a loop combines at once. Of 64, 128 and 256 bytes, 256 was the fastest for every type (bfloat16: 6.9, 8.6 and
#: 11.3 GB/s): 8 registers of AVX2, which is enough to hide what an addition takes and leaves registers for the operands.
_VECTOR_BYTES = 256

_I16, _I32, _HALF, _FLOAT, _DOUBLE = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType(), ir.DoubleType()


@dataclass(frozen=True, slots=True)
class Loop:
    """A reduction of any number of sources into any number of destinations. Neither function takes the GIL.

    Attributes:
        whole: ``whole(addresses, nsources, nbytes, divisor)``: addresses of the sources and then of the destinations, as a
            uintp array; the divisor is an integer, and 1 where there is none. A destination may be a source.
        in_pieces: ``in_pieces(addresses, nsources, nbytes, divisor, slots, nslots, piece_bytes, counter, counted, required)
            -> counted``: the same, through `nslots` slots of `piece_bytes` each, from the address `slots`. When a piece is
            in the slot of its number (modulo `nslots`), and none of the words at the addresses `required` (a uintp array)
            is 0, the number of pieces is written to the word at the address `counter`, beginning with `counted` + 1; only
            then is anything of the piece written to a destination. Ends early where a word is 0. Returns the last number.
            Whoever shares the memory sees all of it in this order.
        function: what both call.
    """

    whole: Callable[[np.ndarray, int, int, int], None]
    in_pieces: Callable[[np.ndarray, int, int, int, int, int, int, int, int, np.ndarray], int]
    function: Any


@dataclass(frozen=True, slots=True)
class _Element:
    """A type in LLVM's terms, by the types of single elements.

    Attributes:
        stored: in memory.
        accumulated: in registers.
        kind: as numpy has it: f, i or u.
        widen, narrow: builder, vector, lanes -> vector; between the two.
    """

    stored: ir.Type
    accumulated: ir.Type
    kind: str
    widen: Callable[[Any, Any, int], Any] = lambda builder, vector, lanes: vector
    narrow: Callable[[Any, Any, int], Any] = lambda builder, vector, lanes: vector


def _vector(element: ir.Type, lanes: int) -> ir.Type:
    return ir.VectorType(element, lanes)


def _all(element: ir.Type, lanes: int, value: int) -> ir.Constant:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _widen_float16(builder: Any, bits: Any, lanes: int) -> Any:
    return builder.fpext(builder.bitcast(bits, _vector(_HALF, lanes)), _vector(_FLOAT, lanes))


def _narrow_float16(builder: Any, values: Any, lanes: int) -> Any:
    return builder.bitcast(builder.fptrunc(values, _vector(_HALF, lanes)), _vector(_I16, lanes))


def _widen_bfloat16(builder: Any, bits: Any, lanes: int) -> Any:
    wide = builder.zext(bits, _vector(_I32, lanes))
    return builder.bitcast(builder.shl(wide, _all(_I32, lanes, 16)), _vector(_FLOAT, lanes))


def _narrow_bfloat16(builder: Any, values: Any, lanes: int) -> Any:
    """To nearest, ties to even.

    A NaN stays one: it comes from NaNs with nothing in the lower half, so no carry out of that half can reach its exponent.
    Of a weight, `checked_weight` sees to that.
    """
    bits = builder.bitcast(values, _vector(_I32, lanes))
    odd = builder.and_(builder.lshr(bits, _all(_I32, lanes, 16)), _all(_I32, lanes, 1))
    rounded = builder.add(builder.add(bits, _all(_I32, lanes, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, _all(_I32, lanes, 16)), _vector(_I16, lanes))


def _integer(dtype: np.dtype[Any]) -> _Element:
    element = ir.IntType(8 * dtype.itemsize)
    return _Element(element, element, dtype.kind)


_ELEMENTS = {
    np.dtype(np.float64): _Element(_DOUBLE, _DOUBLE, "f"),
    np.dtype(np.float32): _Element(_FLOAT, _FLOAT, "f"),
    np.dtype(np.float16): _Element(_I16, _FLOAT, "f", _widen_float16, _narrow_float16),
    np.dtype(ml_dtypes.bfloat16): _Element(_I16, _FLOAT, "f", _widen_bfloat16, _narrow_bfloat16),
    **{dtype: _integer(dtype) for dtype in map(np.dtype, ("i1", "u1", "i4", "u4", "i8", "u8"))},
}


def _combine(element: _Element, ufunc: str, builder: Any, left: Any, right: Any) -> Any:
    if ufunc in ("add", "multiply"):
        operation = {"add": "add", "multiply": "mul"}[ufunc]
        return getattr(builder, "f" + operation if element.kind == "f" else operation)(left, right)
    less = {"minimum": "<", "maximum": ">"}[ufunc]
    if element.kind == "f":
        # A NaN on the left is taken here, one on the right because nothing is less than it.
        is_left = builder.or_(builder.fcmp_ordered(less, left, right), builder.fcmp_unordered("uno", left, left))
    else:
        is_left = (builder.icmp_signed if element.kind == "i" else builder.icmp_unsigned)(less, left, right)
    return builder.select(is_left, left, right)


class _Lanes(types.Type):
    """numba's type of a vector of accumulators."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        self.vector = _vector(element, lanes)
        super().__init__(name=f"Lanes({element}, {lanes})")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: _Lanes) -> None:
        super().__init__(manager, lanes, lanes.vector)


def _spread(builder: Any, single: Any, lanes: int) -> Any:
    """A vector of the same value in all lanes."""
    first = builder.insert_element(ir.Constant(_vector(single.type, lanes), ir.Undefined), single, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, _all(_I32, lanes, 0))


def _access(element: _Element, lanes: int) -> tuple[Any, Any]:
    """Functions for numba code: load(address), store(address, vector)."""
    vector = _Lanes(element.accumulated, lanes)
    in_memory = _vector(element.stored, lanes)

    @intrinsic
    def load(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            pointer = builder.inttoptr(arguments[0], in_memory.as_pointer())
            return element.widen(builder, builder.load(pointer, align=1), lanes)

        return vector(types.uintp), generate

    @intrinsic
    def store(context: Any, address: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            address, values = arguments
            pointer = builder.inttoptr(address, in_memory.as_pointer())
            builder.store(element.narrow(builder, values, lanes), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.uintp, vector), generate

    return load, store


def _reductions(element: _Element, ufunc: str, lanes: int) -> tuple[Any, Any]:
    """Functions for numba code: combine(left, right), divide(vector, divisor)."""
    vector = _Lanes(element.accumulated, lanes)

    @intrinsic
    def combine(context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            return _combine(element, ufunc, builder, *arguments)

        return vector(vector, vector), generate

    @intrinsic
    def divide(context: Any, dividend: Any, divisor: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            dividend, divisor = arguments
            return builder.fdiv(dividend, _spread(builder, builder.sitofp(divisor, element.accumulated), lanes))

        return vector(vector, types.intp), generate

    return combine, divide


def _multiplication(element: _Element, lanes: int) -> Any:
    """A function for numba code: multiply(vector, weight), both of float32."""
    vector = _Lanes(element.accumulated, lanes)

    @intrinsic
    def multiply(context: Any, values: Any, weight: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
            values, weight = arguments
            return builder.fmul(values, _spread(builder, weight, lanes))

        return vector(vector, types.float32), generate

    return multiply


def _define(dtype: np.dtype[Any], ufunc: str) -> Callable[..., None]:
    """The loop of a reduction as numba takes it: a function of the type `LOOP`."""
    element = _ELEMENTS[dtype]
    itemsize = dtype.itemsize
    divides = element.kind == "f" and ufunc == "add"  # processors divide no vectors of integers
    wide = _VECTOR_BYTES // (4 if itemsize == 2 else itemsize)
    load, store = _access(element, wide)
    combine, divide = _reductions(element, ufunc, wide)
    load_one, store_one = _access(element, 1)
    combine_one, divide_one = _reductions(element, ufunc, 1)

    def loop(addresses: Any, nsources: Any, ndestinations: Any, nbytes: Any, divisor: Any) -> None:
        count = nbytes // itemsize
        whole = count - count % wide
        for start in range(0, whole, wide):
            offset = np.uintp(start * itemsize)
            vector = load(addresses[0] + offset)
            for source in range(1, nsources):
                vector = combine(vector, load(addresses[source] + offset))
            if divides and divisor != 1:
                vector = divide(vector, divisor)
            for destination in range(nsources, nsources + ndestinations):
                store(addresses[destination] + offset, vector)
        for index in range(whole, count):
            offset = np.uintp(index * itemsize)
            one = load_one(addresses[0] + offset)
            for source in range(1, nsources):
                one = combine_one(one, load_one(addresses[source] + offset))
            if divides and divisor != 1:
                one = divide_one(one, divisor)
            for destination in range(nsources, nsources + ndestinations):
                store_one(addresses[destination] + offset, one)

    return loop


def _define_weighing(dtype: np.dtype[Any]) -> Callable[..., None]:
    """The multiplication of a half type by a weight as numba takes it."""
    element = _ELEMENTS[dtype]
    itemsize = dtype.itemsize
    wide = _VECTOR_BYTES // 4
    load, store = _access(element, wide)
    multiply = _multiplication(element, wide)
    load_one, store_one = _access(element, 1)
    multiply_one = _multiplication(element, 1)

    def weigh(source: Any, destination: Any, weight: Any) -> None:
        read, written = source.ctypes.data, destination.ctypes.data
        count = source.size // itemsize
        whole = count - count % wide
        for start in range(0, whole, wide):
            offset = np.uintp(start * itemsize)
            store(written + offset, multiply(load(read + offset), weight))
        for index in range(whole, count):
            offset = np.uintp(index * itemsize)
            store_one(written + offset, multiply_one(load_one(read + offset), weight))

    return weigh


def has_half_conversion() -> bool:
    """Whether this processor converts float16 itself; otherwise LLVM calls functions that nobody provides."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return bool(binding.get_host_cpu_features().get("f16c"))
    return machine in ("aarch64", "arm64")


_compiling = threading.Lock()
#: By what they do and the type.
_compiled: dict[tuple[str, np.dtype[Any]], Any] = {}

_BYTES = types.Array(types.uint8, 1, "C", readonly=True)  # which a writable array is as well
_WRITABLE_BYTES = types.Array(types.uint8, 1, "C")


def compiled_loop(ufunc: str, dtype: np.dtype[Any]) -> Loop | None:
    """The loop for one numpy function of `Operator.ufunc` and one type, compiled unless this process has it already.

    Blocks for a third of a second, for the first loop of a process a second. None where this processor cannot run it.
    """
    loop: Loop | None = _compiled_once(f"reduction {ufunc}", dtype, lambda: _compile_loop(dtype, ufunc))
    return loop


def _compile_loop(dtype: np.dtype[Any], ufunc: str) -> Loop:
    function = numba.cfunc(LOOP)(_define(dtype, ufunc))
    whole, in_pieces = calls().whole, calls().in_pieces
    return Loop(partial(whole, function.address), partial(in_pieces, function.address), function)


def compiled_weighing(dtype: np.dtype[Any]) -> Weighing | None:
    """The multiplication of float16 or bfloat16 by a weight; otherwise as `compiled_loop`."""
    signature = types.void(_BYTES, _WRITABLE_BYTES, types.float32)
    compile_it = numba.njit(signature, nogil=True)
    what = "multiplication by a weight"
    weighing: Weighing | None = _compiled_once(what, dtype, lambda: compile_it(_define_weighing(dtype)))
    return weighing


def _compiled_once(what: str, dtype: np.dtype[Any], compile_it: Callable[[], Any]) -> Any:
    if dtype == np.float16 and not has_half_conversion():
        log.info("float16 reductions are left to numpy: this processor has no instructions that convert float16")
        return None
    with _compiling:
        function = _compiled.get((what, dtype))
        if function is None:
            started = time.perf_counter()
            function = compile_it()
            log.info("compiled the %s of %s in %.2f s", what, dtype, time.perf_counter() - started)
            _compiled[what, dtype] = function
    return function


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where one-dimensional contiguous arrays of uint8 are, found by compiled code.

    ``__array_interface__`` takes 1.4 us for an array, which on small operands is more than all the rest.

    Attributes:
        of: array -> its address.
        of_three: three arrays -> their addresses as a uintp array.
    """

    of: Callable[[np.ndarray], int]
    of_three: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@cache
def address_functions() -> Addresses:
    """Compiled in a tenth of a second, once in a process."""

    def of(array: Any) -> Any:
        return array.ctypes.data

    def of_three(first: Any, second: Any, third: Any) -> Any:
        addresses = np.empty(3, np.uintp)
        addresses[0] = first.ctypes.data
        addresses[1] = second.ctypes.data
        addresses[2] = third.ctypes.data
        return addresses

    return Addresses(
        of=numba.njit(types.uintp(_BYTES))(of), of_three=numba.njit(ADDRESSES(_BYTES, _BYTES, _BYTES))(of_three)
    )

"""Reductions in host memory: numpy's functions, or loops compiled by numba where it is installed (`fast`). Same bits."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dsml_gpu.reduction.operators import Operator
from dsml_gpu.reduction.passes import MAX_OPERANDS, TEMPORARY, Pass, aliases_of, plan_passes

if TYPE_CHECKING:
    from dsml_gpu.reduction.fast import Addresses, Loop, Weighing

log = logging.getLogger(__name__)

# Measured on two cores of an AMD EPYC (Milan, 512 KiB of L2 and 32 MiB of shared L3), numpy 2.4, medians of one run.

#: Operands that together are larger than this go through numpy block by block, so that what one function leaves in the
#: cache is there for the next; smaller ones gain nothing by it and pay for the calls. The sum of four into all four in ms,
#: float32, whole against blocks: 3.6 MB each 1.39 and 1.83, 5 MB 2.54 and 2.62, 6 MB 3.52 and 3.26, 16 MB 11.2 and 8.8.
CACHE_BYTES = 24 << 20
#: Bytes of one operand in a block. The same sum, 64 MB each, in blocks of 64, 128, 256, 512, 1024 and 4096 KiB: 33.1, 29.6,
#: 26.4, 25.2 and, in another run, 31.5 (512), 30.7, 35.1 ms. Blocks that fit L2 lose more to the calls than they gain.
BLOCK_BYTES = 512 << 10
#: The half types' own functions in numpy are slow, but one call: up to so many bytes of two sources they are faster than
#: widening. In large operands it is widening, with 0.5 against 0.3 GB/s (float16) and 1.8 against 1.2 (bfloat16).
SMALL_HALF_BYTES = {np.dtype(np.float16): 20 << 10, np.dtype(ml_dtypes.bfloat16): 32 << 10}
#: What a divisor may be: a number that all types but those of one byte can hold.
MAX_DIVISOR = (1 << 31) - 1


class _Scratch:
    """Memory for one reduction: made when it is first asked for, and the same for each block.

    Fresh memory for each block could come from the system each time, page by page.
    """

    def __init__(self) -> None:
        self._memory: np.ndarray | None = None

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Of arbitrary content, and the same memory as before."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._memory is None or self._memory.nbytes < nbytes:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(shape)


#: (sources, destinations, accumulator, divisor, scratch): one reducing pass. Operands are of their type; of uint8 for a
#: compiled loop. The accumulator is the destination of `Pass.accumulator`.
_Combine = Callable[[Sequence[np.ndarray], Sequence[np.ndarray], np.ndarray | None, int, _Scratch], None]


class HostReducer:
    """See `Reducer`. `reduce` and `weigh` never compile: where there is no compiled loop, numpy computes the same.

    `prepare` compiles one loop, which serves any number of sources and destinations, and where it helps one that multiplies
    by weights. May be used from several threads.

    Args:
        compiles: False: never use numba.
        cache_bytes, block_bytes: see `CACHE_BYTES` and `BLOCK_BYTES`; a block is a multiple of 32 bytes.
    """

    must_be_ready = False

    def __init__(self, compiles: bool = True, cache_bytes: int = CACHE_BYTES, block_bytes: int = BLOCK_BYTES) -> None:
        self._compiles = compiles
        self._cache_bytes = cache_bytes
        self._block_bytes = block_bytes
        #: By numpy function and type; None where numba cannot help.
        self._compiled: dict[tuple[str, np.dtype[Any]], Compiled | None] = {}
        #: Of the half types; None where numba cannot help.
        self._weighings: dict[np.dtype[Any], Weighing | None] = {}

    def is_ready(
        self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, destinations: int = 1, *, weighted: bool = False
    ) -> bool:
        if not self._may_compile():
            return True
        if weighted and dtype.itemsize == 2 and dtype not in self._weighings:
            return False
        # Of a pair only the half types gain.
        return (operator.ufunc, dtype) in self._compiled or (sources + destinations <= 3 and dtype.itemsize != 2)

    def _may_compile(self) -> bool:
        return self._compiles and not _numpy_only and _numba_is_installed()

    def prepare(self, operator: Operator, dtype: np.dtype[Any], sources: int = 2, *, weighted: bool = False) -> None:
        if not self._may_compile():
            return
        key = operator.ufunc, dtype
        if key not in self._compiled:
            self._compiled[key] = _compile(*key)
        if weighted and dtype.itemsize == 2 and dtype not in self._weighings:
            self._weighings[dtype] = _compile_weighing(dtype)

    def compiled(self, operator: Operator, dtype: np.dtype[Any]) -> Compiled | None:
        """The loop that `prepare` has compiled, if it has."""
        return self._compiled.get((operator.ufunc, dtype))

    def reduce(
        self,
        operator: Operator,
        dtype: np.dtype[Any],
        sources: Sequence[np.ndarray],
        destinations: Sequence[np.ndarray],
        divisor: int = 1,
    ) -> None:
        ufunc = getattr(np, operator.ufunc)
        compiled = self._compiled.get((operator.ufunc, dtype))
        pair = len(sources) == 2 and len(destinations) == 1
        if pair and divisor == 1 and (dtype.itemsize != 2 or not (compiled or _is_large_half(dtype, sources[0]))):
            # One call, as fast as memory. Small collectives come this way, and nothing else may cost here.
            with np.errstate(all="ignore"):  # overflow to infinity and NaN are results, not warnings
                ufunc(sources[0].view(dtype), sources[1].view(dtype), out=destinations[0].view(dtype))
            return
        nbytes = _checked_size(sources, destinations, divisor)
        if compiled is not None and divisor > 1 and dtype.kind in "iu":
            compiled = None  # it has no integer division
        if compiled is not None and pair:
            compiled.loop.whole(compiled.addresses.of_three(*sources, *destinations), 2, nbytes, divisor)
            return
        aliases = _aliases(sources, destinations, _address if compiled is None else compiled.addresses.of)
        passes = plan_passes(len(sources), aliases)
        block_bytes = self._block_bytes
        if compiled is None and dtype.itemsize == 2:
            block_bytes //= 4  # what is worked on is three arrays of float32, each twice as large
        elif (compiled and len(passes) == 1) or nbytes * max(len(sources), len(destinations)) <= self._cache_bytes:
            block_bytes = nbytes
        # The plan names no destination that is a source.
        buffers: list[np.ndarray | None] = [*sources]
        buffers += [own if alias is None else None for own, alias in zip(destinations, aliases, strict=True)]
        if compiled is not None:
            _run(passes, compiled.combine, buffers, divisor, block_bytes)
            return
        views = [array if array is None else array.view(dtype) for array in buffers]
        combine = _combine_half if dtype.itemsize == 2 else _combine_own
        with np.errstate(all="ignore"):
            _run(passes, partial(combine, ufunc), views, divisor, block_bytes // dtype.itemsize)

    def weigh(self, dtype: np.dtype[Any], source: np.ndarray, destination: np.ndarray, weight: np.generic) -> None:
        _checked_size((source,), (destination,), 1)
        compiled = self._weighings.get(dtype)
        if compiled is not None:
            compiled(source, destination, weight)
            return
        values, out = source.view(dtype), destination.view(dtype)
        with np.errstate(all="ignore"):
            if dtype.itemsize != 2:
                np.multiply(values, weight, out=out)  # as fast as memory
                return
            block = self._block_bytes // 8  # of which two arrays of float32 stay in the cache
            for start in range(0, values.size, block):
                part = slice(start, start + block)
                out[part] = (values[part].astype(np.float32) * weight).astype(dtype)


def compiled_of(reducer: object, operator: Operator, dtype: np.dtype[Any], nsources: int, divisor: int) -> Compiled | None:
    """What does as `HostReducer.reduce` does, in one pass and without its checks; None: it was not compiled."""
    if not isinstance(reducer, HostReducer) or not 2 <= nsources <= MAX_OPERANDS or (divisor > 1 and dtype.kind in "iu"):
        return None
    return reducer.compiled(operator, dtype)


def _is_large_half(dtype: np.dtype[Any], source: np.ndarray) -> bool:
    return source.nbytes > SMALL_HALF_BYTES[dtype]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A loop of `fast`, which this module imports only to compile one."""

    loop: Loop
    addresses: Addresses

    def addresses_of(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """As the loop takes them."""
        return np.array([self.addresses.of(array) for array in arrays], np.uintp)

    def combine(
        self,
        sources: Sequence[np.ndarray],
        destinations: Sequence[np.ndarray],
        accumulator: np.ndarray | None,
        divisor: int,
        scratch: _Scratch,
    ) -> None:
        self.loop.whole(self.addresses_of((*sources, *destinations)), len(sources), sources[0].nbytes, divisor)


def _aliases(
    sources: Sequence[np.ndarray], destinations: Sequence[np.ndarray], address: Callable[[np.ndarray], int]
) -> tuple[int | None, ...]:
    """Which source each destination is, as `plan_passes` wants it."""
    if len(sources) <= 2 and len(destinations) <= MAX_OPERANDS:
        # Nothing is written before both are read: it makes no difference which memory is whose, and addresses cost.
        return (None,) * len(destinations)
    aliases = aliases_of([*map(id, sources)], [*map(id, destinations)])
    if None in aliases:  # another array may still be the same memory
        aliases = aliases_of([*map(address, sources)], [*map(address, destinations)])
    return aliases


def _run(passes: Sequence[Pass], combine: _Combine, buffers: Sequence[np.ndarray | None], divisor: int, block: int) -> None:
    """All passes over the first `block` elements of all buffers, then over the next."""
    assert buffers[0] is not None
    length = buffers[0].size
    if not length:
        return
    scratch = _Scratch()
    temporary = None
    if len(passes) > 1 and any(TEMPORARY in step.destinations for step in passes):
        temporary = np.empty(min(block, length), buffers[0].dtype)
    buffers = [*buffers, temporary]
    steps = [(step, step.accumulator, divisor if step.last else 1) for step in passes]
    for start in range(0, length, block):
        stop = start + block
        pieces: Any = buffers if block >= length else [array if array is None else array[start:stop] for array in buffers]
        if temporary is not None:
            pieces[TEMPORARY] = temporary[: pieces[0].size]
        for step, accumulator, by in steps:
            read = [pieces[index] for index in step.sources]
            written = [pieces[index] for index in step.destinations]
            if len(read) > 1 or by > 1:
                combine(read, written, None if accumulator is None else pieces[accumulator], by, scratch)
            else:
                _copy(read[0], written)


def _copy(source: np.ndarray, destinations: Sequence[np.ndarray]) -> None:
    for destination in destinations:
        if destination is not source:
            np.copyto(destination, source)


def _combine_own(
    ufunc: Any,
    sources: Sequence[np.ndarray],
    destinations: Sequence[np.ndarray],
    accumulator: np.ndarray | None,
    divisor: int,
    scratch: _Scratch,
) -> None:
    """Types that accumulate in themselves."""
    dtype = sources[0].dtype
    target = scratch.take(sources[0].shape, dtype) if accumulator is None else accumulator
    accumulated = sources[0]
    for source in sources[1:]:
        ufunc(accumulated, source, out=target)
        accumulated = target
    if divisor > 1:
        if dtype.kind == "f":
            np.divide(accumulated, dtype.type(divisor), out=target)
        else:
            _divide_integers(accumulated, divisor, target)
    _copy(target, destinations)


def _divide_integers(dividend: np.ndarray, divisor: int, out: np.ndarray) -> None:
    """Truncates toward zero. `out` may be the dividend."""
    dtype = dividend.dtype
    if divisor > np.iinfo(dtype).max:  # int8 on 200 ranks
        wide = dividend.astype(np.int64)
        _divide_integers(wide, divisor, wide)
        np.copyto(out, wide, casting="unsafe")
        return
    by = dtype.type(divisor)
    if dtype.kind == "i":
        # floor_divide rounds toward minus infinity, which divisor - 1 makes up for where the sign is negative. It multiplies
        # instead of dividing: int32 0.8 ns an element, and 2.5 with fmod.
        ones_where_negative = np.right_shift(dividend, dtype.type(8 * dtype.itemsize - 1))
        dividend = np.add(dividend, np.bitwise_and(ones_where_negative, dtype.type(divisor - 1)), out=out)
    np.floor_divide(dividend, by, out=out)


def _combine_half(
    ufunc: Any,
    sources: Sequence[np.ndarray],
    destinations: Sequence[np.ndarray],
    accumulator: np.ndarray | None,
    divisor: int,
    scratch: _Scratch,
) -> None:
    """float16 and bfloat16: accumulate in float32 and round once."""
    accumulated, incoming, spare = scratch.take((3, sources[0].size), np.dtype(np.float32))
    widen, narrow = (_widen_float16, _narrow_float16) if sources[0].dtype == np.float16 else (np.copyto, _narrow_bfloat16)
    widen(accumulated, sources[0])
    for source in sources[1:]:
        widen(incoming, source)
        ufunc(accumulated, incoming, out=accumulated)
    if divisor > 1:
        np.divide(accumulated, np.float32(divisor), out=accumulated)
    narrow(destinations[0], accumulated, incoming, spare)
    _copy(destinations[0], destinations[1:])


def _narrow_bfloat16(out: np.ndarray, values: np.ndarray, *scratch: np.ndarray) -> None:
    np.copyto(out, values, casting="unsafe")


_EXPONENT = np.uint32(0x7F800000)
_SIGN_AND_NUMBER = np.uint32(0x8FFFE000)
_SHIFT = np.uint32(23 - 10)  # from the mantissa of float16 to that of float32
_UP, _DOWN = np.float32(2.0**112), np.float32(2.0**-112)  # between the biases of their exponents, 15 and 127
_INFINITY = np.float32(2.0**16)  # the first power of two that float16 does not have


def _widen_float16(out: np.ndarray, values: np.ndarray) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits.view(np.int32), values.view(np.int16))  # extends the sign, one bit of which the mask leaves
    np.left_shift(bits, _SHIFT, out=bits)
    np.bitwise_and(bits, _SIGN_AND_NUMBER, out=bits)
    np.multiply(out, _UP, out=out)  # exact, and a number with float32's exponent where float16's was subnormal
    if np.maximum.reduce(out) >= _INFINITY or np.minimum.reduce(out) <= -_INFINITY:
        np.bitwise_or(bits, _EXPONENT, out=bits, where=np.abs(out) >= _INFINITY)


def _narrow_float16(out: np.ndarray, values: np.ndarray, power: np.ndarray, spare: np.ndarray) -> None:
    """To nearest, ties to even. Nothing remains of the other three."""
    bits = values.view(np.uint32)
    sign = np.right_shift(bits, np.uint32(16), out=spare.view(np.uint32))
    np.bitwise_and(sign, np.uint32(0x8000), out=sign)
    np.abs(values, out=values)
    np.minimum(values, _INFINITY, out=values)
    # A power of two so high that the last bit of the sum is worth as much as float16's: the addition rounds there. Below
    # 2**-14 float16 is subnormal, and the worth of its last bit the same for all.
    exponent = np.bitwise_and(bits, _EXPONENT, out=power.view(np.uint32))
    np.maximum(exponent, np.uint32((127 - 14) << 23), out=exponent)
    np.add(exponent, np.uint32(_SHIFT << np.uint32(23)), out=exponent)
    np.add(values, power, out=values)
    np.subtract(values, power, out=values)
    # Scaled down, a number has the bits of float16, and 2**16 those of infinity. Of a NaN the highest bits remain set.
    np.multiply(values, _DOWN, out=values)
    np.right_shift(bits, _SHIFT, out=bits)
    np.bitwise_or(bits, sign, out=bits)
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def _checked_size(sources: Sequence[np.ndarray], destinations: Sequence[np.ndarray], divisor: int) -> int:
    """Bytes of every operand. Compiled code would read and write past the end of a shorter one."""
    nbytes = destinations[0].nbytes
    for array in sources:
        if array.nbytes != nbytes:
            raise ValueError(f"operands differ in size: a source of {array.nbytes}, a destination of {nbytes} bytes")
    for array in destinations:
        if array.nbytes != nbytes:
            raise ValueError(f"operands differ in size: destinations of {array.nbytes} and {nbytes} bytes")
        if not array.flags.writeable:
            raise ValueError("a destination is read-only")
    if not 1 <= divisor <= MAX_DIVISOR:
        raise ValueError(f"divisor must be 1 to {MAX_DIVISOR}, not {divisor}")
    return nbytes


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


#: See `use_numpy_only`.
_numpy_only = False


def use_numpy_only() -> None:
    """From now on this process compiles no reduction, as if numba were not installed.

    Importing numba and compiling the first loop take about a second of one core, more than all the rest of a server that is
    there for a few small collectives.
    """
    global _numpy_only
    _numpy_only = True


@cache
def _numba_is_installed() -> bool:
    return find_spec("numba") is not None


def _numba_can_be_imported() -> bool:
    try:
        import dsml_gpu.reduction.fast  # noqa: F401
    except ImportError as error:  # numba refuses a numpy that is too new for it
        log.warning("numba is installed but cannot be imported, so numpy reduces: %s", error)
        return False
    return True


def _compile(ufunc: str, dtype: np.dtype[Any]) -> Compiled | None:
    if not _numba_can_be_imported():
        return None
    from dsml_gpu.reduction import fast

    loop = fast.compiled_loop(ufunc, dtype)
    return None if loop is None else Compiled(loop, fast.address_functions())


def _compile_weighing(dtype: np.dtype[Any]) -> Weighing | None:
    if not _numba_can_be_imported():
        return None
    from dsml_gpu.reduction import fast

    return fast.compiled_weighing(dtype)

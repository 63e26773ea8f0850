"""The CUDA kernels of ``kernels/``: their source, their instantiations, and what a launch passes to them. Needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dsml_gpu.reduction.dtypes import DTYPES
from dsml_gpu.reduction.operators import OPERATORS, Operator
from dsml_gpu.reduction.passes import MAX_OPERANDS

#: Threads of a block; `kThreads` in reduce.cu.
BLOCK_THREADS = 256
#: Contraction to fused multiply-add would round otherwise than the CPU twin. CuPy adds ``-ftz=true``, for which the kernels
#: are prepared (operators.cuh).
COMPILE_OPTIONS = ("--std=c++17", "--fmad=false")
_PACK_BYTES = 16
#: Sources that an instantiation can take.
_CAPACITIES = (2, 4, 8)
#: Types as which bytes are copied, widest first: the widest that all operands are aligned to is taken.
_COPY_TYPES = ("unsigned long long", "unsigned int", "unsigned char")

_CUDA_TYPES = {
    "FLOAT64": "double",
    "FLOAT32": "float",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "INT8": "signed char",
    "UINT8": "unsigned char",
    "INT32": "int",
    "UINT32": "unsigned int",
    "INT64": "long long",
    "UINT64": "unsigned long long",
}
_CUDA_TYPE_OF = {DTYPES[name]: cuda_type for name, cuda_type in _CUDA_TYPES.items()}
_COPY_ITEMSIZES = {"unsigned long long": 8, "unsigned int": 4, "unsigned char": 1}

#: ``struct ReduceArguments`` of reduce.cu, field by field.
ARGUMENTS = np.dtype(
    [
        ("sources", "<u8", MAX_OPERANDS),
        ("destinations", "<u8", MAX_OPERANDS),
        ("count", "<i8"),
        ("head", "<i8"),
        ("source_count", "<u4"),
        ("destination_count", "<u4"),
        ("divisor", "<u4"),
        ("unaligned", "<u4"),
        ("weight", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: name expression of the instantiation.
        arguments: an array of one `ARGUMENTS`, passed by value.
        threads: how many threads find work; more do no harm, fewer do more each.
    """

    kernel: str
    arguments: np.ndarray
    threads: int


def name_expression(operator: Operator, dtype: np.dtype[Any], source_count: int) -> str:
    """The instantiation for so many sources of a type, for example ``"reduce<float, Sum, 2>"``."""
    capacity = next(capacity for capacity in _CAPACITIES if capacity >= source_count)
    return f"reduce<{_CUDA_TYPE_OF[dtype]}, {operator.functor}, {capacity}>"


def instantiations() -> dict[tuple[str, str], tuple[str, ...]]:
    """All instantiations, by operator and type (names on the wire).

    Copies are under ``("COPY", "")``, and what multiplies by a weight is under ``"WEIGH"`` and the type.
    """
    table = {
        (operator.name, name): tuple(name_expression(operator, dtype, capacity) for capacity in _CAPACITIES)
        for name, dtype in DTYPES.items()
        for operator in OPERATORS
    }
    table |= {("WEIGH", name): (weigh_expression(dtype),) for name, dtype in DTYPES.items()}
    table["COPY", ""] = tuple(map(_copy_kernel, _COPY_TYPES))
    return table


def weigh_expression(dtype: np.dtype[Any]) -> str:
    """The instantiation that multiplies a type by a weight."""
    return f"reduce<{_CUDA_TYPE_OF[dtype]}, Weigh, 1>"


def weigh_launch(dtype: np.dtype[Any], source: int, destination: int, nbytes: int, weight: np.generic) -> Launch:
    """A multiplication by a weight.

    Args:
        source, destination: device addresses, of any alignment; may be the same.
        nbytes: size of each, a multiple of the item size.
        weight: of `weights.checked_weight`.
    """
    launch = _launch(weigh_expression(dtype), dtype.itemsize, (source,), (destination,), nbytes, 1)
    launch.arguments["weight"] = int.from_bytes(weight.tobytes().ljust(8, b"\0"), "little")
    return launch


def reduce_launch(
    operator: Operator,
    dtype: np.dtype[Any],
    sources: Sequence[int],
    destinations: Sequence[int],
    nbytes: int,
    divisor: int = 1,
) -> Launch:
    """One pass of a reduction: at most `MAX_OPERANDS` sources and as many destinations.

    Args:
        sources, destinations: device addresses, of any alignment.
        nbytes: size of each operand, a multiple of the item size.
        divisor: above 1 only with AVG.
    """
    # An average that is not divided yet is a sum.
    chosen = _SUM if operator.averages and divisor == 1 else operator
    if len(sources) == 1 and divisor == 1:
        return copy_launch(sources[0], destinations, nbytes)
    return _launch(name_expression(chosen, dtype, len(sources)), dtype.itemsize, sources, destinations, nbytes, divisor)


def copy_launch(source: int, destinations: Sequence[int], nbytes: int) -> Launch:
    """A copy to at most `MAX_OPERANDS` destinations in one pass."""
    operands = (source, *destinations, nbytes)
    for cuda_type in _COPY_TYPES:
        itemsize = _COPY_ITEMSIZES[cuda_type]
        if all(operand % itemsize == 0 for operand in operands):
            break
    return _launch(_copy_kernel(cuda_type), itemsize, (source,), destinations, nbytes, 1)


_SUM = next(operator for operator in OPERATORS if operator.name == "SUM")


def _copy_kernel(cuda_type: str) -> str:
    return f"reduce<{cuda_type}, {_SUM.functor}, 1>"


def _launch(
    kernel: str, itemsize: int, sources: Sequence[int], destinations: Sequence[int], nbytes: int, divisor: int
) -> Launch:
    if not (1 <= len(sources) <= MAX_OPERANDS and 1 <= len(destinations) <= MAX_OPERANDS):
        raise ValueError(
            f"a pass has 1 to {MAX_OPERANDS} sources and as many destinations, not {len(sources)} and {len(destinations)}"
        )
    count = nbytes // itemsize
    operands = (*sources, *destinations)
    arguments = np.zeros(1, ARGUMENTS)
    fields = arguments[0]
    fields["sources"][: len(sources)] = sources
    fields["destinations"][: len(destinations)] = destinations
    fields["count"] = count
    fields["head"] = head = _head(operands, count, itemsize)
    fields["source_count"] = len(sources)
    fields["destination_count"] = len(destinations)
    fields["divisor"] = divisor
    fields["unaligned"] = any(operand % itemsize for operand in operands)
    packs = (count - head) * itemsize // _PACK_BYTES
    return Launch(kernel, arguments, max(packs, count - packs * (_PACK_BYTES // itemsize)))


def _head(operands: Sequence[int], count: int, itemsize: int) -> int:
    """Elements before the first address that is a multiple of 16 in all operands; `count` where there is none."""
    to_boundary = {-operand % _PACK_BYTES for operand in operands}
    nbytes = to_boundary.pop()
    if to_boundary or nbytes % itemsize:
        return count
    return min(nbytes // itemsize, count)


@lru_cache(maxsize=1)
def source() -> str:
    """The kernels as one text.

    Headers are put in where they are included: what a compiler finds in a folder would be no part of the key under which
    CuPy keeps the compiled code.
    """
    return inlined("reduce.cu", directory())


def inlined(name: str, folder: Path) -> str:
    """A source file with its own headers in place of the first ``#include`` of each."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (folder / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'^#include "(.+)"\n', lambda match: expand(match[1]), text, flags=re.MULTILINE)

    return expand(name)


def directory() -> Path:
    """Where the sources are: inside the package when it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "kernels"
    return inside if inside.is_dir() else package.parent / "kernels"

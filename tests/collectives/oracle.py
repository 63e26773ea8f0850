"""What collectives must give, by exact arithmetic in numpy, and what device memory must look like before and after.

A `Case` is one collective on all ranks. `layout` puts its buffers at addresses and gives the request, and each rank's memory
before and after. All of memory is compared, so whatever is written beside the outputs shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from dsml_gpu.reduction import wire_dtype
from dsml_gpu.wire import gpu_sim_pb2 as pb

OPS = ["SUM", "PROD", "MIN", "MAX", "AVG"]
#: Collectives that reduce, and that have a root.
REDUCING = {"all_reduce", "reduce", "reduce_scatter"}
ROOTED = {"reduce", "broadcast", "gather", "scatter"}
#: Bytes between buffers, and what they hold.
_GAP, _GUARD = 16, 0xA5
#: Arrays of up to so many elements are kept for whoever asks again.
_KEPT_COUNT = 1024


@dataclass(frozen=True)
class Case:
    """One collective.

    Attributes:
        counts: elements of the block (one), of each rank's block, or of each pair's block (``src * nranks + dst``).
        pairs: of a send/recv; counts has one element for each.
        weights: of a pre-multiplied sum.
    """

    collective: str
    algorithm: str
    nranks: int
    counts: tuple[int, ...]
    dtype: np.dtype[Any]
    op: str = "SUM"
    root: int = 0
    in_place: bool = False
    pairs: tuple[tuple[int, int], ...] = ()
    weights: tuple[float, ...] = ()

    def __str__(self) -> str:
        place = "in place" if self.in_place else "out of place"
        counts = self.counts if len(self.counts) <= 9 else f"{self.counts[:9]}..."
        return (
            f"{self.collective} {self.algorithm}, {self.nranks} ranks, root {self.root}, {counts} of {self.dtype}, "
            f"{self.op}, {place}"
        )


@dataclass
class Memory:
    """One rank's memory before and after, from address 0 on."""

    before: bytearray = field(default_factory=bytearray)
    after: bytearray = field(default_factory=bytearray)

    def put(self, values: np.ndarray) -> int:
        """A new buffer that holds `values` before and after; returns its address."""
        self._append(bytes([_GUARD]) * (-len(self.before) % max(8, values.itemsize)))
        addr = len(self.before)
        self._append(values.tobytes())
        self._append(bytes([_GUARD]) * _GAP)
        return addr

    def room(self, count: int, dtype: np.dtype[Any]) -> int:
        """A new buffer of garbage."""
        return self.put(np.full(count * dtype.itemsize, 0x5A, np.uint8).view(dtype))

    def expect(self, addr: int, values: np.ndarray) -> None:
        """At `addr` there must be `values` afterwards."""
        self.after[addr : addr + values.nbytes] = values.tobytes()

    def _append(self, data: bytes) -> None:
        self.before += data
        self.after += data


def values_for(dtype: np.dtype[Any], op: str, count: int, seed: Sequence[int]) -> np.ndarray:
    """Small whole numbers, so that every order of summation gives the same exact result in every type.

    Not to be written to: others may get the same array.
    """
    low, high = (1, 3) if op == "PROD" else (0, 8) if dtype.kind == "u" else (-7, 8)
    # The same few are asked for again and again: for each algorithm, operator and place. Large ones would fill memory.
    draw = _kept if count <= _KEPT_COUNT else _drawn
    return draw(dtype, low, high, count, tuple(seed))


def _drawn(dtype: np.dtype[Any], low: int, high: int, count: int, seed: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(seed).integers(low, high, count).astype(dtype)
    values.flags.writeable = False
    return values


_kept = lru_cache(maxsize=1 << 14)(_drawn)


def reduced(arrays: Sequence[np.ndarray], op: str, weights: Sequence[float] = ()) -> np.ndarray:
    """The reduction by exact arithmetic, rounded once."""
    dtype = arrays[0].dtype
    exact = [values.astype(np.float64) for values in arrays]
    if weights:
        exact = [values * weight for values, weight in zip(exact, weights, strict=True)]
    total: np.ndarray = reduce(_FUNCTIONS[op], exact)
    if op == "AVG":
        if dtype.kind in "iu":
            return np.trunc(total / len(arrays)).astype(dtype)
        wide = np.float32 if dtype.itemsize == 2 else dtype.type
        return np.asarray((total.astype(wide) / wide(len(arrays))).astype(dtype))
    if dtype.kind in "iu":  # 2**9 leaves 8 bits
        return np.asarray(total.astype(np.int64).astype(dtype))
    return np.asarray(total.astype(dtype))


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": np.add,
    "AVG": np.add,
    "PROD": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
}


def layout(case: Case, memories: Sequence[Memory]) -> pb.CollectiveRequest:
    """Puts the case's buffers into the ranks' memories, and gives the request that must turn `before` into `after`."""
    request = pb.CollectiveRequest(
        kind=case.collective.upper(),
        dtype=pb.DataType.Name(wire_dtype(case.dtype)),
        op=case.op,
        root=case.root,
        algorithm=case.algorithm,
        weights=case.weights,
    )
    if case.collective == "barrier":
        return request
    if case.collective == "send_recv":
        _lay_out_pairs(case, memories, request)
        return request
    sends, results = buffers_of(case)
    request.counts.extend(count * case.dtype.itemsize for count in case.counts)
    for rank, memory in enumerate(memories):
        send, result = sends[rank], results[rank]
        buffers = request.buffers.add()
        if case.in_place and send is not None and result is not None:
            # The smaller of the two lies in the other one, at the rank's own block; of an all-to-all both begin together.
            one_block = case.collective != "all_to_all" and send.size != result.size
            skipped = sum(case.counts[:rank]) * case.dtype.itemsize if one_block else 0
            if send.size >= result.size:
                buffers.sendAddr = memory.put(send)
                buffers.recvAddr = buffers.sendAddr + skipped
            else:
                buffers.recvAddr = memory.room(result.size, case.dtype)
                buffers.sendAddr = buffers.recvAddr + skipped
                start = buffers.sendAddr
                memory.before[start : start + send.nbytes] = send.tobytes()
            memory.expect(buffers.recvAddr, result)
            continue
        if send is not None:
            buffers.sendAddr = memory.put(send)
        if result is not None:
            buffers.recvAddr = memory.room(result.size, case.dtype)
            memory.expect(buffers.recvAddr, result)
    return request


def buffers_of(case: Case) -> tuple[list[np.ndarray | None], list[np.ndarray | None]]:
    """What each rank sends and must get; None: it has no such buffer."""
    n, root, counts = case.nranks, case.root, case.counts

    def values(rank: int, count: int) -> np.ndarray:
        return values_for(case.dtype, case.op, count, [rank, n, count])

    def only_root(value: np.ndarray) -> list[np.ndarray | None]:
        return [value if rank == root else None for rank in range(n)]

    def cut(array: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        return np.split(array, np.cumsum(sizes)[:-1]) if len(sizes) else []

    sends: list[Any]
    if case.collective in ("all_reduce", "reduce"):
        sends = [values(rank, counts[0]) for rank in range(n)]
        result = reduced(sends, case.op, case.weights)
        return sends, [result] * n if case.collective == "all_reduce" else only_root(result)
    if case.collective == "broadcast":
        source = values(root, counts[0])
        return only_root(source), [source] * n
    if case.collective == "reduce_scatter":
        sends = [values(rank, sum(counts)) for rank in range(n)]
        return sends, [*cut(reduced(sends, case.op, case.weights), counts)]
    if case.collective in ("all_gather", "gather"):
        sends = [values(rank, counts[rank]) for rank in range(n)]
        whole = np.concatenate(sends)
        return sends, [whole] * n if case.collective == "all_gather" else only_root(whole)
    if case.collective == "scatter":
        whole = values(root, sum(counts))
        return only_root(whole), [*cut(whole, counts)]
    assert case.collective == "all_to_all"
    rows = [counts[rank * n : (rank + 1) * n] for rank in range(n)]
    sends = [values(rank, sum(row)) for rank, row in enumerate(rows)]
    parts = [cut(send, row) for send, row in zip(sends, rows, strict=True)]
    return sends, [np.concatenate([parts[src][dst] for src in range(n)]) for dst in range(n)]


def _lay_out_pairs(case: Case, memories: Sequence[Memory], request: pb.CollectiveRequest) -> None:
    for number, ((src, dst), count) in enumerate(zip(case.pairs, case.counts, strict=True)):
        values = values_for(case.dtype, case.op, count, [number, src, dst, count])
        send = memories[src].put(values)
        recv = send if case.in_place and src == dst else memories[dst].room(count, case.dtype)
        memories[dst].expect(recv, values)
        request.sendRecvs.add(src=src, dst=dst, count=values.nbytes, sendAddr=send, recvAddr=recv)

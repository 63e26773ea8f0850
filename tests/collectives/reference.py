"""What collectives mean, one after the other: a request, carried out on plain arrays in place of device memory.

Unlike `oracle`, which knows what one collective must give, this starts from whatever is in memory, so that it can follow a
group whose operations work on each other's results. Whole numbers only: their reductions have no order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsml_gpu.reduction import dtype_of
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.oracle import reduced


def carry_out(request: pb.CollectiveRequest, memories: Sequence[np.ndarray]) -> None:
    """Changes memory as a collective does that nothing is wrong with.

    Args:
        memories: of each rank, bytes from address 0 on.
    """
    kind, nranks, root = pb.CollectiveRequest.Kind.Name(request.kind), len(memories), request.root
    if kind == "BARRIER":
        return
    if kind == "SEND_RECV":
        moved = [memories[one.src][one.sendAddr :][: one.count].copy() for one in request.sendRecvs]
        for one, data in zip(request.sendRecvs, moved, strict=True):
            memories[one.dst][one.recvAddr :][: one.count] = data
        return
    nblocks = {"ALL_REDUCE": 1, "REDUCE": 1, "BROADCAST": 1, "ALL_TO_ALL": nranks**2}.get(kind, nranks)
    counts = list(request.counts) if len(request.counts) == nblocks else [*request.counts] * nblocks
    everybody = range(nranks)

    def sent(rank: int, blocks: Sequence[int]) -> list[np.ndarray]:
        """What a rank has, cut into blocks."""
        addr = request.buffers[rank].sendAddr
        ends = addr + np.cumsum([0, *(counts[block] for block in blocks)])
        return [memories[rank][first:last].copy() for first, last in itertools.pairwise(ends)]

    def put(rank: int, blocks: Sequence[np.ndarray]) -> None:
        data = np.concatenate(blocks)
        memories[rank][request.buffers[rank].recvAddr :][: data.size] = data

    if kind in ("ALL_REDUCE", "REDUCE", "REDUCE_SCATTER"):
        own = [sent(rank, range(nblocks)) for rank in everybody]
        results = [_reduced(request, [blocks[block] for blocks in own]) for block in range(nblocks)]
        if kind == "REDUCE":
            put(root, results)
        for rank in everybody if kind != "REDUCE" else ():
            put(rank, results if kind == "ALL_REDUCE" else [results[rank]])
    elif kind in ("BROADCAST", "SCATTER"):
        blocks = sent(root, range(nblocks))
        for rank in everybody:
            put(rank, blocks if kind == "BROADCAST" else [blocks[rank]])
    elif kind in ("ALL_GATHER", "GATHER"):
        blocks = [sent(rank, [rank])[0] for rank in everybody]
        for rank in everybody if kind == "ALL_GATHER" else (root,):
            put(rank, blocks)
    else:
        rows = [sent(src, range(src * nranks, (src + 1) * nranks)) for src in everybody]
        for dst in everybody:
            put(dst, [row[dst] for row in rows])


def _reduced(request: pb.CollectiveRequest, blocks: Sequence[np.ndarray]) -> np.ndarray:
    dtype: np.dtype[Any] = dtype_of(request.dtype)
    values = [block.view(dtype) for block in blocks]
    return reduced(values, pb.ReduceOp.Name(request.op), request.weights).view(np.uint8)

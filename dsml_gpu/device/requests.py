"""What Execute is asked for, from the wire: programs, operations and passes, checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dsml_gpu.device.buckets import Piece
from dsml_gpu.device.dataflow import Dataflow, dataflow_of
from dsml_gpu.device.device import Membership
from dsml_gpu.device.operation import Block, Operation
from dsml_gpu.device.passes import Pass
from dsml_gpu.errors import InvalidValue
from dsml_gpu.memory.arena import Arena
from dsml_gpu.reduction import checked_weight, dtype_of, elements_in, operator_of
from dsml_gpu.schedules import Kind, Move, Program
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Bounds on what a request can make a server build.
_MAX_CHUNKS = 1 << 17
_MAX_SLICES = 1 << 20
_MIN_SLICE_BYTES = 4 << 10


def check_slice_bytes(slice_bytes: int) -> None:
    """Raises InvalidValue where chunks cannot be cut into pieces of this size."""
    if slice_bytes < _MIN_SLICE_BYTES or slice_bytes % 8:
        raise InvalidValue(f"slices must be a multiple of 8 bytes from {_MIN_SLICE_BYTES} up, not {slice_bytes}")


def operations_of(wire: Sequence[pb.Operation], flows: list[Dataflow], arena: Arena, slice_bytes: int) -> list[Operation]:
    """The operations of a request.

    Args:
        flows: of the request's programs.
        arena: of the device that runs them.
        slice_bytes: into which it cuts chunks.

    Raises:
        InvalidValue, CountNotMultiple: what does not fit together, or is more than a request may ask for.
        AddressOutOfRange: a buffer leaves the arena.
    """
    check_slice_bytes(slice_bytes)
    operations = [_operation(operation, flows) for operation in wire]
    for operation in operations:
        itemsize = operation.dtype.itemsize
        for block in operation.blocks:
            for place in block.pieces or (Piece(block.elements * itemsize, block.send, block.recv),):
                for addr in (place.send, place.recv):
                    if addr is not None:
                        arena.check(addr, place.nbytes)
        nbytes = sum(block.elements for block in operation.blocks) * itemsize
        if nbytes > _MAX_SLICES * slice_bytes:
            raise InvalidValue(f"an operation of {nbytes} bytes has more than {_MAX_SLICES} slices of {slice_bytes} bytes")
    chunks = sum(operation.dataflow.nchunks for operation in operations)
    if chunks > _MAX_CHUNKS:
        raise InvalidValue(f"the operations have {chunks} chunks together, at most {_MAX_CHUNKS} are allowed")
    return operations


@lru_cache(maxsize=256)
def dataflow_of_wire(message: bytes) -> Dataflow:
    """The dataflow of a program's wire bytes; the same few come again and again."""
    wire = pb.Program.FromString(message)
    nblocks, nchunks = wire.nblocks, wire.nblocks * wire.parts
    if wire.parts < 1 or nchunks > _MAX_CHUNKS:
        raise InvalidValue(f"a program cuts blocks into at least 1 part and has at most {_MAX_CHUNKS} chunks, not {nchunks}")
    steps = []
    for step in wire.steps:
        moves = []
        for move in step.moves:
            if move.kind not in Kind._value2member_map_:
                raise InvalidValue(f"unknown kind of move {move.kind}")
            if move.chunk >= nchunks:
                raise InvalidValue(f"chunk {move.chunk} is not one of {nchunks}")
            moves.append(Move(Kind(move.kind), move.peer, move.chunk))
        steps.append(tuple(sorted(moves, key=lambda move: move.kind is not Kind.SEND)))
    return dataflow_of(Program(tuple(range(nblocks)), wire.parts, tuple(steps), wire.storeAndForward))


def pass_of(wire: pb.Pass, membership: Membership) -> Pass:
    """A pass over memory that is open. Raises InvalidValue, CountNotMultiple and AddressOutOfRange."""
    dtype, operator = dtype_of(wire.dtype), operator_of(wire.op)
    elements_in(wire.count, dtype)
    if not wire.sources or not wire.destinations:
        raise InvalidValue(f"a pass has {len(wire.sources)} sources and {len(wire.destinations)} destinations, needs both")
    if len(wire.weights) not in (0, len(wire.sources)):
        raise InvalidValue(f"a pass has {len(wire.weights)} weights for {len(wire.sources)} sources")
    sources, destinations = (
        tuple(membership.memory(place.rank).view(place.addr, wire.count) for place in places)
        for places in (wire.sources, wire.destinations)
    )
    return Pass(
        dtype,
        operator,
        sources,
        destinations,
        tuple(checked_weight(weight, dtype) for weight in wire.weights),
        len(sources) if operator.averages else 1,
    )


def moved_bytes(wire: pb.Pass) -> int:
    """Bytes of payload that a pass moves from rank to rank: all comes together at one of them, and goes out from there."""
    sources = [place.rank for place in wire.sources]
    destinations = [place.rank for place in wire.destinations]
    center = next((rank for rank in destinations if rank in sources), sources[0])
    return int(wire.count) * sum(rank != center for rank in (*sources, *destinations))


def _operation(wire: pb.Operation, flows: list[Dataflow]) -> Operation:
    dtype = dtype_of(wire.dtype)
    if wire.program >= len(flows):
        raise InvalidValue(f"program {wire.program} is not one of the request's {len(flows)}")
    flow = flows[wire.program]
    if len(wire.blocks) != flow.nblocks:
        raise InvalidValue(f"program {wire.program} has {flow.nblocks} blocks, but the operation has {len(wire.blocks)}")
    blocks = tuple(
        Block(elements_in(block.count, dtype), *_addresses(block), _pieces(block, dtype)) for block in wire.blocks
    )
    weight = checked_weight(wire.weight, dtype) if wire.HasField("weight") else None
    return Operation(flow, blocks, dtype, operator_of(wire.op), weight, wire.copiesInput)


def _pieces(wire: pb.Block, dtype: np.dtype[Any]) -> tuple[Piece, ...]:
    for piece in wire.pieces:
        elements_in(piece.count, dtype)
    total = sum(piece.count for piece in wire.pieces)
    if wire.pieces and total != wire.count:
        raise InvalidValue(f"the pieces of a block of {wire.count} bytes have {total} bytes")
    return tuple(Piece(piece.count, *_addresses(piece)) for piece in wire.pieces)


def _addresses(wire: pb.Block | pb.Piece) -> tuple[int | None, int | None]:
    return (
        wire.sendAddr if wire.HasField("sendAddr") else None,
        wire.recvAddr if wire.HasField("recvAddr") else None,
    )

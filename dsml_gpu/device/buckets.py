"""Blocks that are gathered from several places of a device's memory before an operation, and spread after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsml_gpu.device.undo import Undo
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.device_memory import DeviceNDArray


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a block.

    Attributes:
        nbytes: its size.
        send, recv: as of `operation.Block`.
    """

    nbytes: int
    send: int | None
    recv: int | None


def gathered(pieces: Sequence[Piece], arena: Arena) -> DeviceNDArray:
    """What the rank has of the pieces, one behind the other, in memory of its own."""
    bucket = arena.memory.scratch(sum(piece.nbytes for piece in pieces))
    start = 0
    for piece in pieces:
        if piece.send is not None and piece.nbytes:
            arena.memory.copy(bucket[start : start + piece.nbytes], arena.view(piece.send, piece.nbytes))
        start += piece.nbytes
    return bucket


def spread(pieces: Sequence[Piece], bucket: DeviceNDArray, arena: Arena, undo: Undo | None) -> None:
    """Brings the results to where each belongs.

    Args:
        undo: gets what is overwritten; None: it is lost.
    """
    start = 0
    for piece in pieces:
        if piece.recv is not None and piece.nbytes:
            place = arena.view(piece.recv, piece.nbytes)
            if undo is not None:
                undo.keep(place)
            arena.memory.copy(place, bucket[start : start + piece.nbytes])
        start += piece.nbytes

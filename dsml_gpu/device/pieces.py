"""Passes in pieces that are done one behind the other, each of which others can go on from.

A piece is staged, counted, and then written: so at any time at most one is half written, and its result is in the staging. A
piece stays in the cache on its way, where all results of a large operation at once would go to memory and back. It takes
passes in which a piece reads nothing that another one writes, as in a collective in place.

Whoever goes on for a rank that was given up must reckon with that one waking up at any time. It does not get far: before it
counts a piece, it sees that memory of others has moved (`Staging.is_present`). But the piece that it may have been about to
count, it can still count and write, to its own memory as well, where the one that goes on reads. So that piece is taken
from a copy, if it is not counted after the copy was made, and from the staging otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dsml_gpu.device.passes import Pass, piece_of
from dsml_gpu.errors import OperationAborted
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.memory.staging import HEADER_BYTES, Staging
from dsml_gpu.reduction import Reducer
from dsml_gpu.reduction.host import AddressLoop, loop_of

#: Bytes of each range of a piece.
PIECE_BYTES = 128 << 10
#: Pieces that are staged at a time: one is written, two more may be staged by a rank that wakes up.
_SLOTS = 4
#: Pieces that one step does with a compiled loop: after each step a pass can be given up.
_PIECES_PER_STEP = 32

Step = Pass | Callable[[], None]


def require_present(stagings: Sequence[Staging]) -> None:
    """Raises OperationAborted where the memory of one is not there any more."""
    if not all(staging.is_present for staging in stagings):
        raise OperationAborted("the memory of a rank has moved meanwhile; the operation was given up")


class Pieces:
    """One rank's part of a round.

    Args:
        reducer: of the device that does it.
        passes: in order.
        round_id, owner: the round, and the rank whose part it is.
        own: staging of the rank that does it.
        others: of all ranks whose memory it uses.
        reach: told of places that are reached (`failpoints`).
    """

    def __init__(
        self,
        reducer: Reducer,
        passes: Sequence[Pass],
        round_id: int,
        owner: int,
        own: Staging,
        others: Sequence[Staging],
        reach: Callable[[str], None],
    ) -> None:
        self._reducer = reducer
        self._passes = passes
        self._pieces = [
            (index, start) for index, one in enumerate(passes) for start in range(0, one.sources[0].nbytes, PIECE_BYTES)
        ]
        self._round_id = round_id
        self._owner = owner
        self._own = own
        self._others = others
        self._reach = reach

    def steps(self) -> list[Step]:
        """All of it."""
        return [partial(self._own.begin_log, self._round_id, self._owner, 0), *self._from(0, "passes.commit")]

    def rest(self, logs: Sequence[Staging]) -> list[Step]:
        """What is left of it.

        Args:
            logs: of those that have done some of it, the last one first. They write nothing any more, but for what was said.
        """
        log, begun = next(
            ((one, begun) for one in logs if (begun := one.logged(self._round_id, self._owner)) is not None), (None, 0)
        )
        steps: list[Step] = []
        if log is not None and begun:
            steps += self._again(begun - 1, self._staged(log, begun - 1).copy())
        else:
            steps.append(partial(self._own.begin_log, self._round_id, self._owner, 0))
        if begun < len(self._pieces):
            piece = self._piece(begun)
            copied = replace(piece, sources=tuple(one.copy() for one in piece.sources))
            if log is not None and log.logged(self._round_id, self._owner) != begun:
                copied = replace(copied, sources=(self._staged(log, begun).copy(),), weights=(), divisor=1)
            steps += self._do(begun, copied, "passes.resume")
            steps += self._from(begun + 1, "passes.resume")
        return steps

    def _piece(self, number: int) -> Pass:
        index, start = self._pieces[number]
        return piece_of(self._passes[index], slice(start, start + PIECE_BYTES))

    def _from(self, first: int, written: str) -> list[Step]:
        """All pieces from one on."""
        steps: list[Step] = []
        while first < len(self._pieces):
            index, start = self._pieces[first]
            end = first + 1
            while end < len(self._pieces) and self._pieces[end][0] == index and end - first < _PIECES_PER_STEP:
                end += 1
            part = piece_of(self._passes[index], slice(start, start + (end - first) * PIECE_BYTES))
            loop = loop_of(self._reducer, part.operator, part.dtype, len(part.sources), part.divisor)
            if loop is None or part.weights:
                for number in range(first, end):
                    steps += self._do(number, self._piece(number), written)
            else:
                slots = self._own.view(HEADER_BYTES, _SLOTS * PIECE_BYTES)
                steps.append(_CompiledStep(loop, part, first, slots, self._count, partial(self._reach, written)))
            first = end
        return steps

    def _again(self, number: int, result: DeviceNDArray) -> list[Step]:
        """A piece that was begun, and those before it are written."""
        piece = self._piece(number)
        copy = replace(piece, sources=(result,), weights=(), divisor=1)
        return [
            replace(copy, destinations=(self._staged(self._own, number),)),
            partial(self._own.begin_log, self._round_id, self._owner, number + 1),
            copy,
            partial(self._reach, "passes.resume"),
        ]

    def _do(self, number: int, piece: Pass, written: str) -> list[Step]:
        staged = self._staged(self._own, number)
        return [
            replace(piece, destinations=(staged,)),
            partial(self._count, number + 1),
            Pass(piece.dtype, piece.operator, (staged,), piece.destinations),
            partial(self._reach, written),
        ]

    def _count(self, begun: int) -> None:
        require_present(self._others)
        self._own.log(begun)
        self._reach("passes.staged")

    def _staged(self, staging: Staging, number: int) -> DeviceNDArray:
        offset = HEADER_BYTES + number % _SLOTS * PIECE_BYTES
        index, start = self._pieces[number]
        return staging.view(offset, min(self._passes[index].sources[0].nbytes - start, PIECE_BYTES))


@dataclass(frozen=True, slots=True)
class _CompiledStep:
    """Several pieces by a compiled loop: so small pieces that they stay in the cache take longer in Python than at work.

    Attributes:
        loop: of the reduction.
        part: all of them.
        first: number of the first.
        slots: where pieces are staged.
        count, written: called with the number of pieces, when one is staged, and when one is written.
    """

    loop: AddressLoop
    part: Pass
    first: int
    slots: DeviceNDArray
    count: Callable[[int], None]
    written: Callable[[], None]

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        return self.part.nbytes

    def __call__(self) -> None:
        sources = [_address(one) for one in self.part.sources]
        destinations = [_address(one) for one in self.part.destinations]
        slots, length = _address(self.slots), self.part.sources[0].nbytes
        reduced, copied = np.array([*sources, 0], np.uintp), np.array([0, *destinations], np.uintp)
        step = np.uintp(PIECE_BYTES)
        for index, start in enumerate(range(0, length, PIECE_BYTES)):
            number, nbytes = self.first + index, min(PIECE_BYTES, length - start)
            slot = slots + number % _SLOTS * PIECE_BYTES
            reduced[-1] = copied[0] = slot
            self.loop(reduced, len(sources), nbytes, self.part.divisor)
            self.count(number + 1)
            self.loop(copied, 1, nbytes, 1)
            reduced += step
            copied += step
            self.written()


def _address(array: DeviceNDArray) -> int:
    return int(array.__array_interface__["data"][0])

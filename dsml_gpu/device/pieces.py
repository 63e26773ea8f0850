"""Passes in pieces that are done one behind the other, each of which others can go on from.

A piece is staged, counted, and then written: so at any time at most one is half written, and its result is in the staging. A
piece stays in the cache on its way, where all results of a large operation at once would go to memory and back. It takes
passes in which a piece reads nothing that another one writes, as in a collective in place. The smaller the pieces, the less
they cost, as long as no Python runs for each: compiled loops do that (`fast.Loop.in_pieces`). Where there are none, or a
fault is ordered between pieces, they are larger.

Whoever goes on for a rank that was given up must reckon with that one waking up at any time. It does not get far: before it
counts a piece, it sees that memory of others has moved (`Staging.is_present`). But the piece that it may have been about to
count, it can still count and write, to its own memory as well, where the one that goes on reads. So that piece is taken
from a copy, if it is not counted after the copy was made, and from the staging otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import numpy as np

from dsml_gpu.device.passes import Pass, piece_of
from dsml_gpu.errors import OperationAborted
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.memory.staging import HEADER_BYTES, Staging
from dsml_gpu.reduction import Reducer
from dsml_gpu.reduction.host import Compiled, compiled_of

#: Bytes of each range of a piece: by compiled loops, where all ranges of it should fit the fastest cache; and otherwise.
#: The maximum of four buffers of 64 MB in place, times the duration without pieces: 4 KiB 1.14, 8 KiB 1.12, 16 KiB 1.29,
#: 128 KiB 1.48; and 128 KiB with Python between them 1.58 (48 KiB of L1, 2 MiB of L2).
COMPILED_PIECE_BYTES = 8 << 10
PIECE_BYTES = 128 << 10
#: Pieces that are staged at a time: one is written, two more may be staged by a rank that wakes up.
_SLOTS = 4
#: Bytes of each range that one step does with a compiled loop: after each step a pass can be given up.
_STEP_BYTES = 4 << 20

Step = Pass | Callable[[], None]


def require_present(stagings: Sequence[Staging]) -> None:
    """Raises OperationAborted where the memory of one is not there any more."""
    if not all(staging.is_present for staging in stagings):
        raise _moved()


def _moved() -> OperationAborted:
    return OperationAborted("the memory of a rank has moved meanwhile; the operation was given up")


class Pieces:
    """One rank's part of a round.

    Args:
        reducer: of the device that does it.
        passes: in order.
        round_id, owner: the round, and the rank whose part it is.
        own: staging of the rank that does it.
        others: of all ranks whose memory it uses.
        reach: told of places that are reached (`failpoints`); None: nobody wants to know.
    """

    def __init__(
        self,
        reducer: Reducer,
        passes: Sequence[Pass],
        round_id: int,
        owner: int,
        own: Staging,
        others: Sequence[Staging],
        reach: Callable[[str], None] | None = None,
    ) -> None:
        self._passes = passes
        self._round_id = round_id
        self._owner = owner
        self._own = own
        self._others = others
        self._reach = reach or (lambda place: None)
        self._compiled = [None if reach is not None else compiled_pass(reducer, one) for one in passes]
        self._cut(COMPILED_PIECE_BYTES if all(self._compiled) else PIECE_BYTES)

    def _cut(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        #: Number of the first piece of each pass, and of all.
        self._firsts = [0, *accumulate(-(-one.sources[0].nbytes // piece_bytes) for one in self._passes)]

    def steps(self) -> list[Step]:
        """All of it."""
        return [self._begin_log, *self._from(0, "passes.commit")]

    def rest(self, logs: Sequence[Staging]) -> list[Step]:
        """What is left of it.

        Args:
            logs: of those that have done some of it, the last one first. They write nothing any more, but for what was said.
        """
        staging, log = next(
            ((one, log) for one in logs if (log := one.logged(self._round_id, self._owner)) is not None), (None, None)
        )
        if staging is None or log is None:
            # Who has not begun by now comes to nothing: it sees before its first piece that memory has moved.
            return [self._begin_log, *self._from(0, "passes.resume")]
        self._cut(log.piece_bytes)
        begun = log.begun
        steps: list[Step] = [self._begin_log]
        if begun:
            steps = self._again(begun - 1, self._staged(staging, begun - 1).copy())
        if begun < self._firsts[-1]:
            piece = self._piece(begun)
            copied = replace(piece, sources=tuple(one.copy() for one in piece.sources))
            if staging.logged(self._round_id, self._owner) != log:
                copied = replace(copied, sources=(self._staged(staging, begun).copy(),), weights=(), divisor=1)
            steps += self._do(begun, copied, "passes.resume")
            steps += self._from(begun + 1, "passes.resume")
        return steps

    def _begin_log(self) -> None:
        self._own.begin_log(self._round_id, self._owner, self._piece_bytes)

    def _place(self, number: int) -> tuple[int, slice]:
        """Which pass a piece is of, and what of each range."""
        index = bisect_right(self._firsts, number) - 1
        start = (number - self._firsts[index]) * self._piece_bytes
        return index, slice(start, min(start + self._piece_bytes, self._passes[index].sources[0].nbytes))

    def _piece(self, number: int) -> Pass:
        index, part = self._place(number)
        return piece_of(self._passes[index], part)

    def _from(self, first: int, written: str) -> list[Step]:
        """All pieces from one on."""
        steps: list[Step] = []
        while first < self._firsts[-1]:
            index, part = self._place(first)
            one, compiled = self._passes[index], self._compiled[index]
            if compiled is None:
                steps += self._do(first, self._piece(first), written)
                first += 1
                continue
            slots = self._own.view(HEADER_BYTES, _SLOTS * self._piece_bytes)
            step_bytes = max(_STEP_BYTES // self._piece_bytes, 1) * self._piece_bytes
            for start in range(part.start, one.sources[0].nbytes, step_bytes):
                some = piece_of(one, slice(start, start + step_bytes))
                steps.append(
                    CompiledPieces(compiled, some, slots, self._piece_bytes, self._own.log_address, first, self._others)
                )
                first += -(-some.sources[0].nbytes // self._piece_bytes)
        return steps

    def _again(self, number: int, result: DeviceNDArray) -> list[Step]:
        """A piece that was begun, and those before it are written."""
        piece = self._piece(number)
        copy = replace(piece, sources=(result,), weights=(), divisor=1)
        return [
            replace(copy, destinations=(self._staged(self._own, number),)),
            partial(self._own.begin_log, self._round_id, self._owner, self._piece_bytes, number + 1),
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
        _, part = self._place(number)
        return staging.view(HEADER_BYTES + number % _SLOTS * self._piece_bytes, part.stop - part.start)


def compiled_pass(reducer: Reducer, one: Pass) -> Compiled | None:
    """What `CompiledPieces` of a pass can use, if there is something."""
    return None if one.weights else compiled_of(reducer, one.operator, one.dtype, len(one.sources), one.divisor)


@dataclass(frozen=True, slots=True)
class CompiledPieces:
    """Several pieces by a compiled loop: so small pieces that they stay in the cache take longer in Python than at work.

    Attributes:
        compiled: the reduction.
        part: all of them.
        slots: where pieces are staged: room for one, or for several, which take turns.
        piece_bytes: of each range.
        counter: address of the word that gets the number of pieces, when one is staged and before it is written.
        begun: pieces before.
        others: must be present.
    """

    compiled: Compiled
    part: Pass
    slots: DeviceNDArray
    piece_bytes: int
    counter: int
    begun: int
    others: Sequence[Staging]

    @property
    def nbytes(self) -> int:
        """Bytes that are read and written."""
        return self.part.nbytes

    def __call__(self) -> None:
        part, nbytes = self.part, self.part.sources[0].nbytes
        begun = self.compiled.loop.in_pieces(
            self.compiled.addresses_of((*part.sources, *part.destinations)),
            len(part.sources),
            nbytes,
            part.divisor,
            self.compiled.addresses.of(self.slots),
            self.slots.nbytes // self.piece_bytes,
            self.piece_bytes,
            self.counter,
            self.begun,
            np.array([one.present_address for one in self.others], np.uintp),
        )
        if begun < self.begun + -(-nbytes // self.piece_bytes):
            raise _moved()

"""Passes that either happen as a whole or not at all, whoever fails meanwhile.

A pass whose result replaces what it, or another pass of the round, is made of cannot be done again once it has written
something. So such results first go to the staging of the rank that runs the passes (`memory.staging`), all of them, and
nothing is written. From there they go to their destinations, which can be done again at any time, and by anyone: a rank that
outlives the one that began goes on in its place. Passes without staging can be done again because what they read stays.

The point from which a round goes to its end, and before which nothing has happened, is that the staging of the rank that has
all the work (``RUN``) says that the results are there. It looks first whether the memory it has read is still where it was:
one that has slept may have read what is no longer there, and ends.

Several ranks share the work where nothing needs staging (``COMMIT``), or piece by piece (``PIECES``, `device.pieces`). Their
rounds always go to their end, as long as one rank is left.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from dsml_gpu import failpoints
from dsml_gpu.device.device import Device, Membership
from dsml_gpu.device.passes import Pass, run_passes
from dsml_gpu.device.pieces import CompiledPieces, Pieces, Step, compiled_pass, require_present
from dsml_gpu.device.requests import pass_of
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.memory.staging import Staging
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: A single pass over so many bytes is one call of compiled code; a larger one must be possible to give up in between.
_AT_ONCE_BYTES = 4 << 20
#: After so long without an operation the memory of what was staged goes back to the system.
_SPARE_S = 1.0


def has_begun(membership: Membership, request: pb.ExecuteRequest) -> bool:
    """Whether a rank that is to be gone on for has begun the request's round. Raises MemoryNotShared."""
    return any(membership.memory(rank).staging.has(request.round) for rank in request.resumedRanks)


class PassPhases:
    """What one device does of atomic rounds of passes. Everything happens in the server's event loop.

    Args:
        device: that runs them.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        #: One request at a time uses the staging: one that is cancelled first has to stop.
        self._turn = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._used = False

    async def run(self, membership: Membership, request: pb.ExecuteRequest) -> None:
        """Does a request's phase.

        Cancelled, it returns (with the cancellation) when the device has stopped writing.

        Raises:
            InvalidValue, CountNotMultiple, AddressOutOfRange, MemoryNotShared: what does not fit; nothing was written.
            OperationAborted: memory that was read is not there any more; nothing was written.
            InternalError: from the device's memory.
        """
        async with self._turn:
            self._used = True
            reach = partial(
                failpoints.reach,
                rank=membership.rank,
                device=self._device.device_id,
                phase=pb.ExecuteRequest.Phase.Name(request.phase),
            )
            if request.phase in (pb.ExecuteRequest.PIECES, pb.ExecuteRequest.RESUME_PIECES):
                steps = _piece_steps(self._device, membership, request, reach)
            else:
                steps = _steps(self._device, membership, request, reach)
            await run_passes(self._device, steps)
            reach("passes.committed")

    def settle(self, round_id: int) -> None:
        """What was staged for a round is not needed any more, by anyone."""
        memory = self._device.arena
        if memory.has_staging and memory.staging.settle(round_id) and self._timer is None:
            self._wait()

    def _wait(self) -> None:
        self._used = False
        self._timer = asyncio.get_running_loop().call_later(_SPARE_S, self._look)

    def _look(self) -> None:
        if self._used:
            self._wait()
        else:
            self._timer = None
            self._device.arena.memory.give_back_staging()


def _steps(device: Device, membership: Membership, request: pb.ExecuteRequest, reach: Callable[[str], None]) -> list[Step]:
    """Of RUN, COMMIT and RESUME."""
    passes = [pass_of(one, membership) for one in request.passes]
    places = [
        membership.memory(wire.staged.rank).staging.view(wire.staged.addr, wire.count) if wire.HasField("staged") else None
        for wire in request.passes
    ]
    steps: list[Step] = []
    if request.phase == pb.ExecuteRequest.RUN:
        own = membership.memory(membership.rank).staging
        if len(passes) == 1 and (at_once := _at_once(device, passes[0], places[0], own, membership)) is not None:
            return [partial(own.begin, request.round), at_once]
        steps += [
            partial(own.begin, request.round),
            *_staging_steps(request.passes, passes, places),
            partial(require_present, _stagings(membership)),
            own.complete,
            partial(reach, "passes.staged"),
        ]
    written = partial(reach, "passes.resume" if request.resumedRanks else "passes.commit")
    for one, place in zip(passes, places, strict=True):
        steps += [one if place is None else Pass(one.dtype, one.operator, (place,), one.destinations), written]
    return steps


def _at_once(
    device: Device, one: Pass, place: DeviceNDArray | None, own: Staging, membership: Membership
) -> CompiledPieces | None:
    """A single pass that is staged, all of it as one piece: most small operations are. None: it cannot be done so."""
    compiled = compiled_pass(device.reducer, one)
    if place is None or compiled is None or one.nbytes > _AT_ONCE_BYTES or failpoints.are_ordered():
        return None
    return CompiledPieces(compiled, one, place, place.nbytes, own.complete_address, 0, _stagings(membership))


def _piece_steps(
    device: Device, membership: Membership, request: pb.ExecuteRequest, reach: Callable[[str], None]
) -> list[Step]:
    passes = [pass_of(one, membership) for one in request.passes]
    own = membership.memory(membership.rank).staging
    owner = request.resumedRanks[0] if request.resumedRanks else membership.rank
    listener = reach if failpoints.are_ordered() else None
    pieces = Pieces(device.reducer, passes, request.round, owner, own, _stagings(membership), listener)
    if request.phase == pb.ExecuteRequest.PIECES:
        return pieces.steps()
    return pieces.rest([membership.memory(rank).staging for rank in reversed(request.resumedRanks)])


def _stagings(membership: Membership) -> list[Staging]:
    return [memory.staging for memory in membership.memories if memory is not None and memory.has_staging]


class _Written:
    """What passes of a round will have written to the memory of one rank, and where it is staged."""

    def __init__(self) -> None:
        # In order, without overlaps.
        self._starts: list[int] = []
        self._results: list[DeviceNDArray] = []

    def _overlapping(self, start: int, stop: int) -> range:
        first = bisect_right(self._starts, start)
        if first and self._starts[first - 1] + self._results[first - 1].nbytes > start:
            first -= 1
        return range(first, bisect_left(self._starts, stop))

    def add(self, start: int, result: DeviceNDArray) -> None:
        """One more result, which takes the place of earlier ones."""
        stop = start + result.nbytes
        old = self._overlapping(start, stop)
        starts, results = [start], [result]
        if old:
            first, last = old[0], old[-1]
            if self._starts[first] < start:
                starts.insert(0, self._starts[first])
                results.insert(0, self._results[first][: start - self._starts[first]])
            if self._starts[last] + self._results[last].nbytes > stop:
                starts.append(stop)
                results.append(self._results[last][stop - self._starts[last] :])
        self._starts[old.start : old.stop] = starts
        self._results[old.start : old.stop] = results

    def parts(self, start: int, stop: int) -> list[tuple[int, DeviceNDArray]]:
        """The results within ``[start, stop)``, each with its distance from `start`."""
        parts = []
        for index in self._overlapping(start, stop):
            own, result = self._starts[index], self._results[index]
            parts.append((max(own - start, 0), result[max(start - own, 0) : stop - own]))
        return parts


def _staging_steps(wire: Sequence[pb.Pass], passes: Sequence[Pass], places: Sequence[DeviceNDArray | None]) -> list[Step]:
    """Makes the results that are staged, each of what it would read if all before it were written."""
    steps: list[Step] = []
    written: defaultdict[int, _Written] = defaultdict(_Written)
    for message, one, place in zip(wire, passes, places, strict=True):
        if place is None:
            continue
        sources = list(one.sources)
        if steps:
            for index, location in enumerate(message.sources):
                parts = written[location.rank].parts(location.addr, location.addr + message.count)
                if len(parts) == 1 and parts[0][1].nbytes == message.count:
                    sources[index] = parts[0][1]
                elif parts:
                    # Some of it, and some of what is there.
                    whole = sources[index].copy()
                    steps += [
                        Pass(one.dtype, one.operator, (result,), (whole[at : at + result.nbytes],)) for at, result in parts
                    ]
                    sources[index] = whole
        steps.append(replace(one, sources=tuple(sources), destinations=(place,)))
        if len(passes) > 1:
            for location in message.destinations:
                written[location.rank].add(location.addr, place)
    return steps

"""What a device does of atomic rounds of passes, cut off anywhere and gone on with by another one, without servers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np
import pytest

from dsml_gpu.device import pass_phases, pieces
from dsml_gpu.device.device import Device, Membership, Peer
from dsml_gpu.device.pass_phases import PassPhases, has_begun
from dsml_gpu.device.passes import Pass, run_passes
from dsml_gpu.device.pieces import Pieces
from dsml_gpu.errors import AddressOutOfRange, MemoryNotShared, OperationAborted
from dsml_gpu.memory.arena import Arena, OpenedArena
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.memory.shared import SharedHandle, can_share, open_shared, open_staging
from dsml_gpu.memory.staging import HEADER_BYTES, Log, Staging
from dsml_gpu.reduction import DTYPES, OPERATORS
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import wait_until

pytestmark = pytest.mark.skipif(not can_share(), reason="only shared memory has a staging")

MIB = 1 << 20
NRANKS = 3
SUM = next(operator for operator in OPERATORS if operator.name == "SUM")
U64 = DTYPES["UINT64"]
ROUND = 77


@dataclass
class Ranks:
    """Devices of one process, each with a part of its memory that the passes are over."""

    nbytes: int = 4 * MIB
    devices: list[Device] = field(init=False)

    def __post_init__(self) -> None:
        self.devices = [Device(rank + 1, Arena(self.nbytes, NUMPY)) for rank in range(NRANKS)]

    def membership(self, rank: int) -> Membership:
        peers = tuple(Peer(other, other + 1, "", True) for other in range(NRANKS))
        return Membership(1, rank, peers, tuple(device.arena for device in self.devices), 1)

    def run(self, rank: int, phase: pb.ExecuteRequest.Phase, passes: list[pb.Pass], resumed: tuple[int, ...] = ()) -> None:
        request = pb.ExecuteRequest(commId=1, round=ROUND, phase=phase, passes=passes, resumedRanks=resumed)
        asyncio.run(PassPhases(self.devices[rank]).run(self.membership(rank), request))

    def memory(self, rank: int, addr: int, elements: int) -> np.ndarray:
        return np.asarray(self.devices[rank].arena.view(addr, 8 * elements)).view(np.uint64)

    def staging(self, rank: int) -> Staging:
        return self.devices[rank].arena.staging


def wire(sources: list[tuple[int, int]], destinations: list[tuple[int, int]], elements: int, staged: int) -> pb.Pass:
    return pb.Pass(
        dtype="UINT64",
        count=8 * elements,
        sources=[pb.RankAddress(rank=rank, addr=addr) for rank, addr in sources],
        destinations=[pb.RankAddress(rank=rank, addr=addr) for rank, addr in destinations],
        staged=pb.RankAddress(rank=0, addr=HEADER_BYTES + staged),
    )


def test_passes_that_depend_on_each_other_are_staged_as_if_they_had_run() -> None:
    """Whole, a part, and parts of several; and done again by another rank they come to the same."""
    generator = np.random.default_rng(5)
    passes = [
        wire([(0, 0), (1, 0)], [(0, 0), (1, 0)], 64, 0),
        wire([(0, 0), (2, 0)], [(2, 0)], 64, 512),  # the whole result
        wire([(0, 256), (1, 512)], [(2, 1024)], 32, 1024),  # the second half of it
        wire([(0, 256), (2, 512)], [(0, 256)], 64, 1280),  # half of it, and what is behind
        wire([(0, 128), (1, 0)], [(1, 0)], 64, 1792),  # of two results
    ]
    expected, ranks = Ranks(), Ranks()
    for rank in range(NRANKS):
        expected.memory(rank, 0, 1000)[:] = generator.integers(0, 1 << 40, 1000)
        ranks.memory(rank, 0, 1000)[:] = expected.memory(rank, 0, 1000)
    for one in passes:
        n = one.count // 8
        result = sum(expected.memory(place.rank, place.addr, n).copy() for place in one.sources)
        for place in one.destinations:
            expected.memory(place.rank, place.addr, n)[:] = result
    ranks.run(0, pb.ExecuteRequest.RUN, passes)
    for rank in range(NRANKS):
        np.testing.assert_array_equal(ranks.memory(rank, 0, 1000), expected.memory(rank, 0, 1000))
        ranks.memory(rank, 0, 16)[:] = 0
    request = pb.ExecuteRequest(round=ROUND, resumedRanks=[0])
    assert has_begun(ranks.membership(2), request)
    ranks.run(2, pb.ExecuteRequest.RESUME, passes, (0,))
    np.testing.assert_array_equal(ranks.memory(1, 0, 16), expected.memory(1, 0, 16))
    assert not has_begun(ranks.membership(2), pb.ExecuteRequest(round=ROUND + 1, resumedRanks=[0, 1, 2]))


def test_a_single_pass_by_compiled_code_can_be_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it can where it is several steps; which are not taken here."""
    monkeypatch.setattr(pass_phases, "_staging_steps", None)
    ranks = Ranks()
    for rank in range(NRANKS):
        ranks.devices[rank].reducer.prepare(SUM, U64, NRANKS)
        ranks.memory(rank, 0, 64)[:] = np.arange(64) * 10**rank
    passes = [wire([(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (2, 512)], 64, 0)]
    ranks.run(0, pb.ExecuteRequest.RUN, passes)
    places = ((0, 0), (1, 0), (2, 512))
    for rank, addr in places:
        np.testing.assert_array_equal(ranks.memory(rank, addr, 64), np.arange(64) * 111)
        ranks.memory(rank, addr, 32)[:] = 0
    assert has_begun(ranks.membership(2), pb.ExecuteRequest(round=ROUND, resumedRanks=[0]))
    ranks.run(2, pb.ExecuteRequest.RESUME, passes, (0,))
    for rank, addr in places:
        np.testing.assert_array_equal(ranks.memory(rank, addr, 64), np.arange(64) * 111)


@pytest.mark.parametrize("compiled", [True, False])
def test_who_has_slept_while_memory_moved_begins_nothing(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    ranks = Ranks()
    if compiled:
        ranks.devices[0].reducer.prepare(SUM, U64, 2)
    else:
        monkeypatch.setattr(pieces, "compiled_of", lambda *arguments: None)
    ranks.memory(0, 0, 64)[:] = 1
    ranks.memory(1, 0, 64)[:] = 2
    ranks.staging(1).is_present = False
    with pytest.raises(OperationAborted, match="has moved"):
        ranks.run(0, pb.ExecuteRequest.RUN, [wire([(0, 0), (1, 0)], [(0, 0)], 64, 0)])
    with pytest.raises(OperationAborted, match="has moved"):
        ranks.run(0, pb.ExecuteRequest.PIECES, [wire([(0, 0), (1, 0)], [(0, 0)], 64, 0)])
    assert (ranks.memory(0, 0, 64) == 1).all()
    log = ranks.staging(0).logged(ROUND, 0)
    assert log is not None
    assert log.begun == 0
    assert not has_begun(ranks.membership(1), pb.ExecuteRequest(round=ROUND, resumedRanks=[0]))


class Death(Exception):
    """The rank is no more."""


def dies_after(steps: int) -> Callable[[str], None]:
    left = [steps]

    def reach(place: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Death(place)

    return reach


@pytest.mark.parametrize("deaths", [(0,), (1,), (2,), (7,), (3, 0), (3, 1), (4, 2, 1), (0, 0, 0)], ids=str)
def test_pieces_go_on_wherever_those_before_have_died(monkeypatch: pytest.MonkeyPatch, deaths: tuple[int, ...]) -> None:
    """A place is reached when a piece is counted, and when it is written. The last one goes on by a compiled loop."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 512)
    ranks = Ranks()
    elements = 64 * 5 + 7
    for rank in range(NRANKS):
        ranks.memory(rank, 0, elements)[:] = np.arange(elements) * 10**rank
    ranks.devices[0].reducer.prepare(SUM, U64, NRANKS)
    everywhere = tuple(ranks.devices[rank].arena.view(0, 8 * elements) for rank in range(NRANKS))
    passes = [Pass(U64, SUM, everywhere, everywhere)]
    for number, steps in enumerate((*deaths, 1000)):
        own = ranks.staging(number % NRANKS)
        reach = dies_after(steps) if steps < 1000 else None
        part = Pieces(ranks.devices[0].reducer, passes, ROUND, 0, own, [own], reach)
        # The one that goes on is never one of those before.
        logs = [ranks.staging(other) for other in reversed(range(max(number - NRANKS + 1, 0), number))]
        work = part.rest(logs) if number else part.steps()
        if steps < 1000:
            with pytest.raises(Death):
                asyncio.run(run_passes(ranks.devices[0], work))
        else:
            asyncio.run(run_passes(ranks.devices[0], work))
    for rank in range(NRANKS):
        np.testing.assert_array_equal(ranks.memory(rank, 0, elements), np.arange(elements) * 111)


def test_a_piece_that_a_waking_rank_still_counts_is_taken_from_its_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 512)
    ranks = Ranks()
    elements = 64 * 4
    for rank in range(2):
        ranks.memory(rank, 0, elements)[:] = 1 + rank
    both = tuple(ranks.devices[rank].arena.view(0, 8 * elements) for rank in range(2))
    passes = [Pass(U64, SUM, both, both)]
    owner, heir = ranks.staging(0), ranks.staging(2)
    reducer = ranks.devices[0].reducer
    part = Pieces(reducer, passes, ROUND, 0, owner, [owner], dies_after(2))
    with pytest.raises(Death):  # the second piece is counted, and not written
        asyncio.run(run_passes(ranks.devices[0], part.steps()))

    class Waking:
        """Its staging: right after the first look the third piece is counted, and half of it is in its own memory."""

        def __init__(self) -> None:
            self.looks = 0

        def logged(self, round_id: int, of: int) -> Log | None:
            self.looks += 1
            begun = owner.logged(round_id, of)
            if self.looks == 1:
                owner.view(HEADER_BYTES + 2 * 512, 512).view(np.uint64)[:] = 3
                owner.log(3)
                ranks.memory(0, 2 * 512, 32)[:] = 3
            return begun

        def view(self, offset: int, nbytes: int) -> np.ndarray:
            return np.asarray(owner.view(offset, nbytes))

    part = Pieces(reducer, passes, ROUND, 0, heir, [heir])
    asyncio.run(run_passes(ranks.devices[2], part.rest([Waking()])))  # type: ignore[list-item]
    for rank in range(2):
        assert (ranks.memory(rank, 0, elements) == 3).all()


def all_pieces_of(handles: list[SharedHandle], ready: Connection) -> None:
    """Does the part of rank 0, in a process that is killed meanwhile, by one that is to be in time."""
    os.nice(19)
    opened = [open_shared(handle)[:-8] for handle in handles]
    own = Staging(open_staging(handles[0]))
    device = Device(1, Arena(4 * MIB, NUMPY))
    device.reducer.prepare(SUM, U64, NRANKS)
    ready.send("ready")
    steps = Pieces(device.reducer, [Pass(U64, SUM, tuple(opened), tuple(opened))], ROUND, 0, own, [own]).steps()
    asyncio.run(run_passes(device, steps))


@pytest.mark.parametrize("part", [0, 0.3, 0.6])
def test_pieces_of_a_killed_process_are_gone_on_with(part: float) -> None:
    """By compiled loops on both sides, and killed wherever it happens to be."""
    nbytes = 64 * MIB
    ranks = Ranks(nbytes)
    elements = nbytes // 8 - 1
    expected = np.arange(elements, dtype=np.uint64) * np.uint64(111)
    for rank in range(NRANKS):
        ranks.memory(rank, 0, elements)[:] = np.arange(elements, dtype=np.uint64) * np.uint64(10**rank)
    handles = [device.arena.share() for device in ranks.devices]
    owner = ranks.staging(0)
    total = -(-8 * elements // pieces.COMPILED_PIECE_BYTES)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=all_pieces_of, args=(handles, there), daemon=True)
    process.start()
    assert here.poll(60)
    assert here.recv() == "ready"
    log = None
    while log is None or log.begun <= part * total:
        log = owner.logged(ROUND, 0)
    process.kill()
    process.join(20)
    log = owner.logged(ROUND, 0)
    assert log is not None
    assert 0 < log.begun < total, "it was not killed in the middle"
    everywhere = tuple(ranks.devices[rank].arena.view(0, 8 * elements) for rank in range(NRANKS))
    reducer = ranks.devices[2].reducer
    reducer.prepare(SUM, U64, NRANKS)
    heir = ranks.staging(2)
    rest = Pieces(reducer, [Pass(U64, SUM, everywhere, everywhere)], ROUND, 0, heir, [heir]).rest([owner])
    asyncio.run(run_passes(ranks.devices[2], rest))
    for rank in range(NRANKS):
        np.testing.assert_array_equal(ranks.memory(rank, 0, elements), expected)


def test_what_was_staged_is_given_back_when_it_is_settled_and_nothing_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsml_gpu.device.pass_phases._SPARE_S", 0.01)

    async def settle() -> None:
        ranks = Ranks()
        staging, phases = ranks.staging(0), PassPhases(ranks.devices[0])
        staging.begin(ROUND)
        staging.view(HEADER_BYTES, 8)[:] = 1
        staging.complete()
        phases.settle(ROUND + 1)
        assert staging.has(ROUND)
        phases.settle(ROUND)
        assert not staging.has(ROUND)
        await asyncio.to_thread(wait_until, lambda: not staging.view(HEADER_BYTES, 8).any(), "the memory to be given back")
        assert staging.is_present

    asyncio.run(asyncio.wait_for(settle(), 20))


def test_a_staging_knows_its_bounds_and_where_it_is() -> None:
    arena = Arena(4 * MIB, NUMPY)
    staging = arena.staging
    for offset, nbytes in ((0, 8), (HEADER_BYTES - 1, 8), (staging.nbytes - 7, 8)):
        with pytest.raises(AddressOutOfRange, match="outside of the staging"):
            staging.view(offset, nbytes)
    theirs = arena.memory.open_staging(arena.share())
    staging.view(HEADER_BYTES, 8)[:] = 9
    assert theirs.is_present
    arena.move()
    assert not theirs.is_present
    assert staging.is_present
    assert (staging.view(HEADER_BYTES, 8) == 9).all(), "it moves as well"
    with pytest.raises(MemoryNotShared, match="no staging"):
        OpenedArena(np.zeros(8, np.uint8), 0).staging  # noqa: B018

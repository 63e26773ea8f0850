"""Collectives as passes over memory: what they compute, who does which part, and what may run side by side."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence

import numpy as np
import pytest

from dsml_gpu.coordinator import passes
from dsml_gpu.coordinator.call import CollectiveCall, call_of
from dsml_gpu.coordinator.passes import (
    BYTES_PER_WORKER,
    Pass,
    Team,
    bytes_of,
    has_passes,
    independent,
    may_open_memory,
    passes_of,
    rounds_of,
    shares,
)
from dsml_gpu.reduction import DTYPES, dtype_of
from dsml_gpu.schedules import COLLECTIVES
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.oracle import OPS, REDUCING, ROOTED, Case, Memory, layout, reduced

MIB = 1 << 20
MOVING = sorted({*COLLECTIVES} - {"barrier"})


# ---- an interpreter --------------------------------------------------------------------------------------------------


def run(one: Pass | pb.Pass, memories: Sequence[np.ndarray]) -> None:
    """Runs a pass over the ranks' memories by exact arithmetic."""
    dtype = dtype_of(one.dtype)
    if isinstance(one, Pass):
        one = one.to_wire()
    sources = [memories[place.rank][place.addr : place.addr + one.count].copy().view(dtype) for place in one.sources]
    result = reduced(sources, pb.ReduceOp.Name(one.op), one.weights) if len(sources) > 1 or one.weights else sources[0]
    for place in one.destinations:
        target = memories[place.rank][place.addr : place.addr + one.count]
        assert target.nbytes == one.count, "a pass leaves the memory"
        target[...] = result.view(np.uint8)


def random_case(collective: str, generator: random.Random) -> Case:
    nranks = generator.randrange(1, 10)
    in_place = generator.random() < 0.5
    pairs: tuple[tuple[int, int], ...] = ()
    if collective in ("all_reduce", "reduce", "broadcast"):
        nblocks = 1
    elif collective == "all_to_all":
        nblocks = nranks**2
    elif collective == "send_recv":
        nblocks = generator.randrange(1, 12)
        pairs = tuple((generator.randrange(nranks), generator.randrange(nranks)) for _ in range(nblocks))
    else:
        nblocks = nranks
    counts = tuple(generator.choice([0, 1, 2, 63, 64, 65, generator.randrange(400)]) for _ in range(nblocks))
    if collective == "all_to_all" and in_place:  # is no pass
        in_place = False
    if in_place and collective == "broadcast" and nranks == 1:
        in_place = False
    op = generator.choice(OPS) if collective in REDUCING else "SUM"
    weights: tuple[float, ...] = ()
    if collective in REDUCING and op == "SUM" and generator.random() < 0.5:
        weights = tuple(generator.choice([1.0, 2.0, 3.0]) for _ in range(nranks))
    return Case(
        collective,
        "",
        nranks,
        counts,
        DTYPES[generator.choice([*DTYPES])],
        op,
        generator.randrange(nranks) if collective in ROOTED else 0,
        in_place,
        pairs,
        weights,
    )


def shuffled(work: Iterable[Sequence[pb.Pass]], generator: random.Random) -> list[pb.Pass]:
    """All passes in some order in which each list's own stay in theirs."""
    queues = [list(share) for share in work if share]
    order = []
    while queues:
        queue = generator.choice(queues)
        order.append(queue.pop(0))
        queues = [rest for rest in queues if rest]
    return order


@pytest.mark.parametrize("collective", MOVING)
def test_passes_give_what_the_collective_is_specified_to_give(collective: str) -> None:
    """Whoever does which part, and in whatever order the parts are done."""
    generator = random.Random(collective)
    for _ in range(150):
        case = random_case(collective, generator)
        memories = [Memory() for _ in range(case.nranks)]
        call = call_of(layout(case, memories), case.nranks)
        assert has_passes(call)
        parts = [part for share in shares(passes_of(call), generator.randrange(1, 10)) for part in share]
        generator.shuffle(parts)
        actual = [np.frombuffer(bytes(memory.before), np.uint8).copy() for memory in memories]
        for part in parts:
            run(part, actual)
        for rank, (memory, now) in enumerate(zip(memories, actual, strict=True)):
            wrong = np.flatnonzero(now != np.frombuffer(bytes(memory.after), np.uint8))
            assert not wrong.size, f"{case}: byte {wrong[0]} of rank {rank}"


def test_every_input_is_read_and_every_output_written_once() -> None:
    counts = {  # blocks of 8 elements on 4 ranks: read and written
        "all_reduce": 4 + 4,
        "reduce": 4 + 1,
        "broadcast": 1 + 4,
        "reduce_scatter": 16 + 4,
        "all_gather": 4 + 16,
        "gather": 4 + 4,
        "scatter": 4 + 4,
        "all_to_all": 16 + 16,
    }
    for collective, blocks in counts.items():
        nblocks = 1 if collective in ("all_reduce", "reduce", "broadcast") else 16 if collective == "all_to_all" else 4
        case = Case(collective, "", 4, (8,) * nblocks, DTYPES["FLOAT64"])
        call = call_of(layout(case, [Memory() for _ in range(4)]), 4)
        assert bytes_of(call) == blocks * 64, collective


def test_a_copy_to_itself_is_no_pass_but_a_weight_is() -> None:
    def passes_in_place(nranks: int, **fields: object) -> list[Pass]:
        buffers = [pb.RankBuffers(sendAddr=64, recvAddr=64) for _ in range(nranks)]
        request = pb.CollectiveRequest(kind="ALL_REDUCE", counts=[80], buffers=buffers, **fields)  # type: ignore[arg-type]
        return passes_of(call_of(request, nranks))

    assert passes_in_place(1) == []
    assert passes_in_place(1, op=pb.AVG) == []
    assert [one.weights for one in passes_in_place(1, weights=[2.0])] == [(2.0,)]
    assert len(passes_in_place(2)) == 1
    # Of an all-gather in place each block goes to all ranks but its own.
    buffers = [pb.RankBuffers(sendAddr=80 * rank, recvAddr=0) for rank in range(3)]
    call = call_of(pb.CollectiveRequest(kind="ALL_GATHER", counts=[80], buffers=buffers), 3)
    assert [{rank for rank, _ in one.destinations} for one in passes_of(call)] == [{1, 2}, {0, 2}, {0, 1}]


def test_what_cannot_be_passes() -> None:
    assert not has_passes(call_of(pb.CollectiveRequest(kind="BARRIER"), 3))
    buffers = [pb.RankBuffers(sendAddr=0, recvAddr=0)] * 2
    in_place = pb.CollectiveRequest(kind="ALL_TO_ALL", counts=[8] * 4, buffers=buffers)
    assert not has_passes(call_of(in_place, 2))
    own = pb.Schedule(algorithm="mine", parts=1)
    request = pb.CollectiveRequest(kind="ALL_REDUCE", counts=[8], buffers=buffers, schedule=own)
    assert not has_passes(call_of(request, 2))


# ---- shares ----------------------------------------------------------------------------------------------------------


def random_passes(generator: random.Random) -> list[Pass]:
    dtypes = [index for index, dtype in enumerate(DTYPES.values())]
    some = []
    for number in range(generator.randrange(1, 8)):
        dtype = generator.choice(dtypes)
        count = dtype_of(dtype).itemsize * generator.choice([1, 5, 63, 1000, generator.randrange(1, 100_000)])
        sources, destinations = (tuple((rank, number << 32) for rank in range(generator.randrange(1, 6))) for _ in range(2))
        some.append(Pass(dtype, pb.SUM, count, sources, destinations))
    return some


def test_shares_cover_each_byte_once_and_are_of_about_one_size() -> None:
    generator = random.Random(3)
    for _ in range(300):
        whole, nworkers = random_passes(generator), generator.randrange(1, 10)
        lists = shares(whole, nworkers)
        assert len(lists) == nworkers
        parts = [part for share in lists for part in share]
        for number, one in enumerate(whole):
            done = 0
            for part in [part for part in parts if part.sources[0][1] >> 32 == number]:
                assert part == one.part(done, done + part.count), "its parts follow each other, worker by worker"
                assert done % 64 == 0, "two workers write to one cache line"
                assert part.count > 0
                assert part.count % dtype_of(one.dtype).itemsize == 0
                done += part.count
            assert done == one.count
        for share in lists:
            order = [part.sources[0][1] for part in share]
            assert order == sorted(order)
        total = sum(one.nbytes for one in whole)
        # Cut at whole cache lines of all operands: of one pass at either end of a share.
        line = 64 * max(len(one.sources) + len(one.destinations) for one in whole)
        for share in lists:
            assert abs(sum(part.nbytes for part in share) - total / nworkers) <= 2 * line


def test_a_large_pass_is_cut_in_equal_parts() -> None:
    whole = Pass(0, pb.SUM, 40 * MIB, ((0, 0), (1, 0)), ((0, 0), (1, 0)))
    assert [[(part.sources[0], part.count) for part in share] for share in shares([whole], 4)] == [
        [((0, number * 10 * MIB), 10 * MIB)] for number in range(4)
    ]
    assert shares([whole], 1) == [[whole]]
    assert shares([], 3) == [[], [], []]


# ---- who works -------------------------------------------------------------------------------------------------------


def test_on_the_host_as_many_work_as_help() -> None:
    team = Team(nranks=6, cores=4)
    assert team.workers(0) == [0]
    assert team.workers(2 * BYTES_PER_WORKER - 1) == [0]
    assert team.workers(2 * BYTES_PER_WORKER) == [0, 1]
    assert team.workers(3 * BYTES_PER_WORKER) == [0, 1, 2]
    assert team.workers(1 << 40) == [0, 1, 2, 3], "not more than there are cores"
    assert Team(nranks=2, cores=64).workers(1 << 40) == [0, 1]
    assert Team(nranks=3, cores=0).workers(1 << 40) == [0, 1, 2], "of a host that does not tell its cores all ranks"
    assert Team(nranks=1, cores=1).workers(1 << 40) == [0]


def metadata(process: str, gpu: int = 0, backend: str = "numpy", host: str = "here", **fields: int) -> pb.DeviceMetadata:
    return pb.DeviceMetadata(processUid=process, gpu=gpu, backend=backend, host=host, **fields)  # type: ignore[arg-type]


def test_one_rank_works_for_each_gpu() -> None:
    ranks = [("a", 0), ("a", 0), ("b", 1), ("c", 0), ("b", 1)]
    team = Team.of([metadata(process, gpu, "cupy") for process, gpu in ranks])
    # Which GPU two processes mean by one number is not known: each works on its own.
    assert team.workers(8) == team.workers(1 << 40) == [0, 2, 3]
    on_host = Team.of([metadata(process, gpu, cores=2) for process, gpu in ranks])
    assert on_host == Team(5, 2)


def test_who_can_be_asked_to_open_memory() -> None:
    one, other = metadata("a"), metadata("b")
    assert may_open_memory([one])
    assert may_open_memory([one, other, metadata("a")])
    assert may_open_memory([one, other], pb.P2P)
    assert not may_open_memory([one, other], pb.GRPC)
    assert not may_open_memory([one, metadata("b", host="there")])
    assert not may_open_memory([one, metadata("b", backend="cupy")])


@pytest.mark.parametrize("slow", [metadata("b", linkLatencyNs=1), metadata("b", linkBytesPerS=1)])
def test_emulated_links_are_used_unless_p2p_is_forced(slow: pb.DeviceMetadata) -> None:
    for devices in ([metadata("a"), slow], [slow, metadata("a")]):
        assert not may_open_memory(devices)
        assert may_open_memory(devices, pb.P2P)


def test_two_gpus_of_one_process_do_not_open_memory() -> None:
    def gpus(*ranks: tuple[str, int]) -> list[pb.DeviceMetadata]:
        return [metadata(process, gpu, "cupy") for process, gpu in ranks]

    assert may_open_memory(gpus(("a", 0), ("b", 1)))
    assert may_open_memory(gpus(("a", 0), ("a", 0)))
    assert not may_open_memory(gpus(("a", 0), ("a", 1)))
    assert not may_open_memory(gpus(("a", 0), ("b", 0), ("b", 1)))


# ---- rounds ----------------------------------------------------------------------------------------------------------


def all_reduce(count: int, sends: Sequence[int], recvs: Sequence[int] = ()) -> CollectiveCall:
    """Of float64, in place where `recvs` is not given."""
    buffers = [pb.RankBuffers(sendAddr=send, recvAddr=recv) for send, recv in zip(sends, recvs or sends, strict=True)]
    return call_of(pb.CollectiveRequest(kind="ALL_REDUCE", counts=[count], buffers=buffers), len(buffers))


TEAM = Team(nranks=2, cores=2)


def test_small_calls_are_done_in_turn_by_one_rank_in_one_round() -> None:
    calls = tuple(all_reduce(8000, [0, 0]) for _ in range(20))
    (one_round,) = rounds_of(calls, TEAM)
    assert [*one_round.work] == [0]
    assert [one.count for one in one_round.work[0]] == [8000] * 20
    assert one_round.nbytes == 20 * 4 * 8000


def test_large_calls_that_depend_on_each_other_are_rounds_of_their_own() -> None:
    size = 16 * MIB
    calls = (
        all_reduce(size, [0, 0], [size, size]),
        all_reduce(size, [size, size], [2 * size, 2 * size]),  # reads what the first one writes
        all_reduce(size, [4 * size, 4 * size], [0, 5 * size]),  # writes what the first one reads, on one rank
        all_reduce(size, [6 * size, 6 * size]),  # touches nothing of theirs
    )
    rounds = rounds_of(calls, TEAM)
    # The third does not touch what the second one touches, and so on.
    assert [one_round.nbytes for one_round in rounds] == [4 * size, 3 * 4 * size]
    for one_round in rounds:
        assert [*one_round.work] == [0, 1]
    assert rounds_of((calls[0], calls[0], calls[0]), TEAM)[2].nbytes == 4 * size
    assert len(rounds_of((calls[0], calls[0], calls[0]), TEAM)) == 3


def test_many_calls_that_do_not_touch_each_other_are_one_round_of_all_workers() -> None:
    calls = tuple(all_reduce(MIB, [number * MIB, number * MIB]) for number in range(30))
    (one_round,) = rounds_of(calls, TEAM)
    assert [*one_round.work] == [0, 1]
    assert [sum(one.count for one in share) for share in one_round.work.values()] == [15 * MIB] * 2


def phase_and_staged(*calls: CollectiveCall) -> tuple[str, list[list[bool]]]:
    (one_round,) = rounds_of(calls, TEAM, 64 * MIB)
    staged = [[one.HasField("staged") for one in share] for share in one_round.work.values()]
    return pb.ExecuteRequest.Phase.Name(one_round.phase), staged


def test_what_is_staged_and_how_a_round_is_run_so_that_others_can_go_on() -> None:
    small, large = 8000, 16 * MIB
    assert phase_and_staged(all_reduce(small, [0, 0])) == ("RUN", [[True]])
    assert phase_and_staged(all_reduce(small, [0, 0], [small, small])) == ("RUN", [[False]])
    # The second reads what the first one writes, the third nothing of theirs.
    chain = (
        all_reduce(small, [0, 0], [small, small]),
        all_reduce(small, [small, small], [2 * small, 2 * small]),
        all_reduce(small, [3 * small, 3 * small], [4 * small, 4 * small]),
    )
    assert phase_and_staged(*chain) == ("RUN", [[True, True, False]])
    assert phase_and_staged(all_reduce(large, [0, 0], [large, large])) == ("COMMIT", [[False], [False]])
    assert phase_and_staged(all_reduce(large, [0, 0])) == ("PIECES", [[False], [False]])
    # What is written is read at another distance, or by another pass.
    across = [Pass(pb.FLOAT64, pb.SUM, 800, ((0, 0), (1, 0)), ((0, 8),))]
    after = [Pass(pb.FLOAT64, pb.SUM, 800, ((0, start), (1, start)), ((0, start + 800),)) for start in (0, 800)]
    for some in (across, after):
        marked, phase = passes.with_staging(some, small=False)
        assert (phase, [one.needs_staging for one in marked]) == (pb.ExecuteRequest.RUN, [True] * len(some))


def test_results_that_do_not_fit_in_a_staging_are_rounds_of_their_own() -> None:
    calls = [all_reduce(8000, [0, 0])] * 10
    runs = passes.runs_of(calls, 4096 + 3 * 8192)
    assert [len(run) for run in runs] == [3, 3, 3, 1]
    for run in runs:
        (one_round,) = rounds_of(tuple(run), TEAM, 4096 + 3 * 8192)
        places = [(one.staged.rank, one.staged.addr) for one in one_round.work[0]]
        assert places == [(0, 4096 + 8000 * number) for number in range(len(run))]


def test_a_call_in_which_nothing_moves_is_no_round() -> None:
    assert rounds_of((all_reduce(0, [0, 0]),), TEAM) == ()
    assert rounds_of((all_reduce(800, [0]),), Team(1, 2)) == ()


def names(runs: Sequence[Sequence[CollectiveCall]], calls: Sequence[CollectiveCall]) -> list[list[int]]:
    return [[calls.index(call) for call in run] for run in runs]


def test_calls_may_read_the_same_and_touch_at_their_ends() -> None:
    calls = [
        all_reduce(80, [0, 0], [80, 80]),
        all_reduce(80, [0, 0], [160, 240]),  # reads the same
        all_reduce(80, [240, 160], [320, 320]),  # of another rank's memory at the same address
        all_reduce(0, [80, 80]),  # no byte
    ]
    assert names(independent(calls), calls) == [[0, 1, 2, 3]]
    for conflicting in (
        all_reduce(80, [159, 1000], [2000, 2000]),  # reads the last byte of what is written
        all_reduce(80, [1000, 1000], [79, 2000]),  # writes the last byte of what is read
        all_reduce(8, [1000, 1000], [2000, 112]),  # writes into what is written
        all_reduce(400, [1000, 1000], [2000, 0]),  # writes all around
    ):
        assert names(independent([*calls, conflicting]), [*calls, conflicting]) == [[0, 1, 2, 3], [4]]


def test_a_group_has_the_result_of_its_calls_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rank is faster."""
    monkeypatch.setattr(passes, "BYTES_PER_WORKER", 200)
    generator = random.Random(4)
    several_rounds = shared_rounds = 0
    for _ in range(300):
        nranks, cores = generator.randrange(2, 5), generator.randrange(1, 5)
        calls = tuple(_random_call(nranks, generator) for _ in range(generator.randrange(1, 8)))
        start = [np.random.default_rng(generator.randrange(1 << 30)).integers(0, 3, 1024, np.uint8) for _ in range(nranks)]
        expected, actual = ([memory.copy() for memory in start] for _ in range(2))
        for call in calls:
            for one in passes_of(call):
                run(one, expected)
        rounds = rounds_of(calls, Team(nranks, cores))
        for one_round in rounds:
            for shipped in shuffled(one_round.work.values(), generator):
                run(shipped, actual)
        for rank in range(nranks):
            np.testing.assert_array_equal(actual[rank], expected[rank])
        several_rounds += len(rounds) > 1
        shared_rounds += any(len(one_round.work) > 1 for one_round in rounds)
    assert several_rounds > 50
    assert shared_rounds > 50


def _random_call(nranks: int, generator: random.Random) -> CollectiveCall:
    """Of bytes in the first KiB of each rank's memory."""
    count = generator.choice([8, 64, 100, 128])
    slots = [generator.sample(range(0, 1024, 128), 2) for _ in range(nranks)]
    kind = generator.choice(["ALL_REDUCE", "BROADCAST", "SEND_RECV"])
    if kind == "SEND_RECV":
        src, dst = generator.sample(range(nranks), 2)
        pair = pb.SendRecv(src=src, dst=dst, count=count, sendAddr=slots[src][0], recvAddr=slots[dst][1])
        return call_of(pb.CollectiveRequest(kind="SEND_RECV", dtype="UINT8", sendRecvs=[pair]), nranks)
    in_place = generator.random() < 0.5
    buffers = [pb.RankBuffers(sendAddr=send, recvAddr=send if in_place else recv) for send, recv in slots]
    return call_of(pb.CollectiveRequest(kind=kind, dtype="UINT8", counts=[count], buffers=buffers), nranks)


@pytest.mark.alone
def test_a_group_of_thousands_is_planned_while_others_wait() -> None:
    """The event loop of the coordinator stands still meanwhile."""
    calls = tuple(all_reduce(2048, [number * 4096] * 4) for number in range(4000))
    started = time.perf_counter()
    (one_round,) = rounds_of(calls, Team(4, 4))
    assert time.perf_counter() - started < 2.0
    assert sum(len(share) for share in one_round.work.values()) >= 4000

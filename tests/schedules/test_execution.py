"""What is proved also runs: programs, executed in any order that is allowed, end, and give what numpy gives."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dsml_gpu.schedules import (
    ALGORITHMS,
    COLLECTIVES,
    InvalidSchedule,
    Kind,
    Move,
    Roles,
    Schedule,
    Transfer,
    algorithms_of,
    chunk_bounds,
    programs_of,
)
from dsml_gpu.schedules.steps import Steps
from dsml_gpu.schedules.verify import _check_progress
from tests.schedules.execution import execute, problem
from tests.schedules.interpreter import interpret


@st.composite
def schedules(draw: st.DrawFn, max_nranks: int, min_nranks: int = 1) -> Schedule:
    """Any algorithm for any number of ranks, root, places of hosts (many or equally many on each), and pairs."""
    algorithm = draw(st.sampled_from(ALGORITHMS))
    nranks = draw(st.integers(min_nranks, max_nranks))
    rank = st.integers(0, nranks - 1)
    nhosts = draw(st.integers(1, nranks))
    even = st.permutations([number % nhosts for number in range(nranks)])
    any_hosts = st.lists(st.integers(0, nhosts), min_size=nranks, max_size=nranks)
    return algorithm.schedule(
        nranks,
        root=draw(rank),
        pairs=tuple(draw(st.lists(st.tuples(rank, rank), max_size=20))) if algorithm.collective == "send_recv" else (),
        hosts=tuple(draw(st.one_of(even, any_hosts))),
    )


def require_numpy_s_result(schedule: Schedule, seed: int, average: bool) -> None:
    """Executes the schedule's programs on blocks of uneven sizes, some of them empty."""

    def size(block: int) -> int:
        return (seed + 7 * block) % 23

    n, parts = schedule.nranks, schedule.parts
    inputs, outputs = problem(schedule.collective, schedule.roles, size, average)
    programs = programs_of(schedule)
    held: list[dict[int, np.ndarray]] = [
        {
            place * parts + part: blocks[block][slice(*chunk_bounds(blocks[block].size, parts, part))]
            for place, block in enumerate(program.blocks)
            if block in blocks
            for part in range(parts)
        }
        for program, blocks in zip(programs, inputs, strict=True)
    ]
    reduce: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.bitwise_or if schedule.collective == "barrier" else np.add

    def complete(total: np.ndarray) -> np.ndarray:
        return total // n if average else total

    assert execute([program.steps for program in programs], held, reduce, complete, Random(seed)), "it ends"
    for program, chunks, wanted in zip(programs, held, outputs, strict=True):
        assert set(wanted) <= set(program.blocks), "every block that a rank must get belongs to its program"
        for block, values in wanted.items():
            first = program.blocks.index(block) * parts
            actual = np.concatenate([chunks[first + part] for part in range(parts)])
            np.testing.assert_array_equal(actual, values, f"{schedule}, block {block}")


@settings(max_examples=200, deadline=None)
@given(schedules(max_nranks=10), st.integers(0, 10**6))
def test_programs_give_what_numpy_gives(schedule: Schedule, seed: int) -> None:
    require_numpy_s_result(schedule, seed, average=False)
    if COLLECTIVES[schedule.collective].reduces and schedule.collective != "barrier":
        require_numpy_s_result(schedule, seed, average=True)  # which each rank must divide once, or get divided


@settings(deadline=None)
@given(schedules(max_nranks=8))
def test_blocks_are_where_numpy_has_them(schedule: Schedule) -> None:
    """The specification of collectives says who holds and who gets which block; here numpy does."""
    collective, roles = COLLECTIVES[schedule.collective], schedule.roles
    inputs, outputs = problem(schedule.collective, roles, lambda block: 1, average=False)
    for who, blocks in ((collective.holders, inputs), (collective.takers, outputs)):
        wanted = {(rank, block) for block in range(schedule.nblocks) for rank in who(roles, block)}
        assert {(rank, block) for rank, of_rank in enumerate(blocks) for block in of_rank} == wanted


# ---- the proof is sound --------------------------------------------------------------------------------------------------


def mutated(steps: list[list[Transfer]], nranks: int, nchunks: int, random: Random) -> None:
    """Changes the steps somewhere; some changes do no harm."""
    number = random.randrange(len(steps))
    step = steps[number]
    index = random.randrange(len(step)) if step else 0
    change = random.choice(("drop", "repeat", "src", "dst", "chunk", "reduce", "order", "join", "split", "swap"))
    if change in ("drop", "repeat", "src", "dst", "chunk", "reduce") and step:
        old = step[index]
        step[index : index + 1] = {
            "drop": [],
            "repeat": [old, old],
            "src": [replace(old, src=random.randrange(nranks))],
            "dst": [replace(old, dst=random.randrange(nranks))],
            "chunk": [replace(old, chunk=random.randrange(nchunks))],
            "reduce": [replace(old, reduce=not old.reduce)],
        }[change]
    elif change == "order":
        random.shuffle(step)
    elif change == "split":
        steps[number : number + 1] = [step[:index], step[index:]]
    elif number + 1 < len(steps):
        if change == "join":
            steps[number : number + 2] = [step + steps[number + 1]]
        else:
            steps[number : number + 2] = [steps[number + 1], step]


@settings(max_examples=400, deadline=None)
@given(schedules(min_nranks=2, max_nranks=6), st.integers(1, 3), st.integers(0, 10**6))
def test_what_the_proof_lets_pass_is_right(schedule: Schedule, changes: int, seed: int) -> None:
    """Schedules with mistakes: whichever is not refused does not wait for ever, and gives the right result."""
    random = Random(seed)
    steps = [list(step) for step in schedule.steps]
    for _ in range(changes if steps else 0):
        mutated(steps, schedule.nranks, schedule.nchunks, random)
    try:
        changed = replace(schedule, algorithm="changed", steps=tuple(map(tuple, steps)))
    except InvalidSchedule:
        event("refused")
        return
    event("passed")
    require_numpy_s_result(changed, seed, average=False)


@pytest.mark.parametrize("hosts", [(0, 1, 0, 1, 1, 0), (0, 0, 1, 1, 1), (2, 0, 1)])
def test_every_omission_from_a_hierarchy_is_noticed(hosts: tuple[int, ...]) -> None:
    schedule = algorithms_of("all_reduce")["hierarchical"].schedule(len(hosts), hosts=hosts)
    for number, step in enumerate(schedule.steps):
        for index in range(len(step)):
            shorter = (*step[:index], *step[index + 1 :])
            with pytest.raises(InvalidSchedule):
                replace(schedule, steps=(*schedule.steps[:number], shorter, *schedule.steps[number + 1 :]))


def test_the_proof_does_not_say_that_all_ranks_add_up_alike() -> None:
    """Which is why it is tested. Of three ranks that all tell each other, two add 0 and 1 first, and rank 2 adds 2 and 0."""
    step = tuple(Transfer(src, dst, 0, reduce=True) for src, dst in permutations(range(3), 2))
    schedule = Schedule("all_reduce", "differently", 3, 1, (step,))
    trees: list[dict[int, Any]] = interpret(schedule, lambda rank, chunk: rank, lambda there, came: frozenset({there, came}))
    assert len({held[0] for held in trees}) == 2
    sums = interpret(schedule, lambda rank, chunk: (1e16, -1e16, 1.0)[rank], operator.add)
    assert len({held[0] for held in sums}) == 2


NCHUNKS = 2


def random_steps(nranks: int, random: Random) -> Steps:
    """One or two steps of transfers of chance, crowded enough that many of them deadlock."""

    def transfer() -> Transfer:
        src, dst = random.sample(range(nranks), 2)
        return Transfer(src, dst, random.randrange(NCHUNKS), random.random() < 0.7)

    return tuple(tuple(transfer() for _ in range(random.randint(1, 4 * nranks))) for _ in range(random.randint(1, 2)))


def moves_of(steps: Steps, nranks: int) -> list[list[list[Move]]]:
    """The moves of each rank, step by step, as they are listed."""
    moves: list[list[list[Move]]] = [[[] for _ in steps] for _ in range(nranks)]
    for number, step in enumerate(steps):
        for transfer in step:
            moves[transfer.src][number].append(Move(Kind.SEND, transfer.dst, transfer.chunk))
        for transfer in step:
            kind = Kind.REDUCE if transfer.reduce else Kind.COPY
            moves[transfer.dst][number].append(Move(kind, transfer.src, transfer.chunk))
    return moves


def combine(there: str, came: str) -> str:
    return f"({there}+{came})"


@pytest.mark.parametrize("nranks", [2, 3, 4])
def test_a_deadlock_is_found_if_and_only_if_it_is_one(nranks: int) -> None:
    """Whatever the steps compute. And if they end, every order of execution gives what their definition says."""
    random = Random(nranks)
    deadlocks, cases = 0, 700
    for _ in range(cases):
        steps = random_steps(nranks, random)
        schedule: Any = SimpleNamespace(  # it would not be proved: it computes nothing in particular
            collective="all_reduce",
            algorithm="any",
            steps=steps,
            nranks=nranks,
            parts=NCHUNKS,
            nchunks=NCHUNKS,
            roles=Roles(nranks),
        )
        held = [dict.fromkeys(range(NCHUNKS), f"{rank}") for rank in range(nranks)]
        ends = execute(moves_of(steps, nranks), held, combine, str, random)
        try:
            _check_progress(schedule)
        except InvalidSchedule:
            deadlocks += 1
            assert not ends, steps
            continue
        assert ends, steps
        assert held == interpret(schedule, lambda rank, chunk: f"{rank}", combine), steps
    assert 0.03 * cases < deadlocks < 0.9 * cases, "there were enough of both"


def test_a_deadlock_names_the_transfers_that_wait_for_each_other() -> None:
    crossed = (Transfer(0, 1, 0, True), Transfer(0, 1, 1, True), Transfer(1, 0, 1, True), Transfer(1, 0, 0, True))
    bystander = Transfer(2, 1, 2, True)
    with pytest.raises(InvalidSchedule, match="waits for itself, by way of") as error:
        _check_progress(SimpleNamespace(algorithm="any", steps=((bystander, *crossed),)))  # type: ignore[arg-type]
    assert str(bystander) not in str(error.value)
    assert sum(str(transfer) in str(error.value) for transfer in crossed) >= 2

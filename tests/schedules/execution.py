"""Executes programs as devices may: in any order that chunks and streams allow. And what numpy says must come out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Any, TypeVar

import numpy as np

from dsml_gpu.schedules import Kind, Move, Roles

Value = TypeVar("Value")
#: What each rank holds, by block.
Blocks = list[dict[int, np.ndarray]]


@dataclass(eq=False)
class _Message:
    """A chunk on its way through a stream. First it is taken from its source, then applied to its target."""

    src: int
    dst: int
    sent: int
    received: int = -1
    kind: Kind = Kind.COPY
    to_be_taken: list[_Message] = field(default_factory=list)  # when all these are applied
    to_be_applied: list[_Message] = field(default_factory=list)  # when all these are applied,
    overwrites_read_by: list[_Message] = field(default_factory=list)  # and all these are taken
    value: Any = None
    taken: bool = False
    applied: bool = False

    @property
    def ready(self) -> bool:
        if not self.taken:
            return all(other.applied for other in self.to_be_taken)
        waits = any(not other.applied for other in self.to_be_applied) or any(not m.taken for m in self.overwrites_read_by)
        return not self.applied and not waits


def execute(
    steps_of: Sequence[Sequence[Sequence[Move]]],
    held: Sequence[dict[int, Value]],
    reduce: Callable[[Value, Value], Value],
    complete: Callable[[Value], Value],
    random: Random,
) -> bool:
    """Executes the moves of all ranks on what they hold, in place, and in an order of chance.

    Args:
        steps_of: the steps of each rank.
        held: by rank and its own number of the chunk.
        reduce: (what was there, what came) -> what is there then.
        complete: applied to the result of a reduction that completes the chunk.

    Returns:
        Whether all has been executed; otherwise the ranks wait for each other for ever.
    """
    messages = _messages(steps_of)
    speeds = [random.random() + 0.05 for _ in held]
    while any(message.ready for message in messages):
        random.shuffle(messages)
        for message in messages:
            if random.random() > speeds[message.dst] or not message.ready:
                continue
            if not message.taken:
                message.value = held[message.src][message.sent]
                message.taken = True
                continue
            there, value = held[message.dst], message.value
            if message.kind is not Kind.COPY:
                value = reduce(there[message.received], value)
            there[message.received] = complete(value) if message.kind is Kind.REDUCE_LAST else value
            message.applied = True
    return all(message.applied for message in messages)


def _messages(steps_of: Sequence[Sequence[Sequence[Move]]]) -> list[_Message]:
    """All messages, each with what it waits for."""
    streams: dict[tuple[int, int], list[_Message]] = defaultdict(list)
    reads: dict[tuple[int, int], list[tuple[int, _Message]]] = defaultdict(list)  # by rank and chunk: (step, message)
    writes: dict[tuple[int, int], list[tuple[int, _Message]]] = defaultdict(list)
    for rank, steps in enumerate(steps_of):
        for number, step in enumerate(steps):
            for move in step:
                if move.kind is Kind.SEND:
                    message = _Message(rank, move.peer, move.chunk)
                    message.to_be_taken += streams[rank, move.peer][-1:]
                    streams[rank, move.peer].append(message)
                    reads[rank, move.chunk].append((number, message))
    arrived = dict.fromkeys(streams, 0)
    for rank, steps in enumerate(steps_of):
        for number, step in enumerate(steps):
            for move in step:
                if move.kind is not Kind.SEND:
                    message = streams[move.peer, rank][arrived[move.peer, rank]]
                    arrived[move.peer, rank] += 1
                    message.received, message.kind = move.chunk, move.kind
                    message.to_be_applied += [before for _, before in writes[rank, move.chunk]]
                    message.overwrites_read_by += [m for reads_in, m in reads[rank, move.chunk] if reads_in <= number]
                    writes[rank, move.chunk].append((number, message))
    for place, readers in reads.items():
        for number, message in readers:
            message.to_be_taken += [before for writes_in, before in writes[place] if writes_in < number]
    assert arrived == {stream: len(sent) for stream, sent in streams.items()}, "whatever is sent is received"
    return [message for sent in streams.values() for message in sent]


def problem(collective: str, roles: Roles, sizes: Callable[[int], int], average: bool) -> tuple[Blocks, Blocks]:
    """What each rank has, and what it must get, by numpy alone.

    Args:
        sizes: elements of each block.
        average: a sum is divided by the number of ranks, which it is a multiple of.
    """
    n, root = roles.nranks, roles.root
    generator = np.random.default_rng(sizes(0))

    def values(*shape: int) -> np.ndarray:
        return generator.integers(1, 1000, shape) * n

    def summed(rows: np.ndarray) -> np.ndarray:
        total: np.ndarray = rows.sum(axis=0)
        return total // n if average else total

    def only(rank: int, blocks: dict[int, np.ndarray]) -> Blocks:
        return [blocks if rank == other else {} for other in range(n)]

    each = [sizes(rank) for rank in range(n)]
    ends = list(accumulate(each))
    if collective in ("all_reduce", "reduce"):
        rows = values(n, sizes(0))
        result = {0: summed(rows)}
        return [{0: row} for row in rows], [result] * n if collective == "all_reduce" else only(root, result)
    if collective == "broadcast":
        data = {0: values(sizes(0))}
        return only(root, data), [data] * n
    if collective == "reduce_scatter":
        rows = values(n, sum(each))
        parts = [dict(enumerate(np.split(row, ends[:-1]))) for row in rows]
        return parts, [{rank: part} for rank, part in enumerate(np.split(summed(rows), ends[:-1]))]
    if collective in ("all_gather", "gather"):
        mine = [{rank: values(each[rank])} for rank in range(n)]
        whole = {rank: blocks[rank] for rank, blocks in enumerate(mine)}
        return mine, [whole] * n if collective == "all_gather" else only(root, whole)
    if collective == "scatter":
        parts = [{rank: values(each[rank])} for rank in range(n)]
        return only(root, {rank: part[rank] for rank, part in enumerate(parts)}), parts
    if collective == "all_to_all":
        matrix = [[values(sizes(src * n + dst)) for dst in range(n)] for src in range(n)]
        return (
            [{src * n + dst: block for dst, block in enumerate(row)} for src, row in enumerate(matrix)],
            [{src * n + dst: matrix[src][dst] for src in range(n)} for dst in range(n)],
        )
    if collective == "send_recv":
        inputs: Blocks = [{} for _ in range(n)]
        outputs: Blocks = [{} for _ in range(n)]
        for number, (src, dst) in enumerate(roles.pairs):
            inputs[src][number] = outputs[dst][number] = values(sizes(number))
        return inputs, outputs
    assert collective == "barrier"
    return [{0: np.array([1 << rank])} for rank in range(n)], [{0: np.array([(1 << n) - 1])}] * n

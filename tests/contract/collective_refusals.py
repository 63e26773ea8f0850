"""The rows of `test_refusals` about Collective and SetCostModel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsml_gpu.schedules import algorithms_of
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.contract.refusal_cases import NOBODY, TWO_64, Case, World, on_coordinator, ranges, size_of
from tests.support.rpc import MIB

NRANKS = 4
ROOT = 1
#: Where the buffers of `collective` are.
SEND, RECV = 0, MIB
END = 16 * MIB
KINDS = [name for name, number in pb.CollectiveRequest.Kind.items() if number]
ROOTED = ("REDUCE", "BROADCAST", "GATHER", "SCATTER")
REDUCING = ("ALL_REDUCE", "REDUCE", "REDUCE_SCATTER")

_EVERYBODY, _ROOT = tuple(range(NRANKS)), (ROOT,)


@dataclass(frozen=True)
class Needs:
    """What a collective of four ranks with root 1 needs.

    Attributes:
        nblocks: blocks.
        senders, receivers: ranks that need a sendAddr, and a recvAddr.
    """

    nblocks: int
    senders: tuple[int, ...]
    receivers: tuple[int, ...]

    def ranks(self, field: str) -> tuple[int, ...]:
        return self.senders if field == "sendAddr" else self.receivers


#: Of the collectives that have buffers.
NEEDS = {
    "ALL_REDUCE": Needs(1, _EVERYBODY, _EVERYBODY),
    "REDUCE": Needs(1, _EVERYBODY, _ROOT),
    "BROADCAST": Needs(1, _ROOT, _EVERYBODY),
    "REDUCE_SCATTER": Needs(NRANKS, _EVERYBODY, _EVERYBODY),
    "ALL_GATHER": Needs(NRANKS, _EVERYBODY, _EVERYBODY),
    "GATHER": Needs(NRANKS, _EVERYBODY, _ROOT),
    "SCATTER": Needs(NRANKS, _ROOT, _EVERYBODY),
    "ALL_TO_ALL": Needs(NRANKS**2, _EVERYBODY, _EVERYBODY),
}


def buffers(kind: str, at: Mapping[int, Mapping[str, int | None]] | None = None) -> list[pb.RankBuffers]:
    """The addresses that a collective needs, and no others: SEND and RECV on every rank.

    Args:
        at: by rank, what is different there; None for an address that is absent.
    """
    entries = []
    for rank in range(NRANKS):
        addrs: dict[str, int | None] = {
            field: addr for field, addr in (("sendAddr", SEND), ("recvAddr", RECV)) if rank in NEEDS[kind].ranks(field)
        }
        entries.append(pb.RankBuffers(**{**addrs, **(at or {}).get(rank, {})}))
    return entries


def in_place(kind: str, at: int, block: int) -> dict[int, dict[str, int]]:
    """Addresses of a collective in place, on the ranks where it can be: as `buffers` takes them.

    Args:
        at: address of the larger buffer.
        block: bytes of each block.
    """
    smaller = {"REDUCE_SCATTER": "recvAddr", "ALL_GATHER": "sendAddr", "GATHER": "sendAddr", "SCATTER": "recvAddr"}
    addrs = {rank: {"sendAddr": at, "recvAddr": at} for rank in (_ROOT if kind in ROOTED else _EVERYBODY)}
    if kind in smaller:
        for rank, both in addrs.items():
            both[smaller[kind]] += rank * block
    return addrs


def collective(world: World, kind: str, /, **fields: Any) -> pb.CollectiveRequest:
    """A collective of one float64 in each block, out of place, in which nothing is wrong but what `fields` bring."""
    right: dict[str, Any] = {"commId": world.comm.commId, "kind": kind}
    if kind in ROOTED:
        right["root"] = ROOT
    if kind == "SEND_RECV":
        right["sendRecvs"] = [send_recv(0, 1)]
    elif kind != "BARRIER":
        right |= {"counts": [8], "buffers": buffers(kind)}
    return pb.CollectiveRequest(**{**right, **fields})


def send_recv(src: int, dst: int, send_addr: int = SEND, recv_addr: int = RECV, count: int = 8) -> pb.SendRecv:
    return pb.SendRecv(src=src, dst=dst, count=count, sendAddr=send_addr, recvAddr=recv_addr)


def _case(kind: str, what: str, fields: dict[str, Any], refusal: str, *words: object) -> Case:
    code = "OUT_OF_RANGE" if refusal == "ADDRESS_OUT_OF_RANGE" else "INVALID_ARGUMENT"
    request: Callable[[World], Any] = lambda world: collective(world, kind, **fields)  # noqa: E731
    return on_coordinator("Collective", f"{kind}, {what}", request, code, refusal, *words)


# ---- what there is not -----------------------------------------------------------------------------------------------


def _unknown() -> Iterator[Case]:
    yield on_coordinator(
        "Collective",
        "unknown comm",
        lambda world: collective(world, "BARRIER", commId=NOBODY),
        "NOT_FOUND",
        "COMM_NOT_FOUND",
        NOBODY,
    )
    for number in (0, 11, -1):
        yield _case("BARRIER", f"kind {number}", {"kind": number}, "INVALID_VALUE", number, "1 ALL_REDUCE", "10 BARRIER")
    for kind in KINDS:
        known = algorithms_of(kind.lower())
        yield _case(kind, "unknown algorithm", {"algorithm": "star"}, "INVALID_VALUE", "'star'", kind.lower(), *known)
    yield _case(
        "BROADCAST", "algorithm of another", {"algorithm": "pairwise"}, "INVALID_VALUE", "'pairwise'", "binomial_tree"
    )
    yield _case("ALL_REDUCE", "algorithm in capitals", {"algorithm": "RING"}, "INVALID_VALUE", "'RING'", "known: ring")
    for kind in ("ALL_REDUCE", "BROADCAST", "ALL_TO_ALL", "SEND_RECV", "BARRIER"):
        for number in (99, -1):
            yield _case(kind, f"dtype {number}", {"dtype": number}, "INVALID_VALUE", number, "0 FLOAT64", "9 UINT64")
            yield _case(kind, f"op {number}", {"op": number}, "INVALID_VALUE", number, "0 SUM", "4 AVG")


# ---- what does not fit the collective --------------------------------------------------------------------------------


def _fields_it_has_not() -> Iterator[Case]:
    for kind in ("SEND_RECV", "BARRIER"):
        yield _case(kind, "counts", {"counts": [8]}, "INVALID_VALUE", kind.lower(), "counts", 1)
        yield _case(kind, "buffers", {"buffers": [pb.RankBuffers()] * 4}, "INVALID_VALUE", kind.lower(), "buffers", 4)
    for kind in KINDS:
        if kind != "SEND_RECV":
            pairs = {"sendRecvs": [send_recv(0, 1), send_recv(1, 2)]}
            yield _case(kind, "sendRecvs", pairs, "INVALID_VALUE", kind.lower(), "sendRecvs", 2)
        if kind not in ROOTED:
            yield _case(kind, "root", {"root": 2}, "INVALID_VALUE", kind.lower(), "root", 2)
        else:
            for root in (NRANKS, 2**32 - 1):
                yield _case(kind, f"root {root}", {"root": root}, "INVALID_VALUE", root, NRANKS)


def _counts() -> Iterator[Case]:
    for kind, needs in NEEDS.items():
        for number in {0, 2, NRANKS - 1, NRANKS, NRANKS + 1, needs.nblocks - 1, needs.nblocks + 1} - {1, needs.nblocks}:
            words = (kind.lower(), f"{needs.nblocks} blocks", f"{number} counts")
            yield _case(kind, f"{number} counts", {"counts": [8] * number}, "INVALID_VALUE", *words)
        yield _case(kind, "count", {"counts": [12]}, "COUNT_NOT_MULTIPLE", 12, 8)
        if needs.nblocks > 1:
            last = [8] * (needs.nblocks - 1) + [4]
            yield _case(kind, "last count", {"counts": last}, "COUNT_NOT_MULTIPLE", 4, 8)
    pairs = {"sendRecvs": [send_recv(0, 1), send_recv(2, 3, count=12)]}
    yield _case("SEND_RECV", "count of the second", pairs, "COUNT_NOT_MULTIPLE", 12, 8)
    for number in pb.DataType.values():
        size = size_of(number)
        if size > 1:
            fields = {"counts": [5 * size + size // 2], "dtype": number}
            name = pb.DataType.Name(number)
            yield _case("ALL_GATHER", f"{name}, count", fields, "COUNT_NOT_MULTIPLE", 5 * size + size // 2, size)


def _buffers() -> Iterator[Case]:
    fields: dict[str, Any]
    for kind, needs in NEEDS.items():
        for number in (0, NRANKS - 1, NRANKS + 1):
            fields = {"buffers": [*buffers(kind), pb.RankBuffers()][:number]}
            yield _case(kind, f"{number} buffers", fields, "RANK_MISMATCH", NRANKS, number)
        for field in ("sendAddr", "recvAddr"):
            for rank in needs.ranks(field):
                fields = {"buffers": buffers(kind, {rank: {field: None}})}
                yield _case(
                    kind, f"rank {rank} without {field}", fields, "RANK_MISMATCH", f"rank {rank}", field, kind.lower()
                )
    for src, dst in ((NRANKS, 0), (0, NRANKS), (2**32 - 1, 1), (1, 2**32 - 1), (9, 9)):
        fields = {"sendRecvs": [send_recv(0, 1), send_recv(src, dst)]}
        yield _case("SEND_RECV", f"{src} to {dst}", fields, "INVALID_VALUE", max(src, dst), f"{src} -> {dst}", NRANKS)


def _weights() -> Iterator[Case]:
    fields: dict[str, Any]
    for kind in REDUCING:
        for number in (1, NRANKS - 1, NRANKS + 1):
            fields = {"weights": [1.0] * number}
            yield _case(kind, f"{number} weights", fields, "RANK_MISMATCH", NRANKS, number)
        for op in ("PROD", "MIN", "MAX", "AVG"):
            fields = {"weights": [1.0] * NRANKS, "op": op}
            yield _case(kind, f"weights by {op}", fields, "INVALID_VALUE", "SUM", op)
    for kind in KINDS:
        if kind not in REDUCING:
            yield _case(kind, "weights", {"weights": [1.0] * NRANKS}, "INVALID_VALUE", "weights", kind.lower())
    for number in pb.DataType.values():
        name = pb.DataType.Name(number)
        if "INT" in name:
            for weight in (0.5, float("inf"), float("nan"), 2.0**64, -(2.0**63) - 2048):
                fields = {"weights": [1, 1, weight, 1], "dtype": number}
                yield _case("ALL_REDUCE", f"{name}, weight {weight:g}", fields, "INVALID_VALUE", "weight", name.lower())


# ---- where buffers are -----------------------------------------------------------------------------------------------


def _out_of_range() -> Iterator[Case]:
    fields: dict[str, Any]
    for field in ("sendAddr", "recvAddr"):
        # Rank 2 has only this address, and the root is in place, so that nothing overlaps whatever the size.
        kind = "REDUCE" if field == "sendAddr" else "BROADCAST"
        for what, (addr, nbytes) in ranges(0, END).items():
            at = {**in_place(kind, 0, nbytes), 2: {field: addr}}
            fields = {"counts": [nbytes], "dtype": pb.UINT8, "buffers": buffers(kind, at)}
            # Rank 0's buffer is the one that is too long where the size alone is at fault.
            yield _case(kind, f"{field} {what}", fields, "ADDRESS_OUT_OF_RANGE", nbytes, hex(END))
        for kind, needs in NEEDS.items():
            rank = needs.ranks(field)[-1]
            for what, addr in (("crosses the end", END - 4), ("last address", TWO_64 - 1)):
                fields = {"buffers": buffers(kind, {rank: {field: addr}})}
                yield _case(kind, f"{field} {what}, rank {rank}", fields, "ADDRESS_OUT_OF_RANGE", hex(addr), hex(END))
    for kind, needs in NEEDS.items():
        if needs.nblocks > 1:
            # Each block is smaller than 2**64 bytes, and together they are 2**64, or 8 bytes more.
            even = TWO_64 // needs.nblocks
            fields = {"buffers": buffers(kind, in_place(kind, 0, even))}
            for what, counts in (("counts", [even]), ("uneven counts", [even] * (needs.nblocks - 1) + [even + 8])):
                yield _case(kind, f"{what} wrap", {**fields, "counts": counts}, "ADDRESS_OUT_OF_RANGE", hex(END))
    for what, addr in (("begins behind the end", END), ("crosses the end", END - 4), ("last address", TWO_64 - 1)):
        for where, pair in (
            ("sendAddr", send_recv(2, 3, send_addr=addr)),
            ("recvAddr", send_recv(2, 3, recv_addr=addr)),
            ("own recvAddr", send_recv(2, 2, recv_addr=addr)),
            ("own address", send_recv(2, 2, addr, addr)),
        ):
            fields = {"sendRecvs": [send_recv(0, 1), pair]}
            yield _case("SEND_RECV", f"{where} {what}", fields, "ADDRESS_OUT_OF_RANGE", hex(addr), 8, hex(END))
    fields = {"sendRecvs": [send_recv(0, 1, count=TWO_64 - 8)]}
    yield _case("SEND_RECV", "largest count", fields, "ADDRESS_OUT_OF_RANGE", TWO_64 - 8, hex(END))


def _overlaps() -> Iterator[Case]:
    """Every buffer that lies in another one but where the collective in place has it. Blocks are of 16 bytes."""
    fields: dict[str, Any]
    at = 4096
    by_kind: dict[str, Sequence[tuple[str, int, int, int]]] = {
        # (what, rank, sendAddr, recvAddr)
        "ALL_REDUCE": [("behind", 3, at, at + 8), ("before", 0, at + 8, at), ("by a byte", 2, at, at + 15)],
        "REDUCE": [("on the root", ROOT, at, at + 8)],
        "BROADCAST": [("on the root", ROOT, at + 8, at)],
        "REDUCE_SCATTER": [
            ("at another block", 2, at, at + 16),
            ("beside its block", 2, at, at + 40),
            ("at the beginning", 2, at, at),
            ("before the beginning", 0, at, at - 8),
            ("beyond the end", 3, at, at + 56),
        ],
        "ALL_GATHER": [
            ("at another block", 2, at + 16, at),
            ("beside its block", 2, at + 40, at),
            ("at the end", 0, at + 48, at),
        ],
        "GATHER": [("on the root", ROOT, at, at), ("at another block", ROOT, at + 32, at)],
        "SCATTER": [("on the root", ROOT, at, at), ("at another block", ROOT, at, at + 32)],
        "ALL_TO_ALL": [("behind", 1, at, at + 8), ("before", 3, at + 16, at), ("by a byte", 2, at, at + 63)],
    }
    for kind, places in by_kind.items():
        for what, rank, send, recv in places:
            fields = {"counts": [16], "buffers": buffers(kind, {rank: {"sendAddr": send, "recvAddr": recv}})}
            yield _case(kind, what, fields, "BUFFER_OVERLAP", f"rank {rank}", hex(send), hex(recv))
    # What rank 1 has for itself is where it gets it, but what it gets from rank 0 is on what it has for rank 0.
    counts = [16 if (src, dst) == (0, 1) else 8 for src in range(NRANKS) for dst in range(NRANKS)]
    fields = {"counts": counts, "buffers": buffers("ALL_TO_ALL", {1: {"sendAddr": at + 8, "recvAddr": at}})}
    yield _case("ALL_TO_ALL", "only its own block in place", fields, "BUFFER_OVERLAP", "rank 1", hex(at + 8), hex(at))
    by_pairs: dict[str, tuple[int, list[pb.SendRecv]]] = {
        "into a source": (1, [send_recv(0, 1, at, at), send_recv(1, 2, at + 4, at)]),
        "two into one place": (2, [send_recv(0, 2, at, at), send_recv(1, 2, at, at + 4)]),
        "the second one first": (2, [send_recv(0, 2, at, at + 4), send_recv(1, 2, at, at)]),
        "to itself": (3, [send_recv(3, 3, at, at + 4)]),
        "into what stays": (3, [send_recv(3, 3, at, at), send_recv(0, 3, at, at)]),
        "two sources in a destination": (
            0,
            [
                send_recv(1, 0, at, at, 64),
                send_recv(2, 0, at, at + 8 * MIB),
                send_recv(0, 3, at + 8, at),
                send_recv(0, 3, at, at + 64),
            ],
        ),
    }
    for what, (rank, pairs) in by_pairs.items():
        yield _case("SEND_RECV", what, {"sendRecvs": pairs}, "BUFFER_OVERLAP", f"rank {rank}", hex(at))


# ---- schedules -------------------------------------------------------------------------------------------------------

Transfer = tuple[int, int, int, bool]


def own_schedule(*steps: Sequence[Transfer], parts: int = 1, algorithm: str = "mine") -> pb.Schedule:
    """A schedule, of (src, dst, chunk, reduce)."""
    return pb.Schedule(
        algorithm=algorithm,
        parts=parts,
        steps=[
            pb.ScheduleStep(
                transfers=[pb.Transfer(src=src, dst=dst, chunk=chunk, reduce=reduce) for src, dst, chunk, reduce in step]
            )
            for step in steps
        ],
    )


#: An all-reduce of four ranks by way of rank 0.
TO_ZERO = [(rank, 0, 0, True) for rank in (1, 2, 3)]
FROM_ZERO = [(0, rank, 0, False) for rank in (1, 2, 3)]
#: Two parts between ranks 0 and 1, each of which sends first what the other expects last.
_CROSSED = [(0, 1, 0, True), (0, 1, 1, True), (1, 0, 1, True), (1, 0, 0, True)]
_BY_TWO = [
    [(rank + 2, rank, chunk, True) for rank in (0, 1) for chunk in (0, 1)],
    _CROSSED,
    [(rank, rank + 2, chunk, False) for rank in (0, 1) for chunk in (0, 1)],
]
#: (collective, what, schedule, what the message names): schedules that are not proved.
UNPROVED: Sequence[tuple[str, str, pb.Schedule, Sequence[object]]] = [
    ("ALL_REDUCE", "null schedule", pb.Schedule(), ("0 parts",)),
    ("BROADCAST", "no parts", own_schedule([(ROOT, 0, 0, False)], parts=0), ("0 parts",)),
    ("ALL_REDUCE", "src 4", own_schedule([(4, 0, 0, True)]), ("step 0", "src 4", "4 ranks")),
    ("ALL_REDUCE", "dst 2**32-1", own_schedule(TO_ZERO, [(0, 2**32 - 1, 0, False)]), ("step 1", "dst 4294967295")),
    ("ALL_REDUCE", "chunk 2", own_schedule([(1, 0, 2, True)], parts=2), ("chunk 2", "2 chunks")),
    ("ALL_TO_ALL", "chunk 16", own_schedule([(1, 0, 16, False)]), ("chunk 16", "16 chunks")),
    ("ALL_REDUCE", "to itself", own_schedule([(2, 2, 0, True)]), ("a rank does not send to itself",)),
    ("GATHER", "what it has not", own_schedule([(2, ROOT, 3, False)]), ("rank 2 does not hold chunk 3",)),
    ("ALL_REDUCE", "reduced twice", own_schedule(TO_ZERO, TO_ZERO[:1], FROM_ZERO), ("step 1", "rank 1", "twice")),
    ("BROADCAST", "reduces", own_schedule([(ROOT, 0, 0, True)]), ("broadcast does not reduce",)),
    ("ALL_REDUCE", "two copies", own_schedule(TO_ZERO, [FROM_ZERO[0]] * 2), ("step 1", "another transfer of the same step")),
    ("ALL_REDUCE", "a part forgotten", own_schedule(TO_ZERO, FROM_ZERO, parts=2), ("chunk 1", "all_reduce promises")),
    ("REDUCE", "another root", own_schedule(TO_ZERO), (f"at the end rank {ROOT}", "ranks 0, 1, 2, 3")),
    ("ALL_REDUCE", "deadlock", own_schedule(*_BY_TWO, parts=2), ("deadlock",)),
    # The first of several: what is malformed before what is missing at the end, and that before the deadlock.
    ("ALL_REDUCE", "malformed and unfinished", own_schedule(TO_ZERO, [(0, 0, 0, False)]), ("step 1", "itself")),
    ("ALL_REDUCE", "unfinished deadlock", own_schedule(*_BY_TWO[:2], parts=2), ("at the end rank 2",)),
    ("ALL_REDUCE", "2**18 + 1 transfers", own_schedule(FROM_ZERO[:1] * (2**18 + 1)), (2**18 + 1, 2**18)),
    ("ALL_REDUCE", "2**17 + 1 chunks", own_schedule(TO_ZERO, FROM_ZERO, parts=2**17 + 1), (2**17 + 1, 2**17)),
    ("BARRIER", "2**32 - 1 chunks", own_schedule(TO_ZERO, FROM_ZERO, parts=2**32 - 1), (2**32 - 1, 2**17)),
    ("ALL_TO_ALL", "chunks of all blocks", own_schedule(parts=2**13 + 1), (16 * (2**13 + 1), 2**17)),
    *((kind, "nothing happens", own_schedule(), ("at the end rank", f"{kind.lower()} promises")) for kind in KINDS),
]


def _schedules() -> Iterator[Case]:
    for kind, what, schedule, words in UNPROVED:
        yield _case(kind, what, {"schedule": schedule}, "INVALID_SCHEDULE", *words)
    right = own_schedule(TO_ZERO, FROM_ZERO)
    for algorithm in ("ring", "auto", "MINE"):
        fields = {"schedule": right, "algorithm": algorithm}
        yield _case(
            "ALL_REDUCE", f"algorithm {algorithm} and schedule mine", fields, "INVALID_VALUE", f"'{algorithm}'", "'mine'"
        )
    unnamed = {"schedule": own_schedule(TO_ZERO, FROM_ZERO, algorithm=""), "algorithm": "ring"}
    yield _case("ALL_REDUCE", "algorithm ring and an unnamed schedule", unnamed, "INVALID_VALUE", "'ring'", "''")


# ---- cost models -----------------------------------------------------------------------------------------------------


def _cost_models() -> Iterator[Case]:
    def changed(**costs: Any) -> str:
        content = json.loads(DEFAULT_COST_MODEL.to_json())
        content["grpc"] |= costs
        return json.dumps({**content, "grpc": {key: value for key, value in content["grpc"].items() if value is not None}})

    right = json.loads(DEFAULT_COST_MODEL.to_json())
    texts: dict[str, tuple[str, tuple[object, ...]]] = {
        "nothing": ("", ("JSON",)),
        "no JSON": ("fast", ("JSON",)),
        "half of it": (DEFAULT_COST_MODEL.to_json()[:100], ("JSON",)),
        "a list": ("[]", ("[]",)),
        "a number": ("7", ("7",)),
        "null": ("null", ("None",)),
        "an empty object": ("{}", ("grpc", "p2p", "version")),
        "another version": (json.dumps({**right, "version": 2}), ("version 2", "version 1")),
        "a third transport": (json.dumps({**right, "nccl": {}}), ("nccl",)),
        "a transport that is none": (json.dumps({**right, "p2p": 3}), ("p2p", "3")),
        "a cost missing": (changed(stream_s=None), ("grpc", "stream_s")),
        "an unknown cost": (changed(electricity_s=1), ("grpc", "electricity_s")),
        "a negative cost": (changed(message_s=-1e-6), ("grpc", "message_s", "-1e-06")),
        "an infinite cost": (changed(message_s=float("inf")), ("grpc", "message_s", "inf")),
        "a cost that is no number": (changed(message_s=float("nan")), ("grpc", "message_s", "nan")),
        "a cost in words": (changed(message_s="a lot"), ("grpc", "message_s", "a lot")),
        "a cost that is true": (changed(message_s=True), ("grpc", "message_s", "True")),
        "a cost of 400 digits": (changed(message_s=10**400), ("grpc", "message_s")),
        "brackets without end": ("[" * 100_000, ("JSON",)),
    }
    for what, (text, words) in texts.items():
        yield on_coordinator(
            "SetCostModel",
            what,
            lambda world, text=text: pb.SetCostModelRequest(json=text),
            "INVALID_ARGUMENT",
            "INVALID_VALUE",
            *words,
        )


COLLECTIVE_CASES = [
    *_unknown(),
    *_fields_it_has_not(),
    *_counts(),
    *_buffers(),
    *_weights(),
    *_out_of_range(),
    *_overlaps(),
    *_schedules(),
    *_cost_models(),
]

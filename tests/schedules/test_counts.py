"""Messages and data of each rank, exactly, by the formulas of the literature, for every algorithm, N and root.

A message is all that goes from one rank to another in one step. Data is in blocks, of which a collective has one in all
(all-reduce, reduce, broadcast), one for each rank, or one for each pair of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest

from dsml_gpu.schedules import ALGORITHMS, COLLECTIVES, Algorithm, Schedule, algorithms_of

#: (messages, blocks) that a rank sends.
Load = tuple[int, Fraction]


def loads(schedule: Schedule) -> list[Load]:
    """What each rank sends, from the root on."""
    messages: Counter[int] = Counter()
    chunks: Counter[int] = Counter()
    for step in schedule.steps:
        messages.update(src for src, _ in {(transfer.src, transfer.dst) for transfer in step})
        chunks.update(transfer.src for transfer in step)
    ranks = [(schedule.root + place) % schedule.nranks for place in range(schedule.nranks)]
    return [(messages[rank], Fraction(chunks[rank], schedule.parts)) for rank in ranks]


def each(n: int, messages: int, data: Fraction | int) -> list[Load]:
    return [(messages, Fraction(data))] * n


def root_and_others(n: int, root: int, other: int) -> list[Load]:
    """So many messages, each with one block."""
    return [(root, Fraction(root)), *each(n - 1, other, other)]


def rounds(n: int) -> int:
    """ceil(log2 N)."""
    return (n - 1).bit_length()


def core(n: int) -> tuple[int, int]:
    """(floor(log2 N), the power of two that this is the logarithm of)."""
    return n.bit_length() - 1, 1 << n.bit_length() - 1


# ---- binomial trees: a rank's distance from the root, in binary, says all -------------------------------------------------


def below(place: int, n: int) -> int:
    """Ranks of the subtree, the rank itself included: 2**k for a place that k zeros end, as far as there are ranks."""
    return min(place & -place, n - place) if place else n


def children(place: int, n: int) -> int:
    """ceil(log2) of the ranks of the subtree: the first child gets half of them, the next a quarter, and so on."""
    return rounds(below(place, n))


def up_and_down(n: int) -> list[Load]:
    return [(count, Fraction(count)) for count in (children(place, n) + (place > 0) for place in range(n))]


def scatter_all_gather(n: int) -> list[Load]:
    """In the ring, a rank sends its neighbour all parts but those that it has from the scatter; the root has all."""
    scatter = [(children(place, n), below(place, n) - 1) for place in range(n)]
    gather = [n - below((place + 1) % n, n) for place in range(n)]
    return [(sent + ring, Fraction(data + ring, n)) for (sent, data), ring in zip(scatter, gather, strict=True)]


# ---- numbers of ranks that are no power of two ----------------------------------------------------------------------------


def folded(n: int, messages: int, data: Fraction | int) -> list[Load]:
    """What a rank of the core sends; those that are too many hand over all, and get all from their keepers."""
    extras = n - core(n)[1]
    in_core = (messages, Fraction(data))
    return [(1, Fraction(1)), (messages + 1, data + Fraction(1))] * extras + [in_core] * (n - 2 * extras)


def recursive_doubling_all_gather(n: int) -> list[Load]:
    """In step k a rank sends what its 2**k ranks of the core began with: one block, or two."""
    floor, power = core(n)
    weights = [2] * (n - power) + [1] * (2 * power - n)

    def exchanged(place: int) -> int:
        groups = [range(place >> k << k, (place >> k << k) + (1 << k)) for k in range(floor)]
        return sum(weights[other] for group in groups for other in group)

    expected: list[Load] = []
    for place, weight in enumerate(weights):
        if weight == 2:
            expected += [(1, Fraction(1)), (floor + 1, Fraction(exchanged(place) + n - 1))]
        else:
            expected.append((floor, Fraction(exchanged(place))))
    return expected


#: By algorithm: (number of ranks) -> load of each, from the root on. N-1 of N blocks is the least for all of these that
#: give or take N of them; an all-reduce takes twice as much.
LOADS: dict[tuple[str, str], Callable[[int], list[Load]]] = {
    ("all_reduce", "ring"): lambda n: each(n, 2 * (n - 1), Fraction(2 * (n - 1), n)),
    ("all_reduce", "bidirectional_ring"): lambda n: each(n, (2 if n == 2 else 4) * (n - 1), Fraction(2 * (n - 1), n)),
    ("all_reduce", "naive"): lambda n: root_and_others(n, n - 1, 1),
    ("all_reduce", "binomial_tree"): up_and_down,
    ("all_reduce", "recursive_doubling"): lambda n: folded(n, core(n)[0], core(n)[0]),
    ("all_reduce", "halving_doubling"): lambda n: folded(n, 2 * core(n)[0], Fraction(2 * (core(n)[1] - 1), core(n)[1])),
    ("all_reduce", "bruck"): lambda n: each(n, 2 * rounds(n), Fraction(2 * (n - 1), n)),
    ("all_reduce", "direct"): lambda n: each(n, 2 * (n - 1), Fraction(2 * (n - 1), n)),
    ("all_reduce", "hierarchical"): lambda n: each(n, 2 * (n - 1), Fraction(2 * (n - 1), n)),  # on one host
    ("reduce", "ring"): lambda n: root_and_others(n, 0, 1),
    ("reduce", "binomial_tree"): lambda n: root_and_others(n, 0, 1),
    ("reduce", "bruck"): lambda n: [
        (rounds(n) + (place > 0), Fraction(n - 1 + (below(place, n) if place else 0), n)) for place in range(n)
    ],
    ("reduce", "direct"): lambda n: root_and_others(n, 0, 1),
    ("broadcast", "ring"): lambda n: each(n - 1, 1, 1) + each(1, 0, 0),
    ("broadcast", "binomial_tree"): lambda n: [(children(p, n), Fraction(children(p, n))) for p in range(n)],
    ("broadcast", "scatter_all_gather"): scatter_all_gather,
    ("broadcast", "direct"): lambda n: root_and_others(n, n - 1, 0),
    ("reduce_scatter", "ring"): lambda n: each(n, n - 1, n - 1),
    ("reduce_scatter", "bruck"): lambda n: each(n, rounds(n), n - 1),
    ("reduce_scatter", "direct"): lambda n: each(n, n - 1, n - 1),
    ("all_gather", "ring"): lambda n: each(n, n - 1, n - 1),
    ("all_gather", "recursive_doubling"): recursive_doubling_all_gather,
    ("all_gather", "bruck"): lambda n: each(n, rounds(n), n - 1),
    ("all_gather", "direct"): lambda n: each(n, n - 1, n - 1),
    ("gather", "binomial_tree"): lambda n: [(int(p > 0), Fraction(below(p, n) if p else 0)) for p in range(n)],
    ("gather", "direct"): lambda n: root_and_others(n, 0, 1),
    ("scatter", "binomial_tree"): lambda n: [(children(p, n), Fraction(below(p, n) - 1)) for p in range(n)],
    ("scatter", "direct"): lambda n: root_and_others(n, n - 1, 0),
    ("all_to_all", "direct"): lambda n: each(n, n - 1, n - 1),
    ("all_to_all", "pairwise"): lambda n: each(n, n - 1, n - 1),
    # A block goes as many times as its distance has bits that are set: N/2 log2 N in all for a power of two.
    ("all_to_all", "bruck"): lambda n: each(n, rounds(n), sum(distance.bit_count() for distance in range(n))),
    ("send_recv", "direct"): lambda n: each(n, int(n > 1), int(n > 1)),  # each rank to its right neighbour
    ("barrier", "dissemination"): lambda n: each(n, rounds(n), rounds(n)),
    ("barrier", "binomial_tree"): up_and_down,
}
#: Has no such formula, but a test of its own.
BY_STRUCTURE = {("all_reduce", "double_binary_tree")}


def test_every_algorithm_is_counted() -> None:
    assert set(LOADS) | BY_STRUCTURE == {(algorithm.collective, algorithm.name) for algorithm in ALGORITHMS}


@pytest.mark.parametrize(
    "algorithm",
    [algorithm for algorithm in ALGORITHMS if (algorithm.collective, algorithm.name) in LOADS],
    ids=lambda algorithm: f"{algorithm.collective}-{algorithm.name}",
)
def test_messages_and_data_of_each_rank(algorithm: Algorithm) -> None:
    for nranks in range(1, 34):
        expected = LOADS[algorithm.collective, algorithm.name](nranks)
        pairs = tuple((rank, (rank + 1) % nranks) for rank in range(nranks)) if algorithm.collective == "send_recv" else ()
        for root in range(nranks) if COLLECTIVES[algorithm.collective].rooted else (0,):
            assert loads(algorithm.schedule(nranks, root=root, pairs=pairs)) == expected, (nranks, root)


def test_bruck_s_all_to_all_for_powers_of_two() -> None:
    for power in range(6):
        assert LOADS["all_to_all", "bruck"](1 << power)[0] == (power, Fraction((1 << power) * power, 2))


@pytest.mark.parametrize("nranks", range(2, 34))
def test_a_double_binary_tree_uses_every_rank_in_one_tree_or_the_other(nranks: int) -> None:
    schedule = algorithms_of("all_reduce")["double_binary_tree"].schedule(nranks)
    assert len(schedule.steps) == 2 * rounds(nranks)
    sent = loads(schedule)
    assert sum(data for _, data in sent) == 2 * (nranks - 1), "in all not more than one tree would send"
    assert max(data for _, data in sent) <= 2
    counts = [Counter(t.src for step in schedule.steps for t in step if t.chunk == half and not t.reduce) for half in (0, 1)]
    for rank in range(nranks):
        children = sorted(count[rank] for count in counts)
        assert children in ([0, 0], [0, 1], [0, 2]) or (nranks % 2 == 1 and rank == 0 and children == [1, 1])


@pytest.mark.parametrize("nranks", [2, 3, 8, 13])
@pytest.mark.parametrize(
    ("collective", "name"),
    [
        ("all_reduce", "direct"),
        ("reduce_scatter", "direct"),
        ("all_gather", "direct"),
        ("all_to_all", "direct"),
        ("all_to_all", "pairwise"),
    ],
)
def test_whoever_sends_to_all_begins_with_another_rank_than_the_others(collective: str, name: str, nranks: int) -> None:
    for step in algorithms_of(collective)[name].schedule(nranks).steps:
        destinations = [[transfer.dst for transfer in step if transfer.src == rank] for rank in range(nranks)]
        for at_the_same_time in zip(*destinations, strict=True):
            assert sorted(at_the_same_time) == list(range(nranks))


def test_nobody_is_sent_twice_what_a_broadcast_gives() -> None:
    for algorithm in algorithms_of("broadcast").values():
        for nranks in range(1, 34):
            schedule = algorithm.schedule(nranks, root=nranks // 2)
            received = Counter((transfer.dst, transfer.chunk) for step in schedule.steps for transfer in step)
            others = set(range(nranks)) - {schedule.root}
            assert received == Counter((rank, chunk) for rank in others for chunk in range(schedule.parts))


@pytest.mark.parametrize("hosts", [(0, 0, 0, 1), (3, 1, 3, 3, 1, 0), (0, 1, 2, 2, 2, 2, 2), (5, 5, 5, 5, 5, 9, 9, 2)])
def test_of_uneven_hosts_only_leaders_send_to_other_hosts(hosts: tuple[int, ...]) -> None:
    """A binomial tree in each host, and a ring over their first ranks."""
    schedule = algorithms_of("all_reduce")["hierarchical"].schedule(len(hosts), hosts=hosts)
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    largest = max(Counter(hosts).values())
    assert len(schedule.steps) == 2 * rounds(largest) + 2 * (len(leaders) - 1)
    between = Counter(t.src for step in schedule.steps for t in step if hosts[t.src] != hosts[t.dst])
    assert between == Counter(dict.fromkeys(leaders, 2 * (len(leaders) - 1))), "2(H-1)/H of the data"
    ring = {(t.src, t.dst) for step in schedule.steps for t in step if hosts[t.src] != hosts[t.dst]}
    assert ring == set(pairwise([*leaders, leaders[0]]))
    inside = [t for step in schedule.steps for t in step if hosts[t.src] == hosts[t.dst]]
    assert len(inside) == 2 * (len(hosts) - len(leaders)) * schedule.parts, (
        "all the data, up and down each edge of the trees"
    )

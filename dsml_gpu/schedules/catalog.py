"""All algorithms that come with the package, by collective and name."""

from __future__ import annotations

from dsml_gpu.schedules import binomial_tree, bruck, direct, ring
from dsml_gpu.schedules.algorithm import Algorithm
from dsml_gpu.schedules.dissemination import dissemination_barrier
from dsml_gpu.schedules.double_binary_tree import double_binary_tree_all_reduce
from dsml_gpu.schedules.halving_doubling import halving_doubling_all_reduce
from dsml_gpu.schedules.hierarchical import hierarchical_all_reduce
from dsml_gpu.schedules.naive import naive_all_reduce
from dsml_gpu.schedules.recursive_doubling import recursive_doubling_all_gather, recursive_doubling_all_reduce
from dsml_gpu.schedules.scatter_all_gather import scatter_all_gather_broadcast

_RING = "Patarasuk and Yuan, 2009"
_MPICH = "Thakur, Rabenseifner and Gropp, 2005"
_BRUCK = "Bruck et al., 1997"
_TRAEFF = "Traeff, 2024, after Bruck et al., 1997"
_EVERYBODY = "everybody to everybody"

#: In the order in which people are shown them.
ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("all_reduce", "ring", ring.ring_all_reduce, _RING),
    Algorithm("all_reduce", "bidirectional_ring", ring.bidirectional_ring_all_reduce, _RING),
    Algorithm("all_reduce", "naive", naive_all_reduce, "the baseline"),
    Algorithm("all_reduce", "binomial_tree", binomial_tree.binomial_all_reduce, _MPICH),
    Algorithm("all_reduce", "double_binary_tree", double_binary_tree_all_reduce, "Sanders, Speck and Traeff, 2009"),
    Algorithm("all_reduce", "recursive_doubling", recursive_doubling_all_reduce, _MPICH),
    Algorithm("all_reduce", "halving_doubling", halving_doubling_all_reduce, "Rabenseifner, 2004"),
    Algorithm("all_reduce", "bruck", bruck.bruck_all_reduce, _TRAEFF),
    Algorithm("all_reduce", "direct", direct.direct_all_reduce, _EVERYBODY),
    Algorithm("all_reduce", "hierarchical", hierarchical_all_reduce, "Cho et al., 2019"),
    Algorithm("reduce", "ring", ring.chain_reduce, _RING),
    Algorithm("reduce", "binomial_tree", binomial_tree.binomial_reduce, _MPICH),
    Algorithm("reduce", "bruck", bruck.bruck_reduce, "Rabenseifner, 2004; Traeff, 2024"),
    Algorithm("reduce", "direct", direct.direct_reduce, _EVERYBODY),
    Algorithm("broadcast", "ring", ring.chain_broadcast, _RING),
    Algorithm("broadcast", "binomial_tree", binomial_tree.binomial_broadcast, _MPICH),
    Algorithm("broadcast", "scatter_all_gather", scatter_all_gather_broadcast, "van de Geijn, 1994"),
    Algorithm("broadcast", "direct", direct.direct_broadcast, _EVERYBODY),
    Algorithm("reduce_scatter", "ring", ring.ring_reduce_scatter, _RING),
    Algorithm("reduce_scatter", "bruck", bruck.bruck_reduce_scatter, _TRAEFF),
    Algorithm("reduce_scatter", "direct", direct.direct_reduce_scatter, _EVERYBODY),
    Algorithm("all_gather", "ring", ring.ring_all_gather, _RING),
    Algorithm("all_gather", "recursive_doubling", recursive_doubling_all_gather, _MPICH),
    Algorithm("all_gather", "bruck", bruck.bruck_all_gather, _BRUCK),
    Algorithm("all_gather", "direct", direct.direct_all_gather, _EVERYBODY),
    Algorithm("gather", "binomial_tree", binomial_tree.binomial_gather, _MPICH),
    Algorithm("gather", "direct", direct.direct_gather, _EVERYBODY),
    Algorithm("scatter", "binomial_tree", binomial_tree.binomial_scatter, _MPICH),
    Algorithm("scatter", "direct", direct.direct_scatter, _EVERYBODY),
    Algorithm("all_to_all", "direct", direct.direct_all_to_all, _EVERYBODY),
    Algorithm("all_to_all", "pairwise", direct.pairwise_all_to_all, _MPICH),
    Algorithm("all_to_all", "bruck", bruck.bruck_all_to_all, _BRUCK),
    Algorithm("send_recv", "direct", direct.direct_send_recv, _EVERYBODY),
    Algorithm("barrier", "dissemination", dissemination_barrier, "Hensgen, Finkel and Manber, 1988"),
    Algorithm("barrier", "binomial_tree", binomial_tree.binomial_barrier, _MPICH),
)


def algorithms_of(collective: str) -> dict[str, Algorithm]:
    """The algorithms of a collective by name."""
    return {algorithm.name: algorithm for algorithm in ALGORITHMS if algorithm.collective == collective}

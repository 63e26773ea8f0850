"""Small operations of a group that travel as one: pure decisions.

What a small operation costs over a network is its messages, of which each is far from full. Operations that differ only in
where their data is are put in a bucket (as by Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training", VLDB 2020): each device gathers the pieces, one operation runs on all of them, and the results are spread. That
costs two copies in device memory, which are cheap beside what a network does.

Passes over memory (`passes`) need none of this: they send no messages between ranks, and take any number of operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsml_gpu.coordinator.call import CollectiveCall, Place
from dsml_gpu.coordinator.passes import independent
from dsml_gpu.schedules import Layout

#: Bytes of the largest buffer of an operation that may go into a bucket: no more than a message holds.
MAX_FUSED_BYTES = 512 << 10
#: Of a bucket: what a device needs in addition while it runs.
MAX_BUCKET_BYTES = 16 << 20


def buckets_of(calls: Sequence[CollectiveCall]) -> list[list[CollectiveCall]]:
    """Calls in order, neighbours that may be fused together."""
    buckets: list[list[CollectiveCall]] = []
    for run in independent(calls):
        start = len(buckets)
        for call in run:
            if len(buckets) > start and _fits(buckets[-1], call):
                buckets[-1].append(call)
            else:
                buckets.append([call])
    return buckets


def fused(calls: Sequence[CollectiveCall]) -> CollectiveCall:
    """The one call that a bucket is; `CollectiveCall.parts` says of what."""
    first = calls[0]
    if len(calls) == 1:
        return first
    return replace(
        first,
        counts=tuple(sum(call.counts[block] for call in calls) for block in range(len(first.counts))),
        places=tuple({block: _anywhere(place) for block, place in places.items()} for places in first.places),
        ranges=tuple(tuple(part for call in calls for part in call.ranges[rank]) for rank in range(first.roles.nranks)),
        parts=tuple(calls),
    )


def _anywhere(place: Place) -> Place:
    """A place of which only is said what there is."""
    return Place(None if place.send is None else 0, None if place.recv is None else 0)


def _fits(bucket: Sequence[CollectiveCall], call: CollectiveCall) -> bool:
    first = bucket[0]
    return (
        call.collective is first.collective
        and call.collective.layout is not Layout.LISTED
        and call.collective.name != "barrier"
        and not (call.own_schedule or call.copies_input or first.copies_input)
        and (call.roles, call.dtype, call.op, call.weights, call.algorithm, call.own_schedule)
        == (first.roles, first.dtype, first.op, first.weights, first.algorithm, first.own_schedule)
        and max(call.count, first.count) <= MAX_FUSED_BYTES
        and sum(one.count for one in bucket) + call.count <= MAX_BUCKET_BYTES
    )

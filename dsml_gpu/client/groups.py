"""A group of collectives, which the client keeps by itself until it is whole."""

from __future__ import annotations

from dsml_gpu.client.results import CollectiveResult
from dsml_gpu.schedules import algorithms_of
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Group:
    """What `Communicator.group` gives.

    Attributes:
        result: set when the group has run.
        requests: what is in it so far.
    """

    def __init__(self) -> None:
        self.result: CollectiveResult | None = None
        self.requests: list[pb.CollectiveRequest] = []


def is_surely_valid(request: pb.CollectiveRequest) -> bool:
    """Whether the coordinator will take a request of `Collectives`, as far as can be told without asking it.

    Types, sizes and ranks were checked when the request was made of arrays. What is left are names of algorithms, which the
    coordinator may know more of, schedules, weights, and send/recvs that meet in one array.
    """
    if request.weights or request.HasField("schedule"):
        return False
    collective = pb.CollectiveRequest.Kind.Name(request.kind).lower()
    if request.algorithm not in ("", "auto") and request.algorithm not in algorithms_of(collective):
        return False
    ends = [(one.src, one.sendAddr) for one in request.sendRecvs] + [(one.dst, one.recvAddr) for one in request.sendRecvs]
    return len(set(ends)) == len(ends)

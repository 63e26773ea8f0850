"""What calls have come to, as clients are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from dsml_gpu.coordinator.ranks import Planned, Ranks
from dsml_gpu.wire import gpu_sim_pb2 as pb


@dataclass(frozen=True, slots=True)
class Done:
    """Calls that have ended well, on which ranks, and the bytes that moved."""

    ranks: Ranks
    planned: Sequence[Planned]
    moved: int


def result_of(done: Sequence[Done], lost: Sequence[pb.LostDevice], elapsed_ns: int) -> pb.CollectiveResult:
    """What a client is told of calls that have ended well, at least one.

    Args:
        lost: devices that were left behind meanwhile.
    """
    planned = [each for one in done for each in one.planned]
    algorithms = {one.algorithm for one in planned}
    bytes_sent = sum(one.moved for one in done)
    transports = {number for one in done for number in one.ranks.transports(one.planned)} if bytes_sent else ()
    last = done[-1].ranks
    return pb.CollectiveResult(
        algorithm=algorithms.pop() if len(algorithms) == 1 else "",
        transports=cast("list[pb.Transport]", sorted(transports)),
        elapsedNs=elapsed_ns,
        bytesSent=bytes_sent,
        operations=[
            pb.OperationChoice(
                kind=part.name.upper(),
                algorithm=part.algorithm,
                reason=part.choice.reason,
                predictedNs=min(round(part.choice.predicted_s * 1e9), (1 << 64) - 1),
                deviceIds=one.ranks.device_ids,
            )
            for one in done
            for each in one.planned
            for part in each.parts
        ],
        deviceIds=last.device_ids,
        epoch=last.epoch,
        lost=lost,
    )

"""What a collective did, as its answer says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsml_gpu.wire import gpu_sim_pb2 as pb


@dataclass(frozen=True, slots=True)
class OperationChoice:
    """By which algorithm an operation ran, and why.

    Attributes:
        collective, algorithm: by name.
        reason: for people.
        predicted_s: time that the coordinator's cost model predicts for the operation alone; 0 where it was not asked.
        device_ids: the devices that took part, in the order of ranks.
    """

    collective: str
    algorithm: str
    reason: str
    predicted_s: float
    device_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LostDevice:
    """A device that a communicator goes on without.

    Attributes:
        rank: that it had.
        reason: for people.
        detection_s: from when it was last known to be alive until it was given up.
        replaced_by: id of the device that has taken its place; 0: none.
    """

    device_id: int
    rank: int
    reason: str
    detection_s: float
    replaced_by: int = 0


@dataclass(frozen=True, slots=True)
class CollectiveResult:
    """What a collective, or a group of them, did.

    Attributes:
        algorithm: its name; empty for a group that ran by several.
        transports: names of the transports that carried data; empty where nothing had to move.
        elapsed_s: from the start of the coordinator's control round to the last rank's answer.
        bytes_sent: payload that all ranks together sent.
        operations: each operation in the order in which they were issued.
        device_ids: the devices that took part, in the order of ranks; of a group in whose middle one died, those of its last
            operation. Empty: nothing was run.
        epoch: of the communicator, in which it ended.
        lost: devices that were given up in the course of it.
    """

    algorithm: str
    transports: tuple[str, ...]
    elapsed_s: float
    bytes_sent: int
    operations: tuple[OperationChoice, ...] = ()
    device_ids: tuple[int, ...] = ()
    epoch: int = 0
    lost: tuple[LostDevice, ...] = ()

    @property
    def reason(self) -> str:
        """Why the algorithm was chosen; of a group, for each operation."""
        return "; ".join(dict.fromkeys(operation.reason for operation in self.operations))


def result_of(response: Any) -> CollectiveResult | None:
    """The result that an answer carries; None where the operation was queued."""
    if not response.HasField("result"):
        return None
    result = response.result
    return CollectiveResult(
        algorithm=result.algorithm,
        transports=tuple(pb.Transport.Name(number).lower() for number in result.transports),
        elapsed_s=result.elapsedNs / 1e9,
        bytes_sent=result.bytesSent,
        operations=tuple(
            OperationChoice(
                pb.CollectiveRequest.Kind.Name(choice.kind).lower(),
                choice.algorithm,
                choice.reason,
                choice.predictedNs / 1e9,
                tuple(choice.deviceIds),
            )
            for choice in result.operations
        ),
        device_ids=tuple(result.deviceIds),
        epoch=result.epoch,
        lost=tuple(
            LostDevice(one.deviceId, one.rank, one.reason, one.detectionNs / 1e9, one.replacedBy) for one in result.lost
        ),
    )

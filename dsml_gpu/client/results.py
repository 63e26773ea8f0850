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
    """

    collective: str
    algorithm: str
    reason: str
    predicted_s: float


@dataclass(frozen=True, slots=True)
class CollectiveResult:
    """What a collective, or a group of them, did.

    Attributes:
        algorithm: its name; empty for a group that ran by several.
        transports: names of the transports that carried data; empty where nothing had to move.
        elapsed_s: from the start of the coordinator's control round to the last rank's answer.
        bytes_sent: payload that all ranks together sent.
        operations: each operation in the order in which they were issued.
    """

    algorithm: str
    transports: tuple[str, ...]
    elapsed_s: float
    bytes_sent: int
    operations: tuple[OperationChoice, ...] = ()

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
            )
            for choice in result.operations
        ),
    )

"""What a coordinator is set to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, CostModel
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """How a coordinator runs collectives.

    Attributes:
        transport: number of ``enum Transport`` for communicators that ask for none.
        stall_timeout_s: a collective in which nothing moves for so long fails.
        operation_timeout_s: a group that takes longer fails, moving or not.
        max_message_bytes: of an answer.
        cost_model: by which algorithms are chosen.
        cost_model_file: takes what `SetCostModel` brings; None: it is forgotten when the coordinator ends.
        detection: when devices count as dead.
        atomic: see `RunSettings`.
        on_failure: number of ``enum OnFailure`` for communicators that ask for none.
    """

    transport: int = pb.AUTO
    stall_timeout_s: float = 30.0
    operation_timeout_s: float = 600.0
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    cost_model: CostModel = DEFAULT_COST_MODEL
    cost_model_file: Path | None = None
    detection: Detection = DEFAULT_DETECTION
    atomic: bool = True
    on_failure: int = pb.SHRINK

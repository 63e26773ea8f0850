"""Prometheus metrics; `--metrics-port` serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Counter, Histogram, start_http_server

OPERATIONS = Counter("dsml_gpu_operations", "Collectives that ended", ["collective", "algorithm", "outcome"])
OPERATION_BYTES = Counter("dsml_gpu_operation_bytes", "Buffer bytes per rank of collectives that succeeded", ["collective"])
CONTROL_ROUND_SECONDS = Histogram(
    "dsml_gpu_control_round_seconds",
    "Time from the first Execute to the last rank's answer",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60),
)


class CollectiveLike(Protocol):
    """What is counted of a collective."""

    @property
    def name(self) -> str: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def count(self) -> int: ...


def count_operations(collectives: Sequence[CollectiveLike], elapsed_s: float = 0.0, failed: bool = False) -> None:
    """Counts the collectives of one control round."""
    for collective in collectives:
        OPERATIONS.labels(collective.name, collective.algorithm, "failed" if failed else "ok").inc()
        if not failed:
            OPERATION_BYTES.labels(collective.name).inc(collective.count)
    if not failed:
        CONTROL_ROUND_SECONDS.observe(elapsed_s)


def serve(host: str, port: int) -> None:
    """Serves /metrics of this process from a thread of its own."""
    start_http_server(port, host)

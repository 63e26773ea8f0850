"""A GPU device server: device memory and collectives behind gRPC.

Importing this package is cheap: CuPy, gRPC and the servers are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsml_gpu import errors

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dsml_gpu.client import (
        CheckpointJob,
        Client,
        CollectiveResult,
        Communicator,
        Device,
        DeviceArray,
        connect,
        local,
    )

__all__ = [
    "CheckpointJob",
    "Client",
    "CollectiveResult",
    "Communicator",
    "Device",
    "DeviceArray",
    "connect",
    "errors",
    "local",
]

_FROM_CLIENT = {"CheckpointJob", "Client", "CollectiveResult", "Communicator", "Device", "DeviceArray", "connect", "local"}


def __getattr__(name: str) -> Any:
    if name in _FROM_CLIENT:
        from dsml_gpu import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

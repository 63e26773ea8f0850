"""What Python users import: `connect` or `local`, then communicators and device arrays."""

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.checkpoints import CheckpointJob
from dsml_gpu.client.client import Client, connect
from dsml_gpu.client.communicator import Communicator
from dsml_gpu.client.in_process import local
from dsml_gpu.client.results import CollectiveResult, OperationChoice

__all__ = [
    "CheckpointJob",
    "Client",
    "CollectiveResult",
    "Communicator",
    "Device",
    "DeviceArray",
    "OperationChoice",
    "connect",
    "local",
]

"""What Python users import: `connect` or `local`, then communicators and device arrays."""

from dsml_gpu.client.arrays import Device, DeviceArray
from dsml_gpu.client.client import Client, connect
from dsml_gpu.client.collectives import CollectiveResult
from dsml_gpu.client.communicator import Communicator
from dsml_gpu.client.in_process import local

__all__ = ["Client", "CollectiveResult", "Communicator", "Device", "DeviceArray", "connect", "local"]

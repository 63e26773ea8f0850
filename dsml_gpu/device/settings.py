"""What the transfers of a device server are set to."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsml_gpu.device.requests import check_slice_bytes
from dsml_gpu.errors import InvalidValue
from dsml_gpu.transport.emulation import LinkSettings
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How a server's devices move data, and where they say that they are.

    Attributes:
        slice_bytes: chunks are cut into messages of this size.
        stall_timeout_s: whatever does not move for so long fails.
        link: what the link of each device is made to look like; as fast as it is, unless told otherwise.
        host_name: of the host that the devices are on; empty: the machine's own.
        shares_memory: other processes of the same user may open the devices' memory.

    Raises:
        InvalidValue: on construction, where values do not do, or not together.
    """

    slice_bytes: int = 512 << 10
    stall_timeout_s: float = 30.0
    link: LinkSettings = field(default_factory=LinkSettings)
    host_name: str = ""
    shares_memory: bool = True

    def __post_init__(self) -> None:
        check_slice_bytes(self.slice_bytes)
        largest = max(self.slice_bytes, COPY_SLICE_BYTES)
        needed_s = self.link.transmission_s(largest) + self.link.latency_s
        if needed_s > self.stall_timeout_s:
            raise InvalidValue(
                f"a message of {largest} bytes takes {needed_s:.3g} s over the emulated link, longer than "
                f"the stall timeout of {self.stall_timeout_s:g} s"
            )

"""What one control round and pipelining are worth: the ring all-reduce against one that is driven chunk by chunk.

Three things are measured in turn on the same device servers, a process each, over gRPC:

ring            The coordinator's all-reduce: one control round, then chunks go from device to device, many at a time.
chunk by chunk  The same transfers, but the driver tells the sender and the receiver of one transfer what to do (an RPC
                to each, side by side), waits for both, and goes on to the next.
bytes only      As many bytes in as many transfers, one at a time, but each is only written by the driver to the memory
                of the receiver: no control message, no sending device, no reduction. No driver that goes chunk by chunk
                does less.

Exit status 1 when a result is wrong, or when ring does not take less than half the time of chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import count_wrong, expected, inputs, time_interleaved
from dsml_gpu.client import connect
from dsml_gpu.schedules import Transfer, chunk_bounds
from dsml_gpu.schedules.ring import ring_all_reduce
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES, channel_options, device_stub

DEVICES = 4
FLOAT64 = np.dtype(np.float64)
RING, CHUNK_BY_CHUNK, BYTES_ONLY = "ring", "chunk by chunk", "bytes only"
#: Ring must take less than this part of the time of chunk by chunk.
ALLOWED_RATIO = 0.5


class ChunkDriver:
    """Drives device servers by itself, one chunk at a time; a buffer of float64 on each.

    Args:
        addresses: host:port of the device server of each rank.
        elements: length of the buffers, which it allocates.
    """

    def __init__(self, addresses: Sequence[str], elements: int) -> None:
        self._elements = elements
        self._nbytes = elements * FLOAT64.itemsize
        self._schedule = ring_all_reduce(len(addresses))
        self._channels = [grpc.insecure_channel(address, options=channel_options()) for address in addresses]
        self._stubs = [device_stub(channel) for channel in self._channels]
        self._comm_id = secrets.randbits(62)
        self._addrs = [self._join(rank, addresses) for rank in range(len(addresses))]
        self._payload = np.zeros(self._nbytes, dtype=np.uint8)

    def _join(self, rank: int, addresses: Sequence[str]) -> int:
        """Makes a device a rank, and returns the address of its buffer."""
        peers = [pb.Peer(address=address, transport=pb.GRPC) for address in addresses]
        self._stubs[rank].JoinComm(pb.JoinCommRequest(commId=self._comm_id, rank=rank, peers=peers))
        response = self._stubs[rank].Malloc(pb.MallocRequest(numBytes=self._nbytes, commId=self._comm_id))
        return int(response.memAddr.value)

    def close(self) -> None:
        """Gives the devices back."""
        for stub, channel in zip(self._stubs, self._channels, strict=True):
            stub.LeaveComm(pb.LeaveCommRequest(commId=self._comm_id))
            channel.close()

    def __enter__(self) -> ChunkDriver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def transfers(self) -> Iterator[Transfer]:
        """The ring's transfers, in order."""
        for step in self._schedule.steps:
            yield from step

    def all_reduce(self) -> None:
        """Sums the buffers, in place."""
        for transfer in self.transfers():
            stream_id = secrets.randbits(62) + 1
            into = pb.Move.REDUCE if transfer.reduce else pb.Move.COPY
            send = self._request(transfer.src, transfer.dst, transfer.chunk, pb.Move.SEND, sendStreamId=stream_id)
            receive = self._request(transfer.dst, transfer.src, transfer.chunk, into, recvStreamId=stream_id)
            sent = self._stubs[transfer.src].Execute.future(send)
            self._stubs[transfer.dst].Execute(receive)
            sent.result()

    def _request(self, rank: int, peer: int, chunk: int, kind: Any, **stream: int) -> pb.ExecuteRequest:
        """One rank's part in one transfer."""
        step = pb.Step(moves=[pb.Move(kind=kind, peer=peer, chunk=chunk)])
        buffer = pb.Block(count=self._nbytes, sendAddr=self._addrs[rank], recvAddr=self._addrs[rank])
        return pb.ExecuteRequest(
            commId=self._comm_id,
            programs=[pb.Program(parts=self._schedule.parts, nblocks=1, steps=[step])],
            operations=[pb.Operation(blocks=[buffer], dtype=pb.FLOAT64, op=pb.SUM)],
            links=[pb.Link(peer=peer, **stream)],
        )

    def bytes_only(self) -> None:
        """Writes to the receiver of each transfer what the transfer would bring it; no all-reduce."""
        for transfer in self.transfers():
            bounds = chunk_bounds(self._elements, self._schedule.nchunks, transfer.chunk)
            first, last = (bound * FLOAT64.itemsize for bound in bounds)
            self._write(transfer.dst, first, self._payload[first:last])

    def write(self, sources: Sequence[np.ndarray]) -> None:
        """Fills the buffers."""
        for rank, source in enumerate(sources):
            self._write(rank, 0, source.view(np.uint8))

    def _write(self, rank: int, offset: int, data: np.ndarray) -> None:
        header = pb.DataChunk(memAddr=pb.MemAddr(value=self._addrs[rank] + offset), numBytes=data.nbytes)

        def chunks() -> Iterator[Chunk]:
            yield Chunk(b"", header)
            for start in range(0, data.nbytes, COPY_SLICE_BYTES):
                yield Chunk(data[start : start + COPY_SLICE_BYTES])

        self._stubs[rank].StreamHostToDevice(chunks())

    def read(self) -> list[np.ndarray]:
        """The buffers."""
        return [self._read(stub, addr) for stub, addr in zip(self._stubs, self._addrs, strict=True)]

    def _read(self, stub: Any, addr: int) -> np.ndarray:
        request = pb.StreamDeviceToHostRequest(memAddr=pb.MemAddr(value=addr), numBytes=self._nbytes)
        return np.frombuffer(b"".join(chunk.data for chunk in stub.StreamDeviceToHost(request)), dtype=FLOAT64)


def measure(elements: int, repeat: int) -> tuple[dict[str, float], dict[str, int]]:
    """Median seconds of each of the three by name, and how many elements the two all-reduces got wrong."""
    with (
        Fleet(DEVICES) as fleet,
        connect(fleet.address) as client,
        client.communicator(DEVICES, transport="grpc") as comm,
        ChunkDriver([device.address for device in comm.devices], elements) as driver,
    ):
        sources = inputs(DEVICES, elements, FLOAT64, "sum")
        right = expected(sources, "sum")
        arrays = comm.array(sources)
        comm.all_reduce(arrays)
        driver.write(sources)
        driver.all_reduce()
        wrong = {
            RING: sum(count_wrong(array.get(), right) for array in arrays),
            CHUNK_BY_CHUNK: sum(count_wrong(buffer, right) for buffer in driver.read()),
        }
        work: dict[str, Callable[[], object]] = {
            RING: partial(comm.all_reduce, arrays),
            CHUNK_BY_CHUNK: driver.all_reduce,
            BYTES_ONLY: driver.bytes_only,
        }
        times_s = time_interleaved(work, repeat)
    return {name: median(runs_s) for name, runs_s in times_s.items()}, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=450_000, help="float64 in each rank's buffer")
    parser.add_argument("--repeat", type=int, default=15, help="runs of each, whose median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()

    median_s, wrong = measure(arguments.elements, arguments.repeat)
    print(f"all-reduce of {arguments.elements} float64 on {DEVICES} device servers, medians of {arguments.repeat} runs")
    print(f"{'':<16}{'time':>10}  {'ring takes':>10}  {'wrong elements':>14}")
    for name, time_s in median_s.items():
        print(f"{name:<16}{time_s * 1e3:7.1f} ms  {median_s[RING] / time_s:9.2f}x  {wrong.get(name, '-'):>14}")
    if arguments.json is not None:
        figures = {
            "elements": arguments.elements,
            "repeat": arguments.repeat,
            "median_s": median_s,
            "ring_to_chunk_by_chunk": median_s[RING] / median_s[CHUNK_BY_CHUNK],
            "ring_to_bytes_only": median_s[RING] / median_s[BYTES_ONLY],
            "wrong_elements": wrong,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if any(wrong.values()):
        print("FAILED: wrong elements")
        return 1
    if median_s[RING] >= ALLOWED_RATIO * median_s[CHUNK_BY_CHUNK]:
        print(f"FAILED: ring takes more than {ALLOWED_RATIO} of the time of chunk by chunk")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

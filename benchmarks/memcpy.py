"""Copies between host and device memory: through shared memory, as gRPC streams, and what a bare gRPC stream can do.

A device server in a process of its own, and its coordinator in another; one client. In turn, in each direction:

shared      `DeviceArray.set` and `get`: this process copies to and from the device's memory, which it has open.
stream      StreamHostToDevice and StreamDeviceToHost of the coordinator, as a client on another host uses them.
bare        As many bytes in messages of the same size through a bare gRPC stream: a blocking client as above, an asyncio
            server in a process of its own that throws them away, or sends the same bytes again and again.

Exit status 1 when a result is wrong, shared is slower than 4 GB/s for 256 MB, or stream is slower than 0.8 times bare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import time_interleaved
from dsml_gpu.cli.units import format_size, parse_size
from dsml_gpu.client import DeviceArray, connect
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES, channel_options

LEAST_SHARED_GB_PER_S, SHARED_SIZE = 4.0, 256_000_000
LEAST_OF_BARE = 0.8


class BareServer:
    """A process with a bare gRPC service: ``/bare/take`` discards a stream, ``/bare/give`` sends as many bytes as asked."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self._process = context.Process(target=_serve_bare, args=(there,), daemon=True)
        self._process.start()
        self._channel = grpc.insecure_channel(f"127.0.0.1:{here.recv()}", options=channel_options())
        self._take = self._channel.stream_unary("/bare/take")
        self._give = self._channel.unary_stream("/bare/give")

    def take(self, data: np.ndarray) -> None:
        """Sends bytes to the server."""

        def messages() -> Iterator[bytes]:
            for start in range(0, data.nbytes, COPY_SLICE_BYTES):
                yield data[start : start + COPY_SLICE_BYTES].tobytes()

        assert int.from_bytes(self._take(messages(), timeout=60), "little") == data.nbytes

    def give(self, out: np.ndarray) -> None:
        """Gets bytes from the server, to where a copy would bring them."""
        filled = 0
        for message in self._give(out.nbytes.to_bytes(8, "little"), timeout=60):
            out[filled : filled + len(message)] = np.frombuffer(message, np.uint8)
            filled += len(message)
        assert filled == out.nbytes

    def close(self) -> None:
        """Ends the process."""
        self._channel.close()
        self._process.terminate()
        self._process.join()


def _serve_bare(pipe: Connection) -> None:
    async def take(messages: AsyncIterator[bytes], context: Any) -> bytes:
        total = 0
        async for message in messages:
            total += len(message)
        return total.to_bytes(8, "little")

    async def give(request: bytes, context: Any) -> AsyncIterator[bytes]:
        left = int.from_bytes(request, "little")
        while left:
            piece = min(left, COPY_SLICE_BYTES)
            yield bytes(piece)
            left -= piece

    async def serve() -> None:
        server = grpc.aio.server(options=channel_options())
        handlers = {
            "take": grpc.stream_unary_rpc_method_handler(take),
            "give": grpc.unary_stream_rpc_method_handler(give),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await server.wait_for_termination()

    asyncio.run(serve())


def measure(array: DeviceArray, source: np.ndarray, bare: BareServer, repeat: int) -> dict[str, float]:
    """GB/s by name of what was measured."""
    connection, device_id = array.device._connection, array.device.device_id
    there, back = source.view(np.uint8), np.empty(source.nbytes, np.uint8)
    work: dict[str, Callable[[], object]] = {
        "shared, to device": partial(array.set, source),
        "shared, to host": partial(array.get, back.view(source.dtype)),
        "stream, to device": partial(connection.write, device_id, array.addr, there),
        "stream, to host": partial(connection.read, device_id, array.addr, back),
        "bare, to device": partial(bare.take, there),
        "bare, to host": partial(bare.give, back),
    }
    for name in ("shared", "stream"):
        array.set(np.zeros_like(source))
        work[f"{name}, to device"]()
        back[:] = 0
        work[f"{name}, to host"]()
        if not np.array_equal(there, back):
            raise SystemExit(f"{name}: what came back is not what was sent")
    times_s = time_interleaved(work, repeat)
    return {name: source.nbytes / median(times) / 1e9 for name, times in times_s.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1MB,16MB,256MB")
    parser.add_argument("--repeat", type=int, default=7, help="runs whose median counts")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bare = BareServer()
    rows: list[dict[str, Any]] = []
    failures = []
    try:
        with Fleet(1) as fleet, connect(fleet.address) as client, client.communicator(1) as comm:
            for size in map(parse_size, options.sizes.split(",")):
                source = np.random.default_rng(size).random(size // 8)
                with comm.devices[0].array(source) as array:
                    speeds = measure(array, source, bare, options.repeat)
                for name, speed in speeds.items():
                    print(f"{format_size(size):>10}  {name:<18}{speed:>8.2f} GB/s", flush=True)
                    rows.append({"bytes": size, "what": name, "gb_per_s": speed})
                for where in ("to device", "to host"):
                    ratio = speeds[f"stream, {where}"] / speeds[f"bare, {where}"]
                    print(f"{format_size(size):>10}  {'stream / bare, ' + where:<25}{ratio:>6.2f}")
                    if size < SHARED_SIZE:
                        continue
                    if ratio < LEAST_OF_BARE:
                        failures.append(f"{format_size(size)} {where}: stream is {ratio:.2f} of bare, not {LEAST_OF_BARE}")
                    shared = speeds[f"shared, {where}"]
                    if shared < LEAST_SHARED_GB_PER_S:
                        failures.append(f"{format_size(size)} {where}: shared is {shared:.2f} GB/s")
    finally:
        bare.close()
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print("\n" + "\n".join(failures or ["all as it should be"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""One process of a ring that only passes bytes over gRPC; `bare_ring.py` starts them. Nothing of the package is used.

Standard input tells it first its right neighbour, then how long each message of each round is; standard output tells where
it listens, and after each round that all bytes of the round have come and gone.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc

METHOD = "StreamSend"
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
#: What the servers of the package tell glibc: keep freed memory of up to 4 MiB for the next messages, in one heap.
KEPT = {-3: 4 << 20, -1: 16 << 20, -8: 1}


def tell(word: object) -> None:
    print(word, flush=True)


def lengths_of_rounds() -> Iterator[list[int]]:
    for line in sys.stdin:
        yield json.loads(line)


def handler(behavior: Any) -> grpc.GenericRpcHandler:
    return grpc.method_handlers_generic_handler("bare.Ring", {METHOD: grpc.stream_unary_rpc_method_handler(behavior)})


async def with_asyncio() -> None:
    came = asyncio.Queue[int]()

    async def receive(messages: AsyncIterator[bytes], context: Any) -> bytes:
        async for message in messages:
            came.put_nowait(len(message))
        return b""

    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers((handler(receive),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    tell(f"127.0.0.1:{port}")
    loop = asyncio.get_running_loop()
    async with grpc.aio.insecure_channel(sys.stdin.readline().strip(), options=OPTIONS) as channel:
        call = channel.stream_unary(f"/bare.Ring/{METHOD}")()

        async def send(lengths: list[int]) -> None:
            messages = {length: bytes(length) for length in set(lengths)}
            for length in lengths:
                await call.write(messages[length])

        rounds = lengths_of_rounds()
        while (lengths := await loop.run_in_executor(None, next, rounds, None)) is not None:
            sending = asyncio.ensure_future(send(lengths))
            missing = sum(lengths)
            while missing:
                missing -= await came.get()
            await sending
            tell("done")
        await call.done_writing()
        await call
    await server.stop(1)


def with_threads() -> None:
    came = SimpleQueue[int]()

    def receive(messages: Iterator[bytes], context: Any) -> bytes:
        for message in messages:
            came.put(len(message))
        return b""

    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    server.add_generic_rpc_handlers((handler(receive),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    tell(f"127.0.0.1:{port}")
    with grpc.insecure_channel(sys.stdin.readline().strip(), options=OPTIONS) as channel:
        outgoing = SimpleQueue[bytes | None]()
        call = threading.Thread(target=channel.stream_unary(f"/bare.Ring/{METHOD}"), args=(iter(outgoing.get, None),))
        call.start()
        for lengths in lengths_of_rounds():
            messages = {length: bytes(length) for length in set(lengths)}
            for length in lengths:
                outgoing.put(messages[length])
            missing = sum(lengths)
            while missing:
                missing -= came.get()
            tell("done")
        outgoing.put(None)
        call.join()
    server.stop(1)


def main() -> None:
    variant, memory = sys.argv[1:]
    if memory == "kept":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for parameter, value in KEPT.items() if mallopt is not None else ():
            mallopt(parameter, value)
    if variant == "asyncio":
        asyncio.run(with_asyncio())
    else:
        with_threads()


if __name__ == "__main__":
    main()

"""A network that can lose everything: proxies in front of servers, which stop forwarding, or delay, and never close.

Each device server listens on a host of its own (127.1.0.k) and is known by its proxy (127.2.0.k), so that nothing but the
proxy's one port leads to it. What a device server sends to others passes their proxies, and is told by who owns the other
end of the connection. All this is Linux's: other systems have one loopback address, and no /proc.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What is read at once, and what may lie in a proxy per connection and direction.
_CHUNK_BYTES = 1 << 18
_QUEUE_BYTES = 1 << 24


@dataclass
class Condition:
    """How the network treats one process.

    Attributes:
        open: what comes from it and goes to it is forwarded.
        delay_s: later by so much.
        chunks: how many have been held back or delayed.
    """

    open: asyncio.Event = field(default_factory=asyncio.Event)
    delay_s: float = 0.0
    chunks: int = 0

    def __post_init__(self) -> None:
        self.open.set()


class Network:
    """The proxies of a fleet, in a thread of their own. Thread-safe. Ends with `close`.

    Processes have names here: the ids of their devices.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._conditions: dict[int, Condition] = {}
        self._pids: dict[int, int] = {}
        self._servers: list[asyncio.Server] = []
        self._pumps: set[asyncio.Task[None]] = set()

    def proxy(self, host: str, target: Callable[[], str], name: int | None = None) -> str:
        """A proxy in front of a server; returns host:port.

        Args:
            host: to listen on.
            target: tells host:port of the server, for each connection anew; empty: there is none.
            name: of the process behind it; None: one that is never cut off.
        """
        address: str = self._run(self._listen(host, target, name))
        return address

    def belongs(self, pid: int, name: int) -> None:
        """A process has a name from now on."""
        self._pids[pid] = name

    def cut_off(self, name: int) -> None:
        """Nothing reaches the process any more, nothing from it reaches anybody, and nobody is told."""
        self._call(lambda: self._condition(name).open.clear())

    def delay(self, name: int, delay_s: float) -> None:
        """All that comes from the process, and all that goes to it, is late by so much."""

        def change() -> None:
            self._condition(name).delay_s = delay_s

        self._call(change)

    def heal(self, name: int) -> None:
        """All is forwarded, at once, also what has waited."""

        def change() -> None:
            condition = self._condition(name)
            condition.delay_s = 0.0
            condition.open.set()

        self._call(change)

    def touched(self, name: int) -> int:
        """How many pieces were held back or delayed."""
        return self._condition(name).chunks

    def close(self) -> None:
        """Closes all proxies. Idempotent."""
        if not self._thread.is_alive():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _condition(self, name: int) -> Condition:
        return self._conditions.setdefault(name, Condition())

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _call(self, change: Callable[[], None]) -> None:
        """Returns when the change is made."""

        async def make() -> None:
            change()

        self._run(make())

    async def _listen(self, host: str, target: Callable[[], str], name: int | None) -> str:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            caller = self._caller(writer.get_extra_info("peername"))
            conditions = [self._condition(one) for one in (name, caller) if one is not None]
            for condition in conditions:
                await condition.open.wait()
            there_host, _, there_port = target().rpartition(":")
            with suppress(OSError, ValueError):  # nobody is there: this connection ends
                there_reader, there_writer = await asyncio.open_connection(there_host, int(there_port))
                for source, sink in ((reader, there_writer), (there_reader, writer)):
                    pump = asyncio.ensure_future(_pump(source, sink, conditions))
                    self._pumps.add(pump)
                    pump.add_done_callback(self._pumps.discard)
                return
            writer.close()

        server = await asyncio.start_server(serve, host, 0, limit=_CHUNK_BYTES)
        self._servers.append(server)
        bound_host, port = server.sockets[0].getsockname()[:2]
        return f"{bound_host}:{port}"

    def _caller(self, peer: tuple[str, int]) -> int | None:
        """Name of the process that a connection comes from; None: it has none."""
        inode = inode_of(peer)
        return next((name for pid, name in list(self._pids.items()) if inode and has_open(pid, inode)), None)

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for pump in list(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, conditions: list[Condition]) -> None:
    """Forwards one direction of a connection, until it ends."""
    loop = asyncio.get_running_loop()
    late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE_BYTES // _CHUNK_BYTES)

    async def read() -> None:
        while True:
            try:
                data = await source.read(_CHUNK_BYTES)
            except OSError:
                data = b""
            await late.put((loop.time(), data))
            if not data:
                return

    reading = asyncio.ensure_future(read())
    try:
        while True:
            came, data = await late.get()
            for condition in conditions:
                if condition.delay_s or not condition.open.is_set():
                    condition.chunks += 1
                if condition.delay_s:
                    await asyncio.sleep(max(0.0, came + condition.delay_s - loop.time()))
                # An end is as lost as data: who is cut off does not hear of it.
                await condition.open.wait()
            if not data:
                return
            sink.write(data)
            await sink.drain()
    except OSError:
        return  # the other end is gone, and the other direction's pump closes this one
    finally:
        reading.cancel()
        sink.close()


def inode_of(local: tuple[str, int]) -> int:
    """Number of the socket with this local address; 0: there is none here."""
    host, port = local[:2]
    address = "".join(f"{int(part):02X}" for part in reversed(host.split("."))) + f":{port:04X}"
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        if fields[1] == address:
            return int(fields[9])
    return 0


def has_open(pid: int, inode: int) -> bool:
    """Whether a process has a socket open."""
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:  # it may have ended
        for entry in entries:
            with suppress(OSError):  # it was closed meanwhile
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return True
    return False

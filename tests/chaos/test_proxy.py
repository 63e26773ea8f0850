"""The network of `dsml-gpu chaos blackhole` and `delay`: what it loses, and what it only holds back."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from dsml_gpu.chaos.proxy import Network, has_open, inode_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8, and /proc")
LIMIT_S = 10.0
VICTIM = 7


@pytest.fixture
def network() -> Iterator[Network]:
    with closing(Network()) as network:
        yield network


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back all it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), LIMIT_S)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        assert part, "it was closed"
        data += part
    return data


def assert_silent(connection: socket.socket) -> None:
    connection.settimeout(0.1)
    with pytest.raises(TimeoutError):
        connection.recv(1)
    connection.settimeout(LIMIT_S)


def test_it_forwards_everything(network: Network, echo: str) -> None:
    with connect(network.proxy("127.2.0.1", lambda: echo, VICTIM)) as connection:
        sent = os.urandom(3 << 20)
        threading.Thread(target=connection.sendall, args=(sent,), daemon=True).start()
        assert receive(connection, len(sent)) == sent
        assert network.touched(VICTIM) == 0


def test_who_is_cut_off_hears_nothing_and_gets_all_when_it_is_over(network: Network, echo: str) -> None:
    address = network.proxy("127.2.0.1", lambda: echo, VICTIM)
    with connect(address) as connection:
        connection.sendall(b"one")
        assert receive(connection, 3) == b"one"
        network.cut_off(VICTIM)
        connection.sendall(b"two")
        with connect(address) as late:
            late.sendall(b"three")
            assert_silent(connection)
            assert_silent(late)
            network.heal(VICTIM)
            assert receive(connection, 3) == b"two"
            assert receive(late, 5) == b"three"
        assert network.touched(VICTIM) > 0


def test_what_comes_from_who_is_cut_off_is_lost_too(network: Network, echo: str) -> None:
    """By the owner of the connection's other end: this process, here."""
    address = network.proxy("127.2.0.1", lambda: echo)
    network.belongs(os.getpid(), VICTIM)
    with connect(address) as connection:
        assert has_open(os.getpid(), inode_of(connection.getsockname()))
        connection.sendall(b"one")
        assert receive(connection, 3) == b"one"
        network.cut_off(VICTIM)
        connection.sendall(b"two")
        assert_silent(connection)
        network.heal(VICTIM)
        assert receive(connection, 3) == b"two"


def test_what_is_delayed_comes_later_and_in_order(network: Network, echo: str) -> None:
    with connect(network.proxy("127.2.0.1", lambda: echo, VICTIM)) as connection:
        network.delay(VICTIM, 0.1)
        started = time.monotonic()
        for number in range(5):
            connection.sendall(bytes([number]))
            time.sleep(0.01)
        assert receive(connection, 5) == bytes(range(5))
        # There and back; what is sent while other things are under way does not wait for them.
        assert 0.2 <= time.monotonic() - started < 0.6
        assert network.touched(VICTIM) > 0


def test_a_server_that_is_not_there(network: Network) -> None:
    with connect(network.proxy("127.2.0.1", lambda: "", VICTIM)) as connection:
        assert connection.recv(1) == b""

"""The end of a lane (`lane`) for blocking clients, of which many threads may call at a time."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

from dsml_gpu.errors import NoAnswer, Unavailable
from dsml_gpu.wire.lane import (
    ANSWER,
    CANCEL,
    HEADER,
    REQUEST,
    answer_of,
    can_have_lanes,
    is_of_this_user,
    refusal_of_frame,
    request_payload,
)


class LaneClosed(Exception):
    """The server of the lane is not there (any more); the request was not sent."""


class BlockingLanes:
    """Lanes to one server, one for each call under way. Thread-safe.

    Args:
        name: of the server's lane (`lane.LaneServer.name`).
        service: its service in the contract.
    """

    def __init__(self, name: str, service: str) -> None:
        self._name = name
        self._service = service
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._closed = not name or not can_have_lanes()

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """One RPC.

        Raises:
            LaneClosed: nothing was sent; it can go by gRPC.
            MessageTooLarge: the request is not for a lane; nothing was sent.
            DsmlError: as over gRPC (`status.error_of`).
        """
        payload = request_payload(method, request)
        deadline_s = time.monotonic() + timeout_s
        lane = self._take()
        sent = False
        try:
            # Each lane carries one call at a time, so calls need no numbers.
            lane.settimeout(timeout_s)
            lane.sendall(HEADER.pack(len(payload), 0, REQUEST) + payload)
            sent = True
            length, _, kind = HEADER.unpack(_receive(lane, HEADER.size, deadline_s))
            answer = _receive(lane, length, deadline_s)
        except TimeoutError:
            _give_up(lane, sent)
            raise NoAnswer("no answer before the call's deadline") from None
        except OSError as error:
            lane.close()
            raise Unavailable(f"the connection broke: {error}") from None
        except BaseException:
            _give_up(lane, sent)
            raise
        self._give_back(lane)
        if kind == ANSWER:
            return answer_of(self._service, method, answer)
        raise refusal_of_frame(answer)

    def close(self) -> None:
        """Closes all lanes; calls under way end. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for lane in idle:
            lane.close()

    def _take(self) -> socket.socket:
        while True:
            with self._lock:
                if self._closed:
                    raise LaneClosed
                lane = self._idle.pop() if self._idle else None
            if lane is None:
                return self._open()
            if _is_quiet(lane):
                return lane
            lane.close()  # its server has ended, or says what nobody asked

    def _open(self) -> socket.socket:
        lane = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lane.connect(f"\0{self._name}")
            if is_of_this_user(lane):
                return lane
        except OSError:
            pass
        lane.close()
        self.close()
        raise LaneClosed

    def _give_back(self, lane: socket.socket) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(lane)
                return
        lane.close()


def _give_up(lane: socket.socket, sent: bool) -> None:
    """Closes a lane whose call nobody waits for any more, and says so: that it ends could also be an accident."""
    if sent:  # otherwise the frame would pass for the rest of the request
        with suppress(OSError):
            lane.settimeout(0)
            lane.sendall(HEADER.pack(0, 0, CANCEL))
    lane.close()


def _is_quiet(lane: socket.socket) -> bool:
    """Whether a lane is open and nothing has come on it."""
    lane.settimeout(0)
    with suppress(BlockingIOError):
        lane.recv(1, socket.MSG_PEEK)
        return False
    return True


def _receive(lane: socket.socket, nbytes: int, deadline_s: float) -> bytes:
    received = bytearray()
    while len(received) < nbytes:
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        lane.settimeout(remaining_s)
        piece = lane.recv(nbytes - len(received))
        if not piece:
            raise ConnectionResetError("the server ended it")
        received += piece
    return bytes(received)

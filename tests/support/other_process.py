"""A process of its own that has shared memory, or opens that of others, and does with it what it is told."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from dsml_gpu.errors import MemoryNotShared
from dsml_gpu.memory.shared import SharedHandle, SharedRange, boot_id, open_shared

ROOT = Path(__file__).parents[2]
_ANSWER_TIMEOUT_S = 20.0
_PR_SET_DUMPABLE = 4


class OtherProcess:
    """Ends with its ``with`` block, or by `kill`.

    Args:
        user: id of the user that it is a process of; None: of ours. Only root may.
    """

    def __init__(self, user: int | None = None) -> None:
        # The module is imported before the user changes, who may not be allowed to read it.
        start = f"import tests.support.other_process as m; m.serve({user})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def make(self, nbytes: int) -> SharedHandle:
        """Has it make memory of its own."""
        return _handle(self._ask(make=nbytes))

    def open(self, handle: SharedHandle) -> None:
        """Has it open memory of somebody else's. Raises MemoryNotShared, as it does."""
        refusal = self._ask(open=_message(handle))
        if refusal is not None:
            raise MemoryNotShared(refusal)

    def write(self, start: int, data: bytes) -> None:
        """To the memory that it has made or opened last."""
        self._ask(write=[start, base64.b64encode(data).decode()])

    def read(self, start: int, nbytes: int) -> bytes:
        return base64.b64decode(self._ask(read=[start, nbytes]))

    def kill(self) -> None:
        """As by kill -9. Idempotent."""
        self._process.kill()
        self._process.wait(_ANSWER_TIMEOUT_S)

    def _ask(self, **question: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        assert select.select([stdout], [], [], _ANSWER_TIMEOUT_S)[0], f"no answer to {[*question]}"
        line = stdout.readline()
        assert line, f"the process ended instead of an answer to {[*question]}; its traceback is in our error output"
        return json.loads(line)

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def _message(handle: SharedHandle) -> dict[str, Any]:
    return asdict(handle) | {"cuda_ipc_handle": handle.cuda_ipc_handle.hex()}


def _handle(message: dict[str, Any]) -> SharedHandle:
    return SharedHandle(**message | {"cuda_ipc_handle": bytes.fromhex(message["cuda_ipc_handle"])})


def serve(user: int | None) -> None:
    """The other process."""
    if user is not None:
        boot_id()  # imports a codec
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        # Who changes its user is closed to all others until it executes something, as a process of that user would have.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
    own, array = None, None
    for line in sys.stdin:
        ((question, value),) = json.loads(line).items()
        answer: Any = None
        if question == "make":
            own = SharedRange(value)
            array, answer = own.array, _message(own.handle())
        elif question == "open":
            try:
                array = open_shared(_handle(value))
            except MemoryNotShared as refusal:
                answer = str(refusal)
        else:
            assert array is not None, "no memory was made or opened"
            start = value[0]
            if question == "write":
                data = base64.b64decode(value[1])
                array[start : start + len(data)] = bytearray(data)
            else:
                answer = base64.b64encode(array[start : start + value[1]].tobytes()).decode()
        print(json.dumps(answer), flush=True)

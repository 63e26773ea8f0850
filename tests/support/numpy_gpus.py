"""The command ``dsml-gpu`` on a machine with GPUs, as far as a machine without any can be one.

Each GPU that ``--gpu`` names is a piece of host memory with that number; without the option there are two, 0 and 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

from dsml_gpu.cli import main, serve
from dsml_gpu.memory.backend import NUMPY, Backend

#: As `processes.COMMAND`.
COMMAND = (sys.executable, __file__)


def select_backends(name: str, gpus: Sequence[int] = ()) -> tuple[tuple[Backend, ...], str]:
    """In place of `dsml_gpu.memory.backend.select_backends`."""
    return tuple(replace(NUMPY, gpu=gpu) for gpu in gpus or (0, 1)), "host memory in place of GPUs"


if __name__ == "__main__":
    with mock.patch.object(serve, "select_backends", select_backends):
        main.main()

"""What all tests share: the environment of the servers that they start."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Nearly all servers here live for a few small collectives, and numba would cost each more than everything else that it does:
# a second of one core. What compiled reductions give is tested in this process, and between processes where a module asks
# for `compiling_servers`. Whoever sets the variable decides for all others.
os.environ.setdefault("DSML_GPU_COMPILE", "0")


@pytest.fixture(scope="module")
def compiling_servers() -> Iterator[None]:
    """Servers that start meanwhile compile their reductions, as they do by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSML_GPU_COMPILE", "1")
        yield

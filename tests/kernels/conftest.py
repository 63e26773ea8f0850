"""The kernels on the host, built once."""

from __future__ import annotations

import pytest

from dsml_gpu.reduction import kernels
from tests.kernels.on_cpu import SANITIZE, Program, build, sanitizes


def all_instantiations() -> list[str]:
    return [name for names in kernels.instantiations().values() for name in names]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """All instantiations."""
    return build(tmp_path_factory.mktemp("kernels") / "plain", kernels.directory(), all_instantiations())


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """All instantiations, with the address sanitizer and the one for undefined behaviour."""
    if not sanitizes():
        pytest.skip("the C++ compiler here has no working sanitizers")
    return build(tmp_path_factory.mktemp("kernels") / "sanitized", kernels.directory(), all_instantiations(), SANITIZE)

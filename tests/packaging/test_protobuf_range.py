"""The two ends of the range of dependencies that pyproject.toml names: installed exactly, and used.

The committed stubs are code of one protoc for every protobuf of the range (proto/generate.py says why). That they work
at both ends is a claim about versions which nobody has on their machine, and only a test like this holds it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import Distribution, make_environment, run

#: The newest that this range was tried with. Raise it, and the upper bound where a major version is new, after a run.
NEWEST = ("protobuf==7.36.2", "grpcio==1.85.1", "grpcio-health-checking==1.85.1", "grpcio-reflection==1.85.1")

#: Prints the versions after a collective over real gRPC between two devices.
ROUND_TRIP = """
import google.protobuf, grpc, numpy as np
import dsml_gpu

with dsml_gpu.local(devices=2) as client, client.communicator(2) as comm:
    arrays = comm.array([np.arange(5.0), np.ones(5)])
    comm.all_reduce(arrays, op="sum", algorithm="ring")
    for array in arrays:
        np.testing.assert_array_equal(array.get(), np.arange(5.0) + 1)
print(f"protobuf=={google.protobuf.__version__} grpcio=={grpc.__version__}")
"""


def lower_bounds(distribution: Distribution) -> list[str]:
    bounds = []
    for requirement in distribution.required_by(""):
        (lowest,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        bounds.append(f"{requirement.name}=={lowest}")
    return bounds


def use(programs: Path, cwd: Path) -> str:
    """Run the round trip and the command line; return the versions that did it."""
    # Warnings are errors: protobuf announces by them that a version's code will stop working. But for one, by which
    # Python 3.12 says of protobuf 4's own C code that Python 3.14 will not run it, where pip takes a later protobuf.
    warnings = ("-W", "error", "-W", "ignore:Type google._upb._message:DeprecationWarning")
    printed = run([programs / "python", *warnings, "-c", ROUND_TRIP], cwd=cwd)
    assert "coordinator" in run([programs / "dsml-gpu", "--help"], cwd=cwd)
    return printed


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the oldest numpy and grpcio have wheels up to Python 3.12")
def test_a_round_trip_with_every_lower_bound(distribution: Distribution, tmp_path: Path):
    bounds = lower_bounds(distribution)
    programs = make_environment(tmp_path / "env", [distribution.wheel, *bounds])

    printed = use(programs, tmp_path)

    assert set(printed.split()) <= set(bounds)


@pytest.mark.timeout(300)
def test_a_round_trip_with_the_newest_protobuf_and_grpc(distribution: Distribution, tmp_path: Path):
    programs = make_environment(tmp_path / "env", [distribution.wheel, *NEWEST])

    printed = use(programs, tmp_path)

    assert set(printed.split()) <= set(NEWEST)

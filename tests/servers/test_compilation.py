"""Whether a server compiles its reductions: by default, and not where it is told so."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import running
from tests.support.rpc import CALL_TIMEOUT_S, rpc_to

pytest.importorskip("numba")


@pytest.mark.parametrize(
    ("variable", "options", "compiles"),
    [(None, [], True), ("0", [], False), ("0", ["--compile"], True), (None, ["--no-compile"], False)],
    ids=["default", "variable", "option before variable", "option"],
)
def test_reductions_are_compiled_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, options: list[str], compiles: bool
):
    monkeypatch.delenv("DSML_GPU_COMPILE")
    if variable is not None:
        monkeypatch.setenv("DSML_GPU_COMPILE", variable)
    with running(tmp_path, "coordinator", *options) as server, rpc_to(server.address) as rpc:
        buffers = [pb.RankBuffers(sendAddr=0, recvAddr=0)] * 2
        request = pb.CollectiveRequest(
            commId=rpc.comm_init(2).commId, kind="ALL_REDUCE", counts=[64], buffers=buffers, dtype="BFLOAT16", op="SUM"
        )
        rpc.coordinator.Collective(request, timeout=CALL_TIMEOUT_S)
        assert server.ends(signal.SIGTERM) == 0  # not before what is being compiled is compiled
        assert ("compiled the reduction" in server.stderr) == compiles, server.stderr

"""What gpu_report.sh does in Python: asks whether the proof can run here, and writes its results down."""

from __future__ import annotations

import datetime
import importlib
import json
import platform
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

NEEDED = (
    "cupy",
    "google.protobuf",
    "grpc",
    "ml_dtypes",
    "numpy",
    "prometheus_client",
    "pytest",
    "pytest_benchmark",
    "rich",
    "typer",
)
#: Least part of the copy's bytes per second that a kernel must reach.
TARGETS = {("SUM", "FLOAT32", 4, 4): 0.90, ("SUM", "FLOAT16", 4, 4): 0.85, ("SUM", "BFLOAT16", 4, 4): 0.85}


def check() -> None:
    """Ends the program, with one line, where the proof cannot run."""
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        sys.exit(f"gpu_report: this python ({sys.executable}) lacks {', '.join(missing)}")
    from dsml_gpu.memory.backend import BackendUnavailable, select_backends

    try:
        _, why = select_backends("cupy")
    except BackendUnavailable as reason:
        sys.exit(f"gpu_report: {reason}")
    try:
        _compile_something()
    except Exception as error:  # noqa: BLE001  whatever CuPy lacks: headers, NVRTC, a driver that is new enough
        sys.exit(f"gpu_report: CuPy cannot compile here: {type(error).__name__}: {' '.join(str(error).split())[:500]}")
    print(f"gpu_report: {why}")


def _compile_something() -> None:
    """One kernel of ours, and one of CuPy's own, which needs headers."""
    import cupy as cp

    from dsml_gpu.reduction.cuda import loaded_kernels

    loaded_kernels(0).kernel("reduce<float, Sum, 2>")
    cp.add(cp.zeros(4), cp.zeros(4))


def write(work: Path, folder: Path) -> None:
    """Writes the JSON file and the text table, named by date and GPU.

    Args:
        work: has tests.xml, kernels.json and all_reduce.json, as far as they came.
        folder: takes the two files.
    """
    report: dict[str, Any] = {
        "machine": machine(),
        "tests": tests(work / "tests.xml"),
        "kernels": kernels(work / "kernels.json"),
        "all_reduce": all_reduces(work / "all_reduce.json"),
    }
    table = as_text(report)
    name = re.sub(r"[^a-z0-9]+", "-", f"{report['machine']['date']}-{report['machine']['gpu']}".lower())
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.txt").write_text(table)
    print(table)


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    import cupy as cp
    import grpc
    import numpy as np

    properties = cp.cuda.runtime.getDeviceProperties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "memory_bytes": properties["totalGlobalMem"],
        "driver_cuda": cp.cuda.runtime.driverGetVersion(),
        "driver": _driver(),
        "cuda_runtime": cp.cuda.runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, cp.cuda.nvrtc.getVersion())),
        "cupy": cp.__version__,
        "numpy": np.__version__,
        "grpcio": grpc.__version__,
        "python": platform.python_version(),
    }


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    match = re.search(r"Module.*?(\d+\.\d+[.\d]*)", path.read_text()) if path.exists() else None
    return match[1] if match else "unknown"


def tests(path: Path) -> dict[str, Any]:
    """How many tests ran, and which failed."""
    if not path.exists():
        return {"ran": 0, "failed": ["pytest wrote no report"], "skipped": 0, "seconds": 0.0}
    suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    cases = list(suite.iter("testcase"))
    failed = [f"{case.get('classname')}.{case.get('name')}" for case in cases if _is(case, "failure", "error")]
    skipped = sum(_is(case, "skipped") for case in cases)
    return {
        "ran": len(cases) - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": float(suite.get("time", "0")),
    }


def _is(case: ElementTree.Element, *kinds: str) -> bool:
    return any(case.find(kind) is not None for kind in kinds)


def kernels(path: Path) -> list[dict[str, Any]]:
    """The rows of benchmarks/test_kernels.py."""
    if not path.exists() or not path.stat().st_size:
        return []
    rows = [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]
    for row in rows:
        row["target"] = TARGETS.get((row["op"], row["dtype"], row["sources"], row["destinations"]))
    return rows


def all_reduces(path: Path) -> list[dict[str, Any]]:
    """The rows of benchmarks/gpu_all_reduce.py."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def as_text(report: dict[str, Any]) -> str:
    """The table."""
    about = report["machine"]
    run = report["tests"]
    chip = f"compute capability {about['compute_capability']}, {about['memory_bytes'] / 2**30:.0f} GiB"
    packages = [f"{name} {about[key]}" for name, key in (("CuPy", "cupy"), ("numpy", "numpy"), ("grpcio", "grpcio"))]
    lines = [
        f"{about['gpu']} ({chip}), {about['date']}",
        f"driver {about['driver']} (CUDA {about['driver_cuda']}), NVRTC {about['nvrtc']}, Python {about['python']}",
        ", ".join(packages),
        "",
        f"tests: {run['ran']} ran in {run['seconds']:.0f} s, {len(run['failed'])} failed, {run['skipped']} skipped",
        *(f"  failed: {name}" for name in run["failed"]),
        "",
        "GB/s, bytes read and written; buffers of 256 MiB; median of 20; copy: device to device, of as many bytes;",
        "additions: cupy.add for each source after the first, then copies; to copy: kernel / copy",
        "",
        f"{'op':5}{'type':10}{'in':>3}{'out':>4}{'kernel':>9}{'copy':>9}{'additions':>11}{'to copy':>9}{'target':>8}",
    ]
    for row in report["kernels"]:
        speeds = row["gigabytes_per_s"]
        additions = f"{speeds['additions']:.0f}" if "additions" in speeds else "-"
        target = f"{row['target']:.2f}" if row["target"] else ""
        lines.append(
            f"{row['op']:5}{row['dtype'].lower():10}{row['sources']:>3}{row['destinations']:>4}{speeds['kernel']:>9.0f}"
            f"{speeds['copy']:>9.0f}{additions:>11}{row['kernel_to_copy']:>9.2f}{target:>8}"
        )
    lines += ["", "all-reduce of 256 MB float32 on 4 devices of the GPU: the bare kernel, and a client's call"]
    for row in report["all_reduce"]:
        ratio = f"{row['to_kernel']:9.2f} times the kernel, target {row['allowed']:.2f}" if "to_kernel" in row else ""
        lines.append(f"{row['what']:<12}{row['median_ms']:9.3f} ms{ratio}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check()
    elif len(sys.argv) == 4 and sys.argv[1] == "write":
        write(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit("usage: gpu_report.py check | write WORK FOLDER")

"""``dsml-gpu kernels build``: compiles the CUDA kernels ahead of their first use."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dsml_gpu.cli.serve import fail
from dsml_gpu.memory.backend import BackendUnavailable, select_backends
from dsml_gpu.reduction.kernels import instantiations


def build(gpus: list[int]) -> None:
    """Compiles every instantiation for each GPU; what CuPy has in its cache already costs no time.

    Args:
        gpus: numbers of GPUs; empty: all.
    """
    try:
        backends, _ = select_backends("cupy", gpus)
    except (BackendUnavailable, ValueError) as error:
        fail(str(error))
    from dsml_gpu.reduction.cuda import loaded_kernels

    console = Console()
    names = [name for family in instantiations().values() for name in family]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for backend in dict.fromkeys(backends):
        started = time.perf_counter()
        cache = loaded_kernels(backend.gpu)
        with Progress(*columns, console=console) as progress:
            for name in progress.track(names, description=f"GPU {backend.gpu} ({backend.device_name})"):
                cache.kernel(name)
        console.print(f"{len(names)} kernels for GPU {backend.gpu} are ready after {time.perf_counter() - started:.1f} s")

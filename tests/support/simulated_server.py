"""``dsml-gpu`` on a machine whose GPUs are simulated: a library of kernels, then the command's own arguments."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.kernels_on_cpu import load_launcher
from tests.support.simulated_cuda import SimulatedCupy


def main() -> None:
    library = Path(sys.argv.pop(1))
    sys.modules["cupy"] = SimulatedCupy(load_launcher(library))  # type: ignore[assignment]
    from dsml_gpu.cli.main import main as dsml_gpu

    dsml_gpu()


if __name__ == "__main__":
    main()

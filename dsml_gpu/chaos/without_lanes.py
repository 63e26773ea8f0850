"""The command ``dsml-gpu`` as if each process were on a host of its own: without the short cuts of `wire.lane`.

For servers whose TCP traffic is to vanish: by a lane the coordinator would reach them all the same.
"""

from dsml_gpu.cli.main import main
from dsml_gpu.wire import lane


def _no_lanes() -> bool:
    return False


if __name__ == "__main__":
    lane.can_have_lanes = _no_lanes
    main()

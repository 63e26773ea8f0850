"""Groups that a client keeps by itself until they are whole."""

from __future__ import annotations

from collections.abc import Sequence

from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.communicator import Communicator
from dsml_gpu.wire import gpu_sim_pb2 as pb


async def run_group(
    comm: Communicator, calls: Sequence[tuple[CollectiveCall, int]], wait: bool
) -> pb.CollectiveResult | None:
    """Runs calls as one group, or none of them where one is refused. See `Communicator.group_end`.

    Args:
        calls: each with the epoch whose numbering it uses.
    """
    comm.group_start()
    try:
        for call, epoch in calls:
            await comm.submit(call, epoch)
    except BaseException:
        comm.group_discard()
        raise
    return await comm.group_end(wait)

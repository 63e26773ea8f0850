"""The links of a rank during a group of operations, and how they are opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsml_gpu.device.dataflow import Dataflow
from dsml_gpu.device.device import Device, Membership, Peer
from dsml_gpu.errors import DsmlError, InvalidValue, OperationAborted
from dsml_gpu.transport.emulation import DeviceLink
from dsml_gpu.transport.grpc import ChannelPool, GrpcRecvLink, GrpcSendLink
from dsml_gpu.transport.incoming import IncomingTable
from dsml_gpu.transport.link import RecvLink, SendLink
from dsml_gpu.transport.p2p import PipeTable
from dsml_gpu.wire import gpu_sim_pb2 as pb


@dataclass(frozen=True, slots=True)
class Links:
    """The open links of a rank during a group, by peer."""

    send: Mapping[int, SendLink]
    recv: Mapping[int, RecvLink]

    def abort(self, error: DsmlError) -> None:
        """Tells all peers that this rank gives up, and why."""
        for send in self.send.values():
            send.abort(error)
        for recv in self.recv.values():
            recv.abort(error)


class LinkOpener:
    """Opens links between the devices of one server and their peers.

    Args:
        incoming: where StreamSend calls arrive.
        channels: to the peers' servers.
        pipes: between devices whose memory is read directly.
        emulated: the link of each device by its id, where links are emulated. Read at each call: devices come and go.
    """

    def __init__(
        self, incoming: IncomingTable, channels: ChannelPool, pipes: PipeTable, emulated: Mapping[int, DeviceLink]
    ) -> None:
        self._incoming = incoming
        self._channels = channels
        self._pipes = pipes
        self._emulated = emulated

    def open(self, device: Device, membership: Membership, wire: Iterable[pb.Link], flows: Iterable[Dataflow]) -> Links:
        """The links that a request names. Where that fails, those that are open already are aborted.

        Args:
            flows: what is to move over them.

        Raises:
            InvalidValue: a peer that is no rank or has two links, or one that a flow needs and that has none.
        """
        send: dict[int, SendLink] = {}
        recv: dict[int, RecvLink] = {}
        try:
            for link in wire:
                peer = membership.peer(link.peer)
                if peer.rank in send or peer.rank in recv:
                    raise InvalidValue(f"rank {peer.rank} has two links; each peer has one")
                if link.sendStreamId:
                    send[peer.rank] = self._send_link(device, peer, link.sendStreamId)
                if link.recvStreamId:
                    recv[peer.rank] = self._recv_link(device, peer, link.recvStreamId)
            for flow in flows:
                missing = [peer for peer in flow.sends if peer not in send]
                missing += [peer for peer in flow.receives if peer not in recv]
                if missing:
                    raise InvalidValue(f"a program moves data to or from rank {missing[0]}, but no link to it is named")
        except DsmlError as error:
            Links(send, recv).abort(OperationAborted(str(error)))
            raise
        return Links(send, recv)

    def _send_link(self, device: Device, peer: Peer, stream_id: int) -> SendLink:
        if peer.p2p:
            return self._pipes.open_send(stream_id, device.arena.memory)
        emulated = self._emulated.get(device.device_id)
        return GrpcSendLink(self._channels.peer(peer.address), stream_id, device.arena.memory, str(peer), emulated)

    def _recv_link(self, device: Device, peer: Peer, stream_id: int) -> RecvLink:
        if peer.p2p:
            return self._pipes.open_recv(stream_id, device.arena.memory)
        incoming = self._incoming.claim(stream_id, link=self._emulated.get(device.device_id))
        return GrpcRecvLink(incoming, device.arena.memory, str(peer))

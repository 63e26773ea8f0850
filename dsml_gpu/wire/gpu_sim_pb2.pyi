from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IN_PROGRESS: _ClassVar[Status]
    SUCCESS: _ClassVar[Status]
    FAILED: _ClassVar[Status]

class ReduceOp(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SUM: _ClassVar[ReduceOp]
    PROD: _ClassVar[ReduceOp]
    MIN: _ClassVar[ReduceOp]
    MAX: _ClassVar[ReduceOp]
    AVG: _ClassVar[ReduceOp]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FLOAT64: _ClassVar[DataType]
    FLOAT32: _ClassVar[DataType]
    FLOAT16: _ClassVar[DataType]
    BFLOAT16: _ClassVar[DataType]
    INT8: _ClassVar[DataType]
    UINT8: _ClassVar[DataType]
    INT32: _ClassVar[DataType]
    UINT32: _ClassVar[DataType]
    INT64: _ClassVar[DataType]
    UINT64: _ClassVar[DataType]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AUTO: _ClassVar[Transport]
    P2P: _ClassVar[Transport]
    GRPC: _ClassVar[Transport]

class Refusal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_UNSPECIFIED: _ClassVar[Refusal]
    MALFORMED_MESSAGE: _ClassVar[Refusal]
    MISSING_FIELD: _ClassVar[Refusal]
    INVALID_VALUE: _ClassVar[Refusal]
    COUNT_NOT_MULTIPLE: _ClassVar[Refusal]
    RANK_MISMATCH: _ClassVar[Refusal]
    COMM_NOT_FOUND: _ClassVar[Refusal]
    DEVICE_NOT_FOUND: _ClassVar[Refusal]
    STREAM_NOT_FOUND: _ClassVar[Refusal]
    ALLOCATION_NOT_FOUND: _ClassVar[Refusal]
    ADDRESS_OUT_OF_RANGE: _ClassVar[Refusal]
    GROUP_MISUSE: _ClassVar[Refusal]
    COMM_NOT_READY: _ClassVar[Refusal]
    AMBIGUOUS_STREAM: _ClassVar[Refusal]
    STREAM_IN_USE: _ClassVar[Refusal]
    OUT_OF_DEVICES: _ClassVar[Refusal]
    OUT_OF_MEMORY: _ClassVar[Refusal]
    TOO_MANY_STREAMS: _ClassVar[Refusal]
    PEER_UNAVAILABLE: _ClassVar[Refusal]
    OPERATION_TIMEOUT: _ClassVar[Refusal]
    OPERATION_ABORTED: _ClassVar[Refusal]
    STREAM_LENGTH: _ClassVar[Refusal]
    MESSAGE_TOO_LARGE: _ClassVar[Refusal]
    INVALID_SCHEDULE: _ClassVar[Refusal]
    BUFFER_OVERLAP: _ClassVar[Refusal]
    MEMORY_NOT_SHARED: _ClassVar[Refusal]
    STALE_EPOCH: _ClassVar[Refusal]
    CHECKPOINT_DAMAGED: _ClassVar[Refusal]
    CHECKPOINT_NOT_FOUND: _ClassVar[Refusal]
    STORAGE_UNAVAILABLE: _ClassVar[Refusal]
    RANKS_LOST: _ClassVar[Refusal]

class OnFailure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_FAILURE_UNSPECIFIED: _ClassVar[OnFailure]
    SHRINK: _ClassVar[OnFailure]
    FAIL: _ClassVar[OnFailure]
    RESTORE: _ClassVar[OnFailure]
IN_PROGRESS: Status
SUCCESS: Status
FAILED: Status
SUM: ReduceOp
PROD: ReduceOp
MIN: ReduceOp
MAX: ReduceOp
AVG: ReduceOp
FLOAT64: DataType
FLOAT32: DataType
FLOAT16: DataType
BFLOAT16: DataType
INT8: DataType
UINT8: DataType
INT32: DataType
UINT32: DataType
INT64: DataType
UINT64: DataType
AUTO: Transport
P2P: Transport
GRPC: Transport
REFUSAL_UNSPECIFIED: Refusal
MALFORMED_MESSAGE: Refusal
MISSING_FIELD: Refusal
INVALID_VALUE: Refusal
COUNT_NOT_MULTIPLE: Refusal
RANK_MISMATCH: Refusal
COMM_NOT_FOUND: Refusal
DEVICE_NOT_FOUND: Refusal
STREAM_NOT_FOUND: Refusal
ALLOCATION_NOT_FOUND: Refusal
ADDRESS_OUT_OF_RANGE: Refusal
GROUP_MISUSE: Refusal
COMM_NOT_READY: Refusal
AMBIGUOUS_STREAM: Refusal
STREAM_IN_USE: Refusal
OUT_OF_DEVICES: Refusal
OUT_OF_MEMORY: Refusal
TOO_MANY_STREAMS: Refusal
PEER_UNAVAILABLE: Refusal
OPERATION_TIMEOUT: Refusal
OPERATION_ABORTED: Refusal
STREAM_LENGTH: Refusal
MESSAGE_TOO_LARGE: Refusal
INVALID_SCHEDULE: Refusal
BUFFER_OVERLAP: Refusal
MEMORY_NOT_SHARED: Refusal
STALE_EPOCH: Refusal
CHECKPOINT_DAMAGED: Refusal
CHECKPOINT_NOT_FOUND: Refusal
STORAGE_UNAVAILABLE: Refusal
RANKS_LOST: Refusal
ON_FAILURE_UNSPECIFIED: OnFailure
SHRINK: OnFailure
FAIL: OnFailure
RESTORE: OnFailure

class DeviceId(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: int
    def __init__(self, value: _Optional[int] = ...) -> None: ...

class Rank(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: int
    def __init__(self, value: _Optional[int] = ...) -> None: ...

class MemAddr(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: int
    def __init__(self, value: _Optional[int] = ...) -> None: ...

class StreamId(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: int
    def __init__(self, value: _Optional[int] = ...) -> None: ...

class DeviceMetadata(_message.Message):
    __slots__ = ("deviceId", "minMemAddr", "maxMemAddr", "address", "backend", "deviceName", "processUid", "gpu", "linkLatencyNs", "linkBytesPerS", "host", "cores", "lane")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    MINMEMADDR_FIELD_NUMBER: _ClassVar[int]
    MAXMEMADDR_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    DEVICENAME_FIELD_NUMBER: _ClassVar[int]
    PROCESSUID_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    LINKLATENCYNS_FIELD_NUMBER: _ClassVar[int]
    LINKBYTESPERS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    deviceId: DeviceId
    minMemAddr: MemAddr
    maxMemAddr: MemAddr
    address: str
    backend: str
    deviceName: str
    processUid: str
    gpu: int
    linkLatencyNs: int
    linkBytesPerS: int
    host: str
    cores: int
    lane: str
    def __init__(self, deviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., minMemAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., maxMemAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., address: _Optional[str] = ..., backend: _Optional[str] = ..., deviceName: _Optional[str] = ..., processUid: _Optional[str] = ..., gpu: _Optional[int] = ..., linkLatencyNs: _Optional[int] = ..., linkBytesPerS: _Optional[int] = ..., host: _Optional[str] = ..., cores: _Optional[int] = ..., lane: _Optional[str] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("bootId", "pid", "fd", "token", "offset", "numBytes", "cudaIpcHandle", "minMemAddr", "stagingBytes")
    BOOTID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    CUDAIPCHANDLE_FIELD_NUMBER: _ClassVar[int]
    MINMEMADDR_FIELD_NUMBER: _ClassVar[int]
    STAGINGBYTES_FIELD_NUMBER: _ClassVar[int]
    bootId: str
    pid: int
    fd: int
    token: str
    offset: int
    numBytes: int
    cudaIpcHandle: bytes
    minMemAddr: MemAddr
    stagingBytes: int
    def __init__(self, bootId: _Optional[str] = ..., pid: _Optional[int] = ..., fd: _Optional[int] = ..., token: _Optional[str] = ..., offset: _Optional[int] = ..., numBytes: _Optional[int] = ..., cudaIpcHandle: _Optional[bytes] = ..., minMemAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., stagingBytes: _Optional[int] = ...) -> None: ...

class ShareMemoryRequest(_message.Message):
    __slots__ = ("deviceId", "move")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    deviceId: int
    move: bool
    def __init__(self, deviceId: _Optional[int] = ..., move: bool = ...) -> None: ...

class QuiesceRequest(_message.Message):
    __slots__ = ("commId", "deviceId", "round", "settlement")
    class Settlement(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSETTLED: _ClassVar[QuiesceRequest.Settlement]
        ROLL_BACK: _ClassVar[QuiesceRequest.Settlement]
        COMMIT: _ClassVar[QuiesceRequest.Settlement]
    UNSETTLED: QuiesceRequest.Settlement
    ROLL_BACK: QuiesceRequest.Settlement
    COMMIT: QuiesceRequest.Settlement
    COMMID_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENT_FIELD_NUMBER: _ClassVar[int]
    commId: int
    deviceId: int
    round: int
    settlement: QuiesceRequest.Settlement
    def __init__(self, commId: _Optional[int] = ..., deviceId: _Optional[int] = ..., round: _Optional[int] = ..., settlement: _Optional[_Union[QuiesceRequest.Settlement, str]] = ...) -> None: ...

class QuiesceResponse(_message.Message):
    __slots__ = ("waits", "unsettledRound")
    WAITS_FIELD_NUMBER: _ClassVar[int]
    UNSETTLEDROUND_FIELD_NUMBER: _ClassVar[int]
    waits: _containers.RepeatedCompositeFieldContainer[Wait]
    unsettledRound: int
    def __init__(self, waits: _Optional[_Iterable[_Union[Wait, _Mapping]]] = ..., unsettledRound: _Optional[int] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("rank", "chunk", "step", "steps", "waitedMs", "sends", "operation")
    RANK_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITEDMS_FIELD_NUMBER: _ClassVar[int]
    SENDS_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    rank: int
    chunk: int
    step: int
    steps: int
    waitedMs: int
    sends: bool
    operation: int
    def __init__(self, rank: _Optional[int] = ..., chunk: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., waitedMs: _Optional[int] = ..., sends: bool = ..., operation: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("intervalMs",)
    INTERVALMS_FIELD_NUMBER: _ClassVar[int]
    intervalMs: int
    def __init__(self, intervalMs: _Optional[int] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("number", "progress", "executing")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    EXECUTING_FIELD_NUMBER: _ClassVar[int]
    number: int
    progress: int
    executing: int
    def __init__(self, number: _Optional[int] = ..., progress: _Optional[int] = ..., executing: _Optional[int] = ...) -> None: ...

class ArrayRange(_message.Message):
    __slots__ = ("name", "dtype", "shape", "memAddr")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    memAddr: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., memAddr: _Optional[int] = ...) -> None: ...

class SaveShardRequest(_message.Message):
    __slots__ = ("deviceId", "url", "arrays")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    deviceId: int
    url: str
    arrays: _containers.RepeatedCompositeFieldContainer[ArrayRange]
    def __init__(self, deviceId: _Optional[int] = ..., url: _Optional[str] = ..., arrays: _Optional[_Iterable[_Union[ArrayRange, _Mapping]]] = ...) -> None: ...

class SaveShardResponse(_message.Message):
    __slots__ = ("bytesWritten", "bytesTotal", "json")
    BYTESWRITTEN_FIELD_NUMBER: _ClassVar[int]
    BYTESTOTAL_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    bytesWritten: int
    bytesTotal: int
    json: str
    def __init__(self, bytesWritten: _Optional[int] = ..., bytesTotal: _Optional[int] = ..., json: _Optional[str] = ...) -> None: ...

class LoadShardRequest(_message.Message):
    __slots__ = ("deviceId", "arrays", "checkOnly")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    CHECKONLY_FIELD_NUMBER: _ClassVar[int]
    deviceId: int
    arrays: _containers.RepeatedCompositeFieldContainer[LoadedArray]
    checkOnly: bool
    def __init__(self, deviceId: _Optional[int] = ..., arrays: _Optional[_Iterable[_Union[LoadedArray, _Mapping]]] = ..., checkOnly: bool = ...) -> None: ...

class LoadedArray(_message.Message):
    __slots__ = ("memAddr", "parts")
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    memAddr: int
    parts: _containers.RepeatedCompositeFieldContainer[LoadedPart]
    def __init__(self, memAddr: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[LoadedPart, _Mapping]]] = ...) -> None: ...

class LoadedPart(_message.Message):
    __slots__ = ("url", "json", "name", "start", "numBytes")
    URL_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    url: str
    json: str
    name: str
    start: int
    numBytes: int
    def __init__(self, url: _Optional[str] = ..., json: _Optional[str] = ..., name: _Optional[str] = ..., start: _Optional[int] = ..., numBytes: _Optional[int] = ...) -> None: ...

class LoadShardResponse(_message.Message):
    __slots__ = ("numBytes",)
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    numBytes: int
    def __init__(self, numBytes: _Optional[int] = ...) -> None: ...

class GetDeviceMetadataRequest(_message.Message):
    __slots__ = ("deviceId",)
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    deviceId: int
    def __init__(self, deviceId: _Optional[int] = ...) -> None: ...

class GetDeviceMetadataResponse(_message.Message):
    __slots__ = ("metadata", "devices")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    metadata: DeviceMetadata
    devices: _containers.RepeatedCompositeFieldContainer[DeviceMetadata]
    def __init__(self, metadata: _Optional[_Union[DeviceMetadata, _Mapping]] = ..., devices: _Optional[_Iterable[_Union[DeviceMetadata, _Mapping]]] = ...) -> None: ...

class BeginSendRequest(_message.Message):
    __slots__ = ("sendBuffAddr", "numBytes", "dstRank", "commId", "deviceId")
    SENDBUFFADDR_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    DSTRANK_FIELD_NUMBER: _ClassVar[int]
    COMMID_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    sendBuffAddr: MemAddr
    numBytes: int
    dstRank: Rank
    commId: int
    deviceId: int
    def __init__(self, sendBuffAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., numBytes: _Optional[int] = ..., dstRank: _Optional[_Union[Rank, _Mapping]] = ..., commId: _Optional[int] = ..., deviceId: _Optional[int] = ...) -> None: ...

class BeginSendResponse(_message.Message):
    __slots__ = ("initiated", "streamId")
    INITIATED_FIELD_NUMBER: _ClassVar[int]
    STREAMID_FIELD_NUMBER: _ClassVar[int]
    initiated: bool
    streamId: StreamId
    def __init__(self, initiated: bool = ..., streamId: _Optional[_Union[StreamId, _Mapping]] = ...) -> None: ...

class BeginReceiveRequest(_message.Message):
    __slots__ = ("streamId", "recvBuffAddr", "numBytes", "srcRank", "commId", "deviceId")
    STREAMID_FIELD_NUMBER: _ClassVar[int]
    RECVBUFFADDR_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    SRCRANK_FIELD_NUMBER: _ClassVar[int]
    COMMID_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    streamId: StreamId
    recvBuffAddr: MemAddr
    numBytes: int
    srcRank: Rank
    commId: int
    deviceId: int
    def __init__(self, streamId: _Optional[_Union[StreamId, _Mapping]] = ..., recvBuffAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., numBytes: _Optional[int] = ..., srcRank: _Optional[_Union[Rank, _Mapping]] = ..., commId: _Optional[int] = ..., deviceId: _Optional[int] = ...) -> None: ...

class BeginReceiveResponse(_message.Message):
    __slots__ = ("initiated",)
    INITIATED_FIELD_NUMBER: _ClassVar[int]
    initiated: bool
    def __init__(self, initiated: bool = ...) -> None: ...

class DataChunk(_message.Message):
    __slots__ = ("data", "streamId", "deviceId", "memAddr", "numBytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    STREAMID_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    streamId: int
    deviceId: DeviceId
    memAddr: MemAddr
    numBytes: int
    def __init__(self, data: _Optional[bytes] = ..., streamId: _Optional[int] = ..., deviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., memAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., numBytes: _Optional[int] = ...) -> None: ...

class StreamSendResponse(_message.Message):
    __slots__ = ("success",)
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    success: bool
    def __init__(self, success: bool = ...) -> None: ...

class GetStreamStatusRequest(_message.Message):
    __slots__ = ("streamId",)
    STREAMID_FIELD_NUMBER: _ClassVar[int]
    streamId: StreamId
    def __init__(self, streamId: _Optional[_Union[StreamId, _Mapping]] = ...) -> None: ...

class GetStreamStatusResponse(_message.Message):
    __slots__ = ("status", "message")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    status: Status
    message: str
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("deviceId", "address", "transport", "sharedMemory")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SHAREDMEMORY_FIELD_NUMBER: _ClassVar[int]
    deviceId: int
    address: str
    transport: Transport
    sharedMemory: SharedMemory
    def __init__(self, deviceId: _Optional[int] = ..., address: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., sharedMemory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

class JoinCommRequest(_message.Message):
    __slots__ = ("commId", "rank", "peers", "deviceId", "epoch")
    COMMID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    commId: int
    rank: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    deviceId: int
    epoch: int
    def __init__(self, commId: _Optional[int] = ..., rank: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., deviceId: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class JoinCommResponse(_message.Message):
    __slots__ = ("unreachable",)
    UNREACHABLE_FIELD_NUMBER: _ClassVar[int]
    unreachable: _containers.RepeatedCompositeFieldContainer[UnreachableMemory]
    def __init__(self, unreachable: _Optional[_Iterable[_Union[UnreachableMemory, _Mapping]]] = ...) -> None: ...

class UnreachableMemory(_message.Message):
    __slots__ = ("rank", "reason")
    RANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    rank: int
    reason: str
    def __init__(self, rank: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveCommRequest(_message.Message):
    __slots__ = ("commId", "deviceId")
    COMMID_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    commId: int
    deviceId: int
    def __init__(self, commId: _Optional[int] = ..., deviceId: _Optional[int] = ...) -> None: ...

class LeaveCommResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Move(_message.Message):
    __slots__ = ("kind", "peer", "chunk")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Move.Kind]
        SEND: _ClassVar[Move.Kind]
        COPY: _ClassVar[Move.Kind]
        REDUCE: _ClassVar[Move.Kind]
        REDUCE_LAST: _ClassVar[Move.Kind]
    KIND_UNSPECIFIED: Move.Kind
    SEND: Move.Kind
    COPY: Move.Kind
    REDUCE: Move.Kind
    REDUCE_LAST: Move.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    kind: Move.Kind
    peer: int
    chunk: int
    def __init__(self, kind: _Optional[_Union[Move.Kind, str]] = ..., peer: _Optional[int] = ..., chunk: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("moves",)
    MOVES_FIELD_NUMBER: _ClassVar[int]
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    def __init__(self, moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ...) -> None: ...

class Program(_message.Message):
    __slots__ = ("parts", "steps", "nblocks", "storeAndForward")
    PARTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NBLOCKS_FIELD_NUMBER: _ClassVar[int]
    STOREANDFORWARD_FIELD_NUMBER: _ClassVar[int]
    parts: int
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    nblocks: int
    storeAndForward: bool
    def __init__(self, parts: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ..., nblocks: _Optional[int] = ..., storeAndForward: bool = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("count", "sendAddr", "recvAddr", "pieces")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SENDADDR_FIELD_NUMBER: _ClassVar[int]
    RECVADDR_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    count: int
    sendAddr: int
    recvAddr: int
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    def __init__(self, count: _Optional[int] = ..., sendAddr: _Optional[int] = ..., recvAddr: _Optional[int] = ..., pieces: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("count", "sendAddr", "recvAddr")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SENDADDR_FIELD_NUMBER: _ClassVar[int]
    RECVADDR_FIELD_NUMBER: _ClassVar[int]
    count: int
    sendAddr: int
    recvAddr: int
    def __init__(self, count: _Optional[int] = ..., sendAddr: _Optional[int] = ..., recvAddr: _Optional[int] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("dtype", "op", "program", "blocks", "weight", "copiesInput")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    COPIESINPUT_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    op: ReduceOp
    program: int
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    weight: float
    copiesInput: bool
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., op: _Optional[_Union[ReduceOp, str]] = ..., program: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ..., weight: _Optional[float] = ..., copiesInput: bool = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("peer", "sendStreamId", "recvStreamId")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SENDSTREAMID_FIELD_NUMBER: _ClassVar[int]
    RECVSTREAMID_FIELD_NUMBER: _ClassVar[int]
    peer: int
    sendStreamId: int
    recvStreamId: int
    def __init__(self, peer: _Optional[int] = ..., sendStreamId: _Optional[int] = ..., recvStreamId: _Optional[int] = ...) -> None: ...

class RankAddress(_message.Message):
    __slots__ = ("rank", "addr")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDR_FIELD_NUMBER: _ClassVar[int]
    rank: int
    addr: int
    def __init__(self, rank: _Optional[int] = ..., addr: _Optional[int] = ...) -> None: ...

class Pass(_message.Message):
    __slots__ = ("dtype", "op", "count", "sources", "destinations", "weights", "staged")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    DESTINATIONS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    op: ReduceOp
    count: int
    sources: _containers.RepeatedCompositeFieldContainer[RankAddress]
    destinations: _containers.RepeatedCompositeFieldContainer[RankAddress]
    weights: _containers.RepeatedScalarFieldContainer[float]
    staged: RankAddress
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., op: _Optional[_Union[ReduceOp, str]] = ..., count: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[RankAddress, _Mapping]]] = ..., destinations: _Optional[_Iterable[_Union[RankAddress, _Mapping]]] = ..., weights: _Optional[_Iterable[float]] = ..., staged: _Optional[_Union[RankAddress, _Mapping]] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("commId", "deviceId", "programs", "operations", "links", "stallTimeoutMs", "sliceBytes", "passes", "round", "phase", "resumedRanks", "epoch", "kept")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RUN: _ClassVar[ExecuteRequest.Phase]
        PREPARE: _ClassVar[ExecuteRequest.Phase]
        COMMIT: _ClassVar[ExecuteRequest.Phase]
        RESUME: _ClassVar[ExecuteRequest.Phase]
        PIECES: _ClassVar[ExecuteRequest.Phase]
        RESUME_PIECES: _ClassVar[ExecuteRequest.Phase]
    RUN: ExecuteRequest.Phase
    PREPARE: ExecuteRequest.Phase
    COMMIT: ExecuteRequest.Phase
    RESUME: ExecuteRequest.Phase
    PIECES: ExecuteRequest.Phase
    RESUME_PIECES: ExecuteRequest.Phase
    COMMID_FIELD_NUMBER: _ClassVar[int]
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    STALLTIMEOUTMS_FIELD_NUMBER: _ClassVar[int]
    SLICEBYTES_FIELD_NUMBER: _ClassVar[int]
    PASSES_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    RESUMEDRANKS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    commId: int
    deviceId: int
    programs: _containers.RepeatedCompositeFieldContainer[Program]
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    links: _containers.RepeatedCompositeFieldContainer[Link]
    stallTimeoutMs: int
    sliceBytes: int
    passes: _containers.RepeatedCompositeFieldContainer[Pass]
    round: int
    phase: ExecuteRequest.Phase
    resumedRanks: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    kept: _containers.RepeatedCompositeFieldContainer[Piece]
    def __init__(self, commId: _Optional[int] = ..., deviceId: _Optional[int] = ..., programs: _Optional[_Iterable[_Union[Program, _Mapping]]] = ..., operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ..., links: _Optional[_Iterable[_Union[Link, _Mapping]]] = ..., stallTimeoutMs: _Optional[int] = ..., sliceBytes: _Optional[int] = ..., passes: _Optional[_Iterable[_Union[Pass, _Mapping]]] = ..., round: _Optional[int] = ..., phase: _Optional[_Union[ExecuteRequest.Phase, str]] = ..., resumedRanks: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., kept: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("bytesSent", "begun")
    BYTESSENT_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    bytesSent: int
    begun: bool
    def __init__(self, bytesSent: _Optional[int] = ..., begun: bool = ...) -> None: ...

class MallocRequest(_message.Message):
    __slots__ = ("deviceId", "numBytes", "commId", "at", "idempotencyKey")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    COMMID_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    deviceId: DeviceId
    numBytes: int
    commId: int
    at: int
    idempotencyKey: str
    def __init__(self, deviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., numBytes: _Optional[int] = ..., commId: _Optional[int] = ..., at: _Optional[int] = ..., idempotencyKey: _Optional[str] = ...) -> None: ...

class MallocResponse(_message.Message):
    __slots__ = ("memAddr",)
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    memAddr: MemAddr
    def __init__(self, memAddr: _Optional[_Union[MemAddr, _Mapping]] = ...) -> None: ...

class FreeRequest(_message.Message):
    __slots__ = ("deviceId", "memAddr", "commId", "idempotencyKey")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    COMMID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    deviceId: DeviceId
    memAddr: MemAddr
    commId: int
    idempotencyKey: str
    def __init__(self, deviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., memAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., commId: _Optional[int] = ..., idempotencyKey: _Optional[str] = ...) -> None: ...

class FreeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StreamHostToDeviceResponse(_message.Message):
    __slots__ = ("numBytes",)
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    numBytes: int
    def __init__(self, numBytes: _Optional[int] = ...) -> None: ...

class StreamDeviceToHostRequest(_message.Message):
    __slots__ = ("deviceId", "memAddr", "numBytes")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    deviceId: DeviceId
    memAddr: MemAddr
    numBytes: int
    def __init__(self, deviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., memAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., numBytes: _Optional[int] = ...) -> None: ...

class HoldMemoryRequest(_message.Message):
    __slots__ = ("deviceId", "memAddr", "numBytes", "writes")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    WRITES_FIELD_NUMBER: _ClassVar[int]
    deviceId: DeviceId
    memAddr: MemAddr
    numBytes: int
    writes: bool
    def __init__(self, deviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., memAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., numBytes: _Optional[int] = ..., writes: bool = ...) -> None: ...

class CommInitRequest(_message.Message):
    __slots__ = ("numDevices", "deviceIds", "transport", "onFailure", "idempotencyKey")
    NUMDEVICES_FIELD_NUMBER: _ClassVar[int]
    DEVICEIDS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ONFAILURE_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    numDevices: int
    deviceIds: _containers.RepeatedScalarFieldContainer[int]
    transport: Transport
    onFailure: OnFailure
    idempotencyKey: str
    def __init__(self, numDevices: _Optional[int] = ..., deviceIds: _Optional[_Iterable[int]] = ..., transport: _Optional[_Union[Transport, str]] = ..., onFailure: _Optional[_Union[OnFailure, str]] = ..., idempotencyKey: _Optional[str] = ...) -> None: ...

class CommInitResponse(_message.Message):
    __slots__ = ("success", "commId", "devices", "lane")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    COMMID_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    success: bool
    commId: int
    devices: _containers.RepeatedCompositeFieldContainer[DeviceMetadata]
    lane: str
    def __init__(self, success: bool = ..., commId: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[DeviceMetadata, _Mapping]]] = ..., lane: _Optional[str] = ...) -> None: ...

class GetCommStatusRequest(_message.Message):
    __slots__ = ("commId",)
    COMMID_FIELD_NUMBER: _ClassVar[int]
    commId: int
    def __init__(self, commId: _Optional[int] = ...) -> None: ...

class GetCommStatusResponse(_message.Message):
    __slots__ = ("status", "message", "epoch", "devices", "lane", "seats")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    message: str
    epoch: int
    devices: _containers.RepeatedCompositeFieldContainer[DeviceMetadata]
    lane: str
    seats: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., message: _Optional[str] = ..., epoch: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[DeviceMetadata, _Mapping]]] = ..., lane: _Optional[str] = ..., seats: _Optional[_Iterable[int]] = ...) -> None: ...

class CommGrowRequest(_message.Message):
    __slots__ = ("commId", "numDevices", "deviceIds", "idempotencyKey")
    COMMID_FIELD_NUMBER: _ClassVar[int]
    NUMDEVICES_FIELD_NUMBER: _ClassVar[int]
    DEVICEIDS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    commId: int
    numDevices: int
    deviceIds: _containers.RepeatedScalarFieldContainer[int]
    idempotencyKey: str
    def __init__(self, commId: _Optional[int] = ..., numDevices: _Optional[int] = ..., deviceIds: _Optional[_Iterable[int]] = ..., idempotencyKey: _Optional[str] = ...) -> None: ...

class CommGrowResponse(_message.Message):
    __slots__ = ("epoch", "devices", "seats")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    devices: _containers.RepeatedCompositeFieldContainer[DeviceMetadata]
    seats: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, epoch: _Optional[int] = ..., devices: _Optional[_Iterable[_Union[DeviceMetadata, _Mapping]]] = ..., seats: _Optional[_Iterable[int]] = ...) -> None: ...

class RegisterDevicesRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class RegisterDevicesResponse(_message.Message):
    __slots__ = ("deviceIds",)
    DEVICEIDS_FIELD_NUMBER: _ClassVar[int]
    deviceIds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, deviceIds: _Optional[_Iterable[int]] = ...) -> None: ...

class UnregisterDevicesRequest(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class UnregisterDevicesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointArray(_message.Message):
    __slots__ = ("name", "dtype", "parts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DataType
    parts: _containers.RepeatedCompositeFieldContainer[ArrayPart]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., parts: _Optional[_Iterable[_Union[ArrayPart, _Mapping]]] = ...) -> None: ...

class ArrayPart(_message.Message):
    __slots__ = ("shape", "memAddr")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    MEMADDR_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    memAddr: int
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., memAddr: _Optional[int] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("commId", "url", "arrays", "epoch")
    COMMID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    commId: int
    url: str
    arrays: _containers.RepeatedCompositeFieldContainer[CheckpointArray]
    epoch: int
    def __init__(self, commId: _Optional[int] = ..., url: _Optional[str] = ..., arrays: _Optional[_Iterable[_Union[CheckpointArray, _Mapping]]] = ..., epoch: _Optional[int] = ...) -> None: ...

class CheckpointProgress(_message.Message):
    __slots__ = ("bytesWritten", "bytesTotal", "copied", "complete")
    BYTESWRITTEN_FIELD_NUMBER: _ClassVar[int]
    BYTESTOTAL_FIELD_NUMBER: _ClassVar[int]
    COPIED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    bytesWritten: int
    bytesTotal: int
    copied: bool
    complete: bool
    def __init__(self, bytesWritten: _Optional[int] = ..., bytesTotal: _Optional[int] = ..., copied: bool = ..., complete: bool = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("commId", "url", "arrays", "epoch", "describeOnly")
    COMMID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DESCRIBEONLY_FIELD_NUMBER: _ClassVar[int]
    commId: int
    url: str
    arrays: _containers.RepeatedCompositeFieldContainer[CheckpointArray]
    epoch: int
    describeOnly: bool
    def __init__(self, commId: _Optional[int] = ..., url: _Optional[str] = ..., arrays: _Optional[_Iterable[_Union[CheckpointArray, _Mapping]]] = ..., epoch: _Optional[int] = ..., describeOnly: bool = ...) -> None: ...

class RestoreResponse(_message.Message):
    __slots__ = ("numBytes", "arrays")
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    ARRAYS_FIELD_NUMBER: _ClassVar[int]
    numBytes: int
    arrays: _containers.RepeatedCompositeFieldContainer[CheckpointArray]
    def __init__(self, numBytes: _Optional[int] = ..., arrays: _Optional[_Iterable[_Union[CheckpointArray, _Mapping]]] = ...) -> None: ...

class GroupStartRequest(_message.Message):
    __slots__ = ("commId",)
    COMMID_FIELD_NUMBER: _ClassVar[int]
    commId: int
    def __init__(self, commId: _Optional[int] = ...) -> None: ...

class GroupStartResponse(_message.Message):
    __slots__ = ("success",)
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    success: bool
    def __init__(self, success: bool = ...) -> None: ...

class GroupEndRequest(_message.Message):
    __slots__ = ("commId", "nonBlocking", "discard", "idempotencyKey", "operations")
    COMMID_FIELD_NUMBER: _ClassVar[int]
    NONBLOCKING_FIELD_NUMBER: _ClassVar[int]
    DISCARD_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    commId: int
    nonBlocking: bool
    discard: bool
    idempotencyKey: str
    operations: _containers.RepeatedCompositeFieldContainer[CollectiveRequest]
    def __init__(self, commId: _Optional[int] = ..., nonBlocking: bool = ..., discard: bool = ..., idempotencyKey: _Optional[str] = ..., operations: _Optional[_Iterable[_Union[CollectiveRequest, _Mapping]]] = ...) -> None: ...

class GroupEndResponse(_message.Message):
    __slots__ = ("success", "result")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    success: bool
    result: CollectiveResult
    def __init__(self, success: bool = ..., result: _Optional[_Union[CollectiveResult, _Mapping]] = ...) -> None: ...

class CollectiveResult(_message.Message):
    __slots__ = ("algorithm", "transports", "elapsedNs", "bytesSent", "operations", "deviceIds", "epoch", "lost")
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    ELAPSEDNS_FIELD_NUMBER: _ClassVar[int]
    BYTESSENT_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    DEVICEIDS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    algorithm: str
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    elapsedNs: int
    bytesSent: int
    operations: _containers.RepeatedCompositeFieldContainer[OperationChoice]
    deviceIds: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    lost: _containers.RepeatedCompositeFieldContainer[LostDevice]
    def __init__(self, algorithm: _Optional[str] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., elapsedNs: _Optional[int] = ..., bytesSent: _Optional[int] = ..., operations: _Optional[_Iterable[_Union[OperationChoice, _Mapping]]] = ..., deviceIds: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ..., lost: _Optional[_Iterable[_Union[LostDevice, _Mapping]]] = ...) -> None: ...

class LostDevice(_message.Message):
    __slots__ = ("deviceId", "rank", "reason", "detectionNs", "replacedBy")
    DEVICEID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETECTIONNS_FIELD_NUMBER: _ClassVar[int]
    REPLACEDBY_FIELD_NUMBER: _ClassVar[int]
    deviceId: int
    rank: int
    reason: str
    detectionNs: int
    replacedBy: int
    def __init__(self, deviceId: _Optional[int] = ..., rank: _Optional[int] = ..., reason: _Optional[str] = ..., detectionNs: _Optional[int] = ..., replacedBy: _Optional[int] = ...) -> None: ...

class OperationChoice(_message.Message):
    __slots__ = ("kind", "algorithm", "reason", "predictedNs", "deviceIds")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PREDICTEDNS_FIELD_NUMBER: _ClassVar[int]
    DEVICEIDS_FIELD_NUMBER: _ClassVar[int]
    kind: CollectiveRequest.Kind
    algorithm: str
    reason: str
    predictedNs: int
    deviceIds: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kind: _Optional[_Union[CollectiveRequest.Kind, str]] = ..., algorithm: _Optional[str] = ..., reason: _Optional[str] = ..., predictedNs: _Optional[int] = ..., deviceIds: _Optional[_Iterable[int]] = ...) -> None: ...

class CollectiveRequest(_message.Message):
    __slots__ = ("commId", "kind", "dtype", "op", "root", "counts", "buffers", "sendRecvs", "algorithm", "schedule", "weights", "epoch", "idempotencyKey", "checkOnly")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[CollectiveRequest.Kind]
        ALL_REDUCE: _ClassVar[CollectiveRequest.Kind]
        REDUCE: _ClassVar[CollectiveRequest.Kind]
        BROADCAST: _ClassVar[CollectiveRequest.Kind]
        REDUCE_SCATTER: _ClassVar[CollectiveRequest.Kind]
        ALL_GATHER: _ClassVar[CollectiveRequest.Kind]
        GATHER: _ClassVar[CollectiveRequest.Kind]
        SCATTER: _ClassVar[CollectiveRequest.Kind]
        ALL_TO_ALL: _ClassVar[CollectiveRequest.Kind]
        SEND_RECV: _ClassVar[CollectiveRequest.Kind]
        BARRIER: _ClassVar[CollectiveRequest.Kind]
    KIND_UNSPECIFIED: CollectiveRequest.Kind
    ALL_REDUCE: CollectiveRequest.Kind
    REDUCE: CollectiveRequest.Kind
    BROADCAST: CollectiveRequest.Kind
    REDUCE_SCATTER: CollectiveRequest.Kind
    ALL_GATHER: CollectiveRequest.Kind
    GATHER: CollectiveRequest.Kind
    SCATTER: CollectiveRequest.Kind
    ALL_TO_ALL: CollectiveRequest.Kind
    SEND_RECV: CollectiveRequest.Kind
    BARRIER: CollectiveRequest.Kind
    COMMID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    BUFFERS_FIELD_NUMBER: _ClassVar[int]
    SENDRECVS_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    CHECKONLY_FIELD_NUMBER: _ClassVar[int]
    commId: int
    kind: CollectiveRequest.Kind
    dtype: DataType
    op: ReduceOp
    root: int
    counts: _containers.RepeatedScalarFieldContainer[int]
    buffers: _containers.RepeatedCompositeFieldContainer[RankBuffers]
    sendRecvs: _containers.RepeatedCompositeFieldContainer[SendRecv]
    algorithm: str
    schedule: Schedule
    weights: _containers.RepeatedScalarFieldContainer[float]
    epoch: int
    idempotencyKey: str
    checkOnly: bool
    def __init__(self, commId: _Optional[int] = ..., kind: _Optional[_Union[CollectiveRequest.Kind, str]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., op: _Optional[_Union[ReduceOp, str]] = ..., root: _Optional[int] = ..., counts: _Optional[_Iterable[int]] = ..., buffers: _Optional[_Iterable[_Union[RankBuffers, _Mapping]]] = ..., sendRecvs: _Optional[_Iterable[_Union[SendRecv, _Mapping]]] = ..., algorithm: _Optional[str] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ..., weights: _Optional[_Iterable[float]] = ..., epoch: _Optional[int] = ..., idempotencyKey: _Optional[str] = ..., checkOnly: bool = ...) -> None: ...

class RankBuffers(_message.Message):
    __slots__ = ("sendAddr", "recvAddr")
    SENDADDR_FIELD_NUMBER: _ClassVar[int]
    RECVADDR_FIELD_NUMBER: _ClassVar[int]
    sendAddr: int
    recvAddr: int
    def __init__(self, sendAddr: _Optional[int] = ..., recvAddr: _Optional[int] = ...) -> None: ...

class SendRecv(_message.Message):
    __slots__ = ("src", "dst", "count", "sendAddr", "recvAddr")
    SRC_FIELD_NUMBER: _ClassVar[int]
    DST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    SENDADDR_FIELD_NUMBER: _ClassVar[int]
    RECVADDR_FIELD_NUMBER: _ClassVar[int]
    src: int
    dst: int
    count: int
    sendAddr: int
    recvAddr: int
    def __init__(self, src: _Optional[int] = ..., dst: _Optional[int] = ..., count: _Optional[int] = ..., sendAddr: _Optional[int] = ..., recvAddr: _Optional[int] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("algorithm", "parts", "steps", "storeAndForward")
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STOREANDFORWARD_FIELD_NUMBER: _ClassVar[int]
    algorithm: str
    parts: int
    steps: _containers.RepeatedCompositeFieldContainer[ScheduleStep]
    storeAndForward: bool
    def __init__(self, algorithm: _Optional[str] = ..., parts: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[ScheduleStep, _Mapping]]] = ..., storeAndForward: bool = ...) -> None: ...

class ScheduleStep(_message.Message):
    __slots__ = ("transfers",)
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    transfers: _containers.RepeatedCompositeFieldContainer[Transfer]
    def __init__(self, transfers: _Optional[_Iterable[_Union[Transfer, _Mapping]]] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("src", "dst", "chunk", "reduce")
    SRC_FIELD_NUMBER: _ClassVar[int]
    DST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    REDUCE_FIELD_NUMBER: _ClassVar[int]
    src: int
    dst: int
    chunk: int
    reduce: bool
    def __init__(self, src: _Optional[int] = ..., dst: _Optional[int] = ..., chunk: _Optional[int] = ..., reduce: bool = ...) -> None: ...

class CollectiveResponse(_message.Message):
    __slots__ = ("success", "result")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    success: bool
    result: CollectiveResult
    def __init__(self, success: bool = ..., result: _Optional[_Union[CollectiveResult, _Mapping]] = ...) -> None: ...

class GetCostModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCostModelResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class SetCostModelRequest(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class SetCostModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AllReduceRingRequest(_message.Message):
    __slots__ = ("commId", "count", "op", "memAddrs", "dtype", "epoch", "idempotencyKey")
    class MemAddrsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: MemAddr
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[MemAddr, _Mapping]] = ...) -> None: ...
    COMMID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    MEMADDRS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    commId: int
    count: int
    op: ReduceOp
    memAddrs: _containers.MessageMap[int, MemAddr]
    dtype: DataType
    epoch: int
    idempotencyKey: str
    def __init__(self, commId: _Optional[int] = ..., count: _Optional[int] = ..., op: _Optional[_Union[ReduceOp, str]] = ..., memAddrs: _Optional[_Mapping[int, MemAddr]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., epoch: _Optional[int] = ..., idempotencyKey: _Optional[str] = ...) -> None: ...

class AllReduceRingResponse(_message.Message):
    __slots__ = ("success", "result")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    success: bool
    result: CollectiveResult
    def __init__(self, success: bool = ..., result: _Optional[_Union[CollectiveResult, _Mapping]] = ...) -> None: ...

class NaiveAllReduceRequest(_message.Message):
    __slots__ = ("comm_id", "count", "op", "mem_addrs", "dtype", "epoch", "idempotencyKey")
    class MemAddrsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: MemAddr
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[MemAddr, _Mapping]] = ...) -> None: ...
    COMM_ID_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    OP_FIELD_NUMBER: _ClassVar[int]
    MEM_ADDRS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCYKEY_FIELD_NUMBER: _ClassVar[int]
    comm_id: int
    count: int
    op: ReduceOp
    mem_addrs: _containers.MessageMap[int, MemAddr]
    dtype: DataType
    epoch: int
    idempotencyKey: str
    def __init__(self, comm_id: _Optional[int] = ..., count: _Optional[int] = ..., op: _Optional[_Union[ReduceOp, str]] = ..., mem_addrs: _Optional[_Mapping[int, MemAddr]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., epoch: _Optional[int] = ..., idempotencyKey: _Optional[str] = ...) -> None: ...

class NaiveAllReduceResponse(_message.Message):
    __slots__ = ("success", "result")
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    success: bool
    result: CollectiveResult
    def __init__(self, success: bool = ..., result: _Optional[_Union[CollectiveResult, _Mapping]] = ...) -> None: ...

class MemcpyHostToDeviceRequest(_message.Message):
    __slots__ = ("hostSrcData", "dstDeviceId", "dstMemAddr")
    HOSTSRCDATA_FIELD_NUMBER: _ClassVar[int]
    DSTDEVICEID_FIELD_NUMBER: _ClassVar[int]
    DSTMEMADDR_FIELD_NUMBER: _ClassVar[int]
    hostSrcData: bytes
    dstDeviceId: DeviceId
    dstMemAddr: MemAddr
    def __init__(self, hostSrcData: _Optional[bytes] = ..., dstDeviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., dstMemAddr: _Optional[_Union[MemAddr, _Mapping]] = ...) -> None: ...

class MemcpyHostToDeviceResponse(_message.Message):
    __slots__ = ("success",)
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    success: bool
    def __init__(self, success: bool = ...) -> None: ...

class MemcpyDeviceToHostRequest(_message.Message):
    __slots__ = ("srcDeviceId", "srcMemAddr", "numBytes")
    SRCDEVICEID_FIELD_NUMBER: _ClassVar[int]
    SRCMEMADDR_FIELD_NUMBER: _ClassVar[int]
    NUMBYTES_FIELD_NUMBER: _ClassVar[int]
    srcDeviceId: DeviceId
    srcMemAddr: MemAddr
    numBytes: int
    def __init__(self, srcDeviceId: _Optional[_Union[DeviceId, _Mapping]] = ..., srcMemAddr: _Optional[_Union[MemAddr, _Mapping]] = ..., numBytes: _Optional[int] = ...) -> None: ...

class MemcpyDeviceToHostResponse(_message.Message):
    __slots__ = ("dstData",)
    DSTDATA_FIELD_NUMBER: _ClassVar[int]
    dstData: bytes
    def __init__(self, dstData: _Optional[bytes] = ...) -> None: ...

class MemcpyRequest(_message.Message):
    __slots__ = ("hostToDevice", "deviceToHost")
    HOSTTODEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICETOHOST_FIELD_NUMBER: _ClassVar[int]
    hostToDevice: MemcpyHostToDeviceRequest
    deviceToHost: MemcpyDeviceToHostRequest
    def __init__(self, hostToDevice: _Optional[_Union[MemcpyHostToDeviceRequest, _Mapping]] = ..., deviceToHost: _Optional[_Union[MemcpyDeviceToHostRequest, _Mapping]] = ...) -> None: ...

class MemcpyResponse(_message.Message):
    __slots__ = ("hostToDevice", "deviceToHost")
    HOSTTODEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICETOHOST_FIELD_NUMBER: _ClassVar[int]
    hostToDevice: MemcpyHostToDeviceResponse
    deviceToHost: MemcpyDeviceToHostResponse
    def __init__(self, hostToDevice: _Optional[_Union[MemcpyHostToDeviceResponse, _Mapping]] = ..., deviceToHost: _Optional[_Union[MemcpyDeviceToHostResponse, _Mapping]] = ...) -> None: ...

class CommFinalizeRequest(_message.Message):
    __slots__ = ("commId",)
    COMMID_FIELD_NUMBER: _ClassVar[int]
    commId: int
    def __init__(self, commId: _Optional[int] = ...) -> None: ...

class CommFinalizeResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: Status
    def __init__(self, status: _Optional[_Union[Status, str]] = ...) -> None: ...

class CommDestroyRequest(_message.Message):
    __slots__ = ("commId",)
    COMMID_FIELD_NUMBER: _ClassVar[int]
    commId: int
    def __init__(self, commId: _Optional[int] = ...) -> None: ...

class CommDestroyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceStatus]
    def __init__(self, devices: _Optional[_Iterable[_Union[DeviceStatus, _Mapping]]] = ...) -> None: ...

class DeviceStatus(_message.Message):
    __slots__ = ("metadata", "reachable", "commIds", "embedded")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    COMMIDS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDED_FIELD_NUMBER: _ClassVar[int]
    metadata: DeviceMetadata
    reachable: bool
    commIds: _containers.RepeatedScalarFieldContainer[int]
    embedded: bool
    def __init__(self, metadata: _Optional[_Union[DeviceMetadata, _Mapping]] = ..., reachable: bool = ..., commIds: _Optional[_Iterable[int]] = ..., embedded: bool = ...) -> None: ...

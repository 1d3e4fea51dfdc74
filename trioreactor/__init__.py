"""trioreactor: a structured-concurrency TCP toolkit for trio."""

from trioreactor.acceptor import Acceptor, AcceptorStatistics
from trioreactor.address import SocketAddress, format_address
from trioreactor.backoff import Backoff
from trioreactor.buffer import Buffer
from trioreactor.callbacks import Callbacks
from trioreactor.client_statistics import ClientStatistics
from trioreactor.codec import NEED_MORE, Codec, NeedMore
from trioreactor.connecting import open_tcp_connection
from trioreactor.connection_statistics import ConnectionStatistics
from trioreactor.connector import Connector, ConnectorStatistics
from trioreactor.endpoints import ConnectAttempt, Endpoint
from trioreactor.errors import (
    ConnectError,
    FrameTooLarge,
    HandshakeFailed,
    IllegalStateTransition,
    IncompleteFrame,
    InheritedSocketError,
    NotConnected,
    ProtocolError,
    ProxyProtocolError,
    ReceiveBufferFull,
    SendBufferFull,
    TrioReactorError,
    WorkerStartError,
)
from trioreactor.event_loop import EventLoop
from trioreactor.event_loop_thread_pool import EventLoopThreadPool
from trioreactor.framed import FramedChannel, dispatch_messages
from trioreactor.heartbeat import Heartbeat
from trioreactor.inherited import inherited_acceptors
from trioreactor.length_codecs import (
    FixedLengthCodec,
    LengthHeaderCodec,
    NetstringCodec,
    VarintCodec,
)
from trioreactor.line_codecs import DelimiterCodec, JsonLinesCodec, LineCodec
from trioreactor.listen import open_acceptors, open_tcp_acceptors, open_unix_acceptor
from trioreactor.loop_watchdog import LoopWatchdog
from trioreactor.options import Keepalive, Limits, SocketOptions, Timeouts, Watermarks
from trioreactor.proxy_header import ProxyHeader, encode_proxy_header
from trioreactor.proxy_protocol import ProxyProtocol, receive_proxy_header
from trioreactor.proxy_tlvs import ProxySsl, ProxyTlvType
from trioreactor.serve_options import ServeOptions
from trioreactor.server_statistics import DrainReport, ServerStatistics
from trioreactor.service_notifier import ServiceNotifier
from trioreactor.signals import run_workers, serve_until_signalled
from trioreactor.sockets import TcpInfo
from trioreactor.state import CloseReason, ConnectionState, ConnectorState
from trioreactor.supervisor_statistics import SupervisorStatistics
from trioreactor.tcp_client import TcpClient
from trioreactor.tcp_connection import TcpConnection
from trioreactor.tcp_server import TcpServer, serve_tcp
from trioreactor.tls import TlsInfo
from trioreactor.worker_options import WorkerOptions
from trioreactor.workers import Supervisor

__version__ = "0.5.0"

__all__ = [
    # servers
    "TcpServer",
    "serve_tcp",
    "Callbacks",
    "DrainReport",
    "ServerStatistics",
    # clients
    "TcpClient",
    "ClientStatistics",
    "open_tcp_connection",
    "Connector",
    "ConnectorState",
    "ConnectorStatistics",
    "ConnectAttempt",
    "Endpoint",
    "Backoff",
    # connections
    "TcpConnection",
    "ConnectionStatistics",
    "ConnectionState",
    "CloseReason",
    "Buffer",
    "TcpInfo",
    "TlsInfo",
    # messages
    "Codec",
    "NeedMore",
    "NEED_MORE",
    "LengthHeaderCodec",
    "VarintCodec",
    "NetstringCodec",
    "FixedLengthCodec",
    "LineCodec",
    "DelimiterCodec",
    "JsonLinesCodec",
    "FramedChannel",
    "dispatch_messages",
    "Heartbeat",
    # listening
    "Acceptor",
    "AcceptorStatistics",
    "open_acceptors",
    "open_tcp_acceptors",
    "open_unix_acceptor",
    "inherited_acceptors",
    # options
    "Watermarks",
    "Limits",
    "Timeouts",
    "SocketOptions",
    "Keepalive",
    # behind proxies, and in front
    "ProxyProtocol",
    "ProxyHeader",
    "ProxySsl",
    "ProxyTlvType",
    "receive_proxy_header",
    "encode_proxy_header",
    # the loop
    "EventLoop",
    # processes
    "Supervisor",
    "SupervisorStatistics",
    "ServeOptions",
    "WorkerOptions",
    "run_workers",
    "serve_until_signalled",
    "LoopWatchdog",
    # the service manager
    "ServiceNotifier",
    "EventLoopThreadPool",
    # addresses
    "SocketAddress",
    "format_address",
    # errors
    "TrioReactorError",
    "ConnectError",
    "InheritedSocketError",
    "NotConnected",
    "HandshakeFailed",
    "SendBufferFull",
    "ProtocolError",
    "ProxyProtocolError",
    "FrameTooLarge",
    "IncompleteFrame",
    "ReceiveBufferFull",
    "IllegalStateTransition",
    "WorkerStartError",
]

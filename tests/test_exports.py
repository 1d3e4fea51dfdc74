"""The public names: exactly these, each explained where it is defined."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest

import trioreactor

pytestmark = pytest.mark.pure

NAMES = {
    "ServeOptions",
    "Supervisor",
    "SupervisorStatistics",
    "WorkerOptions",
    "WorkerStartError",
    "run_workers",
    "serve_until_signalled",
    "Acceptor",
    "AcceptorStatistics",
    "Backoff",
    "Buffer",
    "Callbacks",
    "ClientStatistics",
    "CloseReason",
    "Codec",
    "ConnectAttempt",
    "ConnectError",
    "ConnectionState",
    "ConnectionStatistics",
    "Connector",
    "ConnectorState",
    "ConnectorStatistics",
    "DelimiterCodec",
    "DrainReport",
    "Endpoint",
    "EventLoop",
    "EventLoopThreadPool",
    "FixedLengthCodec",
    "FrameTooLarge",
    "FramedChannel",
    "HandshakeFailed",
    "Heartbeat",
    "IllegalStateTransition",
    "IncompleteFrame",
    "InheritedSocketError",
    "JsonLinesCodec",
    "Keepalive",
    "LengthHeaderCodec",
    "Limits",
    "LineCodec",
    "LoopWatchdog",
    "NEED_MORE",
    "NeedMore",
    "NetstringCodec",
    "NotConnected",
    "ProtocolError",
    "ProxyHeader",
    "ProxyProtocol",
    "ProxyProtocolError",
    "ProxySsl",
    "ProxyTlvType",
    "ReceiveBufferFull",
    "SendBufferFull",
    "ServerStatistics",
    "ServiceNotifier",
    "SocketAddress",
    "SocketOptions",
    "TcpClient",
    "TcpConnection",
    "TcpInfo",
    "TcpServer",
    "Timeouts",
    "TlsInfo",
    "TrioReactorError",
    "VarintCodec",
    "Watermarks",
    "dispatch_messages",
    "encode_proxy_header",
    "format_address",
    "inherited_acceptors",
    "open_acceptors",
    "open_tcp_acceptors",
    "open_tcp_connection",
    "open_unix_acceptor",
    "receive_proxy_header",
    "serve_tcp",
}

PACKAGE = Path(trioreactor.__file__).parent


def test_names() -> None:
    """``__all__`` is this list, with nothing twice."""
    assert sorted(trioreactor.__all__) == sorted(NAMES)


def test_star_import() -> None:
    """``from trioreactor import *`` gives exactly these."""
    namespace: dict[str, object] = {}
    exec("from trioreactor import *", namespace)
    del namespace["__builtins__"]
    assert set(namespace) == NAMES


def test_no_other_name_is_public() -> None:
    """Beside these the package has nothing without an underscore, except for its modules."""
    others = {
        name
        for name, value in vars(trioreactor).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert others == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_docstring(name: str) -> None:
    """Each public name has a docstring of its own."""
    value = getattr(trioreactor, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        text = value.__doc__ or ""
        # A dataclass without one is given its signature.
        assert not text.startswith(f"{name}(")
    else:
        text = text_below(name)
    assert re.match(r"[A-Z`].{10,}", text), f"{name} is not explained"


def text_below(name: str) -> str:
    """The string that stands below an assignment to *name*, in whichever module has it."""
    for path in PACKAGE.glob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for statement, following in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and ast.unparse(statement.target) == name
                and isinstance(following, ast.Expr)
            ):
                return str(ast.literal_eval(following.value))
    return ""


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_members_have_docstrings(name: str) -> None:
    """So has each public method and property of each public class."""
    cls = getattr(trioreactor, name)
    if not inspect.isclass(cls):
        return
    for member, value in vars(cls).items():
        if not member.startswith("_") and (
            inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
        ):
            assert value.__doc__, f"{name}.{member} is not explained"


def test_version() -> None:
    """The version is a plain release number, and that of the metadata if it is installed."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", trioreactor.__version__)
    try:
        installed = metadata.version("trioreactor")
    except metadata.PackageNotFoundError:
        return
    assert installed == trioreactor.__version__


def test_typed() -> None:
    """The package tells type checkers that its annotations are meant for them."""
    assert (PACKAGE / "py.typed").is_file()


def test_import_is_quiet() -> None:
    """Importing prints nothing, warns of nothing, and leaves logging as it was."""
    program = (
        "import logging; import trioreactor; root = logging.getLogger(); "
        "own = [l for n, l in logging.Logger.manager.loggerDict.items() if 'trioreactor' in n "
        "and isinstance(l, logging.Logger)]; "
        "assert not root.handlers and not any(l.handlers or l.level for l in own)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

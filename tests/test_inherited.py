"""Sockets from elsewhere: systemd's protocol, by its own program too, and descriptors by number."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.conftest import connect, no_leaks, open_descriptors
from tests.servers import installed, unused_port
from trioreactor import (
    Acceptor,
    InheritedSocketError,
    SocketOptions,
    inherited,
    inherited_acceptors,
    open_acceptors,
)

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).parent / "programs" / "activated_server.py"

# Where the tests' process, whose low descriptors are in use, is handed sockets.
FIRST = 600


def tcp_listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def unix_listener() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0trioreactor-test-{os.getpid()}-{id(sock)}")
    sock.listen()
    return sock


class HandedOver:
    """Descriptors from FIRST on, as if another program had left them there."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def add(self, sock: socket.socket) -> int:
        """A copy of *sock*, which is closed, at the next number; inheritable, as after an exec."""
        with sock:
            fd = fcntl.fcntl(sock, fcntl.F_DUPFD, FIRST + len(self.descriptors))
        assert fd == FIRST + len(self.descriptors)
        self.descriptors.append(fd)
        os.set_inheritable(fd, True)
        os.set_blocking(fd, True)
        return fd

    def close(self) -> None:
        for fd in self.descriptors:
            with suppress(OSError):
                os.close(fd)


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[HandedOver]:
    """Nothing is left from other tests, and descriptors begin at FIRST."""
    monkeypatch.setattr(inherited, "_FIRST_DESCRIPTOR", FIRST)
    monkeypatch.setattr(inherited, "_waiting", [])
    monkeypatch.setattr(inherited, "_read_from", [])
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        # Also restores what the code under test removes.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    handed = HandedOver()
    yield handed
    handed.close()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, handed: HandedOver) -> Callable[..., None]:
    """Sets the variables."""

    def tell(count: object, names: str | None = None, pid: object = None) -> None:
        monkeypatch.setenv("LISTEN_PID", str(os.getpid() if pid is None else pid))
        monkeypatch.setenv("LISTEN_FDS", str(count))
        if names is not None:
            monkeypatch.setenv("LISTEN_FDNAMES", names)

    return tell


@contextmanager
def closing(acceptors: list[Acceptor]) -> Iterator[list[Acceptor]]:
    try:
        yield acceptors
    finally:
        for acceptor in acceptors:
            acceptor.close()


async def assert_accepts(acceptor: Acceptor) -> None:
    """A client that comes is accepted."""
    address = acceptor.address
    with socket.socket(acceptor.socket.family) as client, trio.fail_after(5):
        client.connect(address)
        stream = await acceptor.accept()
        await stream.send_all(b"x")
        assert client.recv(1) == b"x"
        await stream.aclose()


# -- LISTEN_FDS


async def test_nothing_was_handed_over(handed: HandedOver) -> None:
    """Without the variables there is nothing."""
    assert inherited_acceptors() == []
    assert inherited_acceptors(name="web") == []


async def test_names(handed: HandedOver, told: Callable[..., None]) -> None:
    """Each is given out once, to who asks for its name or for what is left; in order; and works.

    No child process inherits one, also if it was not asked for, and the variables are gone.
    """
    for listener in (tcp_listener(), unix_listener(), tcp_listener(), tcp_listener()):
        handed.add(listener)
    told(4, "web:admin:web")
    before = open_descriptors()
    assert inherited_acceptors(name="other") == []
    assert not any(name.startswith("LISTEN_") for name in os.environ)
    assert not any(map(os.get_inheritable, handed.descriptors))
    web = inherited_acceptors(name="web")
    admin = inherited_acceptors(name="admin")
    assert inherited_acceptors(name="web") == []
    # The one that nobody has named.
    rest = inherited_acceptors(name="unknown")
    assert inherited_acceptors() == []
    acceptors = [*web, *admin, *rest]
    numbers = [acceptor.socket.fileno() for acceptor in acceptors]
    assert numbers == [FIRST, FIRST + 2, FIRST + 1, FIRST + 3]
    for acceptor in acceptors:
        assert not os.get_blocking(acceptor.socket.fileno())
        await assert_accepts(acceptor)
        await acceptor.aclose()
    # The acceptors owned them.
    assert open_descriptors() == before - 4


async def test_all_at_once(handed: HandedOver, told: Callable[..., None]) -> None:
    """With no name asked for, all come; more names than descriptors mean nothing."""
    handed.add(tcp_listener())
    handed.add(tcp_listener())
    told(2, "a:b:c:d")
    with closing(inherited_acceptors()) as acceptors:
        assert [a.socket.fileno() for a in acceptors] == [FIRST, FIRST + 1]


async def test_for_another_process(handed: HandedOver, told: Callable[..., None]) -> None:
    """What is meant for another process is not touched; its variables are no child's, either."""
    fd = handed.add(tcp_listener())
    told(1, pid=os.getppid())
    assert inherited_acceptors() == []
    assert os.get_inheritable(fd)
    assert "LISTEN_FDS" not in os.environ


async def test_the_environment_may_stay(handed: HandedOver, told: Callable[..., None]) -> None:
    """With unset_environment=False the variables stay, and each socket is still given out once."""
    handed.add(tcp_listener())
    handed.add(tcp_listener())
    told(2, "a:b")
    with closing(inherited_acceptors(name="a", unset_environment=False)) as first:
        assert len(first) == 1
        assert os.environ["LISTEN_FDNAMES"] == "a:b"
        with closing(inherited_acceptors(unset_environment=False)) as second:
            assert [a.socket.fileno() for a in second] == [FIRST + 1]
        assert inherited_acceptors() == []
        assert "LISTEN_FDS" not in os.environ


async def test_options(handed: HandedOver, told: Callable[..., None]) -> None:
    """Socket options hold for the connections that are accepted."""
    handed.add(tcp_listener())
    told(1)
    options = SocketOptions(no_delay=False, keepalive=True, backlog=1, reuse_port=True)
    with closing(inherited_acceptors(socket_options=options, batch=7)) as (acceptor,):
        assert acceptor.batch == 7
        async with connect(acceptor.address), await acceptor.accept() as stream:
            sock = stream.socket
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def connected() -> socket.socket:
    left, right = socket.socketpair()
    right.close()
    return left


def bound() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


WRONG: dict[str, tuple[Callable[[], socket.socket], str]] = {
    "datagram": (lambda: socket.socket(type=socket.SOCK_DGRAM), "no stream socket"),
    "seqpacket": (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), "no stream socket"),
    "bound": (bound, "does not listen"),
    "connected": (connected, "does not listen"),
    "family": (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "no TCP or Unix socket"),
}


@pytest.mark.parametrize("kind", WRONG)
async def test_a_wrong_socket(kind: str, handed: HandedOver, told: Callable[..., None]) -> None:
    """One that does not listen is named, none is taken, and asking again says it again."""
    make, problem = WRONG[kind]
    handed.add(tcp_listener())
    handed.add(make())
    told(2, "good:bad")
    for _ in range(2):
        text = f"^descriptor {FIRST + 1}: .*{problem}"
        with pytest.raises(InheritedSocketError, match=text) as caught:
            inherited_acceptors()
        assert caught.value.descriptor == FIRST + 1
        assert caught.value.errno == errno.EINVAL
        assert "pass a listening TCP or Unix stream socket" in str(caught.value)
        for fd in handed.descriptors:
            os.fstat(fd)
    # The other one can still be had.
    with closing(inherited_acceptors(name="good")) as (acceptor,):
        await assert_accepts(acceptor)


async def test_no_socket_at_all(handed: HandedOver, told: Callable[..., None]) -> None:
    """A file, and a number with nothing behind it."""
    with open(os.devnull, "rb") as file:
        fd = fcntl.fcntl(file, fcntl.F_DUPFD, FIRST)
    handed.descriptors.append(fd)
    told(2)
    with pytest.raises(InheritedSocketError, match=f"{FIRST}: it is no socket") as caught:
        inherited_acceptors()
    assert caught.value.errno == errno.ENOTSOCK
    os.fstat(fd)
    os.close(fd)
    with pytest.raises(InheritedSocketError, match=f"{FIRST}: it is not open") as caught:
        inherited_acceptors()
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize(("count", "pid"), [("x", None), ("-1", None), ("", None), ("1", "1e3")])
async def test_nonsense(
    count: str, pid: str | None, handed: HandedOver, told: Callable[..., None]
) -> None:
    """Variables that are no numbers are an error, which names no descriptor."""
    told(count, pid=pid)
    with pytest.raises(InheritedSocketError, match="this is no number") as caught:
        inherited_acceptors()
    assert caught.value.descriptor is None


async def test_a_count_that_cannot_be(handed: HandedOver, told: Callable[..., None]) -> None:
    """An absurd number costs no memory: the first descriptor that is not there is the error."""
    told("9999999999")
    with pytest.raises(InheritedSocketError, match="it is not open"):
        inherited_acceptors()


def test_the_error_can_be_copied() -> None:
    """It survives pickling, with what it knows."""
    error = pickle.loads(pickle.dumps(InheritedSocketError("text", 7, errno.EBADF)))
    assert (str(error), error.descriptor, error.errno) == ("text", 7, errno.EBADF)
    assert isinstance(error, OSError)


# -- bind addresses


async def test_open_acceptors(tmp_path: Path, handed: HandedOver) -> None:
    """Every kind of address at once, in order; the file has the mode, and is removed at the end."""
    fd = handed.add(tcp_listener())
    path = tmp_path / "x.sock"
    async with no_leaks():
        acceptors = await open_acceptors(
            f"unix:{path}",
            f"fd://{fd}",
            "127.0.0.1:0",
            f"unix:@trioreactor-test-{os.getpid()}",
            mode=0o600,
            batch=3,
        )
        assert path.stat().st_mode & 0o777 == 0o600
        assert not os.get_inheritable(fd)
        assert [a.batch for a in acceptors] == [3] * 4
        assert [a.socket.family for a in acceptors] == [
            socket.AF_UNIX,
            socket.AF_INET,
            socket.AF_INET,
            socket.AF_UNIX,
        ]
        assert acceptors[1].socket.fileno() == fd
        for acceptor in acceptors:
            await assert_accepts(acceptor)
            await acceptor.aclose()
        assert not path.exists()
        # The acceptor owned it, and the count before had it.
        handed.descriptors[:] = [os.open(os.devnull, os.O_RDONLY)]


async def test_by_number_and_by_name(handed: HandedOver, told: Callable[..., None]) -> None:
    """What was taken by its number is not given out once more, nor left to a child process."""
    for listener in (tcp_listener(), tcp_listener()):
        handed.add(listener)
    told(2, "a:b")
    with (
        closing(await open_acceptors(f"fd://{FIRST}")),
        closing(inherited_acceptors()) as acceptors,
    ):
        assert [a.socket.fileno() for a in acceptors] == [FIRST + 1]


async def test_every_address() -> None:
    """:0 is every address, in each family that the machine has, on one port."""
    acceptors = await open_acceptors(":0")
    with closing(acceptors):
        assert len({a.address[1] for a in acceptors}) == 1
        assert {a.address[0] for a in acceptors} <= {"0.0.0.0", "::"}


async def test_all_or_none(tmp_path: Path, handed: HandedOver) -> None:
    """If one cannot be bound, those before it are closed, and a descriptor stays the caller's."""
    fd = handed.add(tcp_listener())
    path = tmp_path / "x.sock"
    async with no_leaks():
        with socket.create_server(("127.0.0.1", 0)) as blocker:
            port = blocker.getsockname()[1]
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
                await open_acceptors(f"unix:{path}", f"fd://{fd}", f"127.0.0.1:{port}")
        assert not path.exists()
        with socket.socket(fileno=fd) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            sock.detach()


async def test_mistakes_come_first(tmp_path: Path) -> None:
    """What is no address, or no listening socket, is found before anything is opened."""
    path = tmp_path / "x.sock"
    async with no_leaks():
        with pytest.raises(ValueError, match="pass at least one address"):
            await open_acceptors()
        with pytest.raises(ValueError, match="pass host:port"):
            await open_acceptors(f"unix:{path}", "nonsense")
        with socket.socket() as sock:
            fd = sock.fileno()
            with pytest.raises(InheritedSocketError, match=f"descriptor {fd}: .*does not listen"):
                await open_acceptors(f"unix:{path}", f"fd://{fd}")
            sock.listen()
            with pytest.raises(InheritedSocketError, match=f"descriptor {fd}: .*named twice"):
                await open_acceptors(f"fd://{fd}", f"fd://{fd}")
    assert not path.exists()


# -- systemd's own program


@contextmanager
def activated(
    *arguments: str, listen: list[str], fdnames: str | None = None, poller: str
) -> Iterator[subprocess.Popen[str]]:
    """The program, which systemd-socket-activate starts at the first client."""
    listens = [option for address in listen for option in ("-l", address)]
    names = [] if fdnames is None else [f"--fdname={fdnames}"]
    environment = {"TRIOREACTOR_POLLER": poller, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [
            installed("systemd-socket-activate"),
            *listens,
            *names,
            # It gives its child a new environment.
            *(f"--setenv={name}={value}" for name, value in environment.items()),
            sys.executable,
            str(PROGRAM),
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def dial(address: object, process: subprocess.Popen[str]) -> bytes:
    """What a client at *address* is greeted with, once somebody listens there."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        client.settimeout(20)
        while client.connect_ex(address):
            assert process.poll() is None
        return client.makefile("rb").read()


@pytest.mark.program
@pytest.mark.parametrize("poller", ["epoll", "trio"])
def test_socket_activation(poller: str, tmp_path: Path) -> None:
    """systemd-socket-activate hands over TCP and Unix sockets with names: each is served under its
    own, the client that woke the program included; at the drain the file stays.
    """
    path = str(tmp_path / "x.sock")
    with ExitStack() as stack:
        ports = [stack.enter_context(unused_port()) for _ in range(2)]
        process = stack.enter_context(
            activated(
                "web admin",
                "",
                listen=[f"127.0.0.1:{ports[0]}", path, f"127.0.0.1:{ports[1]}"],
                fdnames="web:admin:web",
                poller=poller,
            )
        )
        assert dial(path, process) == b"admin\n"
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {
            "found": {
                "web": [f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"],
                "admin": [path],
            },
            "left": 0,
            "variables": [],
            "inheritable": [False] * 3,
        }
        for port in ports:
            assert dial(("127.0.0.1", port), process) == b"web\n"
        assert dial(path, process) == b"admin\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert Path(path).is_socket()


@pytest.mark.program
def test_socket_activation_by_number() -> None:
    """The same sockets by fd://, whatever they are called."""
    with (
        unused_port() as port,
        activated("", "fd://3", listen=[f"127.0.0.1:{port}"], poller="epoll") as process,
    ):
        assert dial(("127.0.0.1", port), process) == b"fd://3\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0

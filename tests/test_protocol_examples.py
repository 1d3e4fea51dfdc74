"""The examples that speak known protocols: against those protocols' own clients, and bad ones."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from types import ModuleType
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import no_leaks, reset, until
from tests.servers import installed
from tests.test_examples import ROOT, load, read_exactly, read_to_eof
from trioreactor import Buffer, IncompleteFrame, ProtocolError

MEBIBYTE = 1 << 20
SUDOKU = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.fixture(autouse=True)
def _as_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They find their parts as programs do: beside themselves."""
    monkeypatch.syspath_prepend(ROOT / "examples")


def python_client(name: str) -> ModuleType:
    """A client's module. Where it is not, the test is skipped, or fails if it is required."""
    if importlib.util.find_spec(name) is None:
        if os.environ.get("TRIOREACTOR_REQUIRE_SERVERS") == "1":
            pytest.fail(f"{name} is not installed, and TRIOREACTOR_REQUIRE_SERVERS=1 wants it")
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


@asynccontextmanager
async def up(example: str | ModuleType) -> AsyncIterator[tuple[str, int]]:
    """The example's `main` on port 0, from start to cancel; gives its address."""
    module = load(example) if isinstance(example, str) else example
    async with no_leaks(), trio.open_nursery() as nursery:
        (acceptor,) = await nursery.start(module.main, 0)
        with trio.fail_after(40):
            yield acceptor.address
        nursery.cancel_scope.cancel()


async def talk(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Send the pieces one after the other, half-close, and give all that comes."""
    stream = await trio.open_tcp_stream(*address)
    answer = b""

    async def listen() -> None:
        nonlocal answer
        answer = await read_to_eof(stream)

    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        # The server may have closed by now, and that is for the test to say.
        with suppress(trio.BrokenResourceError):
            for piece in pieces:
                await stream.send_all(piece)
                if len(pieces) > 1:
                    await trio.testing.wait_all_tasks_blocked()
            await stream.send_eof()
    return answer


async def in_thread(fn: Callable[[], Any]) -> Any:
    """Run a client that blocks."""
    return await trio.to_thread.run_sync(fn, abandon_on_cancel=True)


async def output(*command: object, **options: Any) -> str:
    """What a client program says; it must end with 0."""
    done = await trio.run_process(
        [str(part) for part in command], capture_stdout=True, stderr=subprocess.STDOUT, **options
    )
    return done.stdout.decode()


async def assert_split_anywhere(name: str, conversation: bytes, expected: bytes) -> None:
    """The same answer whether the requests come at once, byte by byte, or cut in two anywhere."""
    async with up(name) as address:
        assert await talk(address, conversation) == expected
        assert await talk(address, *(bytes([byte]) for byte in conversation)) == expected
        for cut in range(1, len(conversation)):
            assert await talk(address, conversation[:cut], conversation[cut:]) == expected


async def assert_survives_resets(name: str, begin: bytes, question: bytes, answer: bytes) -> None:
    """Clients that reset inside a request, or with answers unread, end alone."""
    async with up(name) as address:
        for data in (begin, question * 200, question * 200 + begin):
            for _ in range(3):
                stream = await trio.open_tcp_stream(*address)
                await stream.send_all(data)
                reset(stream.socket)
        assert await talk(address, question) == answer


async def unread(
    address: tuple[str, int], question: bytes, *, most: int
) -> tuple[trio.SocketStream, int]:
    """Ask on and on, reading nothing, until no more is taken; how many questions were."""
    stream = await trio.open_tcp_stream(*address)
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sent = 0
    while sent < most:
        with trio.move_on_after(0.5) as patience:
            await stream.send_all(question * 10)
        if patience.cancelled_caught:
            return stream, sent
        sent += 10
    raise AssertionError(f"it took {sent} questions from one who reads no answer")


# -- memcached


def a_session(pymemcache: ModuleType, address: tuple[str, int]) -> None:
    """What an application does with its cache."""
    with closing(pymemcache.Client(address, default_noreply=False, timeout=20)) as cache:
        assert cache.get("k") is None
        assert cache.set("k", b"hello")
        assert cache.get("k") == b"hello"
        assert not cache.add("k", b"other")
        assert cache.add("j", b"\r\nget k\r\n")
        assert not cache.replace("nobody", b"x")
        assert cache.replace("k", b"")
        assert cache.get_many(["k", "j", "nobody"]) == {"k": b"", "j": b"\r\nget k\r\n"}
        value, unique = cache.gets("k")
        assert value == b""
        assert cache.cas("k", b"new", unique)
        assert cache.cas("k", b"newer", unique) is False
        assert cache.cas("nobody", b"newer", unique) is None
        assert cache.set("n", b"9", flags=7)
        assert cache.incr("n", 3) == 12
        assert cache.decr("n", 20) == 0
        assert cache.incr("n", (1 << 64) - 1) == (1 << 64) - 1
        assert cache.incr("n", 1) == 0
        assert cache.incr("nobody", 1) is None
        with pytest.raises(pymemcache.exceptions.MemcacheClientError, match="non-numeric"):
            cache.incr("k", 1)
        assert cache.delete("k")
        assert not cache.delete("k")
        # An answer that nobody waits for would be taken for the next one's.
        assert cache.set("quiet", b"1", noreply=True)
        assert cache.incr("quiet", 1, noreply=True) is None
        assert cache.add("quiet", b"x", noreply=True)
        assert cache.delete("nobody", noreply=True)
        assert cache.get("quiet") == b"2"
        assert cache.set("long" * 62 + "xy", b"1")
        assert cache.set("big", bytes(MEBIBYTE))
        assert cache.get("big") == bytes(MEBIBYTE)
        assert cache.version() == b"1.0"
        statistics = cache.stats()
        assert statistics[b"curr_items"] == 5
        assert statistics[b"bytes"] > MEBIBYTE
        cache.quit()


async def test_memcached_with_its_client() -> None:
    """A client that many use finds what it stored, conditions, counters, and silence if asked."""
    pymemcache = python_client("pymemcache")
    async with up("memcached") as address:
        await in_thread(lambda: a_session(pymemcache, address))


async def test_memcached_too_large_a_value() -> None:
    """A value of a byte too much is answered with an error, though none of it was stored."""
    pymemcache = python_client("pymemcache")

    def session() -> None:
        with closing(pymemcache.Client(address, default_noreply=False, timeout=20)) as cache:
            assert cache.set("k", b"before")
            with pytest.raises(pymemcache.exceptions.MemcacheClientError, match="too large"):
                cache.set("k", bytes(MEBIBYTE + 1))
            assert cache.get("k") == b"before"

    async with up("memcached") as address:
        await in_thread(session)


async def test_memcached_forgets_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item lives for the seconds or until the date it was given; a negative time is over."""
    items = load("parts/memcached_items")
    now = 1000.0
    monkeypatch.setattr(items.trio, "current_time", lambda: now)
    monkeypatch.setattr(items.time, "time", lambda: now + 1e9)
    store = items.Items()

    def obey(line: str) -> bytes:
        return b"".join(store.answer(line.encode().split(), b"v"))

    for key, seconds in {"short": 10, "date": 1_000_001_020, "past": 1_000_000_999}.items():
        assert obey(f"set {key} 0 {seconds} 1") == b"STORED\r\n"
    assert obey("set over 0 -1 1") == obey("set ever 0 0 1") == b"STORED\r\n"

    def alive() -> list[bytes]:
        return re.findall(rb"VALUE (\w+)", obey("get short date past over ever"))

    assert obey("set gone 0 -1 1") == b"STORED\r\n"
    assert obey("delete gone") == b"NOT_FOUND\r\n"
    assert alive() == [b"short", b"date", b"ever"]
    now += 9.9
    assert alive() == [b"short", b"date", b"ever"]
    now += 0.1
    assert alive() == [b"date", b"ever"]
    assert obey("delete short") == b"NOT_FOUND\r\n"
    now += 10
    assert alive() == [b"ever"]
    # What is over takes no room.
    assert store.size == 100 + len("ever") + 1


def test_memcached_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its capacity it forgets what was stored longest ago, and its size is exact."""
    items = load("parts/memcached_items")
    monkeypatch.setattr(items.trio, "current_time", lambda: 1.0)
    store = items.Items(capacity=1000)
    for number in range(20):
        store.answer([b"set", b"%02d" % number, b"0", b"0", b"98"], bytes(98))
        assert store.size <= 1000
    keys = [b"%02d" % number for number in range(20)]
    found = b"".join(store.answer([b"get", *keys], b""))
    assert re.findall(rb"VALUE (\w+)", found) == keys[-5:]
    assert store.counts["evictions"] == 15
    for _ in range(20):
        store.answer([b"set", b"19", b"0", b"0", b"98"], bytes(98))
    assert store.size == 1000
    assert store.counts["evictions"] == 15


async def test_memcached_split_anywhere() -> None:
    """Requests are the same however they are cut, and pipelined ones are answered in order."""
    await assert_split_anywhere(
        "memcached",
        b"set a 3 0 4\r\nx\r\ny\r\nadd a 0 0 1 noreply\r\nz\r\nget a\r\nbogus\r\n\r\ndelete a\r\n",
        b"STORED\r\nVALUE a 3 4\r\nx\r\ny\r\nEND\r\nERROR\r\nERROR\r\nDELETED\r\n",
    )


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"get\r\n", b"ERROR\r\n"),
        (b"get " + b"k" * 251 + b"\r\n", b"CLIENT_ERROR key too long\r\n"),
        (b"delete " + b"k" * 251 + b"\r\n", b"CLIENT_ERROR key too long\r\n"),
        (b"set " + b"k" * 251 + b" 0 0 1\r\nx\r\n", b"CLIENT_ERROR key too long\r\n"),
        (b"set k x 0 1\r\nx\r\n", b"CLIENT_ERROR bad command line format\r\n"),
        (b"set k 0 x 1\r\nx\r\n", b"CLIENT_ERROR bad command line format\r\n"),
        (b"set k 0 0 1 what now\r\nx\r\n", b"CLIENT_ERROR bad command line format\r\n"),
        (b"cas k 0 0 1 x\r\nx\r\n", b"CLIENT_ERROR bad command line format\r\n"),
        (b"incr k x\r\n", b"CLIENT_ERROR invalid numeric delta argument\r\n"),
        (b"\xff\x00\r\n", b"ERROR\r\n"),
        (b"noreply\r\n", b""),
        (b"SET k 0 0 1\r\n", b"ERROR\r\n"),
    ],
)
async def test_memcached_says_what_is_wrong(request_: bytes, answer: bytes) -> None:
    """A request that is wrong in itself is answered as the protocol says; the next is served."""
    async with up("memcached") as address:
        assert await talk(address, request_ + b"version\r\n") == answer + b"VERSION 1.0\r\n"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"set k 0 0\r\n", b"bad command line format"),
        (b"set k 0 0 -1\r\n", b"bad command line format"),
        (b"set k 0 0 " + b"9" * 5000 + b"\r\n", b"bad command line format"),
        (b"set k 0 0 1048577\r\n", b"object too large for cache"),
        (b"set k 0 0 3\r\nabcdefgh\r\n", b"bad data chunk"),
        (b"x" * 65537, b"line too long"),
        (b"x" * 65537 + b"\r\n", b"line too long"),
        (bytes(range(11, 256)) * 1000, b"line too long"),
    ],
)
async def test_memcached_closes_where_the_thread_is_lost(request_: bytes, answer: bytes) -> None:
    """Where nobody knows where the next request begins, it says so, and is closed; what was asked
    before is answered.
    """
    async with up("memcached") as address:
        heard = await talk(address, b"version\r\n" + request_ + b"\r\nversion\r\n")
        assert heard == b"VERSION 1.0\r\nCLIENT_ERROR %s\r\n" % answer


async def test_memcached_line_without_an_end() -> None:
    """It is refused as soon as it is too long, whatever may still come."""
    async with up("memcached") as address, await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"x" * 65537)
        assert await read_to_eof(stream) == b"CLIENT_ERROR line too long\r\n"


async def test_memcached_quit() -> None:
    """`quit` is the last that is obeyed: EOF follows the answers from before."""
    async with up("memcached") as address, await trio.open_tcp_stream(*address) as stream:
        await stream.send_all(b"version\r\nquit\r\nversion\r\n")
        assert await read_to_eof(stream) == b"VERSION 1.0\r\n"


async def test_memcached_one_who_does_not_read() -> None:
    """An answer of a hundred large values, unread, neither fills our memory nor is lost: it comes
    as it is read, and then the requests behind it are answered.
    """
    big = b"x" * MEBIBYTE
    asked = b"get" + b" big" * 100 + b"\r\n"
    value = b"VALUE big 0 %d\r\n%s\r\n" % (len(big), big)
    async with up("memcached") as address:
        assert await talk(address, b"set big 0 0 %d\r\n%s\r\n" % (len(big), big)) == b"STORED\r\n"
        stream = await trio.open_tcp_stream(*address)
        async with stream:
            # 200 MB of answers, where the hard limit of a send buffer is 64.
            await stream.send_all(asked + asked + b"version\r\n")
            for _ in range(2):
                for _ in range(100):
                    assert await read_exactly(stream, len(value)) == value
                assert await read_exactly(stream, 5) == b"END\r\n"
            assert await read_exactly(stream, 13) == b"VERSION 1.0\r\n"


async def test_memcached_clients_reset() -> None:
    """A client that resets ends alone."""
    await assert_survives_resets(
        "memcached", b"set k 0 0 100\r\nabc", b"version\r\n", b"VERSION 1.0\r\n"
    )


# -- RESP


async def test_resp_with_redis_cli() -> None:
    """redis-cli gets the answers it would get from Redis."""
    cli = installed("redis-cli")
    conversation = {
        "PING": "PONG",
        "PING hello": "hello",
        "ECHO there": "there",
        "GET a": "",
        "SET a 41": "OK",
        "INCR a": "42",
        "get a": "42",
        "MSET b 1 c 2": "OK",
        "DEL a b nobody": "2",
        "GET a ": "",
        'SET q "x\\r\\ny"': "OK",
        "GET q": "x\r\ny",
        "INCR q": "ERR value is not an integer or out of range\n",
        "SET top 9223372036854775807": "OK",
        "INCR top": "ERR increment or decrement would overflow\n",
        "MSET a": "ERR wrong number of arguments\n",
        "MSET a 1 b": "ERR wrong number of arguments\n",
        "FLUSHALL": "ERR unknown command\n",
        "CONFIG GET save": "save\n",
        "COMMAND": "",
    }
    async with up("resp_server") as (host, port):
        said = await output(
            cli, "-h", host, "-p", port, stdin="\n".join(conversation).encode() + b"\nINFO\n"
        )
    answers = "".join(f"{answer}\n" for answer in conversation.values())
    assert said.startswith(answers)
    assert "used_memory:" in said[len(answers) :]


async def test_resp_with_redis_benchmark() -> None:
    """redis-benchmark, pipelining, runs through with no error."""
    benchmark = installed("redis-benchmark")
    async with up("resp_server") as (host, port):
        command = [benchmark, "-h", host, "-p", port, "-P", 16, "-c", 10, "-n", 2000, "--csv"]
        said = await output(*command, "-t", "ping,set,get,incr,mset")
    assert "rror" not in said
    assert "WARNING" not in said
    tests = [line.split('"')[1].split()[0] for line in said.splitlines() if line.startswith('"')]
    assert set(tests) >= {"PING_INLINE", "PING_MBULK", "SET", "GET", "INCR", "MSET"}


async def test_resp_split_anywhere() -> None:
    """Requests are the same however they are cut, and pipelined ones are answered in order."""
    await assert_split_anywhere(
        "resp_server",
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$4\r\n\r\n$1\r\nPING\r\n*0\r\n\r\n"
        b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\nDEL k\n*1\r\n$4\r\nquit\r\n",
        b"+OK\r\n+PONG\r\n$4\r\n\r\n$1\r\n:1\r\n+OK\r\n",
    )


@pytest.mark.parametrize("size", [0, 500, 511, 512, 513, 1023, 65536, MEBIBYTE - 100])
async def test_resp_values_of_all_sizes(size: int) -> None:
    """A value up to the limit comes back whole, with others before and behind it."""
    module = load("resp_server")
    codec = module.RespCodec(MEBIBYTE)
    value = os.urandom(size)
    async with up(module) as address:
        requests = ([b"SET", b"k", value], [b"GET", b"k"], [b"PING"])
        answer = await talk(address, b"PING\n" + b"".join(map(codec.encode, requests)))
    assert answer == b"+PONG\r\n+OK\r\n$%d\r\n%s\r\n+PONG\r\n" % (size, value)


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"*1000\r\n", b"invalid multibulk length"),
        (b"*-1\r\n", b"invalid multibulk length"),
        (b"*" + b"1" * 5000 + b"\r\n", b"invalid multibulk length"),
        (b"*" + b"1" * 5000, b"invalid multibulk length"),
        (b"*1\r\n$-1\r\n", b"invalid bulk length"),
        (b"*1\r\n$1048577\r\n", b"invalid bulk length"),
        (b"*2\r\n$1048000\r\n" + b"x" * 1048000 + b"\r\n$1000\r\n", b"invalid bulk length"),
        (b"*1\r\n$99999999999999999999999999\r\n", b"invalid bulk length"),
        (b"*2\r\n$9000\r\n%s\r\n$%s" % (b"x" * 9000, b"1" * 9000), b"invalid bulk length"),
        (b"*1\r\n:1\r\n", b"expected '$'"),
        (b"*1\r\n$2\r\nPING\r\n", b"a string longer than it says"),
        (b"x" * 4096, b"too big inline request"),
        (b"x" * 100_000, b"too big inline request"),
        (bytes(range(11, 256)) * 1000, b"too big inline request"),
    ],
)
async def test_resp_closes_on_garbage(request_: bytes, answer: bytes) -> None:
    """What is no request, or too large a one, is answered with an error, and then EOF; what was
    asked before is answered.
    """
    async with up("resp_server") as address:
        heard = await talk(address, b"PING\r\n" + request_)
        assert heard == b"+PONG\r\n-ERR Protocol error: %s\r\n" % answer


def test_resp_store_is_bounded() -> None:
    """What would take the store over its capacity is refused whole, and deleting makes room."""
    strings = load("parts/resp_strings").Strings(capacity=1000)
    assert strings.obey([b"SET", b"a", bytes(400)]) == b"+OK\r\n"
    refused = strings.obey([b"MSET", b"b", b"1", b"c", bytes(400)])
    assert refused.startswith(b"-OOM")
    assert strings.obey([b"GET", b"b"]) == b"$-1\r\n"
    assert strings.obey([b"SET", b"a", bytes(899)]) == b"+OK\r\n"
    assert strings.size == 1000
    assert strings.obey([b"SET", b"a", bytes(900)]).startswith(b"-OOM")
    assert strings.obey([b"DEL", b"a", b"a"]) == b":1\r\n"
    assert strings.size == 0


async def test_resp_one_who_does_not_read() -> None:
    """One who asks without reading is no longer read from, and gets every answer once it reads."""
    value = os.urandom(100_000)
    answer = b"$%d\r\n%s\r\n" % (len(value), value)
    module = load("resp_server")
    async with up(module) as address:
        stored = module.RespCodec(MEBIBYTE).encode([b"SET", b"k", value])
        assert await talk(address, stored) == b"+OK\r\n"
        stream, sent = await unread(address, b"GET k\r\n", most=10_000_000)
        async with stream:
            # Of what it took, most is with the kernels: now each of these is answered.
            for _ in range(100):
                assert await read_exactly(stream, len(answer)) == answer
            # Others were served meanwhile.
            assert await talk(address, b"PING\r\n") == b"+PONG\r\n"
        assert sent > 100


async def test_resp_clients_reset() -> None:
    """A client that resets ends alone."""
    await assert_survives_resets(
        "resp_server", b"*2\r\n$4\r\nECHO\r\n$100\r\nabc", b"PING\r\n", b"+PONG\r\n"
    )


# -- sudoku


def test_sudoku_solver() -> None:
    """It finds the solution, or that there is none, or gives up what would take for ever."""
    solver: Any = load("parts/sudoku_solver")
    assert solver.solve(SUDOKU) == SOLVED
    assert solver.solve(SOLVED) == SOLVED
    assert solver.solve("55" + SUDOKU[2:]) == "NoSolution"
    # The cell that lacks must be 9, which its column has.
    assert solver.solve("12345678" + "0" * 9 + "9" + "0" * 63) == "NoSolution"
    empty = solver.solve("0" * 81)
    assert all(len(set(empty[row : row + 9])) == 9 for row in range(0, 81, 9))
    solver.MAX_STEPS = 10
    assert solver.solve(SUDOKU) == "TooHard"


async def test_sudoku_pipelined() -> None:
    """Each of many boards sent at once has its answer, by its id; the last after our half-close."""
    lines = [f"{n}:{SUDOKU if n % 2 else '55' + SUDOKU[2:]}\r\n" for n in range(500)]
    async with up("sudoku") as address:
        answers = (await talk(address, "".join(lines).encode())).decode().splitlines()
    assert sorted(answers) == sorted(f"{n}:{SOLVED if n % 2 else 'NoSolution'}" for n in range(500))


async def test_sudoku_split_anywhere() -> None:
    """A board is the same however its line is cut; an id may have colons, or be empty."""
    await assert_split_anywhere("sudoku", f"a:b:{SUDOKU}\r\n".encode(), f"a:b:{SOLVED}\n".encode())


class SlowSolver:
    """Takes the place of `solve`: each board waits for the test's permission."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._may = trio.Semaphore(0)

    def __call__(self, board: str) -> str:
        self.begun.append(board)
        trio.from_thread.run(self._may.acquire)
        return "solved"

    def allow(self, count: int) -> None:
        for _ in range(count):
            self._may.release()


async def test_sudoku_throttles() -> None:
    """A client with too many unanswered boards is not read from until half have their answer; no
    more threads work than may; and other clients are served meanwhile.
    """
    module: Any = load("sudoku")
    solver = module.solve = SlowSolver()
    boards = 2000
    players: list[Any] = []

    class Player(module.Player):  # type: ignore[misc]
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            players.append(self)

    module.Player = Player
    async with up(module) as address, trio.open_nursery() as nursery:
        stream = await trio.open_tcp_stream(*address)

        async def send() -> None:
            await stream.send_all(f"a:{SUDOKU}\n".encode() * boards)

        nursery.start_soon(send)
        await until(lambda: players and players[0].unanswered == module.PAUSE_AT)
        await until(lambda: len(solver.begun) == module.THREADS)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert (players[0].unanswered, len(solver.begun)) == (module.PAUSE_AT, module.THREADS)
        below = module.PAUSE_AT - module.RESUME_AT - 1
        solver.allow(below)
        await until(lambda: players[0].unanswered == module.RESUME_AT + 1)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert players[0].unanswered == module.RESUME_AT + 1
        solver.allow(1)
        await until(lambda: players[0].unanswered == module.PAUSE_AT)
        solver.allow(boards)
        await read_exactly(stream, len("a:solved\n") * boards)
        await stream.aclose()


async def test_sudoku_client_leaves() -> None:
    """What a client that resets had asked for is given up, but for what the threads are at; when
    they have done that, they are there for others.
    """
    module: Any = load("sudoku")
    solver = module.solve = SlowSolver()
    async with up(module) as address:
        stream = await trio.open_tcp_stream(*address)
        await stream.send_all(f"a:{SUDOKU}\n".encode() * 10)
        await until(lambda: len(solver.begun) == module.THREADS)
        reset(stream.socket)
        async with await trio.open_tcp_stream(*address) as other:
            await other.send_all(f"b:{SUDOKU}\n".encode())
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(solver.begun) == module.THREADS
            solver.allow(module.THREADS + 1)
            assert await read_exactly(other, 9) == b"b:solved\n"
            assert len(solver.begun) == module.THREADS + 1


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"a:123\n", b"a:" + b"x" * 81 + b"\n", b"\xff\n", b"x" * 300, b"a:12"]
)
async def test_sudoku_garbage(line: bytes) -> None:
    """What is no board ends its connection; others are served."""
    async with up("sudoku") as address:
        assert await talk(address, line) == b""
        assert await talk(address, f"a:{SUDOKU}\n".encode()) == f"a:{SOLVED}\n".encode()


# -- msgspec


async def test_msgspec_messages() -> None:
    """Messages arrive as objects of their types; who asks is told the mean."""
    python_client("msgspec")
    module = load("msgspec_messages")
    encode = module.CODEC.encode
    async with up(module) as address:
        readings = [module.Reading("cellar", celsius) for celsius in (8.0, 9.0, 13.0)]
        answers = await talk(
            address,
            b"".join(map(encode, [*readings, module.Question("cellar"), module.Question("x")])),
        )
    assert answers == encode(module.Mean("cellar", 10.0, 3)) + encode(module.Mean("x", None, 0))


async def test_msgspec_messages_that_do_not_fit() -> None:
    """A field of a wrong type, a type nobody knows, bytes that are no message, one too large and
    one that the EOF cut: each ends its connection, as a `ProtocolError`, and no other.
    """
    msgspec: Any = python_client("msgspec")
    module = load("msgspec_messages")
    good = module.CODEC.encode(module.Reading("cellar", 8.0))
    fields = [
        {"type": "Reading", "place": "cellar", "celsius": "warm"},
        {"type": "Reading", "place": "cellar"},
        {"type": "Spy", "place": "cellar"},
        "hello",
    ]
    bad = [msgspec.msgpack.encode(value) for value in fields]
    frames = [len(data).to_bytes(4) + data for data in [*bad, b"", b"\xc1", b"\xff" * 100]]
    for frame in frames:
        with pytest.raises(ProtocolError):
            module.CODEC.decode(Buffer(frame))
    with pytest.raises(IncompleteFrame):
        module.CODEC.check_end(Buffer(good[:-1]))
    none = module.Mean("cellar", None, 0)
    async with up(module) as address:
        question = module.CODEC.encode(module.Question("cellar"))
        for frame in [*frames, (5000).to_bytes(4) + bytes(5000)]:
            assert await talk(address, frame, question) == b""
        long = msgspec.msgpack.encode(module.Reading("x" * 5000, 8.0))
        assert await talk(address, len(long).to_bytes(4) + long, question) == b""
        assert await talk(address, question + good[:-1]) == module.CODEC.encode(none)
        assert await talk(address, question) == module.CODEC.encode(none)


async def test_msgspec_split_anywhere() -> None:
    """Messages are the same however they are cut."""
    python_client("msgspec")
    module = load("msgspec_messages")
    question, answer = module.Question("cellar"), module.Mean("cellar", None, 0)
    encode: Callable[[Any], bytes] = module.CODEC.encode
    await assert_split_anywhere("msgspec_messages", encode(question) * 2, encode(answer) * 2)

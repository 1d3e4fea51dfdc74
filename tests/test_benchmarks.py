"""The benchmark suite: it measures what it says, and says what it could not."""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [
    pytest.mark.program,
    pytest.mark.shown,
    pytest.mark.skipif(sys.platform != "linux", reason="the suite is Linux's"),
]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the suite, as its programs do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def driver(part: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One that has built nothing, for that takes a second."""

    def built(name: str) -> str:
        raise RuntimeError("no C compiler")

    module = part("driver")
    monkeypatch.setattr(module, "_built", built)
    with limits_kept():
        yield module.Driver(server_core=None, load_core=None)


@contextmanager
def limits_kept() -> Iterator[None]:
    """A driver raises its own."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="module")
def c_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where load and floor are."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    directory = tmp_path_factory.mktemp("c")
    for name in ("load", "floor"):
        source = str(BENCHMARKS / f"{name}.c")
        subprocess.run(["cc", "-o", str(directory / name), source], check=True)
    return directory


@pytest.fixture(params=["c", "python"])
def load(request: pytest.FixtureRequest) -> list[str]:
    """How to run the load."""
    if request.param == "python":
        return [sys.executable, str(BENCHMARKS / "load.py")]
    return [str(request.getfixturevalue("c_programs") / "load")]


def work_named(part: Any, name: str) -> Any:
    return next(work for work in part("works").WORKS if work.name == name)


def program(path: Path, text: str) -> str:
    """A shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def run_suite(*arguments: str, path: str | None = None) -> tuple[str, str]:
    """Output and errors of a run."""
    environment = os.environ | ({} if path is None else {"PATH": path})
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "suite.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_a_run(tmp_path: Path) -> None:
    """A row, figures and ratios for each server, in the table and as JSON."""
    file = tmp_path / "found.json"
    output, errors = run_suite(
        *("--server", "trioreactor send", "--server", "plain trio", "--rounds", "1"),
        *("--work", "framed", "--work", "source", "--work", "connect"),
        *("--seconds", "0.05", "--json", str(file)),
    )
    assert not errors
    found = json.loads(file.read_text())
    assert set(found["works"]) == {"framed", "source", "connect"}
    for work in found["works"].values():
        assert len(work["servers"]) == 2
        for server in work["servers"].values():
            assert server[work["metric"]] > 0
        ours, trio = work["servers"]["trioreactor send"], work["servers"]["plain trio"]
        ratio = ours[work["metric"]] / trio[work["metric"]]
        assert work["ratios"]["trioreactor send"]["plain trio"] == pytest.approx(ratio)
        assert work["title"] in output
    assert output.count("\nplain trio ") == 3
    assert found["versions"]["trioreactor"]
    assert found["machine"]["python"] in output


def test_tls() -> None:
    """Echoes and handshakes, by whoever has TLS."""
    output, errors = run_suite(
        # Twenty handshakes take a busy machine a tenth of a second.
        *("--work", "tls-50", "--work", "tls-connect", "--rounds", "1", "--seconds", "0.5"),
        *("--server", "trioreactor send", "--server", "plain trio", "--server", "asyncio streams"),
    )
    assert not errors
    for server in "trioreactor send", "plain trio", "asyncio streams":
        assert output.count(f"\n{server} ") == 2


def test_without_openssl(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its headers may be missing. Then works with TLS have the slow load, and no others."""

    def built(name: str, *options: str) -> str:
        if options:
            raise RuntimeError("cc fails")
        return name

    module, works = part("driver"), part("works").WORKS
    monkeypatch.setattr(module, "_built", built)
    with limits_kept():
        driver = module.Driver(server_core=None, load_core=None)
    assert "with OpenSSL, cc fails: the load with TLS is made by Python" in driver.notes[0]
    slow = {work.name for work in works if driver.load_is_slow(work)}
    assert slow == {"tls-50", "tls-16k", "tls-connect"}


@pytest.mark.parametrize("work", ["echo-1", "lines", "broadcast", "connect", "tls-50"])
def test_without_a_compiler(work: str, tmp_path: Path) -> None:
    """The load is then made by Python, which is said, and it does the same."""
    empty = tmp_path / "bin"
    empty.mkdir()
    output, errors = run_suite(
        *("--work", work, "--server", "trioreactor dispatch", "--server", "*, C"),
        *("--rounds", "1", "--seconds", "0.05"),
        path=str(empty),
    )
    assert not errors
    assert "no C compiler: the load is made by Python, which is too slow" in output
    assert "no goal is judged" in output
    assert "no redis-benchmark" in output
    assert "\ntrioreactor dispatch" in output
    assert "\nbare epoll, C" not in output


def test_what_is_left_out_is_said(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that is not installed, or cannot do a work, is no error and no silence."""
    process = part("server_process")
    with ExitStack() as stack:
        command = [sys.executable, "-c", "import no_such_thing"]
        assert process.started({"a peer": command}, None, stack) == []
    said = capsys.readouterr().err
    assert said == "left out: a peer: ModuleNotFoundError: No module named 'no_such_thing'\n"


WRONG = """
import socket
s = socket.create_server(("127.0.0.1", 0))
print(s.getsockname()[1], flush=True)
c, _ = s.accept()
n = 0
while data := c.recv(65536):
    c.sendall(ANSWER)
    n += 1
"""


@pytest.mark.parametrize(
    ("kind", "answer", "told"),
    [
        ("echo", "data.upper()", "a wrong answer"),
        ("echo", "data if n == 0 else data * 2", "the server answered too much"),
        ("connect", "data * 2", "the server answered too much"),
    ],
)
def test_a_wrong_server_is_found_out(
    load: list[str], kind: str, answer: str, told: str, part: Any
) -> None:
    """The load measures nothing on a server that does not do what it is measured for."""
    command = [sys.executable, "-c", WRONG.replace("ANSWER", answer)]
    with ExitStack() as stack:
        (server,) = part("server_process").started({"wrong": command}, None, stack)
        result = subprocess.run(
            [*load, kind, f"port={server.port}", "seconds=0.1"],
            capture_output=True,
            text=True,
            timeout=15,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == f"load: {told}\n"
    assert not result.stdout


def test_idle_connections_come_one_after_another(load: list[str]) -> None:
    """Else the memory by which a server takes many at once would be counted as theirs."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        holder = subprocess.Popen(
            [*load, "hold", f"port={listener.getsockname()[1]}", "conns=3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        stack.enter_context(holder)
        stack.callback(holder.kill)
        for _ in range(3):
            sock = stack.enter_context(listener.accept()[0])
            data = sock.recv(65536)
            assert not select.select([listener], [], [], 0)[0]
            sock.sendall(data)
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        holder.communicate()
        assert holder.returncode == 0


def test_a_load_waits_only_so_long_for_a_reader(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not read ends the round, and not the load's patience only."""
    module = part("load")
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        sender = module.Load(module.Options("echo"))
        with pytest.raises(SystemExit, match="nothing is read"):
            sender.send(module.Conn(ours), bytes(2**24))
        sender.poller.close()


def test_the_floor_answers_empty_lines(c_programs: Path, part: Any) -> None:
    """As many as fit in one read."""
    size = 65536
    with ExitStack() as stack:
        command = [str(c_programs / "floor"), "loop", "lines"]
        (server,) = part("server_process").started({"floor": command}, None, stack)
        # It reads all of them at once only if they are there when it looks.
        os.kill(server.process.pid, signal.SIGSTOP)
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        sock.sendall(b"\n" * size)
        os.kill(server.process.pid, signal.SIGCONT)
        answer = b""
        while len(answer) < 7 * size:
            data = sock.recv(2**20)
            assert data
            answer += data
        assert answer == b"+PONG\r\n" * size


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_the_suite(number: signal.Signals, tmp_path: Path) -> None:
    """However it ends."""
    suite = subprocess.Popen(
        [
            *(sys.executable, str(BENCHMARKS / "suite.py"), "--work", "source"),
            *("--server", "bare epoll, Python", "--seconds", "60", "--rounds", "1"),
        ],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PATH": str(tmp_path)},
    )
    try:
        # The load, which is started when the server listens.
        children = Path(f"/proc/{suite.pid}/task/{suite.pid}/children")
        found: list[str] = []
        while len(found) < 2:
            assert suite.poll() is None
            found = children.read_text().split()
        handles = [os.pidfd_open(int(child)) for child in found]
        suite.send_signal(number)
        assert suite.wait(10) == (128 + number if number == signal.SIGTERM else -number)
        for handle in handles:
            assert select.select([handle], [], [], 10)[0]
            os.close(handle)
    finally:
        suite.kill()
        suite.wait()


def test_nothing_is_left_of_a_build(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built can be run when its directory is gone: so nobody has to remove it."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = part("driver")._built("floor")
    assert not list(tmp_path.iterdir())
    result = subprocess.run([path], capture_output=True, text=True, check=False)
    os.close(int(path.rpartition("/")[2]))
    assert result.returncode == 2
    assert result.stderr.startswith("floor loop WORK")


def test_a_compiler_that_fails_is_no_missing_one(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "cc", "echo 'In file:\nx.h:1: error: no x.h\nended.' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^cc fails on load.c \(x.h:1: error: no x.h\)$"):
        part("driver")._built("load")


def test_a_server_is_waited_for_only_so_long(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing is left out, and so is one that says nonsense."""
    process = part("server_process")
    monkeypatch.setattr(process, "PATIENCE", 0.01)
    with ExitStack() as stack:
        server = process.ServerProcess("a peer", ["sleep", "60"], None)
        stack.callback(server.stop)
        with pytest.raises(RuntimeError, match=r"^a peer: no port within 0.01 s$"):
            assert server.port
    monkeypatch.setattr(process, "PATIENCE", 10)
    with ExitStack() as stack:
        server = process.ServerProcess("a peer", ["echo", "hello"], None)
        stack.callback(server.stop)
        with pytest.raises(RuntimeError, match="'hello' is no port"):
            assert server.port


def test_what_a_server_says_is_told(part: Any) -> None:
    """Its last line, once; and it may say more than a pipe holds."""
    process = part("server_process")
    code = "import sys; sys.stderr.write('x' * 2**20 + '\\nlast\\n'); print(1); sys.stdin.read()"
    with ExitStack() as stack:
        server = process.ServerProcess("a peer", [sys.executable, "-c", code], None)
        stack.callback(server.stop)
        assert server.port == 1
        assert server.last_words() == "last"
        assert server.last_words() is None


TABLE = """WARNING: no CONFIG
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms"
"PING_INLINE","250000.00","2.1","0.3","2.5","2.8","2.9"
"""


def test_redis_benchmarks_table(part: Any) -> None:
    """That of an older one is told from what is none."""
    read = part("redis_table").read_table
    assert read(TABLE) == (250000, 2500, pytest.approx(2900))
    assert read('"PING_INLINE","123456.78"\n') is None
    for wrong in ("", "Error", TABLE.replace("p50", "p51"), TABLE.replace("250000.00", "many")):
        with pytest.raises(RuntimeError, match="printed"):
            read(wrong)
    for rate in ("0.00", "inf", "nan"):
        with pytest.raises(RuntimeError, match="requests a second"):
            read(TABLE.replace("250000.00", rate))


def test_an_old_redis_benchmark(driver: Any, part: Any, tmp_path: Path) -> None:
    """Is told once, and the suite's own load is taken from then on."""
    driver.redis_benchmark = program(tmp_path / "old", """echo '"PING_INLINE","123456.78"'""")
    work = work_named(part, "lines")
    assert driver.title(work).endswith("by redis-benchmark")
    servers = [server for server in part("works").SERVERS if server.name == "bare epoll, Python"]
    with ExitStack() as stack:
        (server,) = driver.start(servers, work, stack)
        for _ in range(2):
            assert driver.measure(server, work, seconds=0.02, warmup=0).cpu_us > 0
    assert [note for note in driver.notes if "older than 6.2" in note] == driver.notes[-1:]
    assert driver.title(work).endswith("by the suite's own load")


def test_a_silent_load_ends(
    driver: Any, part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-benchmark waits for ever; the suite does not."""
    driver.redis_benchmark = program(tmp_path / "silent", "exec sleep 60")
    monkeypatch.setattr(part("driver"), "PATIENCE", 0.01)
    with ExitStack() as stack:
        command = ["sh", "-c", "echo 1; exec sleep 60"]
        (server,) = part("server_process").started({"a peer": command}, None, stack)
        with pytest.raises(RuntimeError, match="was not done after"):
            driver.measure(server, work_named(part, "lines"), seconds=0.01, warmup=0)


def test_connecting_is_no_part_of_a_request(
    driver: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-benchmark's connections and its CONFIG: a short run is taken off the long one."""
    driver.redis_benchmark = "redis-benchmark"
    asked: list[int] = []

    def run(_server: object, _work: object, requests: int, _seconds: float) -> Any:
        asked.append(requests)
        cpu = 0.5 + requests * 1e-6
        return part("driver")._RedisRun(100_000, 1, 2, server_cpu=cpu, load_cpu=cpu)

    monkeypatch.setattr(driver, "_redis_run", run)
    found = driver.measure(None, work_named(part, "lines"), seconds=1, warmup=0)
    assert asked == [20_000, 50 * 16, 100_000]
    assert found.cpu_us == pytest.approx(1)
    assert found.load_share == pytest.approx(0.1)


def test_a_server_that_answers_nothing(
    driver: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is a missing round, and no division by zero."""
    found = {"count": 0, "seconds": 1.0, "server_cpu": 0.0, "load_cpu": 0.0, "p50": 0, "p99": 0}
    monkeypatch.setattr(driver, "_run_load", lambda *_, **__: found)
    (server,) = [type("Server", (), {"name": "a peer"})]
    for name in ("echo-1", "source"):
        with pytest.raises(RuntimeError, match=r"^a peer: nothing was answered$"):
            driver.measure(server, work_named(part, name), seconds=1, warmup=0)


def test_too_few_descriptors(tmp_path: Path) -> None:
    """The works that need more are left out, which is said once."""
    limit = 'ulimit -n 512; exec "$0" "$@"'
    result = subprocess.run(
        [
            *("/bin/sh", "-c", limit, sys.executable, str(BENCHMARKS / "suite.py")),
            *("--work", "echo-500", "--work", "memory", "--rounds", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
        env=os.environ | {"PATH": str(tmp_path)},
    )
    assert result.stdout.count("echo-500") == 1
    assert "only 512 descriptors (ulimit -n): echo-500, memory\n" in result.stdout
    assert "64-byte echo" not in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("--rounds", "0"), ("--rounds", "-1"), ("--seconds", "0"), ("--seconds", "nan")],
)
def test_options(part: Any, arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """What makes no sense is a usage error."""
    with pytest.raises(SystemExit) as info:
        part("suite")._parser().parse_args([f"{arguments[0]}={arguments[1]}"])
    assert info.value.code == 2
    assert "pass" in capsys.readouterr().err


def test_a_crash_loses_nothing(
    driver: Any, part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found before is in the file."""
    suite, report = part("suite"), part("report")

    def run_works(_driver: object, works: list[Any], *_: object) -> Any:
        if works[0].name != "echo-1":
            raise ZeroDivisionError
        return {"echo-1": report.summary(works[0], {}, title="first")}

    file = tmp_path / "found.json"
    monkeypatch.setattr(suite, "run_works", run_works)
    monkeypatch.setattr(suite, "Driver", lambda **_: driver)
    arguments = ["suite", "--work", "echo-1", "--work", "echo-50", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ZeroDivisionError):
            suite.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert [work["title"] for work in json.loads(file.read_text())["works"].values()] == ["first"]
    assert list(tmp_path.iterdir()) == [file]


DISPATCH, SEND, SEND_ALL = "trioreactor dispatch", "trioreactor send", "trioreactor send_all"
EASY = "EasyNetwork on trio, EasyNetwork on asyncio"
ONE = "plain trio, uvloop Protocol, uvloop streams"


def wanted() -> Iterator[tuple[str, str, str, float, str]]:
    """Every goal: the work, ours, the sign, the factor and the peers."""
    for work in ("echo-50", "echo-500"):
        yield work, DISPATCH, "<=", 1.0, "uvloop Protocol"
        yield work, DISPATCH, "<=", 0.75, "asyncio Protocol"
        yield work, DISPATCH, "<=", 0.35, "plain trio"
        yield work, SEND, "<=", 1.0, "uvloop streams"
        yield work, SEND, "<=", 0.5, "plain trio"
        yield work, SEND_ALL, "<=", 1.0, "asyncio streams"
        yield work, SEND_ALL, "<=", 0.5, "plain trio"
    yield "echo-1 p50", DISPATCH, "<=", 1.05, ONE
    yield "echo-1 p50", SEND, "<=", 1.1, ONE
    yield "echo-1 p50", SEND_ALL, "<=", 1.1, ONE
    yield "echo-16k", DISPATCH, "<=", 1.0, "uvloop Protocol"
    yield "echo-16k", SEND, "<=", 1.0, "uvloop streams"
    yield "echo-16k", SEND_ALL, "<=", 1.0, "asyncio streams"
    yield "lines", DISPATCH, "<=", 0.9, "uvloop Protocol"
    yield "lines", SEND, "<=", 1.0, "uvloop streams"
    for work in ("tls-50", "tls-16k"):
        yield work, DISPATCH, "<=", 1.0, "uvloop Protocol"
        yield work, SEND, "<=", 0.6, "plain trio"
        yield work, SEND_ALL, "<=", 0.6, "plain trio"
    for work in ("sink", "source"):
        yield work, DISPATCH, ">=", 1.0, "uvloop Protocol, uvloop streams"
        yield work, SEND, ">=", 1.0, "asyncio streams"
    yield "connect", DISPATCH, "<=", 1.0, "asyncio Protocol"
    yield "connect", SEND, "<=", 1.0, "asyncio streams"
    yield "connect", SEND, "<=", 0.7, "plain trio"
    yield "broadcast", DISPATCH, "<=", 1.0, "uvloop Protocol"
    yield "broadcast", SEND, "<=", 1.0, "uvloop Protocol"
    yield "memory", DISPATCH, "<=", 1.0, "asyncio Protocol"
    yield "memory", SEND, "<=", 1.0, "asyncio streams"
    yield "framed", DISPATCH, "<=", 0.5, EASY
    yield "framed", SEND, "<=", 0.7, EASY


def test_goals_are_these(part: Any) -> None:
    """A goal that is not reached is not made easier by an edit of its factor."""
    goals = part("goals")
    texts = []
    for work, ours, sign, factor, peers in wanted():
        best = f"the best of {peers}" if "," in peers else peers
        texts.append(f"{work}: {ours} {sign} {factor} x {best}")
    assert [goal.text() for goal in goals.GOALS] == texts
    assert goals.GROWTH == (("active-1000", "active-100"), ("active-5000", "active-100"))
    assert goals.GROWTH_FACTOR == 1.1


def test_goals(part: Any) -> None:
    """Each names works and servers that there are, and is judged by the best of its peers."""
    goals, works = part("goals"), part("works")
    names = {work.name: work for work in works.WORKS}
    servers = {server.name for server in works.SERVERS}
    assert len(names) == len(works.WORKS)
    assert len(servers) == len(works.SERVERS)
    for goal in goals.GOALS:
        assert goal.work in names
        assert {goal.ours, *goal.peers} <= servers
    found = {
        "sink": {
            "metric": "mb_per_s",
            "servers": {
                works.DISPATCH: {"mb_per_s": 90.0},
                goals.UV_PROTOCOL: {"mb_per_s": 80.0},
                goals.UV_STREAMS: {"mb_per_s": 100.0},
            },
        },
        "connect": {
            "metric": "cpu_us",
            "servers": {works.DISPATCH: {"cpu_us": 40.0}, goals.PROTOCOL: {"cpu_us": 50.0}},
        },
        "memory": {
            "metric": "memory",
            "servers": {works.DISPATCH: {"memory": 40.0}, goals.PROTOCOL: {"memory": 0.0}},
        },
        "framed": {
            "metric": "cpu_us",
            "servers": {works.DISPATCH: {"cpu_us": 1.0}, goals.EASY[0]: {"cpu_us": 2.0}},
        },
        "active-100": {"servers": {works.DISPATCH: {"cpu_us": 10.0}}},
        "active-1000": {"servers": {works.DISPATCH: {"cpu_us": 12.0}}},
    }
    judged = goals.judged(found)
    results = [(goal["ratio"], goal["reached"]) for goal in judged]
    assert results == [(0.9, False), (0.8, True), (1.2, False)]
    # For want of a server, even if only one of several, or of a figure that is more than nothing.
    others = goals.not_judged(found)
    missing = {goal["goal"].split(" x ")[0]: goal["missing"] for goal in others}
    assert missing[f"memory: {works.DISPATCH} <= 1.0"] == [goals.PROTOCOL]
    assert missing[f"framed: {works.DISPATCH} <= 0.5"] == [goals.EASY[1]]
    assert missing[f"sink: {works.SEND} >= 1.0"] == [works.SEND, goals.STREAMS]
    assert len(others) == 7
    assert list(goals.lines(judged, others))[-1].startswith("not judged: 7 goals, for want of ")
    assert list(goals.lines([], [])) == []


def test_medians(part: Any) -> None:
    """Of each figure by itself; a round that lacks one does not count for it."""
    report, driver, works = part("report"), part("driver"), part("works")
    rounds = {
        works.DISPATCH: [driver.Round(cpu_us=value, p50=value * 2) for value in (1, 100, 3)],
        "other": [driver.Round(cpu_us=6)],
        "nothing": [driver.Round(cpu_us=0)],
        "absent": [],
    }
    found = report.summary(works.WORKS[0], rounds, title="a title")
    assert found["servers"] == {
        works.DISPATCH: {"rounds": 3, "cpu_us": 3, "p50": 6},
        "other": {"rounds": 1, "cpu_us": 6},
        "nothing": {"rounds": 1, "cpu_us": 0},
    }
    # To nothing there is no ratio.
    assert found["ratios"] == {works.DISPATCH: {"other": 0.5}}


def test_tables_of_little(part: Any) -> None:
    """One without a server says so; one with ours explains its ratios."""
    report, driver, works = part("report"), part("driver"), part("works")
    work = works.WORKS[0]
    assert list(report.table(report.summary(work, {}, title="a title"))) == [
        *("", "a title", "(nothing was measured)")
    ]
    ours = [driver.Round(cpu_us=1, rate=2, p50=3, p99=4)]
    rounds = {works.DISPATCH: ours, "other": ours}
    lines = list(report.table(report.summary(work, rounds, title="a title")))
    assert lines[-1] == "(dispatch /: ours divided by this row; less is better)"


def test_the_kernels_version_is_short(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's own build string is nobody's business."""
    report = part("report")
    monkeypatch.setattr(report.platform, "system", lambda: "Linux")
    monkeypatch.setattr(report.platform, "release", lambda: "6.18.3-a.machine+12")
    assert report.system() == "Linux 6.18"


def test_loops() -> None:
    """A row for each work and number of loops, with figures."""
    result = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "loops.py"), "--loops", "0", "2"),
            *("--rounds", "1", "--seconds", "0.05"),
        ],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    _, _, *rows = result.stdout.splitlines()
    assert len(rows) == 6
    for row in rows:
        rate, cpu = row.split()[-2:]
        assert float(rate.replace(",", "")) > 0
        assert float(cpu.replace(",", "")) >= 0

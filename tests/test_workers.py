"""Worker processes: real ones, killed, stopped, hung, replaced and drained.

Most run with the soak tests, for each starts several interpreters.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import no_leaks
from tests.servers import is_running
from trioreactor import (
    Backoff,
    ServeOptions,
    Supervisor,
    WorkerOptions,
    WorkerStartError,
    worker_process,
)

pytestmark = pytest.mark.program

HOST = "127.0.0.1"
WHO = "tests.programs.served:who"
ROOT = Path(__file__).parents[1]
# Seconds for what takes a moment, on a busy machine.
PATIENCE = 30
SOON = WorkerOptions(backoff=Backoff(initial=0.01, maximum=0.1))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the package, which may not be installed, and these tests' programs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Compiled once, a program starts in half the time.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


@asynccontextmanager
async def supervised(
    target: str = WHO, bind: str = f"{HOST}:0", *, workers: int = 2, **options: Any
) -> AsyncIterator[Supervisor]:
    """A supervisor whose workers serve; drained afterwards, and nothing is left of it."""
    options.setdefault("worker_options", SOON)
    supervisor = Supervisor(target, bind, workers=workers, **options)
    async with no_leaks():
        with trio.fail_after(PATIENCE * 2):
            async with trio.open_nursery() as nursery:
                await nursery.start(supervisor.serve)
                pids = supervisor.pids
                assert len(pids) == workers
                yield supervisor
                pids += supervisor.pids
                await supervisor.drain(1)
    assert supervisor.pids == []
    assert not [pid for pid in pids if is_running(pid)]


class Client:
    """Asks a `who` server which process it is."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def ask(self, what: str = "who") -> int:
        await self.stream.send_all(what.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = await self.stream.receive_some()
            assert more, "EOF instead of an answer"
            answer += more
        return int(answer)


@asynccontextmanager
async def connected(supervisor: Supervisor) -> AsyncIterator[Client]:
    (address,) = supervisor.addresses
    assert isinstance(address, tuple)
    async with await trio.open_tcp_stream(*address[:2]) as stream:
        yield Client(stream)


async def ask_once(supervisor: Supervisor) -> int:
    async with connected(supervisor) as client:
        return await client.ask()


async def until(condition: Any) -> None:
    """Wait for what another process does: nobody tells us."""
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(0.01)


# -- serving


@pytest.mark.soak
async def test_statistics_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers serve, each is an interpreter of its own, and what they count is added up: C.

    Who asks while another does is answered, too.
    """
    monkeypatch.setattr(worker_process, "_COUNT_PATIENCE", 1000)
    async with supervised() as supervisor:
        seen: set[int] = set()
        asked = 0
        clients: list[Any] = []
        # Which one accepts is the kernel's affair, so ask until both have.
        while seen != set(supervisor.pids):
            clients.append(connected(supervisor))
            seen.add(await (await clients[-1].__aenter__()).ask())
            asked += 1
            assert asked < 1000
        counted = await supervisor.statistics()
        assert counted.total.opened == counted.total.active == asked
        assert counted.total.bytes_received == 4 * asked
        assert set(counted.workers) == seen
        assert sum(each.opened for each in counted.workers.values()) == asked
        assert min(each.opened for each in counted.workers.values()) >= 1
        assert (counted.started, counted.died, counted.hung, counted.replaced) == (2, 0, 0, 0)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(supervisor.statistics)
        for client in clients:
            await client.__aexit__(None, None, None)
    counted = await supervisor.statistics()
    assert counted.workers == {}
    # Of those that have ended, too.
    assert counted.total.opened == sum(counted.total.closed.values()) == asked


@pytest.mark.soak
async def test_options_reach_the_workers() -> None:
    """Limits hold in each process: two workers take two connections of one each."""
    options = ServeOptions(max_connections=1, when_full="reject")
    async with (
        supervised(options=options, worker_options=WorkerOptions(reuse_port=True)) as supervisor,
        trio.open_nursery() as nursery,
    ):
        answers: list[int] = []

        async def hold() -> None:
            async with connected(supervisor) as client:
                try:
                    answers.append(await client.ask())
                except (AssertionError, trio.BrokenResourceError):
                    answers.append(0)
                await trio.sleep_forever()

        for _ in range(40):
            nursery.start_soon(hold)
        await until(lambda: len(answers) == 40)
        # Of twenty each, dealt out by the kernel, one.
        assert sorted(answers) == [0] * 38 + sorted(supervisor.pids)
        counted = await supervisor.statistics()
        assert counted.total.rejected == {"connections": 38}
        nursery.cancel_scope.cancel()


@pytest.mark.soak
async def test_unix_socket(tmp_path: Path) -> None:
    """Workers share a Unix socket; its file is there until the supervisor ends, and no longer."""
    path = tmp_path / "x.sock"
    async with supervised(bind=f"unix:{path}", workers=1) as supervisor:
        assert await supervisor.replace()
        async with await trio.open_unix_socket(path) as stream:
            # Of the old worker, if that had not heard yet.
            await Client(stream).ask()
    assert not path.exists()


# -- workers that end


async def test_a_killed_worker_is_replaced() -> None:
    """The others serve meanwhile, and then there are as many as before. What it had open counts as
    closed, though it cannot tell: opened less closed is what is open (C).
    """
    async with supervised() as supervisor, connected(supervisor) as client:
        pid = await client.ask()
        (other,) = set(supervisor.pids) - {pid}
        assert (await supervisor.statistics()).total.active == 1
        os.kill(pid, signal.SIGKILL)
        assert await client.stream.receive_some() == b""
        for _ in range(5):
            assert await ask_once(supervisor) != pid
        await until(lambda: len(supervisor.pids) == 2 and pid not in supervisor.pids)
        assert other in supervisor.pids
        with trio.fail_after(PATIENCE):
            while (counted := await supervisor.statistics()).total.active:
                await trio.sleep(0.01)
        assert (counted.started, counted.died, counted.hung) == (3, 1, 0)
        assert counted.total.opened == sum(counted.total.closed.values()) == 6
        # Of the living ones, which it adds up; who is gone has its part in the sum alone.
        assert set(counted.workers) == set(supervisor.pids)
        assert sum(each.opened for each in counted.workers.values()) == 5


@pytest.mark.soak
@pytest.mark.parametrize("how", ["hangs", "hangs in a thread", "is stopped"])
async def test_a_hung_worker_is_replaced(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One whose loop does not turn is ended, or one of its loops; it says where it hangs, unless it
    is stopped.
    """
    worker_options = WorkerOptions(hang_timeout=0.5, backoff=SOON.backoff)
    options = ServeOptions(threads=2 if how == "hangs in a thread" else None)
    async with (
        supervised(worker_options=worker_options, options=options) as supervisor,
        connected(supervisor) as client,
    ):
        pid = await client.ask()
        (other,) = set(supervisor.pids) - {pid}
        if how != "is stopped":
            await client.stream.send_all(b"hang\n")
        else:
            os.kill(pid, signal.SIGSTOP)
        await until(lambda: len(supervisor.pids) == 2 and pid not in supervisor.pids)
        assert other in supervisor.pids
        assert not is_running(pid)
        assert (await supervisor.statistics()).hung == 1
    assert ("Fatal Python error: Aborted" in capfd.readouterr().err) == (how != "is stopped")


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_worker_that_is_asked_to_end(number: signal.Signals) -> None:
    """A signal to one worker: another takes its place first, and its clients are served on."""
    async with supervised(workers=1) as supervisor, connected(supervisor) as client:
        pid = await client.ask()
        os.kill(pid, number)
        await until(lambda: supervisor.pids != [pid])
        # A framed handler drains between two messages.
        assert await client.stream.receive_some() == b""
        assert await ask_once(supervisor) == supervisor.pids[0] != pid
        counted = await supervisor.statistics()
        assert (counted.died, counted.replaced) == (0, 1)


@pytest.mark.soak
async def test_a_worker_is_ended_at_once_by_a_second_sigterm() -> None:
    """Even before another has taken its place."""
    async with supervised(workers=1) as supervisor, connected(supervisor) as client:
        pid = await client.ask()
        os.kill(pid, signal.SIGTERM)
        # It has said so, and another is being started.
        await until(lambda: supervisor._counts["started"] == 2)
        os.kill(pid, signal.SIGTERM)
        assert await client.stream.receive_some() == b""
        await until(lambda: supervisor.pids not in ([], [pid]))
        assert not is_running(pid)


# -- the first start


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file for a module ``program``, that workers import."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "program.py"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import os; os._exit(3)", "the worker ended with exit code 3 before it was ready"),
        ("import time; time.sleep(1000)", "it was not ready after 0.5 s"),
    ],
)
async def test_the_first_workers_must_start(source: str, reason: str, program: Path) -> None:
    """If one cannot, the supervisor stops and says why; nothing is left of the others."""
    program.write_text(source)
    slow = "sleep" in source
    options = WorkerOptions(start_timeout=0.5 if slow else 30)
    supervisor = Supervisor("program:handler", f"{HOST}:0", workers=1, worker_options=options)
    async with no_leaks():
        with trio.fail_after(PATIENCE), pytest.raises(WorkerStartError, match=reason) as caught:
            await supervisor.serve()
    assert caught.value.details == ""


@pytest.mark.soak
async def test_a_first_worker_that_fails_and_does_not_end(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of its program keeps it: it is killed, and why it failed is told (D)."""
    monkeypatch.setattr(worker_process, "UNWIND", 0.1)
    program.write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "from tests.programs.served import raising as handler\n"
    )
    supervisor = Supervisor("program:handler", f"{HOST}:0", workers=1)
    async with no_leaks():
        with trio.fail_after(PATIENCE), pytest.raises(WorkerStartError, match="out of order"):
            await supervisor.serve()


async def no_thread(*_args: Any, **_options: Any) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("owner", "attribute", "value", "reason"),
    [
        # It has ended before it is told anything.
        (sys, "executable", shutil.which("true"), "ended with exit code 0 before it was ready"),
        (sys, "executable", "/nonesuch", "cannot start a process: .*No such file"),
        (trio.lowlevel, "open_process", no_thread, "cannot start a process: .*new thread"),
    ],
)
async def test_processes_that_cannot_be(
    owner: Any, attribute: str, value: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the first is an error; of later ones the log tells, and those that serve serve on."""
    async with supervised(workers=1) as supervisor:
        (pid,) = supervisor.pids
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            assert not await supervisor.replace()
            async with no_leaks():
                with pytest.raises(WorkerStartError, match=reason):
                    await Supervisor(WHO, f"{HOST}:0", workers=2).serve()
        assert supervisor.pids == [pid]


def test_a_supervisor_that_is_gone_at_once() -> None:
    """Its worker ends, and says nothing of its own."""
    ours, theirs = socket.socketpair()
    with theirs:
        worker = subprocess.Popen(
            [sys.executable, "-m", "trioreactor.worker", str(theirs.fileno()), WHO],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    ours.close()
    assert worker.communicate(timeout=PATIENCE) == (None, b"")
    assert worker.returncode == 1


async def test_port_in_use() -> None:
    """It is told at once, before anything is started."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        supervisor = Supervisor(WHO, f"{HOST}:{port}", workers=2)
        async with no_leaks():
            with pytest.raises(OSError, match=f"cannot listen on {HOST}:{port}: Address already"):
                await supervisor.serve()
    assert (await supervisor.statistics()).started == 0


# -- replacing


async def test_replace_under_load() -> None:
    """Nobody is refused, reset or left without an answer, and in the end all workers are new."""
    async with supervised() as supervisor:
        old = set(supervisor.pids)
        answered: list[int] = []
        async with trio.open_nursery() as nursery:

            async def load() -> None:
                while True:
                    answered.append(await ask_once(supervisor))

            for _ in range(8):
                nursery.start_soon(load)
            await until(lambda: len(answered) > 100)
            assert await supervisor.replace()
            await until(lambda: answered[-1] in supervisor.pids)
            nursery.cancel_scope.cancel()
        assert not old & set(supervisor.pids)
        assert (await supervisor.statistics()).replaced == 2


@pytest.mark.soak
async def test_who_is_connected_stays_with_the_old_worker() -> None:
    """Until it is done, or the grace is over."""
    options = WorkerOptions(grace=PATIENCE)
    async with supervised(
        "tests.programs.served:echo", workers=1, worker_options=options
    ) as supervisor:
        old = supervisor.pids
        async with connected(supervisor) as client:
            await client.stream.send_all(b"1")
            assert await client.stream.receive_some() == b"1"
            assert await supervisor.replace()
            assert supervisor.pids != old
            await client.stream.send_all(b"2")
            assert await client.stream.receive_some() == b"2"
            assert is_running(old[0])
        await until(lambda: not is_running(old[0]))


@pytest.mark.soak
async def test_a_successor_that_dies_while_its_predecessor_drains() -> None:
    """It is replaced at once: the one that drains listens no more."""
    async with supervised("tests.programs.served:echo", workers=1) as supervisor:
        (old,) = supervisor.pids
        async with connected(supervisor) as client:
            await client.stream.send_all(b"1\n")
            assert await client.stream.receive_some() == b"1\n"
            assert await supervisor.replace()
            (new,) = supervisor.pids
            os.kill(new, signal.SIGKILL)
            await until(lambda: supervisor.pids not in ([], [new]))
            assert is_running(old)
            assert (await supervisor.statistics()).died == 1
            # It was served all the while.
            await client.stream.send_all(b"2\n")
            assert await client.stream.receive_some() == b"2\n"


@pytest.mark.soak
async def test_a_program_that_is_broken_meanwhile(program: Path) -> None:
    """The new worker does not start, so the old ones serve on; mended, it takes their place."""
    good = "from tests.programs.served import who as handler\n"
    program.write_text(good)
    async with supervised("program:handler", workers=1) as supervisor:
        old = supervisor.pids
        program.write_text("def handler(\n")
        assert not await supervisor.replace()
        assert supervisor.pids == old
        assert await ask_once(supervisor) in old
        program.write_text(good + "# mended\n")
        assert await supervisor.replace()
        assert not set(old) & set(supervisor.pids)


@pytest.mark.soak
async def test_replacements_asked_for_together_are_one() -> None:
    """Those who ask while one is under way share the next."""
    async with supervised(workers=1) as supervisor:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervisor.replace)
            await until(lambda: supervisor._counts["started"] == 2)
            for _ in range(5):
                nursery.start_soon(supervisor.replace)
        assert (await supervisor.statistics()).replaced == 2


@pytest.mark.soak
async def test_cancelled_replacement() -> None:
    """It leaves the workers as they are, and no other behind."""
    async with supervised(workers=1) as supervisor:
        old = supervisor.pids
        with trio.move_on_after(0.05) as scope:
            await supervisor.replace()
        assert scope.cancelled_caught
        assert supervisor.pids == old
        await until(lambda: supervisor._living[1:] == [])
        assert await supervisor.replace()


@pytest.mark.soak
async def test_reuse_port_keeps_a_dead_workers_queue() -> None:
    """With a socket for each worker, who was dealt to one that died waits for the next one."""
    options = WorkerOptions(reuse_port=True, backoff=SOON.backoff)
    async with supervised(workers=2, worker_options=options) as supervisor:
        for pid in supervisor.pids:
            os.kill(pid, signal.SIGKILL)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask_once, supervisor)
        counted = await supervisor.statistics()
        assert counted.total.opened == 20
        assert min(each.opened for each in counted.workers.values()) > 0


# -- the end


async def test_drain_takes_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has just connected is answered, though the workers drain in that moment."""
    # What has no business there, and does no harm in one process.
    monkeypatch.setattr(sys, "path", [*sys.path, ROOT])
    async with supervised(workers=1) as supervisor:
        with socket.socket() as sock:
            sock.settimeout(PATIENCE)
            sock.connect(supervisor.addresses[0])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(supervisor.drain, 10)
                await until(lambda: not supervisor.addresses)
                sock.sendall(b"who\n")
                assert await trio.to_thread.run_sync(sock.recv, 100)
                with pytest.raises(OSError, match="attempts to connect"):
                    await ask_once_at(sock.getpeername())


async def ask_once_at(address: Any) -> None:
    async with await trio.open_tcp_stream(*address):
        pass


@pytest.mark.soak
async def test_drain_ends_by_its_grace() -> None:
    """Clients that do not end are cut off then (D)."""
    async with (
        supervised("tests.programs.served:echo", workers=1) as supervisor,
        connected(supervisor) as client,
    ):
        await client.stream.send_all(b"1")
        assert await client.stream.receive_some() == b"1"
        begun = trio.current_time()
        await supervisor.drain(0.3)
        assert 0.3 <= trio.current_time() - begun < 3
        assert await client.stream.receive_some() == b""
    assert (await supervisor.statistics()).total.active == 0


@pytest.mark.soak
async def test_drain_bounds_those_that_drain_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was given longer when it was replaced is killed (D)."""
    monkeypatch.setattr(worker_process, "UNWIND", 0.1)
    options = WorkerOptions(grace=1000)
    async with (
        supervised("tests.programs.served:echo", workers=1, worker_options=options) as supervisor,
        connected(supervisor) as client,
    ):
        await client.stream.send_all(b"1")
        assert await client.stream.receive_some() == b"1"
        assert await supervisor.replace()
        await supervisor.drain(0.1)


@pytest.mark.parametrize("end", ["cancel", pytest.param("close", marks=pytest.mark.soak)])
async def test_cancelling_kills(end: str) -> None:
    """No process is left when `serve` is cancelled; nor after `close`."""
    supervisor = Supervisor(WHO, f"{HOST}:0", workers=1)
    async with no_leaks(), trio.open_nursery() as nursery:
        await nursery.start(supervisor.serve)
        pids = supervisor.pids
        if end == "cancel":
            nursery.cancel_scope.cancel()
        else:
            supervisor.close()
    assert not [pid for pid in pids if is_running(pid)]


async def test_closed_while_it_starts() -> None:
    """It returns; nothing is left."""
    supervisor = Supervisor(WHO, f"{HOST}:0", workers=1)
    async with no_leaks(), trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.serve)
        await until(lambda: supervisor.addresses)
        supervisor.close()


async def test_serves_once() -> None:
    """A second time is refused, and so is what is no option."""
    supervisor = Supervisor(WHO, f"{HOST}:0", workers=1)
    with trio.move_on_after(0.1):
        await supervisor.serve()
    with pytest.raises(RuntimeError, match="make another Supervisor"):
        await supervisor.serve()
    with pytest.raises(ValueError, match="names nothing to serve"):
        Supervisor("app", f"{HOST}:0", workers=1)
    with pytest.raises(ValueError, match="pass at least 1 processes"):
        Supervisor(WHO, f"{HOST}:0", workers=0)
    wrong: Any = 3
    with pytest.raises(TypeError, match=r"pass ServeOptions\(...\)"):
        Supervisor(WHO, f"{HOST}:0", workers=1, options=wrong)
    assert "who" in repr(supervisor)

"""What goes wrong at accept: FAULTS 1 to 11, with real sockets and real limits."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.conftest import (
    connect,
    echo,
    living_tasks,
    no_leaks,
    open_descriptors,
    reset,
    serving,
    until,
)
from tests.servers import (
    ScriptedListener,
    assert_echoes,
    balanced,
    clients,
    closed,
    local,
    rest_of,
    serve_and_keep,
)
from trioreactor import Acceptor, CloseReason, Limits, TcpConnection, TcpServer
from trioreactor.acceptor import DEFAULT_BATCH
from trioreactor.sockets import (
    ACCEPT_DESCRIPTOR_ERRNOS,
    ACCEPT_MEMORY_ERRNOS,
    ACCEPT_PEER_ERRNOS,
)

ROOT = Path(__file__).parents[1]


# -- no descriptors (1, 3)


class ExhaustedServer:
    """The server of tests/programs/exhausted_server.py, seen from outside."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._received = b""
        self.address = ("127.0.0.1", 0)

    async def line(self) -> bytes:
        """The next line that it prints."""
        with trio.fail_after(30):
            while b"\n" not in self._received:
                chunk = await self._stdout.receive_some()
                assert chunk, "the server has died"
                self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return line

    async def report(self) -> Any:
        """Its figures now."""
        await self._stdin.send_all(b"\n")
        return json.loads(await self.line())


@asynccontextmanager
async def exhausted_server() -> AsyncIterator[ExhaustedServer]:
    """Run it; at the end it must end by itself, without a complaint."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.programs.exhausted_server"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        server = ExhaustedServer(process)
        server.address = ("127.0.0.1", int(await server.line()))
        yield server
        await process.stdin.aclose()  # type: ignore[union-attr]
        with trio.fail_after(10):
            assert await process.wait() == 0
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            await pipe.aclose()


async def told_or_served(client: trio.SocketStream) -> str:
    """What becomes of a client that says something and waits."""
    with trio.fail_after(20):
        try:
            await client.send_all(b"x")
            return "served" if await client.receive_some() else "told"
        except trio.BrokenResourceError:
            return "told"


async def test_running_out_of_descriptors() -> None:
    """A server with 64 descriptors and 200 clients neither spins nor leaves anybody hanging, and
    is back at once when descriptors come free (FAULTS 1; S, O, F)."""
    round_trips = [0] * 5

    async def reside(n: int, client: trio.SocketStream) -> None:
        while True:
            await assert_echoes(client, b"still here")
            round_trips[n] += 1
            await trio.sleep(0.05)

    async def come(client: trio.SocketStream) -> None:
        fates[client] = await told_or_served(client)

    async def insist() -> None:
        # As real clients do, come back at once.
        while True:
            with connect(server.address).socket as sock:
                await told_or_served(trio.SocketStream(sock))

    fates: dict[trio.SocketStream, str] = {}
    async with (
        exhausted_server() as server,
        clients(server.address, 5) as residents,
        trio.open_nursery() as nursery,
    ):
        for n, resident in enumerate(residents):
            nursery.start_soon(reside, n, resident)
        await until(lambda: all(round_trips))

        # Every one of 200 is told or served.
        async with clients(server.address, 200) as crowd:
            async with trio.open_nursery() as comers:
                for client in crowd:
                    comers.start_soon(come, client)
            served = [client for client, fate in fates.items() if fate == "served"]
            assert len(fates) == 200
            assert 30 <= len(served) <= 59
            report = await server.report()
            assert report["shed"] == 200 - len(served)
            assert report["active"] == len(served) + 5

            # While the shortage lasts and clients keep coming, it costs next to nothing.
            async with trio.open_nursery() as insistent:
                for _ in range(20):
                    insistent.start_soon(insist)
                await trio.sleep(0.3)
                before, trips_before = await server.report(), list(round_trips)
                await trio.sleep(2)
                after, trips_after = await server.report(), list(round_trips)
                insistent.cancel_scope.cancel()
            seconds = after["time"] - before["time"]
            failed = after["failed"] - before["failed"]
            assert failed > 0
            assert after["shed"] > before["shed"]
            assert failed / seconds < 100
            assert (after["cpu"] - before["cpu"]) / seconds < 0.05
            lines = after["log"][len(before["log"]) :]
            assert 1 <= len(lines) <= seconds + 1
            assert all(
                re.search(r"accept failed \d+ times: .*Too many open files", x) for x in lines
            )
            # Those who were there are served throughout.
            assert all(b > a for a, b in zip(trips_before, trips_after, strict=True))

            # Descriptors come free: everybody who comes is served within a second.
            newcomers: list[trio.SocketStream] = []

            async def get_served() -> None:
                fate = "told"
                while fate == "told":
                    newcomers.append(connect(server.address))
                    fate = await told_or_served(newcomers[-1])

            for client in served:
                client.socket.close()
            try:
                with trio.fail_after(1):
                    async with trio.open_nursery() as comers:
                        for _ in range(30):
                            comers.start_soon(get_served)
            finally:
                for client in newcomers:
                    client.socket.close()
        nursery.cancel_scope.cancel()


@contextmanager
def no_descriptors_left() -> Iterator[list[int]]:
    """Take every descriptor that this process may have; close some of the list to free them."""
    gc.collect()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, hard))
    try:
        take_descriptors(taken)
        yield taken
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def take_descriptors(taken: list[int], most: int = 1000) -> None:
    """Take up to *most* of the free descriptors."""
    for _ in range(most):
        try:
            taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return


async def test_clients_are_told_that_there_is_no_room() -> None:
    """With no descriptor left, newcomers are closed by means of the reserve, those who are there
    are served, and all is well as soon as there are descriptors again."""
    # The watchdog reads sources: so it has a descriptor now and then, which comes free again.
    server = local(echo, watchdog=None)
    async with no_leaks(), serving(server) as address, clients(address, 2) as old:
        for client in old:
            await assert_echoes(client)
        server.stop_accepting()
        async with clients(address, 40) as unlucky:
            with no_descriptors_left() as taken:
                server.resume_accepting()
                for client in unlucky:
                    assert await rest_of(client) == b""
                for client in old:
                    await assert_echoes(client)
                assert server.statistics().shed == 40
                # Two descriptors: the client's and the server's end.
                for _ in range(2):
                    os.close(taken.pop())
                with trio.fail_after(1):
                    async with clients(address, 1) as (lucky,):
                        await assert_echoes(lucky)
                await until(lambda: len(server.connections) == 2)
                assert server.statistics().opened == 3
    assert closed(server) == {CloseReason.FORCED: 2, CloseReason.PEER_EOF: 1}


class RaidedListener(ScriptedListener):
    """Somebody else takes every descriptor at the moment when it comes free."""

    def __init__(self) -> None:
        super().__init__()
        self.raiding = False
        self.loot: list[int] = []

    def accept(self) -> tuple[socket.socket, Any]:
        if self.raiding:
            take_descriptors(self.loot)
        return super().accept()


async def test_a_lost_reserve_is_taken_back() -> None:
    """If another task takes the reserve descriptor, it is taken back when descriptors are free,
    and the next shortage is told to clients again (FAULTS 3)."""
    async with no_leaks():
        listener = RaidedListener()
        server = TcpServer(echo, listeners=[Acceptor(listener)], watchdog=None)
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            await trio.testing.wait_all_tasks_blocked()
            server.stop_accepting()
            async with clients(acceptor.address, 1) as (patient,):
                with no_descriptors_left():
                    listener.raiding = True
                    server.resume_accepting()
                    await until(lambda: acceptor.statistics().errors.get("EMFILE", 0) >= 3)
                    assert listener.loot
                    assert server.statistics().shed == 0
                listener.raiding = False
                for fd in listener.loot:
                    os.close(fd)
                # The shortage is over: nobody was lost.
                with trio.fail_after(2):
                    await assert_echoes(patient)
                # What comes between two shortages: time, and a connection.
                await trio.sleep(0.2)
                async with clients(acceptor.address, 1) as (between,):
                    await assert_echoes(between)
                await until(lambda: len(server.connections) == 1)
                server.stop_accepting()
                async with clients(acceptor.address, 3) as unlucky:
                    with no_descriptors_left():
                        server.resume_accepting()
                        for client in unlucky:
                            assert await rest_of(client) == b""
                        assert server.statistics().shed == 3
            server.close()


# -- every errno (2, 6)


@pytest.mark.parametrize(
    "number",
    sorted(ACCEPT_PEER_ERRNOS | ACCEPT_DESCRIPTOR_ERRNOS | ACCEPT_MEMORY_ERRNOS),
    ids=lambda number: errno.errorcode[number],
)
async def test_errors_of_accept_that_a_server_survives(
    number: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Whatever accept(2) may say of a connection or a shortage, the server serves on (FAULTS 2, 6;
    C, F)."""
    async with no_leaks():
        listener = ScriptedListener()
        server = TcpServer(echo, listeners=[Acceptor(listener)])
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            async with clients(acceptor.address, 1) as (old,):
                await assert_echoes(old)
                listener.script.extend([number] * 5)
                with trio.fail_after(5):
                    while listener.script:
                        async with clients(acceptor.address, 1) as (client,):
                            await told_or_served(client)
                            await trio.sleep(0.01)
                async with clients(acceptor.address, 1) as (new,):
                    assert await told_or_served(new) == "served"
                await assert_echoes(old)
                assert set(acceptor.statistics().errors) == {errno.errorcode[number]}
                assert balanced(server)
            server.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EIO])
async def test_an_unknown_error_of_accept_surfaces(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the listening socket itself ends serve() with just that OSError, once, and
    everything is closed (FAULTS 6; C, F, T)."""
    outcomes: list[BaseException | None] = []
    async with no_leaks():
        listeners = [ScriptedListener(), ScriptedListener()]
        server = TcpServer(echo, listeners=[Acceptor(listener) for listener in listeners])
        async with trio.open_nursery() as nursery:
            acceptors = await nursery.start(serve_and_keep, server, outcomes)
            async with clients(acceptors[0].address, 2) as streams:
                for client in streams:
                    await assert_echoes(client)
                listeners[1].script.append(number)
                async with clients(acceptors[1].address, 1):
                    for client in streams:
                        assert await rest_of(client) == b""
        (error,) = outcomes
        assert isinstance(error, OSError)
        assert error.errno == number
        assert [listener.fileno() for listener in listeners] == [-1, -1]
    assert closed(server) == {CloseReason.CANCELLED: 2}
    assert not caplog.records


# -- somebody else took it (4)


class Steps(trio.abc.Instrument):
    """Counts the steps of the tasks of a server."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if "Acceptor" in task.name or "Poller" in task.name:
            self.count += 1


class RobbedListener(ScriptedListener):
    """Another process, which has the same listening socket, is always quicker."""

    def __init__(self) -> None:
        super().__init__()
        self.theirs = socket.socket(fileno=os.dup(self.fileno()))
        self.theirs.setblocking(False)
        self.robbed = 0

    def accept(self) -> tuple[socket.socket, Any]:
        with suppress(BlockingIOError):
            self.theirs.accept()[0].close()
            self.robbed += 1
        return super().accept()


async def test_a_connection_that_another_process_took() -> None:
    """accept() that finds nobody waits for the next one and does not spin (FAULTS 4, S)."""
    steps = Steps()
    async with no_leaks():
        listener = RobbedListener()
        server = TcpServer(echo, listeners=[Acceptor(listener)])
        async with trio.open_nursery() as nursery:
            (acceptor,) = await nursery.start(server.serve)
            await trio.testing.wait_all_tasks_blocked()
            listener.accept_calls = 0
            trio.lowlevel.add_instrument(steps)
            for n in range(1, 51):
                async with clients(acceptor.address, 1) as (client,):
                    assert await rest_of(client) == b""
                await trio.testing.wait_all_tasks_blocked()
                assert listener.robbed == n
                assert listener.accept_calls <= n
            assert server.statistics().opened == 0
            # With nobody there, nothing happens at all.
            steps.count = 0
            await trio.sleep(0.2)
            trio.lowlevel.remove_instrument(steps)
            assert steps.count == 0
            assert listener.accept_calls <= 50
            # And the next one, which nobody else takes, is served.
            listener.theirs.close()
            listener.theirs = socket.create_server(("127.0.0.1", 0))
            listener.theirs.setblocking(False)
            async with clients(acceptor.address, 1) as (client,):
                await assert_echoes(client)
            server.close()
        listener.theirs.close()


# -- reset before accept (5)


async def test_reset_before_accept() -> None:
    """A client that resets while it waits is accepted with its address, and ends as any peer that
    resets (FAULTS 5; C, F)."""
    seen: list[Any] = []

    async def handler(conn: TcpConnection) -> None:
        seen.append(conn.peer_address)
        await echo(conn)

    server = local(handler)
    async with no_leaks(), serving(server) as address:
        server.stop_accepting()
        dead = [connect(address) for _ in range(20)]
        addresses = [client.socket.getsockname() for client in dead]
        for client in dead:
            reset(client.socket)
        async with clients(address, 1) as (living,):
            server.resume_accepting()
            await assert_echoes(living)
            await until(lambda: len(server.connections) == 1)
            assert sorted(seen) == sorted([*addresses, living.socket.getsockname()])
            assert closed(server) == {CloseReason.PEER_RESET: 20}


async def test_reset_before_accept_with_last_words() -> None:
    """What such a client had said before is its own loss: nobody else notices."""
    server = local(echo)
    async with no_leaks(), serving(server) as address:
        server.stop_accepting()
        client = connect(address)
        await client.send_all(b"last words")
        reset(client.socket)
        async with clients(address, 1) as (living,):
            server.resume_accepting()
            await assert_echoes(living)
            await until(lambda: len(server.connections) == 1)
            assert closed(server) == {CloseReason.PEER_RESET: 1}


# -- a storm (7)


class Turns(Acceptor):
    """Notes the most connections that were taken between two waits."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.taken = 0
        self.most = 0

    async def wait_acceptable(self) -> None:
        self.taken = 0
        await super().wait_acceptable()

    def accept_nowait(self) -> Any:
        accepted = super().accept_nowait()
        if accepted is not None:
            self.taken += 1
            self.most = max(self.most, self.taken)
        return accepted


async def test_a_storm_of_connections() -> None:
    """5,000 connections in batches, half of them reset: taken in bounded turns, while the others
    are served; afterwards all is as before (FAULTS 7; O, C, F, T)."""
    batches, size = 10, 500
    round_trips = [0] * 3

    async def reside(n: int, client: trio.SocketStream) -> None:
        while True:
            await assert_echoes(client)
            round_trips[n] += 1

    async with no_leaks():
        acceptor = Turns(socket.create_server(("127.0.0.1", 0), backlog=1024))
        server = TcpServer(echo, listeners=[acceptor])
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            async with clients(acceptor.address, 3) as residents, trio.open_nursery() as talk:
                for n, client in enumerate(residents):
                    talk.start_soon(reside, n, client)
                await until(lambda: all(round_trips))
                before = list(round_trips)
                with trio.fail_after(50):
                    await trio.run_process(
                        [sys.executable, "-m", "tests.programs.storm"]
                        + [str(word) for word in (*acceptor.address, batches, size)],
                        cwd=ROOT,
                        capture_stdout=True,
                    )
                assert all(b - a >= batches for a, b in zip(before, round_trips, strict=True))
                await until(lambda: len(server.connections) == 3)
                talk.cancel_scope.cancel()
            assert server.statistics().opened == 3 + batches * size
            assert balanced(server)
            assert 1 < acceptor.most <= DEFAULT_BATCH
            server.close()


# -- limits (8, 9, 10)


async def test_the_limit_is_exact_and_waits() -> None:
    """At `connections` newcomers wait in the backlog; each end lets exactly one in (FAULTS 8)."""
    most = 0

    async def handler(conn: TcpConnection) -> None:
        nonlocal most
        most = max(most, len(server.connections))
        await echo(conn)

    server = local(handler, limits=Limits(connections=3))
    async with no_leaks(), serving(server) as address, clients(address, 10) as streams:
        for n, client in enumerate(streams):
            await client.send_all(b"%d" % n)
        for n, client in enumerate(streams):
            # The one before has left, and only now is there room for the one after the next two.
            assert await client.receive_some() == b"%d" % n
            await trio.testing.wait_all_tasks_blocked()
            assert server.statistics().opened == min(n + 3, 10)
            await client.aclose()
        assert most == 3
        assert server.statistics().rejected == {}


async def test_the_limit_is_exact_and_rejects() -> None:
    """At `connections` newcomers are closed at once, and counted, when that is asked for."""
    server = local(echo, limits=Limits(connections=3, when_full="reject"))
    async with no_leaks(), serving(server) as address, clients(address, 3) as streams:
        for client in streams:
            await assert_echoes(client)
        async with clients(address, 5) as rejected:
            for client in rejected:
                assert await rest_of(client) == b""
        assert server.statistics().rejected == {"connections": 5}
        assert server.statistics().opened == 3
        await streams[0].aclose()
        await until(lambda: len(server.connections) == 2)
        async with clients(address, 1) as (client,):
            await assert_echoes(client)
        assert balanced(server)


@pytest.mark.parametrize("batch", [1, 16, None])
@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_several_acceptors_share_the_last_permit(limit: int, batch: int | None) -> None:
    """However many listening sockets, the limit holds exactly, and nobody starves at any."""
    most = 0

    async def handler(conn: TcpConnection) -> None:
        nonlocal most
        most = max(most, len(server.connections))
        await conn.receive_some()
        await conn.send_all(b"fine")

    async with no_leaks():
        acceptors = [Acceptor(ScriptedListener(), batch=batch) for _ in range(3)]
        server = TcpServer(handler, listeners=acceptors, limits=Limits(connections=limit))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            streams = [connect(acceptor.address) for acceptor in acceptors * 8]

            async def talk(client: trio.SocketStream) -> None:
                async with client:
                    await client.send_all(b"x")
                    assert await rest_of(client) == b"fine"

            with trio.fail_after(20):
                async with trio.open_nursery() as talkers:
                    for client in streams:
                        talkers.start_soon(talk, client)
            await until(lambda: not server.connections)
            server.close()
        assert most == limit
        assert closed(server) == {CloseReason.LOCAL_CLOSE: 24}


async def test_a_free_place_goes_to_whoever_has_somebody_waiting() -> None:
    """An acceptor that nobody waits at does not keep the free place from one with a client."""
    async with no_leaks():
        acceptors = [Acceptor(ScriptedListener()) for _ in range(3)]
        server = TcpServer(echo, listeners=acceptors, limits=Limits(connections=1))
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve)
            async with clients(acceptors[0].address, 1) as (first,):
                await assert_echoes(first)
                async with clients(acceptors[1].address, 1) as (second,):
                    await trio.testing.wait_all_tasks_blocked()
                    first.socket.close()
                    await assert_echoes(second)
                    async with clients(acceptors[0].address, 1) as (third,):
                        await trio.testing.wait_all_tasks_blocked()
                        second.socket.close()
                        await assert_echoes(third)
            server.close()


async def test_the_limit_may_change_while_running() -> None:
    """A higher limit lets waiting ones in at once, a lower one closes nobody (FAULTS 9)."""
    server = local(echo, limits=Limits(connections=1))
    async with no_leaks(), serving(server) as address, clients(address, 6) as streams:
        await until(lambda: len(server.connections) == 1)
        server.limits = Limits(connections=4)
        for client in streams[:4]:
            await assert_echoes(client)
        await trio.testing.wait_all_tasks_blocked()
        assert len(server.connections) == 4
        server.limits = Limits(connections=2)
        assert server.limits == Limits(connections=2)
        for client in streams[:4]:
            await assert_echoes(client)
        # Three must go before one may come.
        for n in range(2):
            await streams[n].aclose()
            await until(lambda n=n: len(server.connections) == 3 - n)  # type: ignore[misc]
            await trio.testing.wait_all_tasks_blocked()
            assert server.statistics().opened == 4
        await streams[2].aclose()
        await assert_echoes(streams[4])
        server.limits = Limits()
        await assert_echoes(streams[5])
        assert balanced(server)


async def test_waiting_ones_are_rejected_when_that_is_wanted_now() -> None:
    """Changing "wait" to "reject" tells those who wait, at once."""
    server = local(echo, limits=Limits(connections=1))
    async with no_leaks(), serving(server) as address, clients(address, 3) as streams:
        await assert_echoes(streams[0])
        await trio.testing.wait_all_tasks_blocked()
        server.limits = Limits(connections=1, when_full="reject")
        for client in streams[1:]:
            assert await rest_of(client) == b""
        await assert_echoes(streams[0])
        assert server.statistics().rejected == {"connections": 2}


async def test_one_address_floods() -> None:
    """An address at its cap is turned away, and costs other addresses nothing (FAULTS 10)."""
    server = local(echo, limits=Limits(per_peer=3))
    async with no_leaks(), serving(server) as address:
        flood = [connect(address, source="127.0.0.2") for _ in range(50)]
        others = [connect(address, source=f"127.0.0.{n}") for n in (3, 3, 3, 4)]
        try:
            fates = [await told_or_served(client) for client in flood]
            assert sorted(fates) == ["served"] * 3 + ["told"] * 47
            assert server.statistics().rejected == {"per_peer": 47}
            for client in others:
                await assert_echoes(client)
            assert len(server.connections) == 7
            # A place of its own that comes free is its again.
            flood[fates.index("served")].socket.close()
            await until(lambda: len(server.connections) == 6)
            flood.append(connect(address, source="127.0.0.2"))
            assert await told_or_served(flood[-1]) == "served"
        finally:
            for client in flood + others:
                client.socket.close()
        await until(lambda: not server.connections)
        assert balanced(server)


async def test_a_rejected_peer_takes_no_place() -> None:
    """Turning an address away gives its permit back: the limit of all is not used up by it."""
    server = local(echo, limits=Limits(connections=2, per_peer=1))
    async with no_leaks(), serving(server) as address, clients(address, 1) as (first,):
        await assert_echoes(first)
        for _ in range(10):
            async with clients(address, 1) as (client,):
                assert await told_or_served(client) == "told"
        async with connect(address, source="127.0.0.2") as other:
            await assert_echoes(other)


async def test_the_accept_rate(autojump_clock: trio.testing.MockClock) -> None:
    """At most a second's worth at once, and then the rate: the rest waits its turn."""
    times: list[float] = []

    async def handler(conn: TcpConnection) -> None:
        times.append(trio.current_time() - begun)
        await echo(conn)

    server = local(handler, limits=Limits(accept_rate=10))
    begun = trio.current_time()
    async with no_leaks(), serving(server) as address, clients(address, 35):
        await until(lambda: len(times) == 35)
        for n, time in enumerate(times):
            assert time >= (n - 9) / 10 - 1e-6
        assert times[9] < 0.1
        assert times[-1] == pytest.approx(2.5, abs=0.1)
        # A second of silence is worth a second's burst, and no more.
        await trio.sleep(60)
        async with clients(address, 15):
            await until(lambda: len(times) == 50)
            assert times[44] < times[35] + 0.1
            assert times[49] == pytest.approx(times[35] + 0.5, abs=0.1)
        assert server.statistics().rejected == {}


async def test_the_accept_rate_rejects(autojump_clock: trio.testing.MockClock) -> None:
    """Those above the rate are turned away when that is asked for."""
    server = local(echo, limits=Limits(accept_rate=4, when_full="reject"))
    async with no_leaks(), serving(server) as address:
        for _ in range(3):
            async with clients(address, 10) as streams:
                fates = [await told_or_served(client) for client in streams]
                assert fates == ["served"] * 4 + ["told"] * 6
            await trio.sleep(1)
        assert server.statistics().rejected == {"accept_rate": 18}


async def test_the_accept_rate_may_change_while_running(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Lifting the rate lets everybody in who waits for it."""
    server = local(echo, limits=Limits(accept_rate=1 / 3600))
    begun = trio.current_time()
    async with no_leaks(), serving(server) as address, clients(address, 5) as streams:
        await assert_echoes(streams[0])
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().opened == 1
        server.limits = Limits()
        for client in streams:
            await assert_echoes(client)
    assert trio.current_time() - begun < 1


# -- stop and resume (11)


async def test_stop_and_resume_a_thousand_times() -> None:
    """Stopping and resuming leaves nothing behind, however often, and loses nobody (FAULTS 11)."""
    server = local(echo)
    async with no_leaks(), serving(server) as address, clients(address, 1) as (old,):
        await assert_echoes(old)
        await trio.testing.wait_all_tasks_blocked()
        before = open_descriptors(), living_tasks()
        async with clients(address, 0) as streams:
            for n in range(1000):
                server.stop_accepting()
                if n % 3:
                    await trio.lowlevel.checkpoint()
                if not n % 100:
                    streams.append(connect(address))
                server.resume_accepting()
                if n % 2:
                    await trio.lowlevel.checkpoint()
            for client in streams:
                await assert_echoes(client)
            assert len(server.connections) == 11
        await until(lambda: len(server.connections) == 1)
        await trio.testing.wait_all_tasks_blocked()
        assert (open_descriptors(), living_tasks()) == before
    assert closed(server) == {CloseReason.PEER_EOF: 10, CloseReason.FORCED: 1}

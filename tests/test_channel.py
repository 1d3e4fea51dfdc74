"""Channel: one descriptor's registration, and the beliefs about it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.conftest import living_tasks, no_leaks, unix_pair, until
from trioreactor.channel import Channel
from trioreactor.default_poller import current_poller
from trioreactor.epoll_poller import HAVE_EPOLL
from trioreactor.poller import current


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


class Events:
    """What a channel's owner was told."""

    def __init__(self, sock: socket.socket) -> None:
        self.told: list[str] = []
        self.channel = Channel(
            current_poller(),
            sock,
            on_readable=lambda: self.told.append("readable"),
            on_writable=lambda: self.told.append("writable"),
        )


async def test_input(pair: tuple[socket.socket, socket.socket]) -> None:
    """Input is told of to whoever asked, and believed in from then on."""
    left, right = pair
    events = Events(left)
    await trio.testing.wait_all_tasks_blocked()
    assert not events.channel.readable
    events.channel.want_read()
    right.send(b"x")
    await until(lambda: events.told)
    assert events.told == ["readable"]
    assert events.channel.readable
    # Edge-triggered: the same input is not told of twice, though nobody has read it.
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert events.told == ["readable"]
    events.channel.close()


async def test_output_only_when_wanted(pair: tuple[socket.socket, socket.socket]) -> None:
    """Room for output is told of once for each time that it was asked for."""
    left, right = pair
    events = Events(left)
    await trio.testing.wait_all_tasks_blocked()
    assert events.told == []
    for turn in (1, 2):
        with pytest.raises(BlockingIOError):
            while True:
                left.send(bytes(65536))
        events.channel.want_write()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert events.told == ["writable"] * (turn - 1)
        with pytest.raises(BlockingIOError):
            while True:
                right.recv(65536)
        await until(lambda turn=turn: len(events.told) >= turn)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert events.told == ["writable"] * turn
        assert not events.channel.write_wanted
    events.channel.close()


async def test_read_again(pair: tuple[socket.socket, socket.socket]) -> None:
    """`read_again` is one call from the poller however often it is asked for, and never at once."""
    left, _ = pair
    events = Events(left)
    await trio.testing.wait_all_tasks_blocked()
    for turn in (1, 2):
        for _ in range(3):
            events.channel.read_again()
        assert len(events.told) == turn - 1
        await trio.testing.wait_all_tasks_blocked()
        assert events.told == ["readable"] * turn
        assert not events.channel.again
    events.channel.close()


async def test_nothing_after_close(pair: tuple[socket.socket, socket.socket]) -> None:
    """A closed channel is called for nothing that was asked or came before."""
    left, right = pair
    async with no_leaks():
        other, other_peer = socket.socketpair()
        with other, other_peer:
            # Keeps the poller at work.
            witness = Events(other)
            witness.channel.want_read()
            events = Events(left)
            events.channel.want_read()
            events.channel.want_write()
            await trio.testing.wait_all_tasks_blocked()
            del events.told[:]
            right.send(b"x")
            events.channel.read_again()
            assert not events.channel.closed
            events.channel.close()
            events.channel.close()
            assert events.channel.closed
            other_peer.send(b"x")
            await until(lambda: witness.told)
            assert events.told == []
            witness.channel.close()


@pytest.mark.skipif(not HAVE_EPOLL, reason="trio's waits find out when they wait")
async def test_a_descriptor_that_cannot_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Failing to register leaves nothing behind, and hurts nobody."""
    monkeypatch.setenv("TRIOREACTOR_POLLER", "epoll")
    async with no_leaks():
        with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError):
            Channel(current_poller(), file, on_readable=lambda: None, on_writable=lambda: None)
        await trio.testing.wait_all_tasks_blocked()
        assert current.get() is None
        left, right = await unix_pair()
        with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError):
            Channel(current_poller(), file, on_readable=lambda: None, on_writable=lambda: None)
        left.send(b"x")
        assert await right.receive_some() == b"x"
        left.force_close()
        right.force_close()


async def test_closing_while_armed_leaves_no_task(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """Whatever waits for a descriptor ends with its channel, also when it had not begun to."""
    left, _ = pair
    before = living_tasks()
    for settle in (True, False):
        events = Events(left)
        events.channel.want_read()
        events.channel.want_write()
        if settle:
            await trio.testing.wait_all_tasks_blocked()
        events.channel.close()
        await trio.testing.wait_all_tasks_blocked()
        assert living_tasks() == before

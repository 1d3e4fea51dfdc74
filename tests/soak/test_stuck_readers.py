"""Readers that never read, and a server that sends without looking at `send`'s answer."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.soak.child import Child, running
from tests.soak.conftest import Figure
from tests.soak.server import MESSAGE_SIZE

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

STUCK = 2000
HEALTHY = STUCK // 10
LIMIT = 262144

# What a connection may cost besides what is queued. (measured by test_idle.py: a little over 5 KiB;
# without epoll another 4 KiB for the tasks that wait for it)
OVERHEAD = 12288

# What the kernel holds for one that does not read (some 57 KB with the buffers below) and the
# high-water mark, so that all are above it after so many messages, and none is at the limit.
MESSAGES_TO_HIGH = 160
# More than go into the kernel and then to the limit.
MESSAGES_TO_LIMIT = 1000

OPTIONS = {
    "watermarks": {"high": 65536, "low": 16384, "limit": LIMIT},
    "socket_options": {"send_buffer": 32768},
}
RECEIVE_BUFFER = 4096

# One message each so many seconds: the healthy ones alone keep the server a tenth busy.
INTERVAL = 0.02
# Enough to go on for a while after the stuck ones have been closed.
MESSAGES = 360
REPETITIONS = range(3, 9)


@contextmanager
def serving(stuck: int, healthy: int) -> Iterator[tuple[Child, Child, int]]:
    """A server with so many readers of each kind, the healthy ones, and how many bytes the server
    had resident before they came.
    """
    with (
        running("server", "coroutine", json.dumps(OPTIONS)) as server,
        running("swarm", str(port := server.answer())) as never_read,
        running("swarm", str(port)) as do_read,
    ):
        before = server.rss()
        # Mixed, as they would come.
        for _ in range(20):
            never_read.ask("open", stuck // 20, "127.0.0.2", RECEIVE_BUFFER)
            do_read.ask("open", healthy // 20, "127.0.0.3")
        assert server.ask("wait_connections", stuck + healthy)
        yield server, do_read, before


@pytest.mark.parametrize("way", ["broadcast", "flood"])
def test_memory(way: str, figure: Figure) -> None:
    """Promise M for a server that heeds nothing: at most the limit for each stuck reader, and when
    it is reached they are closed as slow consumers.

    A broadcast's messages are one for all, a flood's are each connection's own.
    """
    with serving(STUCK, 0) as (server, _, before):
        assert server.ask(way, MESSAGES_TO_HIGH, 0) == MESSAGES_TO_HIGH
        counts = server.ask("counts")
        assert counts["connections"] == STUCK
        assert counts["pauses"] == STUCK
        growth_at_high = server.rss() - before

        sent = MESSAGES_TO_HIGH + server.ask(way, MESSAGES_TO_LIMIT, 0)
        counts = server.ask("counts")
        assert counts["closed"] == {"SLOW_CONSUMER": STUCK}
        assert counts["buffered"] == 0
        growth = server.peak_rss() - before
        after = server.rss() - before

    figure(f"messages of {MESSAGE_SIZE} bytes until {STUCK} were closed", f"{sent}")
    figure("bytes a connection, all above the high mark", f"{growth_at_high / STUCK:.0f}")
    figure(f"bytes a connection, most (limit: {LIMIT})", f"{growth / STUCK:.0f}")
    figure("bytes a connection, all closed", f"{after / STUCK:.0f}")
    assert growth <= STUCK * (LIMIT + OVERHEAD)


def run(stuck: int) -> dict[str, dict[str, float]]:
    """Broadcast to the healthy ones with so many stuck ones beside them, from when nobody has yet
    got anything until after the stuck ones were closed; how old messages were in each phase.
    """
    with serving(stuck, HEALTHY) as (server, healthy, _):
        healthy.tell("read", MESSAGES)
        server.ask("broadcast", MESSAGES_TO_HIGH, 0, INTERVAL)
        counts = server.ask("counts")
        assert counts["connections"] == stuck + HEALTHY
        assert counts["pauses"] == stuck
        closing = MESSAGES_TO_HIGH + server.ask(
            "broadcast", MESSAGES - MESSAGES_TO_HIGH, HEALTHY if stuck else 0, INTERVAL
        )
        server.ask("broadcast", MESSAGES - closing, 0, INTERVAL)
        healthy.answer()
        counts = server.ask("counts")
        assert counts["connections"] == HEALTHY
        assert counts["closed"] == ({"SLOW_CONSUMER": stuck} if stuck else {})
        assert counts["warnings"] == []
        return {
            "all": healthy.ask("ages", 1, MESSAGES),
            "stuck": healthy.ask("ages", MESSAGES_TO_HIGH + 1, MESSAGES),
            "closing": healthy.ask("ages", closing - 2, min(closing + 3, MESSAGES)),
        }


def test_healthy_readers(figure: Figure) -> None:
    """Promise O: 200 readers get all of a broadcast, and their p99 with 2,000 stuck ones beside
    them is within 2x of what it is without: while those are stuck, when they reach the limit and
    are closed, and afterwards.

    Before they are stuck, which means above the high-water mark, nobody can tell them from
    readers: the kernel takes 2,000 messages more, and that is the load of 2,200 readers.
    """
    without: list[dict[str, dict[str, float]]] = []
    beside: list[dict[str, dict[str, float]]] = []
    ratio = float("inf")
    # Of each the repetition that was least disturbed by what else the machine does. If it does
    # much, more of them are needed until there is one of each.
    while len(beside) < REPETITIONS.start or (len(beside) in REPETITIONS and ratio > 2):
        without.append(run(0))
        beside.append(run(STUCK))
        least = [min(measured["stuck"]["p99"] for measured in runs) for runs in (without, beside)]
        ratio = least[1] / least[0]

    def several(runs: list[dict[str, dict[str, float]]], phase: str, what: str) -> str:
        samples = [measured[phase][what] for measured in runs]
        return f"{statistics.median(samples):.1f} ({', '.join(f'{s:.1f}' for s in samples)})"

    for phase, name in (("stuck", "from the high mark on"), ("all", "from the first message on")):
        figure(f"ms, p99 {name}, without", several(without, phase, "p99"))
        figure(f"ms, p99 {name}, beside ", several(beside, phase, "p99"))
    figure("ms, most when the stuck are closed, without", several(without, "closing", "max"))
    figure("ms, most when the stuck are closed, beside ", several(beside, "closing", "max"))
    figure("ratio of the least p99s from the high mark on", f"{ratio:.2f}")
    assert ratio <= 2

"""What deadlines cost, and heartbeats against a thousand peers that vanish at once."""

from __future__ import annotations

import json
import time

import pytest

from tests.namespaces import own_network
from tests.soak.child import running
from tests.soak.conftest import Figure
from tests.test_heartbeat import peers_that_vanish

__all__ = ["own_network"]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

CONNECTIONS = 10_000
# In several processes, so that each has descriptors enough.
CLIENTS = 2
IDLE = 10
# Within `IDLE` of each other, so that none is ever idle for so long.
ROUNDS = 4
APART = 7

VANISHED = 1000


def used(timeouts: dict[str, float]) -> tuple[float, float]:
    """Seconds of the server's processor time, and of time, with so many connections that speak
    just often enough.
    """
    with (
        running("server", "dispatch", json.dumps({"timeouts": timeouts})) as server,
        running("swarm", str(port := server.answer())) as some,
        running("swarm", str(port)) as others,
    ):
        begun = time.monotonic()
        for n, clients in enumerate((some, others)):
            clients.ask("open", CONNECTIONS // CLIENTS, f"127.0.0.{n + 2}")
        assert server.ask("wait_connections", CONNECTIONS)
        assert time.monotonic() - begun < IDLE, "too slow to be measured"
        begun, before = time.monotonic(), server.cpu()
        for n in range(ROUNDS):
            for clients in (some, others):
                clients.ask("echo", 64)
            time.sleep(max(0, begun + (n + 1) * APART - time.monotonic()))
        taken = server.cpu() - before, time.monotonic() - begun
        assert server.ask("counts")["closed"] == {}
    return taken


def test_cost_of_idle_deadlines(figure: Figure) -> None:
    """10,000 connections' deadlines cost less than 1 % of a core: the server's processor time with
    them less that without, and the same messages.
    """
    costs = []
    for _ in range(2):
        without, _ = used({})
        with_them, seconds = used({"idle": IDLE})
        costs.append((with_them - without) / seconds)
        figure(f"of a core, {CONNECTIONS} connections, without", f"{without / seconds:.3%}")
        figure(f"of a core, {CONNECTIONS} connections, idle={IDLE}", f"{with_them / seconds:.3%}")
    figure("of a core, the deadlines alone, least", f"{min(costs):.3%}")
    assert min(costs) < 0.01


async def test_a_thousand_peers_that_vanish(own_network: None, figure: Figure) -> None:
    """FAULTS 35: all are gone a second after the heartbeat's timeout of 1 s, descriptors back."""
    took = await peers_that_vanish(VANISHED)
    figure(f"seconds until {VANISHED} were closed", f"{took:.2f}")
    assert took < 2

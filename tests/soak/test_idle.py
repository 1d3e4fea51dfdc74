"""What connections cost that say nothing: processor time and memory."""

from __future__ import annotations

import statistics
import time

import pytest

from tests.soak.child import Child, running
from tests.soak.conftest import Figure

pytestmark = [pytest.mark.soak, pytest.mark.timeout(60)]

SILENT = 1000
SECONDS = 5

MEASURED = 2000
# At a time, so that no backlog is too short and what a crowd costs for a moment is not counted.
FEW = 50
REPETITIONS = 3
SERVERS = ["coroutine", "dispatch", "trio", "asyncio streams", "asyncio Protocol"]


@pytest.mark.parametrize("kind", ["coroutine", "dispatch"])
def test_silence_costs_no_processor_time(kind: str, figure: Figure) -> None:
    """Promise S: a server with 1,000 silent connections uses under 1 % of a core."""
    with running("server", kind) as server, running("swarm", str(server.answer())) as clients:
        clients.ask("open", SILENT)
        assert clients.ask("echo", 64) == SILENT * 64
        assert server.ask("wait_connections", SILENT)
        begun, used = time.monotonic(), server.cpu()
        time.sleep(SECONDS)
        share = (server.cpu() - used) / (time.monotonic() - begun)
        figure(f"of a core, {SILENT} connections, {SECONDS} s", f"{share:.4%}")
        assert share < 0.01


def open_few(clients: Child) -> None:
    """Some more connections; the server has them and has echoed on each."""
    clients.ask("open", FEW)
    assert clients.ask("echo", 64, FEW) == FEW * 64


def test_memory_of_an_idle_connection(figure: Figure) -> None:
    """The growth of a server by 2,000 connections that have echoed once, beside other servers'."""
    for kind in SERVERS:
        costs = []
        for _ in range(REPETITIONS):
            with (
                running("server", kind) as server,
                running("swarm", str(server.answer())) as clients,
            ):
                # What the first ones bring with them is not theirs alone.
                open_few(clients)
                before = server.rss()
                for _ in range(MEASURED // FEW):
                    open_few(clients)
                costs.append((server.rss() - before) / MEASURED)
        figure(
            f"{kind if ' ' in kind or kind == 'trio' else 'trioreactor ' + kind:24}",
            f"{statistics.median(costs):6.0f} bytes a connection "
            f"({', '.join(f'{cost:.0f}' for cost in costs)})",
        )
        assert 500 < min(costs) < 65536

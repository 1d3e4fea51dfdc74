"""Connections that come and go by the thousand leave nothing behind."""

from __future__ import annotations

import json

import pytest

from tests.soak.child import running
from tests.soak.conftest import Figure

pytestmark = [pytest.mark.soak, pytest.mark.timeout(120)]

CONNECTIONS = 5000
RESETS = CONNECTIONS // 4
ROUNDS = 10


@pytest.mark.parametrize("kind", ["coroutine", "dispatch"])
def test_nothing_is_left_of_ended_connections(kind: str, figure: Figure) -> None:
    """Promises F, T and C after each of ten rounds of 5,000 connections, a quarter of which are
    reset; and what a few rounds need of memory is enough for all: the least of the last three is
    under 1 MB more than that of the first three, for the allocator's part goes up and down.
    """
    # It has reason to warn where `counts` collects garbage, and keeps the sources that it shows.
    options = json.dumps({"watchdog": None})
    with (
        running("server", kind, options) as server,
        running("swarm", str(server.answer())) as clients,
    ):
        before = server.ask("counts")
        # With all connections open. When they have ended, what is resident says little: the
        # allocator gives memory back by the megabyte, if not one byte of it is in use. So then
        # the blocks in use are counted, of which there should be as many as before.
        full, empty, blocks = [], [], []
        for n in range(1, ROUNDS + 1):
            clients.ask("open", CONNECTIONS, f"127.0.0.{n + 1}")
            assert server.ask("wait_connections", CONNECTIONS)
            assert clients.ask("echo", 64) == CONNECTIONS * 64
            counts = server.ask("counts")
            assert counts["descriptors"] == before["descriptors"] + CONNECTIONS
            full.append(server.rss())
            clients.ask("close", RESETS)
            assert server.ask("wait_connections", 0)
            counts = server.ask("counts")
            for name in ("descriptors", "tasks", "connections", "buffered", "warnings"):
                assert counts[name] == before[name], f"{name} after round {n}"
            assert counts["opened"] == CONNECTIONS * n
            assert counts["closed"] == {
                "PEER_RESET": RESETS * n,
                "PEER_EOF": (CONNECTIONS - RESETS) * n,
            }
            empty.append(server.rss())
            blocks.append(counts["blocks"])
        figure("MiB resident, 5,000 open", " ".join(f"{rss / 2**20:.2f}" for rss in full))
        figure("MiB resident, none open ", " ".join(f"{rss / 2**20:.2f}" for rss in empty))
        growth = min(full[-3:]) - min(full[:3])
        figure("growth of the least of three rounds, 5,000 open", f"{growth / 1024:.0f} KiB")
        figure("growth in the last nine rounds, none open", f"{blocks[-1] - blocks[0]} blocks")
        assert growth < 1_000_000
        # 45,000 connections have come and gone since.
        assert blocks[-1] - blocks[0] < 450

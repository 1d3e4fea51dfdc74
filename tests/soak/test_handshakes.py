"""A thousand connections that stall in TLS's handshake."""

from __future__ import annotations

import json
import statistics
import time

import pytest

from tests.soak.child import running
from tests.soak.conftest import Figure
from tests.soak.test_storm import stop

pytestmark = [pytest.mark.soak, pytest.mark.timeout(120)]

STALLED = 1000
ROUNDS = 5
# Seconds.
HANDSHAKE = 3
MEASURED = 1.5


@pytest.mark.parametrize("kind", ["coroutine", "dispatch"])
def test_stalled_handshakes(kind: str, figure: Figure) -> None:
    """FAULTS 51: who connects while a thousand stall has its first answer at most twice as late
    (p99), and those end by their deadline.
    """
    calm, crowded, seconds = [], [], []
    options = json.dumps({"tls": True, "timeouts": {"handshake": HANDSHAKE}})
    with (
        running("server", kind, options) as server,
        running("swarm", str(port := server.answer())) as visitor,
        running("swarm", str(port)) as crowd,
    ):
        for n in range(ROUNDS):
            visitor.tell("visit")
            time.sleep(MEASURED)
            calm.append(stop(visitor)["p99"])

            begun = time.monotonic()
            assert crowd.ask("stall", STALLED, f"127.0.0.{n + 2}") == STALLED
            assert server.ask("wait_connections", STALLED)
            visitor.tell("visit")
            time.sleep(MEASURED)
            crowded.append(stop(visitor)["p99"])
            assert server.ask("wait_connections", 0)
            seconds.append(time.monotonic() - begun)
            crowd.ask("close", 0)
        counts = server.ask("counts")
    assert counts["closed"]["HANDSHAKE_FAILED"] == ROUNDS * STALLED
    assert counts["opened"] == sum(counts["closed"].values())
    figure("ms, to a first answer, p99, calm   ", " ".join(f"{p99:.2f}" for p99 in calm))
    figure("ms, to a first answer, p99, stalled", " ".join(f"{p99:.2f}" for p99 in crowded))
    ratio = statistics.median(crowded) / statistics.median(calm)
    figure("ratio of the medians", f"{ratio:.2f}")
    figure(f"seconds until they were gone, of {HANDSHAKE}", f"{max(seconds):.2f}")
    assert ratio <= 2
    assert max(seconds) < HANDSHAKE + 2

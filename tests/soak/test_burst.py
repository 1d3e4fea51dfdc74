"""A million tiny messages that come at once."""

from __future__ import annotations

import os
import statistics
import time

import pytest

from tests.soak.child import running
from tests.soak.conftest import Figure
from tests.soak.test_storm import stop

pytestmark = [pytest.mark.soak, pytest.mark.timeout(120)]

MESSAGES = 1_000_000
BURSTS = 5


@pytest.mark.parametrize("kind", ["messages", "channel"])
def test_a_burst_of_tiny_messages(kind: str, figure: Figure) -> None:
    """FAULTS 19: who sends a message now and then waits for its answer at most twice as long (p99)
    while a million from somebody else are decoded. Medians of several are compared. On trio's own
    waits, where input takes a turn of the loop longer to be seen, five times.
    """
    calm, bursting, seconds = [], [], []
    with (
        running("server", kind) as server,
        running("swarm", str(port := server.answer())) as present,
        running("swarm", str(port)) as other,
    ):
        present.ask("open", 1)
        other.ask("open", 1)
        for _ in range(BURSTS):
            # An empty message.
            present.tell("ping", 4)
            time.sleep(1)
            calm.append(stop(present)["p99"])

            present.tell("ping", 4)
            seconds.append(other.ask("burst", MESSAGES))
            bursting.append(stop(present)["p99"])
        assert server.ask("counts")["warnings"] == []
    figure(f"us for each of {MESSAGES} messages ", f"{min(seconds) / MESSAGES * 1e6:.2f}")
    figure("ms, round trip's p99, calm  ", " ".join(f"{p99:.2f}" for p99 in calm))
    figure("ms, round trip's p99, burst ", " ".join(f"{p99:.2f}" for p99 in bursting))
    ratio = statistics.median(bursting) / statistics.median(calm)
    figure("ratio of the medians", f"{ratio:.2f}")
    assert ratio <= (5 if os.environ.get("TRIOREACTOR_POLLER") == "trio" else 2)

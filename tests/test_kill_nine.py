"""Kill -9 of a server under load, a few times; tests/soak does it fifty times."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.kill_nine import DELIVERED, KillNine, Outcome

pytestmark = pytest.mark.program

KILLS = 5


async def test_kill_nine(tmp_path: Path) -> None:
    """After each kill the client is connected again, each message of the application's own
    acknowledged protocol arrives exactly once or is reported as failed, and nothing leaks.
    """
    outcome = await KillNine(tmp_path / "inbox", KILLS).run()
    assert_none_lost(outcome, KILLS)


def assert_none_lost(outcome: Outcome, kills: int) -> None:
    """What must hold whatever was killed when."""
    assert outcome.killed == [-9] * kills
    # Each was acknowledged or reported as failed, one of the two.
    assert outcome.acknowledged | outcome.failed == outcome.sent
    assert not outcome.acknowledged & outcome.failed
    # Acknowledged: exactly once in the server's file. Failed: at most once. Nothing else is there.
    times = Counter(outcome.kept)
    assert {times[text] for text in outcome.acknowledged} == {1}
    assert set(times) <= outcome.sent
    assert max(times.values()) == 1
    # The protocol promises the order of sending.
    assert outcome.numbers == sorted(outcome.numbers)
    # Who had time enough was not given up, and who had not was told.
    assert outcome.patient_failed == 0
    assert len(outcome.failed) >= kills
    # The client was there again each time, and it took a new connection each time.
    assert len(outcome.after_kill) == kills
    statistics = outcome.statistics
    assert statistics is not None
    # More if one came into the queue of a server that was about to end.
    made = sum(attempt.error is None for attempt in outcome.attempts)
    assert statistics.opened == made >= kills + 1
    assert (statistics.active, sum(statistics.closed.values())) == (0, made)
    # The load was a load, and the kills came in the middle of it.
    assert len(outcome.acknowledged) > DELIVERED * kills
    assert outcome.sent_again > 0

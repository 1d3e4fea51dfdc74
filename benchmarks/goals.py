"""What the library wants to reach, and whether a run of the suite did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from works import DISPATCH, SEND, SEND_ALL

TRIO = "plain trio"
PROTOCOL = "asyncio Protocol"
STREAMS = "asyncio streams"
UV_PROTOCOL = "uvloop Protocol"
UV_STREAMS = "uvloop streams"
EASY = ("EasyNetwork on trio", "EasyNetwork on asyncio")


@dataclass(frozen=True)
class Goal:
    """*ours* is to be at most (or at least) *factor* times the best of *peers*."""

    work: str
    ours: str
    factor: float
    peers: tuple[str, ...]
    key: str | None = None
    """What is compared; the work's own metric if None."""
    at_least: bool = False


def _goals() -> Iterable[Goal]:
    for work in ("echo-50", "echo-500"):
        yield Goal(work, DISPATCH, 1.0, (UV_PROTOCOL,))
        yield Goal(work, DISPATCH, 0.75, (PROTOCOL,))
        yield Goal(work, DISPATCH, 0.35, (TRIO,))
        yield Goal(work, SEND, 1.0, (UV_STREAMS,))
        yield Goal(work, SEND, 0.5, (TRIO,))
        yield Goal(work, SEND_ALL, 1.0, (STREAMS,))
        yield Goal(work, SEND_ALL, 0.5, (TRIO,))
    for ours, factor in ((DISPATCH, 1.05), (SEND, 1.1), (SEND_ALL, 1.1)):
        yield Goal("echo-1", ours, factor, (TRIO, UV_PROTOCOL, UV_STREAMS), "p50")
    yield Goal("echo-16k", DISPATCH, 1.0, (UV_PROTOCOL,))
    yield Goal("echo-16k", SEND, 1.0, (UV_STREAMS,))
    yield Goal("echo-16k", SEND_ALL, 1.0, (STREAMS,))
    yield Goal("lines", DISPATCH, 0.9, (UV_PROTOCOL,))
    yield Goal("lines", SEND, 1.0, (UV_STREAMS,))
    for work in ("sink", "source"):
        yield Goal(work, DISPATCH, 1.0, (UV_PROTOCOL, UV_STREAMS), at_least=True)
        yield Goal(work, SEND, 1.0, (STREAMS,), at_least=True)
    yield Goal("connect", DISPATCH, 1.0, (PROTOCOL,))
    yield Goal("connect", SEND, 1.0, (STREAMS,))
    yield Goal("connect", SEND, 0.7, (TRIO,))
    yield Goal("broadcast", DISPATCH, 1.0, (UV_PROTOCOL,))
    yield Goal("broadcast", SEND, 1.0, (UV_PROTOCOL,))
    yield Goal("memory", DISPATCH, 1.0, (PROTOCOL,))
    yield Goal("memory", SEND, 1.0, (STREAMS,))
    yield Goal("framed", DISPATCH, 0.5, EASY)
    yield Goal("framed", SEND, 0.7, EASY)


GOALS = tuple(_goals())

# CPU a request with 100 active of so many connections, over that with no others.
GROWTH = (("active-1000", "active-100"), ("active-5000", "active-100"))
GROWTH_FACTOR = 1.1


def judged(works: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal that *works* can tell of: its text, the ratio found, and whether it is reached."""
    found: list[dict[str, Any]] = []
    for goal in GOALS:
        work = works.get(goal.work)
        if work is None:
            continue
        key = goal.key or work["metric"]
        servers = work["servers"]
        peers = [servers[name][key] for name in goal.peers if name in servers]
        if goal.ours not in servers or not peers:
            continue
        ratio = servers[goal.ours][key] / (max(peers) if goal.at_least else min(peers))
        reached = ratio >= goal.factor if goal.at_least else ratio <= goal.factor
        sign = ">=" if goal.at_least else "<="
        peer = goal.peers[0] if len(goal.peers) == 1 else f"the best of {', '.join(goal.peers)}"
        text = f"{goal.work}{' p50' if goal.key else ''}: {goal.ours} {sign} {goal.factor} x {peer}"
        found.append({"goal": text, "ratio": ratio, "reached": reached})
    for many, few in GROWTH:
        if many in works and few in works:
            for ours in (DISPATCH, SEND, SEND_ALL):
                cpu = [works[name]["servers"].get(ours, {}).get("cpu_us") for name in (many, few)]
                if all(cpu):
                    ratio = cpu[0] / cpu[1]
                    text = f"{many}: {ours} <= {GROWTH_FACTOR} x its own {few}"
                    reached = ratio <= GROWTH_FACTOR
                    found.append({"goal": text, "ratio": ratio, "reached": reached})
    return found


def lines(found: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """The goals as text."""
    yield ""
    yield "goals"
    for goal in found:
        yield f"{'   ' if goal['reached'] else '!! '}{goal['ratio']:>6.2f}  {goal['goal']}"

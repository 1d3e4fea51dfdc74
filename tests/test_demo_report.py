"""Report: what the demo prints, and what it counts."""

from __future__ import annotations

import io
import mmap
import os
import socket

import pytest
import trio

from trioreactor.demo_report import (
    Report,
    count,
    living_tasks,
    open_descriptors,
    resident_memory,
)

pytestmark = pytest.mark.pure

linux = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc here")


def test_report() -> None:
    """One column of labels, one of figures, a mark before what does not hold; those are counted."""
    out = io.StringIO()
    report = Report(out)
    report.text("as it is")
    report.title("1. Title")
    report.line("label", "value")
    report.check("good", "1", holds=True)
    assert report.failures == 0
    report.check("bad", "2", holds=False)
    assert report.failures == 1
    assert out.getvalue() == (
        "as it is\n"
        "\n1. Title\n"
        "   label                       value\n"
        "   good                        1\n"
        "!! bad                         2   <-- does not hold\n"
    )


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 things"), (1, "1 thing"), (2000, "2,000 things")]
)
def test_count(number: int, text: str) -> None:
    """A plural where it belongs."""
    assert count(number, "thing") == text


@linux
def test_open_descriptors() -> None:
    """Counts what this process has open."""
    before = open_descriptors()
    assert before is not None
    with socket.socket():
        assert open_descriptors() == before + 1
    assert open_descriptors() == before


async def test_living_tasks() -> None:
    """Counts this run's tasks."""
    before = living_tasks()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        assert living_tasks() == before + 1
        nursery.cancel_scope.cancel()


@linux
def test_resident_memory() -> None:
    """Bytes, and they grow with what is written to: pages of our own, for the allocator may have
    some left that it had written to before.
    """
    size = 50_000_000
    before = resident_memory()
    assert before is not None
    with mmap.mmap(-1, size) as pages:
        pages.write(b"x" * size)
        after = resident_memory()
    assert after is not None
    assert 0.8 * size < after - before < 2.5 * size

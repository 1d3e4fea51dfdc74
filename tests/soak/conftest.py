"""What the soak tests share: enough descriptors, and a place for the figures that they measure."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

# Both ends of the largest load and some spare.
DESCRIPTORS = 12000

Figure = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def _able() -> None:
    """Skip where the figures cannot be had; allow this process and its children descriptors."""
    for file in ("smaps_rollup", "schedstat"):
        if not Path("/proc/self", file).exists():
            pytest.skip(f"needs Linux's /proc/self/{file}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        pytest.skip(f"needs {DESCRIPTORS} descriptors in a process, and {hard} are allowed")
    if soft < DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))


@pytest.fixture
def figure(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Figure:
    """Report a measured figure: ``figure(name, value)``."""
    print(f"\n{request.node.name}")

    def report(name: str, value: str) -> None:
        record_property(name, value)
        print(f"  {name}: {value}", flush=True)

    return report

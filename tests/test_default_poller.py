"""The choice of the poller: the platform's best, or what the environment says."""

from __future__ import annotations

import pytest

from trioreactor import default_poller
from trioreactor.default_poller import HAVE_EPOLL, current_poller
from trioreactor.epoll_poller import EpollPoller
from trioreactor.poller import Poller, current
from trioreactor.trio_poller import TrioPoller

BEST = EpollPoller if HAVE_EPOLL else TrioPoller


@pytest.mark.parametrize(
    ("wish", "kind"), [(None, BEST), ("", BEST), ("trio", TrioPoller), ("epoll", EpollPoller)]
)
async def test_a_wish(
    wish: str | None, kind: type[Poller], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRIOREACTOR_POLLER chooses; unset or empty, it is the platform's best. Once for a run."""
    if wish == "epoll" and not HAVE_EPOLL:
        pytest.skip("this platform has no epoll")
    if wish is None:
        monkeypatch.delenv("TRIOREACTOR_POLLER", raising=False)
    else:
        monkeypatch.setenv("TRIOREACTOR_POLLER", wish)
    poller = current_poller()
    assert type(poller) is kind
    monkeypatch.setenv("TRIOREACTOR_POLLER", "trio")
    assert current_poller() is poller


@pytest.mark.parametrize("wish", ["kqueue", "Epoll", "1", " "])
async def test_a_wrong_wish(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that means nothing is refused, with what to set instead; nothing is installed."""
    monkeypatch.setenv("TRIOREACTOR_POLLER", wish)
    with pytest.raises(ValueError, match="TRIOREACTOR_POLLER") as caught:
        current_poller()
    assert repr(wish) in str(caught.value)
    assert '"epoll"' in str(caught.value)
    assert '"trio"' in str(caught.value)
    assert current.get() is None


async def test_without_epoll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no epoll, trio's waits are the default, and asking for epoll is refused."""
    monkeypatch.setattr(default_poller, "HAVE_EPOLL", False)
    monkeypatch.setenv("TRIOREACTOR_POLLER", "epoll")
    with pytest.raises(ValueError, match="no epoll"):
        current_poller()
    monkeypatch.setenv("TRIOREACTOR_POLLER", "")
    assert type(current_poller()) is TrioPoller

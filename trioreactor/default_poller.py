"""Which poller a run gets: the platform's best, unless the environment says otherwise."""

from __future__ import annotations

import os

from trioreactor.epoll_poller import HAVE_EPOLL, EpollPoller
from trioreactor.poller import Poller, current
from trioreactor.trio_poller import TrioPoller


def current_poller() -> Poller:
    """The run's poller, made now if there is none."""
    poller = current.get()
    if poller is None:
        poller = _make_poller()
        current.set(poller)
    return poller


def install_poller(poller: Poller) -> None:
    """Make *poller* this run's poller, before anything has used one: for simulation."""
    if current.get() is not None:
        raise RuntimeError("this run has a poller already: install one before the first channel")
    current.set(poller)


def _make_poller() -> Poller:
    wish = os.environ.get("TRIOREACTOR_POLLER", "")
    if wish not in ("", "epoll", "trio"):
        raise ValueError(f'TRIOREACTOR_POLLER={wish!r}: set "epoll", "trio" or nothing')
    if wish == "trio" or not HAVE_EPOLL:
        if wish == "epoll":
            raise ValueError("TRIOREACTOR_POLLER=epoll: this platform has no epoll")
        return TrioPoller()
    return EpollPoller()

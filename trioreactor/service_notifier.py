"""ServiceNotifier: tells the service manager (systemd) how a service is."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

import trio

logger = logging.getLogger("trioreactor.service")


class ServiceNotifier:
    """Sends a service's state to the socket that ``NOTIFY_SOCKET`` names: sd_notify(3).

    Each method is one message, and answers whether it was sent. Nothing here waits or raises: where
    there is no such socket (the service was started by hand, or on another system), nothing is
    done; if the message cannot be sent (the socket is gone, or full), that is logged once, in
    debug, and False.

    *environment* is read when it is made (None: that of the process). With *unset_environment* the
    variables are then removed from the process's environment, so that no child speaks for it.
    """

    def __init__(
        self, *, environment: Mapping[str, str] | None = None, unset_environment: bool = False
    ) -> None:
        if environment is None:
            environment = os.environ
        path = environment.get("NOTIFY_SOCKET", "")
        self._interval = _watchdog_interval(environment)
        if unset_environment:
            for variable in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
                os.environ.pop(variable, None)
        self._address: str | None = None
        self._failed = False
        if path.startswith(("/", "@")) and hasattr(socket, "AF_UNIX"):
            # A leading @ stands for the NUL of an abstract name.
            self._address = f"\0{path[1:]}" if path.startswith("@") else path
        elif path:
            self._note_failure(f"NOTIFY_SOCKET={path!r} is no path and no @name")

    @property
    def active(self) -> bool:
        """Whether there is anybody to tell."""
        return self._address is not None

    @property
    def watchdog_interval(self) -> float | None:
        """Within how many seconds the manager wants `watchdog` to be called again; None if not."""
        return self._interval

    def ready(self, status: str | None = None) -> bool:
        """The service serves: its start, or a reload, is complete."""
        return self._tell("READY=1", status)

    def reloading(self, status: str | None = None) -> bool:
        """The service reads its configuration again; `ready` says that it has.

        With the time that ``Type=notify-reload`` asks for.
        """
        # systemd compares it with CLOCK_MONOTONIC, which this is on Linux.
        now = time.monotonic_ns() // 1000
        return self._tell(f"RELOADING=1\nMONOTONIC_USEC={now}", status)

    def stopping(self, status: str | None = None) -> bool:
        """The service is ending: it drains."""
        return self._tell("STOPPING=1", status)

    def status(self, text: str) -> bool:
        """*text*, in one line, is what ``systemctl status`` shows."""
        return self._tell(None, text)

    def watchdog(self) -> bool:
        """The service is alive."""
        return self._tell("WATCHDOG=1", None)

    def notify(self, state: str) -> bool:
        """Any other message: lines of ``NAME=value``, such as ``EXTEND_TIMEOUT_USEC=5000000``."""
        if self._address is None:
            return False
        try:
            # Each message has a socket of its own, so that none is held in between.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(state.encode("utf-8", "surrogateescape"), self._address)
        except OSError as error:
            self._note_failure(str(error))
            return False
        return True

    async def keep_watchdog(self) -> None:
        """Call `watchdog` at once and then at half of `watchdog_interval`, until cancelled.

        Returns at once if nobody wants that. It runs in the loop, so that a loop that is blocked
        is noticed. If the manager cannot be told, it tries on.
        """
        await trio.lowlevel.checkpoint()
        while self._address is not None and self._interval is not None:
            self.watchdog()
            await trio.sleep(self._interval / 2)

    def _tell(self, state: str | None, status: str | None) -> bool:
        lines = [] if state is None else [state]
        if status is not None:
            # A second line would be a message of its own.
            lines.append(f"STATUS={' '.join(status.splitlines())}")
        return self.notify("\n".join(lines))

    def _note_failure(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            logger.debug("the service manager cannot be told: %s", problem)


def _watchdog_interval(environment: Mapping[str, str]) -> float | None:
    """sd_watchdog_enabled(3): seconds, or None if there is no watchdog or it is another's."""
    pid = environment.get("WATCHDOG_PID", str(os.getpid()))
    text = environment.get("WATCHDOG_USEC", "")
    # No more digits than its 64 bits have.
    if pid != str(os.getpid()) or not (text.isascii() and text.isdigit() and len(text) <= 20):
        return None
    return int(text) / 1e6 or None

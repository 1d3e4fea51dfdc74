"""What the tests of clients share: a server's end that the test works by hand."""

from __future__ import annotations

from typing import Any

import trio

from tests.conftest import address_of
from trioreactor import TcpClient
from trioreactor.connection_callbacks import Handler

settled = trio.testing.wait_all_tasks_blocked

AT_ONCE = [0.0] * 1000


def client_to(
    listener: trio.SocketListener, handler: Handler | None = None, **options: Any
) -> TcpClient:
    """A client that comes back at once."""
    return TcpClient(*address_of(listener), handler, **({"backoff": AT_ONCE} | options))

"""Targets: what ``module:attribute`` may name, and what is said of what it may not."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conftest import no_leaks
from trioreactor import Acceptor, Limits, ServeOptions, open_tcp_acceptors
from trioreactor.server_target import (
    TargetError,
    check_listens,
    load_target,
    open_server,
    parse_target,
)

SERVED = "tests.programs.served"


@asynccontextmanager
async def acceptors() -> AsyncIterator[list[Acceptor]]:
    async with no_leaks():
        opened = await open_tcp_acceptors(0, host="127.0.0.1")
        try:
            yield opened
        finally:
            for acceptor in opened:
                await acceptor.aclose()


@pytest.mark.parametrize("target", ["echo", "callbacks", "factory", "context"])
async def test_what_can_be_served(target: str) -> None:
    """A handler, Callbacks, a function that makes the server, a context that gives one."""
    async with (
        acceptors() as opened,
        open_server(f"{SERVED}:{target}", opened, ServeOptions(max_connections=3)) as server,
        trio.open_nursery() as nursery,
    ):
        assert server.limits == Limits(connections=3)
        assert server.name == ("made" if target == "factory" else server.name)
        serving = await nursery.start(server.serve)
        check_listens(target, server, opened, serving)
        address = server.addresses[0]
        assert isinstance(address, tuple)
        async with await trio.open_tcp_stream(*address[:2]) as client:
            await client.send_all(b"hello")
            assert await client.receive_some() == b"hello"
        server.close()


async def test_a_targets_own_options_stay() -> None:
    """What the command line does not say is not said to the target."""
    assert ServeOptions().server_arguments() == {}
    assert ServeOptions(log_level="info").server_arguments() == {}
    options = ServeOptions(max_per_peer=2, accept_rate=5, when_full="reject")
    assert options.server_arguments() == {
        "limits": Limits(per_peer=2, accept_rate=5, when_full="reject")
    }
    assert ServeOptions(**options.as_plain()) == options


def test_options_are_checked() -> None:
    """At once, with what to pass."""
    with pytest.raises(ValueError, match="pass at least 1 connections"):
        ServeOptions(max_connections=0)
    with pytest.raises(ValueError, match=r"watchdog=0.001\): pass at least 0.01 seconds"):
        ServeOptions(watchdog=0.001)
    # A worker process is told them as text.
    path: Any = Path("cert.pem")
    with pytest.raises(TypeError, match=r"tls_cert=.*pass the file's name as a str"):
        ServeOptions(tls_cert=path)
    network: Any = ip_network("10.0.0.0/8")
    for networks in ([network], "10.0.0.0/8"):
        with pytest.raises(TypeError, match=r"proxy_protocol=.*pass a list of texts"):
            ServeOptions(proxy_protocol=networks)
    wrong = "loud"
    with pytest.raises(ValueError, match="pass one of debug, info, warning, error"):
        ServeOptions(log_level=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["app", "app:", ":handler", "a b:c", "app:a b", "./app:x", ""])
def test_no_target(text: str) -> None:
    """What names nothing is refused before anything is imported."""
    with pytest.raises(ValueError, match="names nothing to serve: pass"):
        parse_target(text)


def test_dotted() -> None:
    """Modules in packages, attributes of attributes."""
    assert parse_target("a.b:c.d") == ("a.b", "c.d")
    assert load_target("os:path.join").__name__ == "join"


def test_the_current_directory_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the program may have been started by a script elsewhere."""
    (tmp_path / "here_it_is.py").write_text("handler = 5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert load_target("here_it_is:handler") == 5
    assert sys.path[0] == str(tmp_path)
    del sys.modules["here_it_is"]


@pytest.mark.parametrize(
    ("source", "reason", "line"),
    [
        ("import nonesuch", "ModuleNotFoundError: No module named 'nonesuch'", "import nonesuch"),
        ("1/0", "ZeroDivisionError: division by zero", "1/0"),
        ("def f(:", "SyntaxError: invalid syntax", "def f(:"),
        ("import sys; sys.exit('no')", None, ""),
    ],
)
def test_a_module_that_fails(
    source: str, reason: str | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own error is shown, from its own line on. If it exits, it exits."""
    (tmp_path / "failing_one.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    if reason is None:
        with pytest.raises(SystemExit):
            load_target("failing_one:x")
        return
    with pytest.raises(TargetError) as caught:
        load_target("failing_one:x")
    assert str(caught.value) == f"importing 'failing_one' failed: {reason}"
    assert line in caught.value.details
    assert "importlib" not in caught.value.details
    assert "server_target" not in caught.value.details

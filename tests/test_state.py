"""States: one table of moves, which the code obeys and the documentation shows."""

from __future__ import annotations

import ast
import logging
import re
from itertools import product
from pathlib import Path

import pytest

import trioreactor
from tests.conftest import refusing, tcp_pair
from trioreactor import (
    CloseReason,
    ConnectError,
    ConnectionState,
    Connector,
    IllegalStateTransition,
)
from trioreactor.state import (
    CONNECTOR_TRANSITIONS,
    TRANSITIONS,
    ConnectorState,
    check_transition,
    state_diagram,
)

pytestmark = pytest.mark.pure

CONNECTING = ConnectionState.CONNECTING
CONNECTED = ConnectionState.CONNECTED
DISCONNECTING = ConnectionState.DISCONNECTING
DISCONNECTED = ConnectionState.DISCONNECTED

LEGAL = {
    (CONNECTING, CONNECTED),
    (CONNECTING, DISCONNECTED),
    (CONNECTED, DISCONNECTING),
    (CONNECTED, DISCONNECTED),
    (DISCONNECTING, DISCONNECTED),
}


IDLE = ConnectorState.IDLE
WAITING = ConnectorState.WAITING
STOPPED = ConnectorState.STOPPED

CONNECTOR_LEGAL = {
    (IDLE, ConnectorState.CONNECTING),
    (IDLE, WAITING),
    (ConnectorState.CONNECTING, ConnectorState.CONNECTED),
    (ConnectorState.CONNECTING, WAITING),
    (ConnectorState.CONNECTING, IDLE),
    (WAITING, ConnectorState.CONNECTING),
    (WAITING, IDLE),
    (ConnectorState.CONNECTED, IDLE),
    *((state, STOPPED) for state in ConnectorState if state is not STOPPED),
}


@pytest.mark.parametrize(("old", "new"), list(product(ConnectionState, repeat=2)))
def test_every_move(old: ConnectionState, new: ConnectionState) -> None:
    """Of the sixteen moves exactly five are legal: forwards, and never to where one is."""
    if (old, new) in LEGAL:
        check_transition(TRANSITIONS, old, new)
    else:
        with pytest.raises(IllegalStateTransition, match=f"{old.name} can become .*{new.name}"):
            check_transition(TRANSITIONS, old, new)


@pytest.mark.parametrize(("old", "new"), list(product(ConnectorState, repeat=2)))
def test_every_move_of_a_connector(old: ConnectorState, new: ConnectorState) -> None:
    """Of the twenty-five moves twelve are legal: to and fro, but a stopped one stays stopped."""
    if (old, new) in CONNECTOR_LEGAL:
        check_transition(CONNECTOR_TRANSITIONS, old, new)
    else:
        with pytest.raises(IllegalStateTransition, match=f"{old.name} can become .*{new.name}"):
            check_transition(CONNECTOR_TRANSITIONS, old, new)


def test_an_error_names_what_would_be_legal() -> None:
    """The text of an illegal move says which moves there are."""
    with pytest.raises(IllegalStateTransition, match="DISCONNECTED can become nothing, not"):
        check_transition(TRANSITIONS, DISCONNECTED, CONNECTED)
    with pytest.raises(IllegalStateTransition, match="become DISCONNECTED, DISCONNECTING, not"):
        check_transition(TRANSITIONS, CONNECTED, CONNECTING)


def test_the_table_cannot_be_changed() -> None:
    """The table is complete and read-only, its rows included."""
    assert set(TRANSITIONS) == set(ConnectionState)
    assert set(CONNECTOR_TRANSITIONS) == set(ConnectorState)
    with pytest.raises(TypeError):
        TRANSITIONS[DISCONNECTED] = frozenset({CONNECTED})  # type: ignore[index]
    with pytest.raises(TypeError):
        CONNECTOR_TRANSITIONS[STOPPED] = frozenset({IDLE})  # type: ignore[index]
    for row in (*TRANSITIONS.values(), *CONNECTOR_TRANSITIONS.values()):
        assert isinstance(row, frozenset)


async def test_an_illegal_move_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A connection that is asked for an illegal move raises, stays as it was, and logs no move."""
    caplog.set_level(logging.DEBUG, "trioreactor")
    left, right = await tcp_pair()
    async with left, right:
        right.force_close()
        for conn, state in ((left, CONNECTED), (right, DISCONNECTED)):
            with pytest.raises(IllegalStateTransition):
                conn._life._become(CONNECTING)
            assert conn.state is state
        assert not [r for r in caplog.records if "CONNECTING" in r.getMessage()]
        left.send(b"still open")


def test_an_illegal_move_changes_nothing_in_a_connector(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A connector that is asked for an illegal move raises, stays as it was, and logs no move."""
    caplog.set_level(logging.DEBUG, "trioreactor")
    connector = Connector("192.0.2.1", 7)
    with pytest.raises(IllegalStateTransition):
        connector._become(ConnectorState.CONNECTED)
    assert connector.state is IDLE
    connector.stop()
    with pytest.raises(IllegalStateTransition):
        connector._become(ConnectorState.CONNECTING)
    assert connector.state is STOPPED
    assert [r.getMessage() for r in caplog.records] == ["connector: IDLE -> STOPPED"]


async def test_each_move_of_a_connector_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Every move is one debug line."""
    caplog.set_level(logging.DEBUG, "trioreactor.connector")
    with refusing() as nobody:
        connector = Connector(*nobody.getsockname(), backoff=[0.001])
        with pytest.raises(ConnectError):
            await connector.connect()
    assert [r.getMessage() for r in caplog.records if "->" in r.getMessage()] == [
        "connector: IDLE -> CONNECTING",
        "connector: CONNECTING -> WAITING",
        "connector: WAITING -> CONNECTING",
        "connector: CONNECTING -> IDLE",
    ]


async def test_each_move_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Every move is one debug line with the connection's name."""
    caplog.set_level(logging.DEBUG, "trioreactor.connection")
    left, right = await tcp_pair(name="the one")
    async with right:
        await left.send_eof()
        await left.aclose()
        lines = [r.getMessage() for r in caplog.records if "the one" in r.getMessage()]
        assert lines == [
            "the one: CONNECTED -> DISCONNECTING",
            "the one: DISCONNECTING -> DISCONNECTED",
        ]


def assigners(path: Path, attribute: str) -> set[str]:
    """The functions in *path* that assign an attribute of that name."""
    return {
        f"{path.stem}.{function.name}"
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.ctx, ast.Store)
    }


def test_one_place_sets_the_state() -> None:
    """No code but the one setter assigns a connection's state, apart from its first value; nor a
    connector's.
    """
    setters = set()
    for path in Path(trioreactor.__file__).parent.glob("*.py"):
        if "ConnectionState" in path.read_text(encoding="utf-8"):
            # Else whatever it calls a state is none of a connection's.
            setters |= assigners(path, "state")
    assert setters == {"lifecycle.__init__", "lifecycle._become"}
    connector = Path(trioreactor.__file__).with_name("connector.py")
    assert assigners(connector, "_state") == {"connector.__init__", "connector._become"}


def test_close_reasons() -> None:
    """The reasons are those of the contract, and each one's value is its name."""
    assert {reason.name for reason in CloseReason} == {
        "LOCAL_CLOSE",
        "PEER_EOF",
        "PEER_RESET",
        "FORCED",
        "CANCELLED",
        "IDLE_TIMEOUT",
        "FIRST_BYTE_TIMEOUT",
        "FRAME_TIMEOUT",
        "WRITE_STALLED",
        "HEARTBEAT_TIMEOUT",
        "SLOW_CONSUMER",
        "PROTOCOL_ERROR",
        "HANDSHAKE_FAILED",
        "HANDLER_ERROR",
        "DRAIN_TIMEOUT",
    }
    for member in (*CloseReason, *ConnectionState, *ConnectorState):
        assert member.value == member.name.lower()


def test_the_diagram_is_the_table() -> None:
    """The diagram has one arrow for each legal move, no other, and says where it begins."""
    lines = state_diagram(TRANSITIONS, starts=[CONNECTING, CONNECTED]).splitlines()
    assert lines[0] == "stateDiagram-v2"
    arrows = set()
    for line in lines[1:]:
        match = re.fullmatch(r"    (\S+) --> (\S+)", line)
        assert match, line
        arrows.add(match.groups())
    assert len(arrows) == len(lines) - 1
    assert arrows == {(old.name, new.name) for old, new in LEGAL} | {
        ("[*]", "CONNECTING"),
        ("[*]", "CONNECTED"),
        ("DISCONNECTED", "[*]"),
    }


def test_the_connectors_diagram_is_its_table() -> None:
    """The same for a connector's, which begins idle and ends stopped."""
    lines = state_diagram(CONNECTOR_TRANSITIONS, starts=[IDLE]).splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        ["[*] --> IDLE", "STOPPED --> [*]"]
        + [f"{old.name} --> {new.name}" for old, new in CONNECTOR_LEGAL]
    )


def test_the_documentation_shows_the_table() -> None:
    """The state diagram in the design document is the one made from the table, to the letter."""
    document = Path(__file__).parents[1] / "docs" / "design.md"
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```mermaid\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert [block for block in blocks if block.startswith("stateDiagram")] == [
        state_diagram(TRANSITIONS, starts=[CONNECTING, CONNECTED]),
        state_diagram(CONNECTOR_TRANSITIONS, starts=[ConnectorState.IDLE]),
    ]

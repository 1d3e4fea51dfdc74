"""Bind addresses: every form, and for everything else an error that says what to pass."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trioreactor.bind_address import parse_bind_address

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("localhost:0", ("localhost", 0)),
        ("a-b.example:65535", ("a-b.example", 65535)),
        (":7000", (None, 7000)),
        ("[::1]:7000", ("::1", 7000)),
        ("[fe80::1%eth0]:7000", ("fe80::1%eth0", 7000)),
        ("unix:/run/x.sock", "/run/x.sock"),
        ("unix:x.sock", "x.sock"),
        ("unix:/run/a:b c", "/run/a:b c"),
        ("unix:@name", "\0name"),
        (f"unix:{'x' * 107}", "x" * 107),
        ("fd://0", 0),
        ("fd://3", 3),
    ],
)
def test_what_it_names(text: str, place: object) -> None:
    """Each form is read into what has to be opened."""
    assert parse_bind_address(text) == place


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "host:port"),
        ("7000", "host:port"),
        ("localhost", "host:port"),
        ("/run/x.sock", "unix:PATH"),
        ("localhost:", "a port from 0 to 65535"),
        ("localhost:http", "a port from 0 to 65535"),
        ("localhost:65536", "a port from 0 to 65535"),
        ("localhost:-1", "a port from 0 to 65535"),
        ("localhost:+1", "a port from 0 to 65535"),
        ("localhost: 1", "a port from 0 to 65535"),
        ("localhost:1_0", "a port from 0 to 65535"),
        ("localhost:\u0661", "a port from 0 to 65535"),
        ("localhost:000080", "a port from 0 to 65535"),
        ("::1", "in brackets"),
        ("::1:7000", "in brackets"),
        ("[::1]", "a port from 0 to 65535"),
        ("[]:7000", "between the brackets"),
        ("[127.0.0.1]:7000", "between the brackets"),
        ("[[::1]]:7000", "between the brackets"),
        ("[x:7000", "host:port"),
        ("tcp://localhost:7000", "in brackets"),
        ("a b:7000", "host:port"),
        ("a\0b:7000", "host:port"),
        ("unix:", "a path or @name"),
        ("unix:@", "a path or @name"),
        ("unix:a\0b", "no NUL"),
        (f"unix:{'x' * 108}", "at most 107 bytes"),
        (f"unix:{'é' * 54}", "at most 107 bytes"),
        ("fd://", "fd://3"),
        ("fd://x", "fd://3"),
        ("fd://-1", "fd://3"),
        ("fd://2147483648", "fd://3"),
    ],
)
def test_what_is_none(text: str, hint: str) -> None:
    """Anything else is a ValueError that names it and says what to pass."""
    with pytest.raises(ValueError, match="pass ") as caught:
        parse_bind_address(text)
    assert repr(text) in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("value", [None, 7000, b":7000", ("localhost", 7000)])
def test_what_is_no_text(value: Any) -> None:
    """What is no text is a TypeError that says what to pass."""
    with pytest.raises(TypeError, match="host:port"):
        parse_bind_address(value)


PARTS = st.sampled_from(["unix:", "fd://", "[", "]", ":", "@", "/", "7", "::1", "host", "\0", "é"])


@given(st.lists(PARTS, max_size=6).map("".join) | st.text())
def test_no_other_error(text: str) -> None:
    """Whatever is given, it names a place that can be opened, or a ValueError says so."""
    try:
        place = parse_bind_address(text)
    except ValueError:
        return
    match place:
        case int():
            assert text == f"fd://{text[5:]}"
            assert place >= 0
        case str():
            assert place
            assert "\0" not in place[1:]
        case host, port:
            assert host is None or host
            assert 0 <= port <= 65535

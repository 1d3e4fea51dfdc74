"""``trioreactor serve --proxy-protocol``: who is believed, and what is no network."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.test_cli import read_exactly
from tests.test_serve_command import _environment, serving
from trioreactor import ProxyProtocol, ServeOptions
from trioreactor.cli import main

__all__ = ["_environment"]

HEADER = b"PROXY TCP4 203.0.113.7 192.0.2.1 50000 443\r\n"


@pytest.mark.program
def test_proxy_protocol(tmp_path: Path) -> None:
    """A connection is its client's, by TCP from the network and by the Unix socket; who sends no
    header is not served.
    """
    path = tmp_path / "x.sock"
    options = ["--proxy-protocol", "127.0.0.0/8", "--proxy-protocol", "unix", "--workers", "1"]
    with serving(
        tmp_path, "echo", *options, "--bind", "127.0.0.1:0", "--bind", f"unix:{path}"
    ) as served:
        with served.connect() as sock, socket.socket(socket.AF_UNIX) as unix:
            unix.connect(str(path))
            for each in (sock, unix):
                each.sendall(HEADER + b"hello")
                assert read_exactly(each, 5) == b"hello"
            served.send_signal(signal.SIGUSR1)
            for number in (1, 2):
                served.wait_log(f"#{number} from 203.0.113.7:50000; CONNECTED")
        with served.connect() as sock:
            sock.sendall(b"hello, without a header, for long enough\r\n")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["10.0.0.0/8", "fd00::/8"], ProxyProtocol(trusted=["10.0.0.0/8", "fd00::/8"])),
        (["any"], ProxyProtocol(trusted="any")),
        (["any", "any", "unix"], ProxyProtocol(trusted="any", unix=True)),
        (["unix"], ProxyProtocol(trusted=[], unix=True)),
        (["unix", "10.0.0.1"], ProxyProtocol(trusted="10.0.0.1", unix=True)),
    ],
)
def test_options(given: list[str], meant: ProxyProtocol) -> None:
    """As the command line gives them, and as they come to a worker."""
    options = ServeOptions(proxy_protocol=given)
    assert options.server_arguments() == {"proxy_protocol": meant}
    assert ServeOptions(**options.as_plain()) == options


@pytest.mark.pure
def test_any_beside_networks() -> None:
    """It would be no use to name them."""
    with pytest.raises(ValueError, match='pass networks or "any"'):
        ServeOptions(proxy_protocol=["10.0.0.0/8", "any"])


@pytest.mark.pure
@pytest.mark.parametrize("network", ["10.0.0.0/99", "everybody", "10.0.0.1/8"])
def test_no_network(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage, which says what to pass."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "app:handler", "--proxy-protocol", network])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert network in errors
    assert "pass networks" in errors
    assert errors.count("\n") == 1

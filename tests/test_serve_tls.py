"""``trioreactor serve --tls-cert``: certificates from files, renewed ones, and those of no use."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import pytest

from tests.test_cli import read_exactly
from tests.test_serve_command import SERVED, Served, main, serving
from tests.tls import NAME, authority, certificate, client_context, write_pem
from trioreactor import ServeOptions
from trioreactor.serve_tls import server_context


@pytest.mark.pure
def test_separate_files(tmp_path: Path) -> None:
    """The key may be in a file of its own."""
    leaf = certificate()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    leaf.cert_chain_pems[0].write_to_path(str(cert))
    leaf.private_key_pem.write_to_path(str(key))
    context = server_context(str(cert), str(key), None)
    assert context.verify_mode is ssl.CERT_NONE
    # It is the first that has none.
    with pytest.raises(ValueError, match=f"certificate {cert}: there is no private key in it"):
        server_context(str(cert), None, None)
    with pytest.raises(ValueError, match=f"{cert} with {cert}: the second has no private key"):
        server_context(str(cert), str(cert), None)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("which", "reason"),
    [
        ("missing", "nonesuch.pem: No such file or directory"),
        ("no PEM", "it has no certificate or key in PEM form"),
        ("mismatch", "the key is of another certificate"),
        ("encrypted", "the key is encrypted: pass one that is not"),
        ("bad CA", "TLS cannot use the authorities in .*: it has no"),
        ("missing CA", "TLS cannot use the authorities in .*: No such file"),
    ],
)
def test_of_no_use(which: str, reason: str, tmp_path: Path) -> None:
    """Each is told apart, with the file's name, and nobody is asked for a password."""
    own, _ = write_pem(tmp_path)
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    other = tmp_path / "other.pem"
    certificate("other").private_key_pem.write_to_path(str(other))
    nonesuch = str(tmp_path / "nonesuch.pem")
    encrypted = tmp_path / "encrypted.pem"
    if which == "encrypted":
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(certificate().private_key_pem.bytes(), None)
        encrypted.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"secret"),
            )
        )
    files = {
        "missing": (nonesuch, None, None),
        "no PEM": (str(empty), None, None),
        "mismatch": (str(own), str(other), None),
        "encrypted": (str(own), str(encrypted), None),
        "bad CA": (str(own), None, str(empty)),
        "missing CA": (str(own), None, nonesuch),
    }[which]
    with pytest.raises(ValueError, match=reason):
        server_context(*files)


@pytest.mark.pure
def test_options_that_belong_together() -> None:
    """A key or an authority alone says nothing."""
    with pytest.raises(ValueError, match="want a tls_cert"):
        ServeOptions(tls_key="key.pem")


def asked(served: Served, context: ssl.SSLContext) -> bytes:
    """The certificate that the server shows; it echoes over it."""
    with context.wrap_socket(served.connect(), server_hostname=NAME) as tls:
        tls.sendall(b"hello")
        assert read_exactly(tls, 5) == b"hello"
        shown = tls.getpeercert(binary_form=True)
        assert shown is not None
        return shown


@pytest.mark.program
def test_a_renewed_certificate(tmp_path: Path) -> None:
    """It is read by the workers that SIGHUP starts. Clients show theirs, if they are asked to."""
    own, trusted = write_pem(tmp_path)
    context = client_context()
    options = ["--workers", "1", "--tls-cert", str(own), "--tls-ca", str(trusted)]
    with serving(tmp_path, "echo", *options) as served:
        with pytest.raises(OSError, match=r"(?i)certificate required|reset"):
            asked(served, context)
        certificate("client").configure_cert(context)
        first = asked(served, context)
        renewed = authority().issue_cert(NAME)
        renewed.private_key_and_cert_chain_pem.write_to_path(str(own))
        served.send_signal(signal.SIGHUP)
        served.wait_log("takes the place of")
        second = first
        while second == first:
            # The old worker may not have heard yet.
            second = asked(served, context)
        served.send_signal(signal.SIGTERM)
        served.ended(0)


@pytest.mark.program
@pytest.mark.parametrize("way", [[], ["--workers", "1"]], ids=["here", "workers"])
def test_a_bad_certificate(
    way: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last line says which file and why; exit code 1. A key alone is wrong usage."""
    file = tmp_path / "bad.pem"
    file.write_text("nothing\n")
    bind = ["--bind", "127.0.0.1:0"]
    assert main(["serve", f"{SERVED}:echo", *bind, *way, "--tls-cert", str(file)]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"trioreactor serve: TLS cannot use the certificate {file}: it has no")
    assert main(["serve", f"{SERVED}:echo", *bind, *way, "--tls-key", str(file)]) == 2
    assert "want a --tls-cert (see trioreactor serve --help)" in capfd.readouterr().err

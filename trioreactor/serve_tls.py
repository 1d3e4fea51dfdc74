"""A server's TLS from files: what a command line says of it."""

from __future__ import annotations

import ssl

_NO_PEM = "it has no certificate or key in PEM form"


def server_context(cert: str, key: str | None, ca: str | None) -> ssl.SSLContext:
    """TLS for a server with the certificate chain in *cert*, a PEM file, and the private key in
    *key* (None: in the same file). With *ca* clients must show a certificate signed by one of those
    in that file.

    `ValueError`, with the file's name, for what cannot be read or used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (OSError, ValueError) as error:
        files = cert if key is None else f"{cert} with {key}"
        reason = _reason(error)
        if reason == _NO_PEM and _has_certificate(cert):
            reason = (
                "there is no private key in it: pass the key's file, too"
                if key is None
                else "the second has no private key in PEM form"
            )
        raise ValueError(f"TLS cannot use the certificate {files}: {reason}") from error
    if ca is not None:
        try:
            context.load_verify_locations(ca)
        except (OSError, ValueError) as error:
            raise ValueError(f"TLS cannot use the authorities in {ca}: {_reason(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _has_certificate(file: str) -> bool:
    """OpenSSL says the same whether the certificate or the key is missing."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(file)
    except OSError:
        return False
    return True


def _no_password() -> str:
    # Else OpenSSL would ask at the terminal, which a service has not.
    raise ValueError("the key is encrypted: pass one that is not")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").replace("_", " ").lower()
        kinds = {
            "no start line": _NO_PEM,
            "no certificate or crl found": "it has no certificate in PEM form",
            "key values mismatch": "the key is of another certificate",
        }
        return kinds.get(reason, reason or _NO_PEM)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)

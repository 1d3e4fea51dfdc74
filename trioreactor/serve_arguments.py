"""ServeCommand: what the command line of ``trioreactor serve`` takes, and what it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from trioreactor.bind_address import parse_bind_address
from trioreactor.command_line import seconds
from trioreactor.loop_watchdog import SMALLEST_THRESHOLD
from trioreactor.serve_options import LOG_LEVELS, ServeOptions
from trioreactor.server_target import parse_target
from trioreactor.worker_options import WorkerOptions

HELP = "serve a program of yours: trioreactor serve module:attribute"

DESCRIPTION = """\
Serve a program of yours: TARGET is module:attribute, where the attribute is one of

  a handler              async def handler(conn): ...
  Callbacks(message=...) for muduo's style
  a function that        def server(**options): return TcpServer(handler, **options, name="x")
  makes the server       (or an async context manager that gives one: it may open a database
                         before, and close it afterwards)

The module is looked for in the current directory first. Such a function is called with
the arguments that this command line decides (listeners=... always), and hands them on.

try it: save these three lines as app.py,
  async def handler(conn):
      async for chunk in conn:
          await conn.send_all(chunk.upper())
then
  trioreactor serve app:handler --bind 127.0.0.1:7000
and from another terminal
  nc 127.0.0.1 7000
"""

_DEFAULT_BIND = "127.0.0.1:7000"

EPILOG = """\
signals:
  SIGTERM, SIGINT (Ctrl-C)  drain: no more clients are taken, those who are there get
                            --drain-seconds to finish. Once more: end at once
  SIGHUP                    with --workers: replace the workers one by one, so that the program
                            as it is now serves, and no client is refused or cut off
  SIGUSR1                   write every connection and task to the log

worker processes (--workers):
  Each is an interpreter of its own, which imports TARGET. They share the listening sockets: who
  is free takes the next client. One that dies, or whose loop hangs, is replaced. A limit such as
  --max-connections holds in each of them: N workers take N times as many.
  For one worker's worth of load, leave --workers out, and for one that is watched use 1.

exit code:
  0  drained, or ended by itself
  1  could not start: the import, an address, a first worker; or the server failed; or, without
     workers, a handler did not end though it was cancelled
  2  wrong usage
  128 + the signal's number, after a second signal
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeCommand:
    """What one command line asks for."""

    target: str
    bind: Sequence[str]
    workers: int | None
    """None: in this process."""
    reload: bool
    grace: float
    options: ServeOptions
    worker_options: WorkerOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``trioreactor serve`` takes."""
    defaults = WorkerOptions()
    parser.add_argument("target", type=_target, metavar="TARGET", help="module:attribute")

    where = parser.add_argument_group("where to listen")
    where.add_argument(
        "--bind",
        type=_bind,
        action="append",
        metavar="ADDRESS",
        help="127.0.0.1:7000, localhost:7000, [::1]:7000, :7000 (every address), unix:/run/x.sock, "
        "unix:@abstract, or fd://3 (a listening socket that is inherited, as from systemd); may be "
        "given several times (default: 127.0.0.1:7000)",
    )

    where.add_argument(
        "--proxy-protocol",
        type=_trusted,
        action="append",
        metavar="NETWORK",
        help="every connection comes by a proxy that says whose it is, by a PROXY header, version "
        "1 or 2. Believe proxies in this network (10.0.0.0/8), or who connects by a Unix socket "
        "(unix), or whoever connects (any: let nobody but proxies do that); may be given several "
        "times",
    )

    processes = parser.add_argument_group("processes")
    processes.add_argument(
        "--workers",
        type=partial(_whole, least=1),
        metavar="N",
        help="serve in N worker processes, watched by this one (default: serve in this process)",
    )
    processes.add_argument(
        "--threads",
        type=partial(_whole, least=1),
        metavar="N",
        help="in each process, serve in N threads with a loop each, beside the one that accepts; "
        "for handlers that leave the interpreter to others, as compression does, or for a Python "
        "without its lock (default: one loop for all)",
    )
    processes.add_argument(
        "--reuse-port",
        action="store_true",
        help="a listening socket for each worker (SO_REUSEPORT): clients are dealt out evenly, but "
        "those dealt to a busy worker wait for it",
    )
    processes.add_argument(
        "--hang-seconds",
        type=seconds,
        metavar="S",
        help="replace a worker whose loop has not turned for so long, 0 for never "
        f"(default: {defaults.hang_timeout:g}, with --reload 0)",
    )
    processes.add_argument(
        "--reload",
        action="store_true",
        help="for development: replace the workers when a source file changes (1 worker, unless "
        "--workers says more)",
    )

    tls = parser.add_argument_group("TLS")
    tls.add_argument(
        "--tls-cert",
        metavar="FILE",
        help="serve TLS, with the certificate chain in this PEM file. It is read when a process "
        "begins to serve: after a renewal, send SIGHUP and the new workers have the new one",
    )
    tls.add_argument(
        "--tls-key",
        metavar="FILE",
        help="the private key, not encrypted (default: in the same file)",
    )
    tls.add_argument(
        "--tls-ca",
        metavar="FILE",
        help="ask clients for a certificate that is signed by one of those in this PEM file",
    )

    limits = parser.add_argument_group("limits, in each process")
    limits.add_argument(
        "--max-connections",
        type=partial(_whole, least=1),
        metavar="N",
        help="connections at one time; more wait in the queue, or see --when-full",
    )
    limits.add_argument(
        "--max-per-peer",
        type=partial(_whole, least=1),
        metavar="N",
        help="connections at one time from one address (IPv4) or /64 network (IPv6)",
    )
    limits.add_argument(
        "--accept-rate", type=_rate, metavar="R", help="new connections a second, on average"
    )
    limits.add_argument(
        "--when-full",
        choices=["wait", "reject"],
        help="what becomes of newcomers then: they wait in the queue, or are accepted and closed "
        "(default: wait)",
    )

    ending = parser.add_argument_group("ending and logging")
    ending.add_argument(
        "--drain-seconds",
        type=seconds,
        default=defaults.grace,
        metavar="S",
        help="how long connections may take to end after the first signal, or when their worker is "
        "replaced (default: %(default)g)",
    )
    ending.add_argument(
        "--watchdog",
        type=_threshold,
        metavar="S",
        help="log who holds the loop, with the stack, when a turn of it takes longer; 0 for never "
        "(default: 0.1, or what TARGET says)",
    )
    ending.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        default="info",
        help="what is written to stderr, a line for each event: this, and what is graver "
        "(default: %(default)s)",
    )


def _target(text: str) -> str:
    try:
        parse_target(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _bind(text: str) -> str:
    try:
        parse_bind_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _trusted(text: str) -> str:
    try:
        ServeOptions(proxy_protocol=[text])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _threshold(text: str) -> float:
    threshold = seconds(text)
    try:
        ServeOptions(watchdog=threshold)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is too short to be seen: pass at least {SMALLEST_THRESHOLD:g} seconds, or 0"
        ) from error
    return threshold


def _whole(text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(
            f"{text!r} does not count anything: pass a whole number of at least {least}"
        )
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = seconds(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no rate: pass a number of connections a second"
        ) from error
    if not rate:
        raise argparse.ArgumentTypeError(f"{text!r} lets nobody in: pass more than 0 a second")
    return rate


def contradiction(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that each are right; None if nothing is."""
    trusted: set[str] = set(arguments.proxy_protocol or ())
    if arguments.tls_cert is None and (arguments.tls_key or arguments.tls_ca):
        return "--tls-key and --tls-ca want a --tls-cert"
    if "any" in trusted and trusted - {"any", "unix"}:
        return "--proxy-protocol any believes whoever connects: leave it or the networks out"
    in_workers = arguments.workers is not None or arguments.reload
    if not in_workers and (arguments.reuse_port or arguments.hang_seconds is not None):
        return "--reuse-port and --hang-seconds are for worker processes: they want --workers"
    return None


def read(arguments: argparse.Namespace) -> ServeCommand:
    """What *arguments*, in which is no `contradiction`, ask for."""
    worker_options = WorkerOptions(grace=arguments.drain_seconds, reuse_port=arguments.reuse_port)
    # In development the loop hangs when somebody steps through it.
    hang = 0.0 if arguments.reload else worker_options.hang_timeout
    if arguments.hang_seconds is not None:
        hang = arguments.hang_seconds
    return ServeCommand(
        target=arguments.target,
        bind=arguments.bind or [_DEFAULT_BIND],
        workers=1 if arguments.reload and arguments.workers is None else arguments.workers,
        reload=arguments.reload,
        grace=arguments.drain_seconds,
        options=ServeOptions(
            max_connections=arguments.max_connections,
            max_per_peer=arguments.max_per_peer,
            accept_rate=arguments.accept_rate,
            when_full=arguments.when_full,
            threads=arguments.threads,
            tls_cert=arguments.tls_cert,
            tls_key=arguments.tls_key,
            tls_ca=arguments.tls_ca,
            proxy_protocol=arguments.proxy_protocol,
            watchdog=arguments.watchdog,
            log_level=arguments.log_level,
        ),
        worker_options=replace(worker_options, hang_timeout=hang or None),
    )

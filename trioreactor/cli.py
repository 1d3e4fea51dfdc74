"""The command line: a program of the user's own, the classic servers, and the demo."""

from __future__ import annotations

import argparse
import logging
import platform
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from importlib import metadata

import trio

import trioreactor
from trioreactor import demo, serve_arguments, serve_command
from trioreactor.acceptor import Acceptor
from trioreactor.address import format_address
from trioreactor.classic import SERVICES, until_drained
from trioreactor.command_line import Parser, count, forget_stdout, say, seconds
from trioreactor.listen import open_tcp_acceptors
from trioreactor.server_statistics import DrainReport
from trioreactor.tcp_server import TcpServer

# Long enough for a client that is busy to finish, short enough to wait for at a terminal.
_DRAIN_SECONDS = 5.0

_DESCRIPTION = """\
A structured-concurrency TCP toolkit for trio, tried from the command line.

start here:
  trioreactor demo                what the library does, measured on this machine in seconds
  trioreactor echo --port 7007    a server to talk to: nc 127.0.0.1 7007
  trioreactor serve app:handler   a program of yours, with worker processes if you like
"""

_SERVICE_DESCRIPTION = """\
{summary} (RFC {rfc}).

Prints where it listens, serves until Ctrl-C or SIGTERM, then drains: it takes no more clients,
and those that are connected get what was sent to them before they are closed. A second signal
ends it at once. The last line counts what was done.

try it, with --port {port}, from another terminal:
  {try_it}
"""

_SERVICE_EPILOG = """\
modes:
  coroutine   a task reads and writes: "async for data in conn" and "await conn.send_all(data)"
  dispatch    a callback is called for input, in the reactor itself: the fastest way
  Clients see no difference. Both are in trioreactor/classic.py.

exit code:
  0  drained: every connection ended by itself
  1  could not listen, or some connections were still there after --drain-seconds
  2  wrong usage
  128 + the signal's number, after a second signal
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _make_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        match arguments.command:
            case "demo":
                return demo.main()
            case "serve":
                return serve_command.run(arguments)
            case _:
                return _serve(arguments)
    except BrokenPipeError:
        forget_stdout()
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseExceptionGroup as group:
        # What a nursery makes of a Ctrl-C.
        if group.split(KeyboardInterrupt)[1] is not None:
            raise
        return 128 + signal.SIGINT


def _make_parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="trioreactor", description=_DESCRIPTION, formatter_class=layout)
    parser.add_argument("--version", action="version", version=_versions())
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    commands.add_parser(
        "demo",
        help="show what the library does, in less than 20 seconds",
        description=(
            "Start real servers on loopback, put them through what goes wrong in practice, and "
            "print what was measured. Exit code 0 if everything held, 1 if something did not."
        ),
    )
    serve = commands.add_parser(
        "serve",
        help=serve_arguments.HELP,
        description=serve_arguments.DESCRIPTION,
        epilog=serve_arguments.EPILOG,
        formatter_class=layout,
    )
    serve_arguments.add_arguments(serve)
    for name, service in SERVICES.items():
        # For root only below 1024.
        port = 7000 + service.well_known_port
        command = commands.add_parser(
            name,
            help=f"{service.summary} (RFC {service.rfc})",
            description=_SERVICE_DESCRIPTION.format(
                summary=service.summary[0].upper() + service.summary[1:],
                rfc=service.rfc,
                port=port,
                try_it=service.try_it.format(port=port),
            ),
            epilog=_SERVICE_EPILOG,
            formatter_class=layout,
        )
        command.add_argument(
            "--port",
            type=_port,
            default=0,
            metavar="N",
            help=f"where to listen; the RFC's own port is {service.well_known_port} "
            "(default: 0, any free port)",
        )
        command.add_argument(
            "--host",
            default="127.0.0.1",
            metavar="H",
            help="address or name to listen on: 127.0.0.1 is for this machine alone, 0.0.0.0 is "
            "every IPv4 address, :: every IPv6 one (default: %(default)s)",
        )
        command.add_argument(
            "--mode",
            choices=list(service.handlers),
            default="coroutine",
            help="how the server is written (default: %(default)s)",
        )
        command.add_argument(
            "--drain-seconds",
            type=seconds,
            default=_DRAIN_SECONDS,
            metavar="S",
            help="how long connections may take to end after the first signal "
            "(default: %(default)g)",
        )
        command.add_argument(
            "--verbose", action="store_true", help="log every connection's life on stderr"
        )
    return parser


def _versions() -> str:
    return (
        f"trioreactor {trioreactor.__version__} (trio {metadata.version('trio')}, "
        f"{platform.python_implementation()} {platform.python_version()})"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: pass 0 to 65535")
    return int(text)


class _CannotListenError(Exception):
    """What to tell the user about it, in a line."""


def _serve(arguments: argparse.Namespace) -> int:
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return trio.run(
            _listen_and_serve,
            _ServiceRun(arguments.command, arguments.mode, arguments.drain_seconds),
            arguments.host,
            arguments.port,
        )
    except _CannotListenError as error:
        print(f"trioreactor {arguments.command}: {error}", file=sys.stderr)
        return 1


async def _listen_and_serve(run: _ServiceRun, host: str, port: int) -> int:
    try:
        acceptors = await open_tcp_acceptors(port, host=host)
    except (socket.gaierror, UnicodeError) as error:
        # UnicodeError: it cannot even be written as a host's name.
        reason = error.strerror if isinstance(error, OSError) else "this is no host's name"
        raise _CannotListenError(f"cannot listen on host {host!r}: {reason}") from error
    except OSError as error:
        raise _CannotListenError(error.strerror or error) from error
    return await run.run(acceptors)


class _ServiceRun:
    """One run of a classic server, from listening to the closing line."""

    def __init__(self, name: str, mode: str, grace: float) -> None:
        self._name = name
        self._mode = mode
        self._grace = grace
        # The signal that ended the drain.
        self._second: int | None = None
        self._report: DrainReport
        self._server: TcpServer

    async def run(self, acceptors: list[Acceptor]) -> int:
        """Serve until a signal, drain, and return the exit code."""
        handler = until_drained(SERVICES[self._name].handlers[self._mode])
        self._server = TcpServer(handler, listeners=acceptors, name=self._name)
        begun = trio.current_time()
        # The signals come first, so that whoever has read the line below can send one.
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._server.serve)
                where = ", ".join(map(format_address, self._server.addresses))
                say(
                    f"{self._name} ({self._mode} mode) listens on {where}; "
                    "Ctrl-C drains and ends it"
                )
                first = signal.Signals(await anext(signals))
                await self._drain(first, signals)
        say(self._closing_line(trio.current_time() - begun))
        if self._second is not None:
            return 128 + self._second
        return 1 if self._report.forced else 0

    async def _drain(self, first: signal.Signals, signals: AsyncIterator[int]) -> None:
        left = len(self._server.connections)
        if left:
            say(
                f"{first.name}: draining {count(left, 'connection')}, at most "
                f"{self._grace:g} s; once more ends at once"
            )
        async with trio.open_nursery() as nursery:

            async def end_at_second() -> None:
                self._second = await anext(signals)
                self._server.close()

            nursery.start_soon(end_at_second)
            self._report = await self._server.drain(self._grace)
            nursery.cancel_scope.cancel()

    def _closing_line(self, seconds: float) -> str:
        statistics = self._server.statistics()
        reasons = ", ".join(f"{count} {why.value}" for why, count in statistics.closed.items())
        parts = [
            f"{count(statistics.opened, 'connection')}{f' ({reasons})' if reasons else ''}",
            f"{statistics.bytes_received} bytes received, {statistics.bytes_sent} sent",
        ]
        if statistics.shed:
            parts.append(f"{statistics.shed} turned away for want of descriptors")
        if self._second is not None:
            parts.append("ended at once")
        else:
            parts.append(
                f"drained in {self._report.seconds:.2f} s, {len(self._report.forced)} by force"
            )
        return f"{self._name}: {'; '.join(parts)}; ran {seconds:.1f} s"

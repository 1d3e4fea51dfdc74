"""``trioreactor serve module:attribute``: a program of the user's own, served from a shell."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

import trio

from trioreactor.acceptor import Acceptor
from trioreactor.address import SocketAddress, format_address
from trioreactor.command_line import count, say
from trioreactor.errors import InheritedSocketError, WorkerStartError
from trioreactor.exception_groups import unwrapped
from trioreactor.listen import open_acceptors
from trioreactor.serve_arguments import ServeCommand, contradiction, read
from trioreactor.serve_logging import set_up_logging
from trioreactor.server_target import TargetError, check_listens, open_server
from trioreactor.signals import run_workers, serve_until_signalled

_PROGRAM = "trioreactor serve"


def run(arguments: argparse.Namespace) -> int:
    """Serve as *arguments* say; the exit code."""
    wrong = contradiction(arguments)
    if wrong is not None:
        _fail(f"{_PROGRAM}: {wrong} (see {_PROGRAM} --help)")
        return 2
    asked = read(arguments)
    if asked.workers is not None and sys.platform == "win32":
        return _fail(f"{_PROGRAM}: worker processes need POSIX: leave --workers out")
    set_up_logging(arguments.log_level)
    try:
        if asked.workers is None:
            return trio.run(_serve_here, asked)
        return trio.run(_serve_in_workers, asked, asked.workers)
    except (TargetError, WorkerStartError) as error:
        return _fail(f"{error.details}{_PROGRAM}: {error}")
    except (socket.gaierror, UnicodeError) as error:
        # UnicodeError: it cannot even be written as a host's name.
        reason = error.strerror if isinstance(error, OSError) else "this is no host's name"
        return _fail(f"{_PROGRAM}: cannot listen on {', '.join(asked.bind)}: {reason}")
    except (OSError, InheritedSocketError) as error:
        return _fail(f"{_PROGRAM}: {error.strerror or error}")


def _fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


async def _serve_here(asked: ServeCommand) -> int:
    acceptors = await open_acceptors(*asked.bind)
    try:
        async with open_server(asked.target, acceptors, asked.options) as server:
            code = 0
            with unwrapped():
                async with trio.open_nursery() as nursery:

                    async def serve(task_status: trio.TaskStatus[list[Acceptor]]) -> None:
                        nonlocal code
                        code = await serve_until_signalled(
                            server,
                            grace=asked.grace,
                            deadline=_must_end,
                            task_status=task_status,
                        )

                    serving = await nursery.start(serve)
                    check_listens(asked.target, server, acceptors, serving)
                    _announce(asked, [acceptor.address for acceptor in serving], "")
            return code
    finally:
        for acceptor in acceptors:
            acceptor.close()


async def _serve_in_workers(asked: ServeCommand, workers: int) -> int:
    code = 0
    with unwrapped():
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[list[SocketAddress]]) -> None:
                nonlocal code
                code = await run_workers(
                    asked.target,
                    asked.bind,
                    workers=workers,
                    options=asked.options,
                    worker_options=asked.worker_options,
                    reload=asked.reload,
                    task_status=task_status,
                )

            addresses = await nursery.start(serve)
            if addresses:
                _announce(asked, addresses, f"{count(workers, 'worker')}; ")
    return code


def _announce(asked: ServeCommand, addresses: Sequence[SocketAddress], how: str) -> None:
    where = ", ".join(map(format_address, addresses))
    say(f"{asked.target} listens on {where}; {how}Ctrl-C drains and ends it")


def _must_end(seconds: float, code: int) -> None:
    """See to it that this process has ended by then, whatever its handlers and its loop do."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, name="deadline", daemon=True).start()

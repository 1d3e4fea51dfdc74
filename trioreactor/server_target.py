"""Targets: the ``module:attribute`` that a program to serve is named by, and the server of it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, cast

from trioreactor.acceptor import Acceptor
from trioreactor.callbacks import Callbacks
from trioreactor.event_loop_thread_pool import EventLoopThreadPool
from trioreactor.serve_options import ServeOptions
from trioreactor.tcp_server import TcpServer

_FORM = 'pass "module:attribute", as in "app:handler" or "package.module:server"'


class TargetError(Exception):
    """A target that cannot be served: its text says why, in a line."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details
        """The traceback of an error of the target's own; else empty."""


def parse_target(text: str) -> tuple[str, str]:
    """The module and the attribute, which may be dotted. `ValueError` for what cannot be any."""
    module, colon, attribute = text.partition(":")
    names = [*module.split("."), *attribute.split(".")]
    if not colon or not all(name.isidentifier() for name in names):
        raise ValueError(f"{text!r} names nothing to serve: {_FORM}")
    return module, attribute


def load_target(text: str) -> Any:
    """Import what *text* names. The current directory is searched first, as Python's ``-m`` does.

    Raises `TargetError`.
    """
    module_name, attribute = parse_target(text)
    here = os.getcwd()
    if not {here, ""} & set(sys.path):
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not _is_part(error.name, module_name):
            raise _own_error(f"importing {module_name!r} failed", error) from error
        raise TargetError(
            f"cannot import {module_name!r}: there is no module {error.name!r} in {here} or where "
            "else Python looks (PYTHONPATH)"
        ) from error
    except Exception as error:
        raise _own_error(f"importing {module_name!r} failed", error) from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as error:
            has = getattr(found, "__file__", None) or repr(found)
            raise TargetError(f"{text!r}: {has} has no {name!r}") from error
    return found


def _is_part(missing: str | None, module: str) -> bool:
    """Whether it is *module* itself, or a package that it is said to be in, that is *missing*."""
    return missing is not None and f"{module}.".startswith(f"{missing}.")


def _own_error(what: str, error: Exception) -> TargetError:
    reason = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    # From the target's own first line on.
    where = error.__traceback__
    while where is not None and _is_ours(where.tb_frame.f_code.co_filename):
        where = where.tb_next
    return TargetError(
        f"{what}: {reason}", "".join(traceback.format_exception(type(error), error, where))
    )


def _is_ours(file: str) -> bool:
    return file == __file__ or "importlib" in file


@asynccontextmanager
async def open_server(  # noqa: ASYNC911 as its target does
    text: str, acceptors: Sequence[Acceptor], options: ServeOptions
) -> AsyncGenerator[TcpServer]:
    """The server that the target *text* names, on *acceptors*, not serving yet.

    The target is a handler (an async function), `Callbacks`, or what makes a server: a function
    that is called with the arguments of `TcpServer` that were decided elsewhere (``listeners``
    always) and returns a `TcpServer`, or an async context manager that gives one. Raises
    `TargetError`, also for what that function raises.
    """
    target = load_target(text)
    arguments: dict[str, Any] = {"listeners": list(acceptors)}
    try:
        arguments |= options.server_arguments()
    except ValueError as error:
        raise TargetError(str(error)) from error
    async with AsyncExitStack() as stack:
        if options.threads is not None:
            pool = EventLoopThreadPool(options.threads)
            arguments["loops"] = await stack.enter_async_context(pool)
        yield await _make_server(text, target, arguments, stack)


async def _make_server(  # noqa: ASYNC910 as its target does
    text: str, target: Any, arguments: dict[str, Any], stack: AsyncExitStack
) -> TcpServer:
    if isinstance(target, Callbacks) or _is_async(target):
        return TcpServer(target, name=parse_target(text)[1], **arguments)  # noqa: ASYNC910 as above
    if isinstance(target, TcpServer) or not callable(target):
        raise TargetError(
            f"{text!r} is {target!r}: name an async function, Callbacks, or a function that takes "
            "**options and returns TcpServer(handler, **options)"
        )
    try:
        made = target(**arguments)
    except Exception as error:
        raise _own_error(f"calling {text!r} failed", error) from error
    if isinstance(made, TcpServer):
        return made  # noqa: ASYNC910 as above
    if not isinstance(made, AbstractAsyncContextManager):
        if inspect.iscoroutine(made):
            made.close()
        raise _no_server(text, made)
    manager = cast("AbstractAsyncContextManager[object]", made)
    try:
        server = await stack.enter_async_context(manager)
    except Exception as error:
        raise _own_error(f"entering {text!r} failed", error) from error
    if not isinstance(server, TcpServer):
        raise _no_server(text, server)
    return server


def check_listens(
    text: str, server: TcpServer, asked: Sequence[Acceptor], serving: Sequence[Acceptor]
) -> None:
    """Raise `TargetError` unless *server*, which the target *text* gave, serves where it was asked
    to.
    """
    if not set(asked) <= set(serving):
        server.close()
        raise TargetError(
            f"{text!r} gave {server!r}, which does not listen where it is asked to: return "
            "TcpServer(handler, **options)"
        )


def _is_async(target: object) -> bool:
    """Whether calling it gives a coroutine: such is a handler."""
    call = getattr(target, "__call__", None)  # noqa: B004 its kind is asked for
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(call)


def _no_server(text: str, made: object) -> TargetError:
    return TargetError(
        f"{text!r} gave {made!r} and no TcpServer: return TcpServer(handler, **options), where "
        "options are the keyword arguments that it was called with"
    )

"""Targets for ``trioreactor serve`` and for supervisors: what worker processes serve in tests."""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio

from trioreactor import Buffer, Callbacks, FramedChannel, LineCodec, TcpConnection, TcpServer


async def echo(conn: TcpConnection) -> None:
    async for chunk in conn:
        await conn.send_all(chunk)


async def who(conn: TcpConnection) -> None:
    """Says which process this is, to every line; "hang" and "hold" block the loop."""
    async for line in FramedChannel(conn, LineCodec()):
        if line == "hang":
            time.sleep(1000)
        if line == "hold":
            time.sleep(0.3)
        conn.send(b"%d\n" % os.getpid())


async def stubborn(conn: TcpConnection) -> None:
    """Does not end, though it is cancelled."""
    conn.send(b"x")
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def ledger(conn: TcpConnection) -> None:
    """Acknowledges what has come, by its size, and writes down what it has acknowledged, with its
    checksum, in the file that ``LEDGER`` names. The first four bytes are the client's own number.
    """
    size = checksum = 0
    name = b""
    try:
        async for chunk in conn:
            name = name or bytes(chunk[:4])
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
            # Counted before it is acknowledged; cancelled here, it is one thing or both.
            await conn.send_all(struct.pack(">Q", size))
    finally:
        descriptor = os.open(os.environ["LEDGER"], os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, struct.pack(">4sQI", name.ljust(4, b"-"), size, checksum))
        os.close(descriptor)


def _echo(conn: TcpConnection, buffer: Buffer) -> None:
    conn.send(buffer.take())


callbacks = Callbacks(message=_echo)


def factory(**options: Any) -> TcpServer:
    return TcpServer(echo, name="made", **options)


@asynccontextmanager
async def context(**options: Any) -> AsyncGenerator[TcpServer]:
    print("opened", flush=True)
    try:
        yield TcpServer(echo, **options)
    finally:
        print("closed", flush=True)


# -- what cannot be served

number = 3

server = TcpServer(echo, 0)


def no_server(**options: Any) -> int:
    return 3


def deaf(**options: Any) -> TcpServer:
    """Listens where it likes."""
    return TcpServer(echo, 0, host="127.0.0.1")


def raising(**options: Any) -> TcpServer:
    raise RuntimeError("out of order")


@asynccontextmanager
async def closed_context(**options: Any) -> AsyncGenerator[TcpServer]:
    raise RuntimeError("no database")
    yield TcpServer(echo, **options)


@asynccontextmanager
async def empty_context(**options: Any) -> AsyncGenerator[int]:
    yield 3

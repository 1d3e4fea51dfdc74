r"""Whoever connects is told who they are, also through a proxy that hides them: haproxy says in a
PROXY header whose connection it is, and what it knows of it. Whoever else connects is closed.

    python examples/whoami.py --port 7091 --trusted 127.0.0.1

with these lines in haproxy's configuration, and then ``nc 127.0.0.1 7090``:

    listen whoami
        mode tcp
        bind 127.0.0.1:7090
        unique-id-format %{+X}o\ %ci:%cp-%Ts
        server only 127.0.0.1:7091 send-proxy-v2 proxy-v2-options unique-id check
"""

import argparse

import trio

from trioreactor import (
    Acceptor,
    ProxyProtocol,
    TcpConnection,
    TcpServer,
    format_address,
    open_tcp_acceptors,
)


def told_of(conn: TcpConnection) -> list[str]:
    """What the proxy says of its client."""
    header = conn.proxy_header
    if header is None or header.source is None:
        # A health check: the proxy itself.
        return []
    lines = [f"you are {format_address(conn.peer_address)}"]
    if conn.proxy_address is not None:
        lines.append(f"the proxy is {format_address(conn.proxy_address)}")
    if header.destination is not None:
        lines.append(f"you wanted {format_address(header.destination)}")
    if header.unique_id is not None:
        lines.append(f"its log calls you {header.unique_id.decode('ascii', 'replace')}")
    if header.ssl is not None:
        who = header.ssl.common_name if header.ssl.verified else None
        lines.append(f"you use {header.ssl.version}, as {who or 'nobody that it knows'}")
    return lines


async def whoami(conn: TcpConnection) -> None:
    await conn.send_all("".join(f"{line}\r\n" for line in told_of(conn)).encode())


async def main(
    port: int,
    trusted: tuple[str, ...] = ("127.0.0.1",),
    *,
    task_status: trio.TaskStatus[list[Acceptor]] = trio.TASK_STATUS_IGNORED,
) -> None:
    acceptors = await open_tcp_acceptors(port, host="127.0.0.1")
    where = format_address(acceptors[0].address)
    print(f"whoami on {where}, behind {', '.join(trusted)}", flush=True)
    server = TcpServer(whoami, listeners=acceptors, proxy_protocol=ProxyProtocol(trusted=trusted))
    await server.serve(task_status=task_status)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=7091)
    parser.add_argument("--trusted", action="append", metavar="NETWORK")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, tuple(args.trusted or ["127.0.0.1"]))
    except* KeyboardInterrupt:
        pass

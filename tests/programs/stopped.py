"""A program under a watchdog whose process is stopped: in the middle of a step, and while idle.

It prints "stop me" when it is to be stopped while idle, and at the end what the watchdog has said,
which is to be nothing until the last step, which does hold the loop.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time

import trio

from trioreactor import LoopWatchdog

said: list[str] = []


class Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


async def main() -> None:
    logging.getLogger("trioreactor.watchdog").addHandler(Keep())
    async with LoopWatchdog(0.1):
        # When the thread sleeps, and when it looks now and then.
        for pause in (0.3, 0.01):
            await trio.sleep(pause)
            os.kill(os.getpid(), signal.SIGSTOP)
            await trio.sleep(0.15)
        print("stop me", flush=True)
        await trio.lowlevel.wait_readable(sys.stdin)
        await trio.sleep(0.15)
        before = list(said)
        time.sleep(0.2)
        await trio.sleep(0.1)
    print(json.dumps([before, said]))


trio.run(main)

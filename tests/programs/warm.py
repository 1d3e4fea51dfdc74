"""Runs programs one after another, each in a fork of an interpreter that has imported trioreactor
and done nothing else: to import it takes longer than most of them.

A line of JSON on stdin for each: its code, the directory to run it in, and files for what it writes
to stdout and stderr. Its exit code comes back on stdout when it has ended.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

import trioreactor  # noqa: F401


def become(code: str, directory: str, stdout: str, stderr: str) -> None:
    """Run *code* as ``python -c`` does. What follows, up to the interpreter's end, is as usual."""
    os.chdir(directory)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT),
        (2, stderr, os.O_WRONLY | os.O_CREAT),
    ):
        file = os.open(path, flags)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["-c"]
    sys.path[0] = ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)


def next_program() -> dict[str, Any] | None:
    """In the parent, serve until there are no more: None. In each child: what it is to run."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            asked: dict[str, Any] = json.loads(line)
            return asked
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    asked = next_program()
    if asked is not None:
        become(**asked)

"""What every command of the command line shares: its parser, its arguments, its output."""

from __future__ import annotations

import argparse
import math
import os
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, with an error in one line instead of several."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where to read more; exit code 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def seconds(text: str) -> float:
    """An argument that is a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: pass a number of seconds")
    return value


def count(number: int, what: str) -> str:
    """``1 connection``, ``2 connections``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def say(text: str) -> None:
    """Print a line, at once."""
    # Whoever reads the output may have gone (`| head -1`): that is no reason to stop serving.
    try:
        print(text, flush=True)
    except BrokenPipeError:
        forget_stdout()


def forget_stdout() -> None:
    """Let nothing more fail on a stdout that nobody reads, the interpreter's last flush too."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)

"""Watching source files: which directories a program was imported from, and what changes there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

# Where other people's code is installed, which nobody edits while a program runs.
_INSTALLED = {"site-packages", "dist-packages"}


def source_directories(target: str) -> list[str]:
    """The directories of all loaded modules that are below the current directory, or belong to the
    package that *target* (``module:attribute``) is in.
    """
    package = target.partition(":")[0].partition(".")[0]
    here = Path.cwd()
    found: set[str] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str):
            continue
        path = Path(file).absolute()
        own = name.partition(".")[0] == package
        if own or (path.is_relative_to(here) and not _INSTALLED & set(path.parts)):
            found.add(str(path.parent))
    return sorted(found)


class SourceWatch:
    """Notices changes of the Python files in some directories, by their time of modification."""

    def __init__(self) -> None:
        self._directories: set[str] = set()
        self._seen: dict[str, int] = {}

    def add(self, directories: Iterable[str]) -> None:
        """Watch these, too."""
        new = set(directories) - self._directories
        self._directories |= new
        self._seen.update(_times(new))

    def changed(self) -> list[str]:
        """The files that have changed, come or gone since the last time, by their paths."""
        now = _times(self._directories)
        before, self._seen = self._seen, now
        return sorted(
            path for path in before.keys() | now.keys() if before.get(path) != now.get(path)
        )


def _times(directories: Iterable[str]) -> dict[str, int]:
    times: dict[str, int] = {}
    for directory in directories:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.endswith(".py"):
                        times[entry.path] = entry.stat().st_mtime_ns
        except OSError:
            # A directory or a file that has just gone.
            continue
    return times

"""The log of a program that serves: a line for each event, on stderr."""

from __future__ import annotations

import logging

from trioreactor.serve_options import LogLevel

# Several processes write to one place, so each line says whose it is.
_FORMAT = "%(asctime)s %(levelname)s [%(process)d] %(name)s: %(message)s"


def set_up_logging(level: LogLevel) -> None:
    """Log to stderr what is at least so grave."""
    logging.basicConfig(level=level.upper(), format=_FORMAT)

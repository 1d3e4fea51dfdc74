"""``python -m trioreactor``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.test_cli import ENVIRONMENT

pytestmark = pytest.mark.program


def test_runs_the_command_line() -> None:
    """The module is the command line, and its exit code is the process's."""
    command = [sys.executable, "-m", "trioreactor"]
    right = subprocess.run(
        [*command, "--version"], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert right.stdout.startswith("trioreactor ")
    wrong = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("usage: trioreactor ")

"""The benchmark suite: it measures what it says, and says what it could not."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = [
    pytest.mark.program,
    pytest.mark.skipif(sys.platform != "linux", reason="the suite is Linux's"),
]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the suite, as its programs do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def run_suite(*arguments: str, path: str | None = None) -> tuple[str, str]:
    """Output and errors of a run."""
    environment = os.environ | ({} if path is None else {"PATH": path})
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "suite.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def test_a_run(tmp_path: Path) -> None:
    """A row, figures and ratios for each server, in the table and as JSON."""
    file = tmp_path / "found.json"
    output, errors = run_suite(
        *("--server", "trioreactor send", "--server", "plain trio", "--rounds", "1"),
        *("--work", "framed", "--work", "source", "--work", "connect"),
        *("--seconds", "0.05", "--json", str(file)),
    )
    assert not errors
    found = json.loads(file.read_text())
    assert set(found["works"]) == {"framed", "source", "connect"}
    for work in found["works"].values():
        assert len(work["servers"]) == 2
        for server in work["servers"].values():
            assert server[work["metric"]] > 0
        ours, trio = work["servers"]["trioreactor send"], work["servers"]["plain trio"]
        ratio = ours[work["metric"]] / trio[work["metric"]]
        assert work["ratios"]["trioreactor send"]["plain trio"] == pytest.approx(ratio)
        assert work["title"] in output
    assert output.count("\nplain trio ") == 3
    assert found["versions"]["trioreactor"]
    assert found["machine"]["python"] in output


@pytest.mark.parametrize("work", ["echo-1", "lines", "broadcast", "connect"])
def test_without_a_compiler(work: str, tmp_path: Path) -> None:
    """The load is then made by Python, which is said, and it does the same."""
    empty = tmp_path / "bin"
    empty.mkdir()
    output, errors = run_suite(
        *("--work", work, "--server", "trioreactor dispatch", "--server", "*, C"),
        *("--rounds", "1", "--seconds", "0.05"),
        path=str(empty),
    )
    assert not errors
    assert "no C compiler" in output
    assert "no redis-benchmark" in output
    assert "\ntrioreactor dispatch" in output
    assert "\nbare epoll, C" not in output


def test_what_is_left_out_is_said(part: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that is not installed, or cannot do a work, is no error and no silence."""
    process = part("server_process")
    missing = process.ServerProcess("a peer", [sys.executable, "-c", "import no_such_thing"], None)
    assert process.started([missing]) == []
    said = capsys.readouterr().err
    assert said == "left out: a peer: ModuleNotFoundError: No module named 'no_such_thing'\n"


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("load", ["c", "python"])
def test_a_wrong_server_is_found_out(load: str, tmp_path: Path) -> None:
    """The load measures nothing on a server that does not do what it is measured for."""
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import socket; s = socket.create_server(('127.0.0.1', 0))\n"
                "print(s.getsockname()[1], flush=True); c, _ = s.accept()\n"
                "while data := c.recv(65536): c.sendall(data.upper())"
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        if load == "c":
            command = [str(tmp_path / "load")]
            source = str(BENCHMARKS / "load.c")
            subprocess.run(["cc", "-O1", "-o", command[0], source], check=True)
        else:
            command = [sys.executable, str(BENCHMARKS / "load.py")]
        result = subprocess.run(
            [*command, "echo", f"port={port}", "seconds=0.1"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert result.returncode == 1
        assert result.stderr == "load: a wrong answer\n"
        assert not result.stdout
    finally:
        server.kill()
        server.communicate()


def test_goals(part: Any) -> None:
    """Each names works and servers that there are, and is judged by the best of its peers."""
    goals, works = part("goals"), part("works")
    names = {work.name: work for work in works.WORKS}
    servers = {server.name for server in works.SERVERS}
    assert len(names) == len(works.WORKS)
    assert len(servers) == len(works.SERVERS)
    for goal in goals.GOALS:
        assert goal.work in names
        assert {goal.ours, *goal.peers} <= servers
    found = {
        "sink": {
            "metric": "mb_per_s",
            "servers": {
                works.DISPATCH: {"mb_per_s": 90.0},
                goals.UV_PROTOCOL: {"mb_per_s": 80.0},
                goals.UV_STREAMS: {"mb_per_s": 100.0},
            },
        },
        "connect": {
            "metric": "cpu_us",
            "servers": {works.DISPATCH: {"cpu_us": 40.0}, goals.PROTOCOL: {"cpu_us": 50.0}},
        },
        "active-100": {"servers": {works.DISPATCH: {"cpu_us": 10.0}}},
        "active-1000": {"servers": {works.DISPATCH: {"cpu_us": 12.0}}},
    }
    judged = [(goal["ratio"], goal["reached"]) for goal in goals.judged(found)]
    assert judged == [(0.9, False), (0.8, True), (1.2, False)]


def test_medians(part: Any) -> None:
    """Of each figure by itself; a round that lacks one does not count for it."""
    report, driver, works = part("report"), part("driver"), part("works")
    rounds = {
        works.DISPATCH: [driver.Round(cpu_us=value, p50=value * 2) for value in (1, 100, 3)],
        "other": [driver.Round(cpu_us=6)],
        "absent": [],
    }
    found = report.summary(works.WORKS[0], rounds)
    assert found["servers"] == {
        works.DISPATCH: {"rounds": 3, "cpu_us": 3, "p50": 6},
        "other": {"rounds": 1, "cpu_us": 6},
    }
    assert found["ratios"] == {works.DISPATCH: {"other": 0.5}}

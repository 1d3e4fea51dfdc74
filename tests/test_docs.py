"""The documents tell the truth: their programs run, their commands, links and names exist.

The convention of README.md and docs/*.md:

- A ```python block is a whole program. It prints what the ```text block right after it says, to
  the letter, or nothing if there is none.
- A program that names port 7000 and dials nobody is a server, which runs until SIGTERM. One that
  names port 7000 and dials is its document's client, and talks to each of that document's servers.
- A block with ``def test_`` in it is a test module, for pytest.
- A block that begins with ``# name.py`` is a file of that name, for the document's commands.
- Each line of a ```sh block is one command. One that serves such a file is a server for the
  document's clients.
- A ```ini block is a unit of systemd.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import operator
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

import trioreactor
from tests.servers import installed
from tests.test_layering import LAYERS

pytestmark = [pytest.mark.program, pytest.mark.shown]

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DESIGN = ROOT / "docs" / "design.md"

# The port that every document uses, so that its programs fit together. Tests put a free one there.
PORT = re.compile(r"\b7000\b")

# Seconds for one program on a busy machine.
PATIENCE = 30

# How often to look whether a server listens yet.
POLL = 0.02

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
DIALS = re.compile(r"open_tcp_stream|open_tcp_connection|TcpClient\(")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")

LOGGERS = {
    name
    for module in (ROOT / "trioreactor").glob("*.py")
    for name in re.findall(r'getLogger\("(.+)"\)', module.read_text())
}


@dataclass(frozen=True)
class Program:
    """A ```python block and the output that the document shows for it."""

    document: str
    line: int
    code: str
    output: str

    @property
    def file(self) -> str | None:
        """The name of the file that it is to be saved as."""
        found = re.match(r"# (\w+\.py)$", self.code, re.MULTILINE)
        return found[1] if found else None

    @property
    def kind(self) -> str:
        if self.file is not None:
            return "file"
        if "def test_" in self.code:
            return "test"
        if not PORT.search(self.code):
            return "program"
        return "client" if DIALS.search(self.code) else "server"

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(text) if found == language]


def programs(document: Path) -> Iterator[Program]:
    text = document.read_text()
    for found in PROGRAM.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Program(document.name, line, found[1], found[2] or "")


PROGRAMS = [program for document in DOCUMENTS for program in programs(document)]


def of_kind(kind: str) -> pytest.MarkDecorator:
    found = [program for program in PROGRAMS if program.kind == kind]
    return pytest.mark.parametrize("program", found, ids=str)


def section(text: str, heading: str) -> str:
    """What stands under ``## heading``."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"there is no section {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the one table in *text*, without its heading and ruler."""
    table = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


# -- programs


def environment() -> dict[str, str]:
    """This one's, in which the checkout's package is found though it may not be installed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


async def run(directory: Path, *command: str) -> str:
    """Run *command* with this Python, as strictly as the tests are; what it printed."""
    with trio.fail_after(PATIENCE):
        done = await trio.run_process(
            [sys.executable, "-W", "error", *command],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            cwd=directory,
            env=environment(),
        )
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert not errors
    return done.stdout.decode()


@contextmanager
def free_port() -> Iterator[str]:
    """A port for a server to come.

    It stays bound here, without listening: so the kernel gives it to nobody who asks for any
    port, and still to a server that asks for this one with SO_REUSEADDR.
    """
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("", 0))
        yield str(sock.getsockname()[1])


@asynccontextmanager
async def server_process(
    directory: Path, command: list[str], port: str
) -> AsyncIterator[trio.Process]:
    """Run *command* with this Python and wait until it listens; it has ended afterwards."""
    with open(directory / "stdout", "wb") as stdout, open(directory / "stderr", "wb") as stderr:
        process = await trio.lowlevel.open_process(
            [sys.executable, *command],
            stdout=stdout,
            stderr=stderr,
            cwd=directory,
            env=environment(),
        )
    try:
        with trio.fail_after(PATIENCE):
            while process.poll() is None:
                try:
                    stream = await trio.open_tcp_stream("127.0.0.1", int(port))
                except OSError:
                    await trio.sleep(POLL)
                else:
                    await stream.aclose()
                    break
        assert process.returncode is None, (directory / "stderr").read_text()
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def end(process: trio.Process, number: signal.Signals) -> int:
    process.send_signal(number)
    with trio.fail_after(PATIENCE):
        return await process.wait()


async def be_the_clients(document: str, directory: Path, port: str) -> None:
    """Run the document's clients, one after the other, with the server on that port."""
    clients = [p for p in PROGRAMS if p.kind == "client" and p.document == document]
    assert clients
    for client in clients:
        assert client.output, "the document does not show what it prints"
        assert await run(directory, "-c", PORT.sub(port, client.code)) == client.output


@pytest.fixture(scope="module")
def warm() -> Iterator[subprocess.Popen[str]]:
    """Runs programs, as strictly as `run`: see tests/programs/warm.py."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.programs.warm"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
    ) as process:
        yield process


@of_kind("program")
def test_program(program: Program, warm: subprocess.Popen[str], tmp_path: Path) -> None:
    """A program of the documents ends by itself and prints what they say."""
    assert program.output, "the document does not show what it prints"
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    asked = {"code": program.code, "directory": str(tmp_path)}
    assert warm.stdin
    assert warm.stdout
    print(json.dumps({**asked, "stdout": str(stdout), "stderr": str(stderr)}), file=warm.stdin)
    warm.stdin.flush()
    if not select.select([warm.stdout], [], [], PATIENCE)[0]:
        os.killpg(warm.pid, signal.SIGKILL)
        pytest.fail("it does not end")
    assert (warm.stdout.readline(), stderr.read_text()) == ("0\n", "")
    assert stdout.read_text() == program.output


@of_kind("server")
async def test_server(program: Program, tmp_path: Path) -> None:
    """A server of the documents serves their clients, and ends at SIGTERM as it says."""
    with free_port() as port:
        command = ["-W", "error", "-c", PORT.sub(port, program.code)]
        async with server_process(tmp_path, command, port) as process:
            await be_the_clients(program.document, tmp_path, port)
            code = await end(process, signal.SIGTERM)
    assert (tmp_path / "stderr").read_text() == ""
    assert (tmp_path / "stdout").read_text() == program.output
    assert code == (0 if "SIGTERM" in program.code else -signal.SIGTERM)


@of_kind("client")
def test_client_has_a_server(program: Program) -> None:
    """Every client of the documents is run: its document has a server."""
    assert any(p.kind == "server" and p.document == program.document for p in PROGRAMS)


@of_kind("test")
async def test_test_module(program: Program, tmp_path: Path) -> None:
    """A test of the documents passes."""
    (tmp_path / "test_it.py").write_text(program.code)
    output = await run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    assert " passed" in output


# -- commands


def commands() -> list[Any]:
    return [
        pytest.param(shlex.split(line, comments=True), id=line)
        for document in DOCUMENTS
        for block in blocks(document.read_text(), "sh")
        for line in block.splitlines()
        if line.split("#")[0].strip()
    ]


async def understood(arguments: list[str], directory: Path) -> None:
    """Our command line has these options, and takes these values for them."""
    # Values are looked at in their order, so --help comes last.
    usage = await run(directory, "-m", "trioreactor", *arguments, "--help")
    for option in arguments:
        if option.startswith("-"):
            assert f"{option} " in usage


@pytest.mark.parametrize("command", commands())
async def test_command(command: list[str], tmp_path: Path) -> None:
    """A command of the documents exists, with the options that it is given."""
    while "=" in command[0]:
        assert command[0].startswith("TRIOREACTOR_POLLER=")
        del command[0]
    match command:
        case ["pip", "install", name]:
            assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == name
        case ["sh", script, *_]:
            assert (ROOT / script).is_file()
        case ["python", "-m", "pytest", *_]:
            pass
        case ["python", "-m", "trioreactor", name, *arguments]:
            assert importlib.util.find_spec("trioreactor.__main__") is not None
            await understood([name, *arguments], tmp_path)
        case _:
            pytest.fail(f"no rule says how to check {command}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_scripts(document: Path) -> None:
    """Every script that is named in a sentence exists."""
    for script in re.findall(r"`sh (\S+)`", document.read_text()):
        assert (ROOT / script).is_file(), script


async def test_command_line_server_is_the_readme_server(tmp_path: Path) -> None:
    """README's clients talk to ``python -m trioreactor echo`` as to README's own server."""
    with free_port() as port:
        command = ["-W", "error", "-m", "trioreactor", "echo", "--port", port]
        async with server_process(tmp_path, command, port) as process:
            await be_the_clients("README.md", tmp_path, port)
            assert await end(process, signal.SIGINT) == 0


@of_kind("file")
async def test_served_file(program: Program, tmp_path: Path) -> None:
    """The commands that serve a file of the document serve its clients, and drain at SIGTERM."""
    assert program.file is not None
    (tmp_path / program.file).write_text(program.code)
    target = f" serve {program.file.removesuffix('.py')}:"
    (document,) = (document for document in DOCUMENTS if document.name == program.document)
    lines = [line for each in blocks(document.read_text(), "sh") for line in each.splitlines()]
    serving = [line for line in lines if target in line]
    assert serving
    for line in serving:
        with free_port() as port:
            python, *command = shlex.split(PORT.sub(port, line))
            assert python == "python"
            async with server_process(tmp_path, ["-W", "error", *command], port) as process:
                await be_the_clients(program.document, tmp_path, port)
                assert await end(process, signal.SIGTERM) == 0
        assert "WARNING" not in (tmp_path / "stderr").read_text()


def units() -> list[Any]:
    return [
        pytest.param(block, id=f"{document.name}-{number}")
        for document in DOCUMENTS
        for number, block in enumerate(blocks(document.read_text(), "ini"))
    ]


@pytest.mark.parametrize("text", units())
async def test_unit(text: str, tmp_path: Path) -> None:
    """systemd has nothing to say about a unit of the documents, nor has its program."""
    verify = installed("systemd-analyze")
    command = re.search(r"^ExecStart=(\S+) (.*)$", text, re.MULTILINE)
    assert command is not None
    await understood(shlex.split(command[2])[2:], tmp_path)
    unit = tmp_path / "app.service"
    unit.write_text(text.replace(command[1], sys.executable))
    done = await trio.run_process(
        [verify, "verify", "--man=no", str(unit)], capture_stderr=True, check=False
    )
    said = [line for line in done.stderr.decode().splitlines() if unit.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


# -- links and names


def anchor(heading: str) -> str:
    """The name that a heading can be linked by."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    """The names that a document's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return set(map(anchor, headings))


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda d: d.name)
def test_links(document: Path) -> None:
    """Every link into the repository leads to a file that exists, and to a heading in it."""
    for link in LINK.findall(BLOCK.sub("", document.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_contents() -> None:
    """A document that begins with a table of contents has each of its sections there, in order."""
    found = 0
    for document in DOCUMENTS:
        text = BLOCK.sub("", document.read_text())
        beginning, _, rest = text.partition("\n## ")
        listed = re.findall(r"\]\(#(.+?)\)", beginning.partition("\n- ")[2])
        if listed:
            found += 1
            headings = re.findall(r"^##+ (.*)$", f"## {rest}", re.MULTILINE)
            assert listed == [anchor(heading) for heading in headings], document.name
    assert found == 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_names(document: Path) -> None:
    """Every ``trioreactor.name`` in the documents is a public name or a logger; what a target
    (``module:attribute``) names is run.
    """
    for dotted in re.findall(r"\b(trioreactor(?:\.\w+)+)(?![\w:])", document.read_text()):
        if dotted not in LOGGERS:
            assert dotted.split(".")[1] in trioreactor.__all__
            operator.attrgetter(dotted.partition(".")[2])(trioreactor)


def test_changelog_names_every_public_name() -> None:
    """What is public is written down in the change log, under the version it came with."""
    text = (ROOT / "CHANGELOG.md").read_text()
    named = {name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"\w+", code)}
    assert set(trioreactor.__all__) - named == set()


def test_changelog_knows_this_version() -> None:
    """The change log has a section for the version that the package says it is."""
    assert f"## [{trioreactor.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_guarantees() -> None:
    """README lists every promise, once, each with test files that exist."""
    table = rows(section((ROOT / "README.md").read_text(), "What is guaranteed"))
    assert [row[0] for row in table] == list("BFTMCOSD")
    for _letter, _promise, shown_by in table:
        files = LINK.findall(shown_by)
        assert files
        for file in files:
            assert re.fullmatch(r"tests/(\w+/)*test_\w+\.py", file)
            assert (ROOT / file).is_file()


def test_numbers_name_their_command() -> None:
    """README's numbers say which command makes them."""
    assert "`sh scripts/bench`" in section((ROOT / "README.md").read_text(), "Numbers")


# -- the design


def test_layers() -> None:
    """The design places every module in the layer whose imports are enforced."""
    table = rows(section(DESIGN.read_text(), "Layers and files"))
    written = [set(re.findall(r"`(\w+)`", row[1])) for row in table]
    assert written == [modules - {"__main__"} for _, modules in LAYERS]


def as_written(default: Any) -> str:
    """A default as the table has it; of an option in an option what is not its own default."""
    if dataclasses.is_dataclass(default):
        others = [
            f"{field.name}={as_written(value)}"
            for field in dataclasses.fields(default)
            if (value := getattr(default, field.name)) != field.default
        ]
        return f"{type(default).__name__}({', '.join(others)})"
    return repr(default).replace("'", '"')


def test_defaults() -> None:
    """The design gives every option's default as it is in the code."""
    table = rows(section(DESIGN.read_text(), "Defaults"))
    written = {row[0].strip("`"): row[1].strip("`") for row in table}
    options = [
        trioreactor.Watermarks,
        trioreactor.Timeouts,
        trioreactor.SocketOptions,
        trioreactor.Keepalive,
        trioreactor.Limits,
        trioreactor.ProxyProtocol,
        trioreactor.Backoff,
        trioreactor.WorkerOptions,
    ]
    assert written == {
        f"{option.__name__}.{field.name}": as_written(field.default)
        for option in options
        for field in dataclasses.fields(option)
        if field.default is not dataclasses.MISSING and not callable(field.default)
    }

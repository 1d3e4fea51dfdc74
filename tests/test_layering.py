"""The layers: imports go strictly downward, and each file is one small concept."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import trioreactor

pytestmark = pytest.mark.pure

PACKAGE = Path(trioreactor.__file__).parent

LAYERS: list[tuple[str, set[str]]] = [
    (
        "pure",
        {
            "address",
            "backoff",
            "bind_address",
            "buffer",
            "codec",
            "endpoints",
            "errors",
            "exception_groups",
            "length_codecs",
            "line_codecs",
            "options",
            "proxy_header",
            "proxy_parser",
            "proxy_tlvs",
            "send_buffer",
            "state",
            "timer_queue",
            "timing_wheel",
        },
    ),
    (
        "edge of the system",
        {
            "channel",
            "default_poller",
            "epoll_poller",
            "event_loop",
            "loop_turns",
            "event_loop_thread",
            "poller",
            "service_notifier",
            "sockets",
            "trio_poller",
        },
    ),
    (
        "parts",
        {
            "acceptor",
            "broadcaster",
            "connect_options",
            "connecting",
            "connection_callbacks",
            "connection_counters",
            "connection_statistics",
            "connector",
            "deadlines",
            "draining_attributes",
            "sending_attributes",
            "ending",
            "half_owner",
            "happy_eyeballs",
            "handler_errors",
            "inherited",
            "lifecycle",
            "limits",
            "linger",
            "listen",
            "loop_holder",
            "loop_lookout",
            "loop_watchdog",
            "opening",
            "opening_attributes",
            "overflow",
            "proxy_attributes",
            "proxy_protocol",
            "read_half",
            "reading_attributes",
            "socket_attributes",
            "stall_watch",
            "tcp_connection",
            "timing_attributes",
            "tls",
            "tls_attributes",
            "tls_output",
            "tls_socket",
            "unread_input",
            "watches",
            "write_half",
            "write_queue",
        },
    ),
    (
        "assemblies",
        {
            "callbacks",
            "client_session",
            "client_statistics",
            "client_waiters",
            "framed",
            "heartbeat",
            "server_connections",
            "server_loops",
            "server_statistics",
            "tcp_client",
            "tcp_server",
        },
    ),
    (
        "around it",
        {
            "__main__",
            "classic",
            "cli",
            "demo",
            "demo_exhaustion",
            "demo_load",
            "demo_reconnect",
            "demo_report",
            "demo_steps",
            "command_line",
            "ending_server",
            "inspector",
            "serve_arguments",
            "serve_command",
            "serve_logging",
            "serve_options",
            "serve_tls",
            "server_target",
            "signals",
            "source_watch",
            "statistics_totals",
            "supervisor_statistics",
            "worker",
            "worker_link",
            "worker_options",
            "worker_process",
            "workers",
            "event_loop_thread_pool",
        },
    ),
]
LAYER_OF = {module: number for number, (_, modules) in enumerate(LAYERS) for module in modules}

# The pure layer is tested without a loop, a socket or a clock. What gets it one is listed here.
IMPURE = {
    "asyncio",
    "datetime",
    "os",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "trio",
}
# Its errors are derived from trio's own words, so that one `except` serves both.
MAY_IMPORT_TRIO = {"errors"}

# Names with an underscore that their module documents as public.
DOCUMENTED = {"os._exit", "sys._current_frames"}

MOST_LINES = 420


@dataclass
class Imports:
    """What one module imports when it runs."""

    # Modules of this package, and the names taken from each.
    own: dict[str, set[str]] = field(default_factory=dict)
    # Everything else, by its top-level name.
    other: set[str] = field(default_factory=set)


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING:``, which only annotations are served by."""
    for child in ast.iter_child_nodes(node):
        if (
            isinstance(child, ast.If)
            and isinstance(child.test, ast.Name)
            and child.test.id == "TYPE_CHECKING"
        ):
            for statement in child.orelse:
                yield statement
                yield from run_time_nodes(statement)
        else:
            yield child
            yield from run_time_nodes(child)


def add_imports(node: ast.AST, imports: Imports) -> None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            if top == "trioreactor":
                imports.own.setdefault(rest or "__init__", set())
            else:
                imports.other.add(top)
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute, so that they can be read here"
        assert node.module is not None
        top, _, rest = node.module.partition(".")
        names = {alias.name for alias in node.names}
        if top != "trioreactor":
            imports.other.add(top)
        elif rest:
            imports.own.setdefault(rest, set()).update(names)
        else:
            # from trioreactor import x: a module, or something that the package re-exports.
            for name in names:
                if (PACKAGE / f"{name}.py").exists():
                    imports.own.setdefault(name, set())
                else:
                    imports.own.setdefault("__init__", set()).add(name)


def read(path: Path) -> tuple[ast.Module, Imports, Imports]:
    """A module's tree, what it imports when it runs, and all that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_run_time, everything = Imports(), Imports()
    for node in run_time_nodes(tree):
        add_imports(node, at_run_time)
    for node in ast.walk(tree):
        add_imports(node, everything)
    return tree, at_run_time, everything


FILES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
READ = {name: read(path) for name, path in FILES.items()}
MODULES = [name for name in FILES if name != "__init__"]

each_module = pytest.mark.parametrize("module", MODULES)
each_file = pytest.mark.parametrize("name", list(FILES))


def test_every_module_has_its_layer() -> None:
    """A new file has to be placed in the table, and a removed one leaves it."""
    assert set(MODULES) == set(LAYER_OF)
    assert sum(len(modules) for _, modules in LAYERS) == len(LAYER_OF)


def test_the_package_is_flat() -> None:
    """One concept a file, and no folders to search for it."""
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]


@pytest.mark.parametrize("module", [module for module in MODULES if module in LAYER_OF])
def test_imports_go_downward(module: str) -> None:
    """A module imports, when it runs, only from its own layer and the layers below."""
    imported = READ[module][1].own
    # The package's own namespace stands above everything but its users.
    assert "__init__" not in imported or LAYERS[LAYER_OF[module]][0] == "around it"
    upward = [name for name in imported if LAYER_OF.get(name, 0) > LAYER_OF[module]]
    assert not upward, f"{module} is in layer {LAYER_OF[module]} and imports {upward}"


def test_no_cycles() -> None:
    """Modules of one layer may build on each other, but never in a circle."""
    imports = {module: set(READ[module][1].own) - {"__init__"} for module in MODULES}
    while imports:
        free = {module for module, needed in imports.items() if not needed & imports.keys()}
        assert free, f"a circle is among {sorted(imports)}"
        for module in free:
            del imports[module]


@each_module
def test_imports_exist(module: str) -> None:
    """Also what only annotations are served by is there."""
    assert set(READ[module][2].own) <= set(FILES)


@pytest.mark.parametrize("module", sorted(LAYERS[0][1]))
def test_the_pure_layer_is_pure(module: str) -> None:
    """No trio, no socket, no clock: what is decided here can be tested with plain values."""
    allowed = {"trio"} if module in MAY_IMPORT_TRIO else set()
    assert not READ[module][2].other & IMPURE - allowed


@each_file
def test_trio_is_all_that_is_needed(name: str) -> None:
    """Third-party imports: trio alone."""
    assert READ[name][2].other <= {"trio", *sys.stdlib_module_names}


@each_file
def test_no_private_imports(name: str) -> None:
    """Nobody takes another module's underscore names, nor another library's."""
    tree = READ[name][0]
    private = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                parts += (node.module or "").split(".")
            private += [part for part in parts if part.startswith("_")]
    assert not private


@each_file
def test_no_reaching_into_modules(name: str) -> None:
    """Nor through the module itself, as in ``module._name``."""
    tree = READ[name][0]
    modules = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "trioreactor"
        for alias in node.names
    }
    reached = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).partition(".")[0] in modules
        and ast.unparse(node) not in DOCUMENTED
    ]
    assert not reached


def test_the_package_only_re_exports() -> None:
    """``__init__`` is a docstring, imports from the modules, a version, and the list of names."""
    docstring, *statements = READ["__init__"][0].body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    assigned = []
    imported: set[str] = set()
    for statement in statements:
        if isinstance(statement, ast.ImportFrom):
            assert (statement.module or "").startswith("trioreactor.")
            # Under their own names.
            assert all(alias.asname is None for alias in statement.names)
            imported |= {alias.name for alias in statement.names}
        else:
            assert isinstance(statement, ast.Assign), ast.unparse(statement)
            assigned += [ast.unparse(target) for target in statement.targets]
            ast.literal_eval(statement.value)
    assert assigned == ["__version__", "__all__"]
    assert imported == set(trioreactor.__all__)


@each_file
def test_files_are_short(name: str) -> None:
    """A file that grows beyond this holds more than one concept."""
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@each_file
def test_files_say_what_they_are(name: str) -> None:
    """Every file opens with a docstring."""
    assert ast.get_docstring(READ[name][0])

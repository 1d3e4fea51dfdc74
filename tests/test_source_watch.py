"""Watching source files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from trioreactor.source_watch import SourceWatch, source_directories

pytestmark = pytest.mark.pure


def test_changes_are_told_once(tmp_path: Path) -> None:
    """Python files that change, come or go; nothing else, and nothing twice."""
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")
    watch = SourceWatch()
    watch.add([str(tmp_path), str(tmp_path / "nonesuch")])
    assert watch.changed() == []
    (tmp_path / "a.py").write_text("2")
    os.utime(tmp_path / "a.py", ns=(1, 1))
    (tmp_path / "b.py").unlink()
    (tmp_path / "c.py").write_text("1")
    (tmp_path / "notes.txt").write_text("1")
    assert [Path(path).name for path in watch.changed()] == ["a.py", "b.py", "c.py"]
    assert watch.changed() == []
    # What is watched already does not count as new.
    watch.add([str(tmp_path)])
    assert watch.changed() == []


def test_a_directory_that_goes(tmp_path: Path) -> None:
    """Its files have gone with it."""
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "a.py").write_text("1")
    watch = SourceWatch()
    watch.add([str(gone)])
    (gone / "a.py").unlink()
    gone.rmdir()
    assert watch.changed() == [str(gone / "a.py")]


def test_source_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the target's own package wherever it is, and of what is below the current directory,
    but not of what is installed there.
    """
    monkeypatch.chdir(tmp_path)
    for name, file in {
        "mine": tmp_path / "mine.py",
        "other": tmp_path / "more" / "other.py",
        "installed": tmp_path / ".venv" / "site-packages" / "installed.py",
        "away.part": Path("/elsewhere/away/part.py"),
        "away2": Path("/elsewhere/away2.py"),
    }.items():
        module = type(sys)(name)
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, name, module)
    assert source_directories("away.part:handler") == sorted(
        [str(tmp_path), str(tmp_path / "more"), "/elsewhere/away"]
    )

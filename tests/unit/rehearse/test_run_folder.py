"""The folder of a rehearsal: short, private, and swept by the next one if its owner was killed."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from caesura.runtime.errors import ConfigError
from caesura_rehearse.run_folder import run_folder


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch, ram_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(ram_path))
    return ram_path


def _old(folder: Path, owner: str) -> Path:
    folder.mkdir()
    (folder / "owner").write_text(owner)
    os.utime(folder, (1, 1))
    return folder


def test_what_a_killed_one_left_is_removed_and_nothing_else(base: Path) -> None:
    mine = run_folder()
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    os.utime(mine, (1, 1))
    killed = _old(base / "caesura-rehearse-killed", "4194305 7")
    other = _old(base / "caesura-rehearse-other", "not ours")
    stranger = _old(base / "somebody-elses", "4194305 7")
    recent = base / "caesura-rehearse-recent"
    recent.mkdir()
    (recent / "owner").write_text("4194305 7")
    run_folder()
    assert not killed.exists()
    assert all(each.exists() for each in (mine, other, stranger, recent))


def test_no_room_for_it_is_said(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(base / "missing"))
    with pytest.raises(ConfigError, match="cannot make a folder in"):
        run_folder()

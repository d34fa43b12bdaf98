"""The file with a unit's settings, as systemd reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura.runtime.settings import SettingsError
from caesura_doctor.host_settings import EnvFileUnusable, host_settings, read_env_file


def test_comments_quotes_and_blanks(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# one\n; two\n\nA=1\n B = 'x y' \nC=\"q\"\nD=a=b\nnothing\n")
    assert read_env_file(str(file)) == {"A": "1", "B": "x y", "C": "q", "D": "a=b"}


def test_the_file_wins_over_the_environment_and_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("CAESURA_HOST_UPDATER_HOST_FILE=/etc/caesura/host.toml\n")
    environ = {"CAESURA_HOST_UPDATER_HOST_FILE": "/other"}
    assert host_settings(str(file), environ).host_file == "/etc/caesura/host.toml"
    assert host_settings(None, environ).host_file == "/other"
    file.write_text("CAESURA_HOST_UPDATER_HOST_FIEL=/x\n")
    with pytest.raises(SettingsError, match="HOST_FIEL"):
        host_settings(str(file), environ)
    with pytest.raises(EnvFileUnusable, match="cannot be read"):
        host_settings(str(tmp_path / "none"), environ)

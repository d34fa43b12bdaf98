"""The file with a unit's settings, as systemd reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from caesura.runtime.settings import SettingsError
from caesura_doctor import command as doctor
from caesura_doctor import host_settings as settings_of_host
from caesura_doctor.host_settings import EnvFileUnusable, host_settings, read_env_file
from caesura_doctor.service_user import own_command


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


def test_the_unit_has_a_guard_of_its_own(tmp_path: Path) -> None:
    """Its variables beside the file are not in the environment of whoever runs the doctor."""
    file = tmp_path / "env"
    file.write_text("CAESURA_HOST_UPDATER_HOST_FILE=/etc/caesura/host.toml\n")
    assert host_settings(str(file), {}).guard == "external"
    assert host_settings(None, {"CAESURA_HOST_UPDATER_HOST_FILE": "/other"}).guard == "spawn"
    file.write_text("CAESURA_HOST_UPDATER_HOST_FILE=/x\nCAESURA_HOST_UPDATER_GUARD=spawn\n")
    assert host_settings(str(file), {}).guard == "spawn"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As the packages' units have it: a password that systemd loads."""
    (tmp_path / "host.toml").write_text('host = "host-1"\ndriver = "process"\n')
    env = tmp_path / "host-updater.env"
    env.write_text(f"CAESURA_HOST_UPDATER_HOST_FILE={tmp_path / 'host.toml'}\n")
    password = tmp_path / "host-updater.password"
    password.write_text("secret\n")
    password.chmod(0o600)
    monkeypatch.setattr(settings_of_host, "_PASSWORD", str(password))
    return env


@pytest.mark.parametrize("broker", [True, False])
def test_a_password_that_only_root_may_read_keeps_the_broker_out_and_nothing_else(
    installed: Path, monkeypatch: pytest.MonkeyPatch, broker: bool
) -> None:
    """As with `sudo -u caesura-host`, which the manual asks for."""
    monkeypatch.setattr(settings_of_host, "_may_read", lambda _: False)
    asked: list[str] = []

    async def ask(*_: object) -> None:
        asked.append("broker")

    monkeypatch.setattr(doctor, "_broker", ask)
    found = {
        each.name: each for each in doctor._findings(str(installed), {}, broker=broker, say=lambda _: None)
    }
    assert "settings" not in found
    assert found["host_file"].level == "ok"
    assert asked == []
    assert ("broker.password" in found) is broker
    if broker:
        assert found["broker.password"].level == "warning"
        assert f"sudo {own_command()} doctor" in found["broker.password"].remedy


def test_a_password_that_may_be_read_is(installed: Path) -> None:
    assert host_settings(str(installed), {}).broker_password.reveal() == "secret"
    assert settings_of_host.password_error(host_settings(str(installed), {}), str(installed), {}) == ""

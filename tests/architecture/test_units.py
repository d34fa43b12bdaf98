"""The systemd units and their example settings: what each must say, and that its service accepts it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from caesura.bus.local_broker import mosquitto_config
from caesura.contract.messages import MAX_BUDGET_S
from caesura.runtime.listen import parse_listen
from caesura_coordinator.leadership import LeadershipLost
from caesura_host_updater.settings import HostUpdaterSettings

_ROOT = Path(__file__).parents[2]
_UNITS = _ROOT / "deploy" / "systemd"
_WITH_SETTINGS = ("coordinator", "host-updater", "metadata-publisher", "metrics-exporter", "vm-agent")
_NAMES = (*_WITH_SETTINGS, "pause-guard")
_START_NOTHING = ("coordinator", "metadata-publisher", "metrics-exporter", "pause-guard")
"""Services whose limits no VM, update or hook inherits."""

_BEAT = ("host-updater", "pause-guard")
"""Services that hold up VMs when their loop hangs."""

Unit = Mapping[str, Sequence[str]]
"""``Section.Key`` to its values, in order: systemd adds up some keys that are given more than once."""


def read_unit(name: str) -> Unit:
    return read_drop_in(f"caesura-{name}.service")


def read_drop_in(name: str) -> Unit:
    found: dict[str, list[str]] = {}
    section = ""
    for line in (_UNITS / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, f"{name}: {line!r} is no setting"
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


@pytest.fixture(params=_NAMES)
def unit(request: pytest.FixtureRequest) -> tuple[str, Unit]:
    return request.param, read_unit(request.param)


def the(unit: Unit, key: str) -> str:
    """The one value of a key."""
    values = unit.get(f"Service.{key}", [])
    assert len(values) == 1, f"{key} is set {len(values)} times"
    return values[0]


def test_every_service_has_a_unit_and_every_unit_a_service() -> None:
    assert {path.name for path in _UNITS.glob("*.service")} == {f"caesura-{name}.service" for name in _NAMES}
    assert {path.stem for path in (_UNITS / "env").iterdir()} == set(_WITH_SETTINGS)


def test_the_publishers_socket_is_of_its_own_service_and_starts_before_it() -> None:
    assert [path.name for path in _UNITS.glob("*.socket")] == ["caesura-metadata-publisher.socket"]
    told = read_drop_in("caesura-metadata-publisher.socket")
    assert told["Install.WantedBy"] == ["sockets.target"]
    for listen in told["Socket.ListenStream"]:
        parse_listen(listen)
    # Accept=yes would start one publisher a connection.
    assert "Socket.Accept" not in told


def test_each_comes_back_and_is_never_given_up(unit: tuple[str, Unit]) -> None:
    name, told = unit
    assert the(told, "Type") == ("notify" if name in _BEAT else "exec")
    assert the(told, "Restart") == "always"
    assert told["Unit.StartLimitIntervalSec"] == ["0"], (
        "systemd gives up after five starts in ten seconds else"
    )
    assert told["Install.WantedBy"] == ["multi-user.target"]


def test_each_has_least_rights(unit: tuple[str, Unit]) -> None:
    name, told = unit
    assert the(told, "NoNewPrivileges") == "yes"
    assert the(told, "ProtectSystem") == "strict"
    assert the(told, "ProtectHome") == "yes"
    assert the(told, "UMask") == "0077"
    assert ("Service.DynamicUser" in told) != ("Service.User" in told), "exactly one of the two"
    needed = {"metadata-publisher": "CAP_NET_BIND_SERVICE", "vm-agent": "CAP_SYS_TIME"}.get(name, "")
    assert the(told, "CapabilityBoundingSet") == needed
    assert told.get("Service.AmbientCapabilities", [""]) == [needed]
    if "Service.StateDirectory" in told:
        assert the(told, "StateDirectoryMode") == "0700"
    if name in _START_NOTHING:
        assert told["Service.SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
        assert the(told, "RestrictNamespaces") == "yes"


@pytest.mark.parametrize("name", _BEAT)
def test_a_loop_that_hangs_is_noticed_within_the_longest_pause(name: str) -> None:
    told = read_unit(name)
    assert 0 < float(the(told, "WatchdogSec")) < MAX_BUDGET_S
    assert the(told, "WatchdogSignal") == "SIGKILL", (
        "the usual SIGABRT would write the memory to a core file first"
    )


def test_a_coordinator_that_was_superseded_stays_down() -> None:
    stays = the(read_unit("coordinator"), "RestartPreventExitStatus").split()
    assert str(LeadershipLost.exit_code) in stays
    assert "2" in stays, "a configuration that is wrong does not get right by starting again"


def test_told_to_stop_the_updater_has_time_to_resume_and_the_vms_run_on() -> None:
    told = read_unit("host-updater")
    drain_s = HostUpdaterSettings(host_file="").drain_timeout_s
    assert float(the(told, "TimeoutStopSec")) > drain_s > MAX_BUDGET_S
    assert the(told, "KillMode") == "process", "else systemd kills the VMs with it"
    assert the(told, "OOMPolicy") == "continue", "else one VM out of memory stops the updater"
    assert the(told, "Delegate") == "yes"
    assert the(told, "ProtectControlGroups") == "no"
    assert "Service.DynamicUser" not in told, "VMs that run on must keep their user"


def test_the_guard_is_back_at_once_and_does_not_hang_on_the_updater() -> None:
    guard, updater = read_unit("pause-guard"), read_unit("host-updater")
    assert the(guard, "RestartSec") == "0"
    assert float(the(guard, "TimeoutStopSec")) > MAX_BUDGET_S
    ties = {"BindsTo", "PartOf", "Requires", "Requisite"}
    for told in (guard, updater):
        assert not ties & {key.removeprefix("Unit.") for key in told}
    assert the(guard, "User") == the(updater, "User"), "it may signal its own user's processes only"
    assert the(guard, "StateDirectory") == the(updater, "StateDirectory")
    assert the(guard, "ProtectControlGroups") == "no"
    state_dir = the(guard, "ExecStart").partition("--state-dir ")[2]
    assert f"CAESURA_HOST_UPDATER_STATE_DIR={state_dir}" in updater["Service.Environment"]
    assert "CAESURA_HOST_UPDATER_GUARD=external" in updater["Service.Environment"]
    assert int(the(guard, "OOMScoreAdjust")) == -1000


def read_env(path: Path, *, commented: bool) -> dict[str, str]:
    """An EnvironmentFile; with ``commented``, also what stands there as ``#NAME=value``."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") or not line:
            continue
        name, equals, value = line.lstrip("#" if commented else "").partition("=")
        if name.startswith("#"):
            continue
        assert equals, line
        found[name] = shlex.split(value)[0] if value else ""
    return found


@pytest.mark.parametrize("commented", [False, True], ids=["as it is", "with all that is commented out"])
@pytest.mark.parametrize("name", _WITH_SETTINGS)
def test_the_service_accepts_its_example(
    name: str,
    commented: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = read_unit(name)
    assert the(told, "EnvironmentFile") == f"/etc/caesura/{name}.env", "missing settings must be an error"
    assert the(told, "LoadCredential") == f"broker-password:/etc/caesura/{name}.password"
    (tmp_path / "broker-password").touch(mode=0o600)
    (tmp_path / "broker-password").write_text("secret\n", encoding="utf-8")
    environ = dict(
        each.replace("%d", str(tmp_path)).replace("%S", "/var/lib").split("=", 1)
        for each in told["Service.Environment"]
    )
    environ |= read_env(_UNITS / "env" / f"{name}.env", commented=commented)
    prefix = f"CAESURA_{name.upper().replace('-', '_')}_"
    assert all(each.startswith(prefix) for each in environ)
    # A check reads these two as well.
    (tmp_path / "host.toml").write_text('host = "host-1"\n', encoding="utf-8")
    (tmp_path / "listeners.toml").write_text(
        '[[listener]]\nvm = "web-1"\nlisten = "127.0.0.1:80"\n', encoding="utf-8"
    )
    for variable in (f"{prefix}HOST_FILE", f"{prefix}LISTENERS_FILE"):
        if variable in environ:
            environ[variable] = environ[variable].replace("/etc/caesura", str(tmp_path))
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    command = Path(the(told, "ExecStart")).name
    monkeypatch.setattr(sys, "argv", [command, "--check-config"])
    (entry,) = entry_points(group="console_scripts", name=command)
    try:
        code = entry.load()()
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "valid" in said.out


def test_the_users_of_the_units_are_made() -> None:
    made = {
        line.split()[1]
        for line in (_UNITS / "caesura.sysusers").read_text(encoding="utf-8").splitlines()
        if line.startswith("u ")
    }
    wanted = {value for name in _NAMES for value in read_unit(name).get("Service.User", [])}
    assert made == wanted


def test_the_broker_has_every_setting_that_the_suite_needs() -> None:
    """``mosquitto_config`` is what all tests run with; the one for real use may say more, not less."""
    real = (_ROOT / "deploy" / "broker" / "mosquitto.conf").read_text(encoding="utf-8").splitlines()
    paths = {"persistence_location", "password_file", "acl_file", "cafile", "certfile", "keyfile"}
    tested = mosquitto_config(
        port=8883,
        data_dir=Path("/x"),
        password_file=Path("/x"),
        acl_file=Path("/x"),
        ca_file=Path("/x"),
        cert_file=Path("/x"),
        key_file=Path("/x"),
    ).splitlines()
    for line in tested:
        key = line.partition(" ")[0]
        if key in {"user", "log_dest", ""}:
            continue
        if key in paths:
            assert any(each.startswith(f"{key} /") for each in real), key
        elif key == "listener":
            assert "listener 8883" in real
        else:
            assert line in real
    settings = [line.partition(" ")[0] for line in real if line and not line.startswith("#")]
    twice = {key for key in settings if settings.count(key) > 1} - {"log_type"}
    assert not twice, "Mosquitto refuses a setting that is given twice"


@pytest.mark.parametrize("name", ["host-updater", "pause-guard"])
def test_qemu_hosts_have_drop_ins_that_only_loosen_what_qemu_needs(name: str) -> None:
    unit, more = read_unit(name), read_drop_in(f"qemu/caesura-{name}.conf")
    assert the(more, "ReadWritePaths").startswith("/dev/"), "guests' RAM files"
    # Both know the sockets under the same path, and a restart of either must not remove them.
    assert (the(more, "RuntimeDirectory"), the(more, "RuntimeDirectoryPreserve")) == ("caesura", "yes")
    assert "User" not in {key.partition(".")[2] for key in more}, "the same user as without QEMU"
    assert the(unit, "NoNewPrivileges") == "yes"
    assert "Service.NoNewPrivileges" not in more


def test_a_guard_that_starts_qemu_can_and_is_outlived_by_it() -> None:
    more = read_drop_in("qemu/caesura-pause-guard.conf")
    assert the(more, "KillMode") == "process"
    for key in ("PrivateDevices", "PrivateNetwork", "PrivateTmp", "MemoryDenyWriteExecute"):
        assert the(more, key) == "no", f"{key}: /dev/kvm, taps, sockets in /tmp, TCG"
    assert the(more, "SystemCallFilter") == "", "QEMU's system calls are not the guard's"


def test_libvirt_hosts_have_a_way_past_the_daemon_with_two_of_roots_rights() -> None:
    """Without capabilities root may open neither QEMU's sockets nor its list of descriptors."""
    updater, guard = (
        read_drop_in(f"libvirt/caesura-{name}-root.conf") for name in ("host-updater", "pause-guard")
    )
    assert the(updater, "User") == the(guard, "User") == "root", (
        "the guard hears nobody but its own user and root"
    )
    assert the(updater, "CapabilityBoundingSet") == "CAP_DAC_OVERRIDE CAP_SYS_PTRACE"
    assert the(guard, "CapabilityBoundingSet") == "CAP_DAC_OVERRIDE"
    folder = (_UNITS / "libvirt" / "caesura-qmp.tmpfiles").read_text(encoding="utf-8").splitlines()[-1]
    assert folder.split() == ["d", "/run/caesura-qmp", "2770", "libvirt-qemu", "caesura-host", "-"]

"""``caesura host rehearse-kexec``: what it refuses before anything changes, against a real pause guard."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from caesura.contract.messages import KernelFigure
from caesura.lifecycle.loaded_kernel import LoadedKernel
from caesura_host import command
from caesura_host.host_files import HostError, HostFolder
from caesura_host.rehearsal import GuardConnection, guests_here, leave, refuse_guests
from caesura_host_updater.kernel.figures import add_figure
from caesura_vmcontrol.procfs import boot_id

_LOADED = LoadedKernel(
    boot_id=boot_id(),
    release="6.1.0-2-amd64",
    kernel="/boot/vmlinuz-6.1.0-2-amd64",
    initrd="/boot/initrd.img-6.1.0-2-amd64",
    command_line="memmap=4G!8G",
    hook_version="1",
)


def _process(proc: Path, pid: int, comm: str, *opened: str) -> None:
    (proc / f"{pid}/fd").mkdir(parents=True)
    (proc / f"{pid}/comm").write_text(f"{comm}\n")
    for number, target in enumerate(opened):
        (proc / f"{pid}/fd/{number}").symlink_to(target)


def test_guests_are_found_by_their_vmm_or_by_kvm(tmp_path: Path) -> None:
    _process(tmp_path, 7, "bash", "/dev/null")
    assert guests_here(tmp_path) == []
    _process(tmp_path, 12, "qemu-system-x86")
    _process(tmp_path, 300, "my-own-vmm", "/dev/null", "/dev/kvm")
    assert guests_here(tmp_path) == ["qemu-system-x86 (pid 12)", "my-own-vmm (pid 300)"]
    with pytest.raises(HostError, match=r"qemu-system-x86 \(pid 12\).*Shut them down or move them away"):
        refuse_guests(guests_here(tmp_path))


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Path]:
    """A guard's state folder."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "caesura_pause_guard", "--state-dir", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    while True:  # its socket is there before it listens
        assert process.poll() is None, process.stderr.read().decode()
        with suppress(HostError):
            GuardConnection(str(folder)).close()
            break
        time.sleep(0.01)  # it is not ours to be notified by
    yield folder
    process.terminate()
    process.wait()
    process.stderr.close()


@pytest.mark.skipif(
    Path("/sys/kernel/kexec_loaded").exists() and Path("/sys/kernel/kexec_loaded").read_text().strip() == "1",
    reason="this machine has a kernel loaded, and the guard would leave for it",
)
def test_a_guard_that_cannot_leave_says_why_and_is_idle_again(guard: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(HostError, match=r"the pause guard refuses: .*kexec_loaded"):
        leave(
            _LOADED,
            state_dir=str(guard),
            carve_out=str(tmp_path),
            watchdog_s=0,
            before_leaving=lambda: seen.append((guard / "guard-intent.json").read_text()),
        )
    assert '"rehearsal": true' in seen[0].replace('"rehearsal":true', '"rehearsal": true')
    status = GuardConnection(str(guard))
    assert status.ask({"do": "status"})["intent"] is None
    status.close()


def test_a_guard_with_an_operation_is_left_alone(guard: Path, tmp_path: Path) -> None:
    updater = GuardConnection(str(guard))
    updater.ask(
        {
            "do": "arm",
            "operation": "op-1",
            "boot_id": boot_id(),
            "deadline": time.monotonic() + 600,
            "plans": [],
        }
    )
    with pytest.raises(HostError, match=r"busy with operation op-1"):
        leave(_LOADED, state_dir=str(guard), carve_out=str(tmp_path), watchdog_s=0)
    assert updater.ask({"do": "status"})["intent"]["operation"] == "op-1"
    updater.close()


def test_without_a_guard_it_is_said_which_unit_to_start(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="systemctl start caesura-pause-guard"):
        leave(_LOADED, state_dir=str(tmp_path), carve_out=str(tmp_path), watchdog_s=0)


class TestCommand:
    @pytest.fixture(autouse=True)
    def prepared(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {"STATE_DIR": str(tmp_path), "CARVE_OUT": str(tmp_path)}
        monkeypatch.setattr(HostFolder, "settings", lambda _: settings)
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def test_guests_are_refused_before_anything_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "guests_here", lambda: ["qemu-system-x86 (pid 12)"])
        monkeypatch.setattr(command, "load_kernel", lambda *_, **__: pytest.fail("it was loaded"))
        result = CliRunner().invoke(command.host, ["rehearse-kexec", "6.1.0-2-amd64", "--yes"])
        assert result.exit_code == 1
        assert "qemu-system-x86 (pid 12)" in result.output

    def test_no_is_no(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "guests_here", list)
        monkeypatch.setattr(command, "load_kernel", lambda *_, **__: pytest.fail("it was loaded"))
        result = CliRunner().invoke(command.host, ["rehearse-kexec", "6.1.0-2-amd64"], input="n\n")
        assert result.exit_code == 1
        assert "every program on it ends" in result.output

    def test_a_kernel_that_was_not_left_for_is_unloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        unloaded: list[bool] = []
        monkeypatch.setattr(command, "guests_here", list)
        monkeypatch.setattr(command, "load_kernel", lambda *_, **__: _LOADED)
        monkeypatch.setattr(command, "unload_kernel", lambda: unloaded.append(True))
        result = CliRunner().invoke(command.host, ["rehearse-kexec", "6.1.0-2-amd64", "--yes"])
        assert result.exit_code == 1
        assert "systemctl start caesura-pause-guard" in result.output
        assert unloaded == [True]

    def test_figures_are_shown_with_the_budget_that_they_need(self, tmp_path: Path) -> None:
        nothing = CliRunner().invoke(command.host, ["kernel-figures"])
        assert nothing.exit_code == 1
        assert "rehearse-kexec" in nothing.output
        add_figure(
            tmp_path,
            KernelFigure(
                to="6.1.0-2-amd64",
                former="6.1.0-1-amd64",
                seconds=16.0,
                at=datetime(2026, 11, 29, 9, tzinfo=UTC),
                rehearsal=True,
            ),
        )
        shown = CliRunner().invoke(command.host, ["kernel-figures"])
        assert shown.exit_code == 0
        assert "6.1.0-2-amd64  16.0 s from 6.1.0-1-amd64, rehearsal" in shown.output
        assert "budget of 24 s" in shown.output


def test_without_preparation_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostFolder, "settings", lambda _: {})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    result = CliRunner().invoke(command.host, ["rehearse-kexec", "6.1.0-2-amd64", "--yes"])
    assert result.exit_code == 1
    assert "prepare-kexec --check" in result.output

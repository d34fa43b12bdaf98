"""What the guard finds on disk at its start: an intent of this boot is carried out, one of another boot never."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.kernel_change import KernelChange
from caesura_vmcontrol.procfs import boot_id, read_process
from caesura_vmcontrol.resume_plans import SignalPlan


@pytest.fixture
def stopped() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped, the leader of its session as a VM's first process is."""
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    yield process
    process.kill()
    process.communicate()


def _state(process: subprocess.Popen[bytes]) -> str:
    found = read_process(process.pid)
    assert found is not None
    return found.state


def _start_guard(folder: Path) -> list[dict[str, Any]]:
    """What a guard says from its start to its end; it ends when it has nothing in its hands."""
    command = [sys.executable, "-m", "caesura_pause_guard", "--state-dir", str(folder)]
    done = subprocess.run([*command, "--exit-when-alone", "0"], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("boot", ["this", "another"])
def test_only_an_intent_of_this_boot_is_carried_out(
    boot: str, tmp_path: Path, stopped: subprocess.Popen[bytes]
) -> None:
    """After a reboot the pids are other processes', and a state file belongs to memory that is gone (I12)."""
    found = read_process(stopped.pid)
    assert found is not None
    plan = SignalPlan("a", stopped.pid, found.start_ticks)
    mine = boot_id() if boot == "this" else "00000000-0000-0000-0000-000000000000"
    # In the past of both boots: a guard that adopts it fires at once.
    IntentFile(str(tmp_path)).store(Intent("op", mine, 0.0, 0.1, (plan,)))
    told = _start_guard(tmp_path)
    if boot == "this":
        assert _state(stopped) != "T"
        return
    assert _state(stopped) == "T", "a process of this boot was signalled for an intent of another"
    assert not any(line["event"] == "guard.fired" for line in told)
    assert IntentFile(str(tmp_path)).load() is None, "it must not be found again"


LATER = ("argparse", "caesura_pause_guard.server", "caesura_vmcontrol.watchdog")


@pytest.mark.parametrize("words", [["--by", "unit", "--state-dir"], ["--state-dir"]])
def test_an_arrival_imports_what_it_needs(words: list[str], tmp_path: Path) -> None:
    """Guests are paused meanwhile, on a host whose caches are cold; with other words it works as well."""
    say = "import sys; from caesura_pause_guard.__main__ import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    argv = ["--arrive", *words, str(tmp_path)]
    argv += [] if "--by" in words else ["--by", "initramfs"]
    done = subprocess.run([sys.executable, "-c", say, *argv], capture_output=True, text=True, check=True)
    assert not set(LATER) & set(done.stdout.split())
    other = [sys.executable, "-m", "caesura_pause_guard", "--arrive", f"--state-dir={tmp_path}"]
    assert subprocess.run(other, check=False, capture_output=True).returncode == 0
    bad = [
        sys.executable,
        "-m",
        "caesura_pause_guard",
        "--arrive",
        "--state-dir",
        str(tmp_path),
        "--by",
        "me",
    ]
    assert subprocess.run(bad, check=False, capture_output=True).returncode == 2


_TELLS_OF_THE_WATCHDOG = """
import sys
from caesura_vmcontrol.hardware_watchdog import HardwareWatchdog
HardwareWatchdog.disarm_former = lambda self: "it was asked"
from caesura_pause_guard.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_hardware_watchdog_that_a_dead_guard_armed_does_not_reset_the_host(tmp_path: Path) -> None:
    """That guard was killed between its last act and the jump; the guests run again in this boot."""
    change = KernelChange("6.1", str(tmp_path), watchdog_s=60)
    IntentFile(str(tmp_path)).store(Intent("op", boot_id(), 0.0, 0.1, (), kernel_change=change))
    command = [sys.executable, "-c", _TELLS_OF_THE_WATCHDOG, "--state-dir", str(tmp_path)]
    done = subprocess.run([*command, "--exit-when-alone", "0"], capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [each["why"] for each in said if each["event"] == "guard.hardware_watchdog"] == ["it was asked"]

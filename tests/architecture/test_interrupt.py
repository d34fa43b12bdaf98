"""Ctrl-C while modules load: 130 and not a word, from each command that is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from caesura_testing.patience import patient

_COMMANDS = sorted(
    (entry.name, entry.module)
    for entry in entry_points(group="console_scripts")
    if entry.name.split("-")[0] == "caesura"
)

# Like an installed script. The signal arrives when a certain module is looked for, so in the middle of the imports.
_SCRIPT = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[2]:
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a shell's background
sys.meta_path.insert(0, Interrupter())
module = sys.argv[1]
if sys.argv[3] == "-m":
    import runpy
    runpy.run_module(module.removesuffix(".__main__"), run_name="__main__", alter_sys=True)
else:
    import importlib
    sys.exit(importlib.import_module(module).main())
"""


def test_the_commands_are_those_that_are_installed() -> None:
    assert len(_COMMANDS) == 7


@pytest.mark.parametrize("way", ["script", "-m"])
@pytest.mark.parametrize(("name", "module"), _COMMANDS)
def test_ctrl_c_while_modules_load(name: str, module: str, way: str) -> None:
    late = "caesura_vmcontrol.watchdog" if name == "caesura-pause-guard" else "msgspec"
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, module, late, way, "SIGINT"],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("way", ["script", "-m"])
def test_sigterm_while_the_modules_of_the_command_load(way: str) -> None:
    """As process 1 of a container it would otherwise ignore the signal."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, "caesura_ctl.__main__", "msgspec", way, "SIGTERM"],
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")

"""A wrong configuration: found by --check-config, said in one line, and ended with the code that systemd leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from caesura.runtime.env import SETTINGS, unknown_variables
from caesura_testing.patience import patient

_BROKER = "write mqtt://host:1883"
_LISTEN = "give host:port"
_ROOT = Path(__file__).parents[2]
_NOT_OURS = {"node_modules", "__pycache__"}
_VARIABLE = re.compile(r"(?<![A-Z_])CAESURA_[A-Z0-9_]*[A-Z0-9]\b")


def enough(folder: Path) -> dict[str, dict[str, str]]:
    """Service to the settings with which its configuration is valid."""
    host, listeners, updates = folder / "host.toml", folder / "listeners.toml", folder / "updates.d"
    updates.mkdir(exist_ok=True)
    host.write_text('host = "host-1"\n', encoding="utf-8")
    listeners.write_text('[[listener]]\nvm = "a"\nlisten = "127.0.0.1:0"\n', encoding="utf-8")
    return {
        "coordinator": {"STATE_DIR": str(folder / "state")},
        "host-updater": {
            "HOST_FILE": str(host),
            "STATE_DIR": str(folder / "state"),
            "UPDATES_DIR": str(updates),
        },
        "metadata-publisher": {"LISTENERS_FILE": str(listeners)},
        "metrics-exporter": {},
        "vm-agent": {"VM": "a", "CLOCK": "simulated"},
    }


def call(name: str, words: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a service's command here; its exit code."""
    for variable, value in environ.items():
        monkeypatch.setenv(f"CAESURA_{name.upper().replace('-', '_')}_{variable}", value)
    monkeypatch.setattr(sys, "argv", [f"caesura-{name}", *words])
    (entry,) = entry_points(group="console_scripts", name=f"caesura-{name}")
    try:
        return entry.load()()
    except SystemExit as ended:
        return ended.code


def test_what_is_enough_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, environ in enough(tmp_path).items():
        assert call(name, ["--check-config"], environ, monkeypatch) == 0, capsys.readouterr().err
    assert not (tmp_path / "state").exists(), "a check changes nothing"


_WRONG = [
    *(
        (name, variable, value, words)
        for name in ("coordinator", "host-updater", "metadata-publisher", "metrics-exporter", "vm-agent")
        for variable, value, words in (
            ("BROKER_URL", "http://x", _BROKER),
            ("BROKER_URL", "", _BROKER),
            ("BROKER_URL", "mqtts://a,mqtt://b", "mixes mqtts:// and mqtt://"),
            ("BROKER_CA_FILE", "/ca.pem", "is not TLS"),
            ("HEALTH_LISTEN", "foo", _LISTEN),
        )
    ),
    ("metrics-exporter", "LISTEN", "127.0.0.1:x", _LISTEN),
    ("metrics-exporter", "LISTEN", "unix:", _LISTEN),
]


@pytest.mark.parametrize("words", [["--check-config"], []])
@pytest.mark.parametrize(("name", "variable", "value", "said"), _WRONG)
def test_what_cannot_be_used_ends_with_2(
    name: str,
    variable: str,
    value: str,
    said: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = {**enough(tmp_path)[name], variable: value}
    assert call(name, words, environ, monkeypatch) == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.startswith(f"caesura-{name}: ")
    assert not told.out
    assert not (tmp_path / "state").exists(), "nothing was started"


@pytest.mark.parametrize("words", [["--check-config"], []])
@pytest.mark.parametrize(
    ("name", "file"), [("host-updater", "host.toml"), ("metadata-publisher", "listeners.toml")]
)
def test_a_file_that_cannot_be_used_ends_with_2(
    name: str,
    file: str,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environ = enough(tmp_path)[name]
    (tmp_path / file).write_text("host = \n", encoding="utf-8")
    assert call(name, words, environ, monkeypatch) == 2
    assert f"{tmp_path / file}: " in capsys.readouterr().err
    (tmp_path / file).unlink()
    assert call(name, words, environ, monkeypatch) == 2
    assert "cannot " in capsys.readouterr().err


def test_everything_that_is_wrong_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"HOST_FILE": str(tmp_path / "none.toml"), "BROKER_URL": "nonsense", "HEALTH_LISTEN": "foo"}
    assert call("host-updater", ["--check-config"], environ, monkeypatch) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 3
    for each in ("none.toml", _BROKER, _LISTEN):
        assert each in said


# A process for all of the folders: its start takes most of the time.
_EACH_FOLDER = """
import importlib, os, sys
_, module, *folders = sys.argv
main = importlib.import_module(f"{module}.__main__").main
for folder in folders:
    os.environ[f"{module.upper()}_STATE_DIR"] = folder
    sys.argv[1:] = []
    try:
        print(main())
    except SystemExit as ended:
        print(ended.code)
"""


@pytest.mark.parametrize("name", ["coordinator", "host-updater"])
def test_a_state_folder_that_cannot_be_used_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    """It ends with 1: a disk that is mounted late is no wrong configuration, and systemd shall try again."""
    for lock in ("lock", "updater.lock"):
        (tmp_path / "blocked" / lock).mkdir(parents=True)
    places = ["/dev/null/x", "/proc/x", str(tmp_path / "blocked")]
    module = f"caesura_{name.replace('-', '_')}"
    environ = {f"{module.upper()}_{key}": value for key, value in enough(tmp_path)[name].items()}
    done = subprocess.run(
        [sys.executable, "-c", _EACH_FOLDER, module, *places],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=patient(60),
        check=False,
    )
    assert done.stdout.split() == ["1"] * len(places), done.stderr
    for line, place in zip(done.stderr.splitlines(), places, strict=True):
        told = json.loads(line)
        assert told["error"] == "StateFolderUnusable"
        assert told["why"].startswith(f"cannot use the state folder {place}: ")


@pytest.mark.parametrize("broker", [["--broker", "http://x"], []])
def test_the_operators_command_ends_with_2_too(
    broker: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAESURA_CTL_BROKER_URL", "")
    monkeypatch.setattr(sys, "argv", ["caesura", "status", *broker])
    (entry,) = entry_points(group="console_scripts", name="caesura")
    with pytest.raises(SystemExit) as ended:
        entry.load()()
    assert ended.value.code == 2
    assert _BROKER in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("CAESURA_METRIC_EXPORTER_LISTEN", "CAESURA_METRICS_EXPORTER_LISTEN"),
        ("CAESURA_METRICS_EXPORTERLISTEN", "CAESURA_METRICS_EXPORTER_LISTEN"),
        ("CAESURA_BROKER_URL", "CAESURA_METRICS_EXPORTER_BROKER_URL"),
        ("CAESURA_ROLOUTS", "CAESURA_ROLLOUTS"),
    ],
)
def test_a_variable_that_is_nobodys_is_an_error(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "x")
    assert call("metrics-exporter", ["--check-config"], {}, monkeypatch) == 2
    assert f"unknown setting {variable}, did you mean {meant}?" in capsys.readouterr().err


def test_variables_of_other_services_hooks_and_marks_are_nobodys_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("CAESURA_CTL_CLIENT", "CAESURA_OPERATION", "CAESURA_TEST_RUN", "CAESURA_DEMO_RUN"):
        monkeypatch.setenv(variable, "x")
    assert call("metrics-exporter", ["--check-config"], {}, monkeypatch) == 0


def test_every_variable_that_this_tree_names_is_known() -> None:
    """Else what one part sets would keep another from starting."""
    named: dict[str, Path] = {}
    for top in (
        "services",
        "shared",
        "tools",
        "deploy",
        "docs",
        "examples",
        "benchmarks",
        "tests",
        "grafana",
        ".",
    ):
        for folder, below, files in os.walk(_ROOT / top):
            below[:] = [] if top == "." else [each for each in below if each not in _NOT_OURS]
            for path in (Path(folder) / name for name in files):
                if path.suffix not in {".pyc", ".png"} and path != Path(__file__):
                    text = path.read_text(encoding="utf-8", errors="ignore")
                    named |= dict.fromkeys(_VARIABLE.findall(text), path)
    assert "CAESURA_PAUSE_S" in named
    wrong = {"CAESURA_ROLOUTS", "CAESURA_COUNT", "CAESURA_MOON"}  # what tests misspell
    assert {name: named[name] for name in unknown_variables(named) if name not in wrong} == {}


def test_the_prefixes_are_those_of_the_commands() -> None:
    commands = {entry.name for entry in entry_points(group="console_scripts")}
    names = {each.removeprefix("CAESURA_").rstrip("_").lower().replace("_", "-") for each in SETTINGS}
    assert {f"caesura-{name}" for name in names - {"ctl"}} == {
        each for each in commands if each.startswith("caesura-") and each != "caesura-pause-guard"
    }

"""The commands that the docs show, run as they stand there.

``tests/architecture/test_doc_commands.py`` holds that every shell block says whether it is run, and how:

- ``run``: in a copy of the checkout.
- ``run in: host``: as on a host, whose folders are below one folder here; systemd is a stand-in that writes down what was asked.
- ``run in: demo``: beside ``./demo --keep``, in a network of its own (the ports that the page names are free there).
- ``run in: broker``: with a broker of its own, for the address and without the TLS of the page's.
- ``run in: laptop``: in an empty folder with a broker, in a network of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from caesura.runtime.processes import kill_marked
from caesura_testing.fleet import until
from caesura_testing.patience import patient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

_ROOT = Path(__file__).parents[3]
_BIN = _ROOT / ".venv" / "bin"
_BLOCK = re.compile(r"^([ ]*)<!-- run(?: in: (\w+))? -->\n\1```sh\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_FOLLOWS = re.compile(r"caesura (watch|tail)\b|mosquitto_sub\b|examples/consumer\.py \d")
"""Commands that show what happens until they are interrupted."""
_NEVER_COPIED = (
    ".git",
    ".venv",
    ".uv",
    ".lanes",
    "node_modules",
    "__pycache__",
    "dist",
    ".*_cache",
    ".hypothesis",
)
_HOST_FOLDERS = (
    "/etc/mosquitto", "/etc/caesura", "/etc/systemd", "/usr/lib/sysusers.d", "/opt/caesura", "/root", "/var/lib/caesura",
    "/var/backups",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One block of a page, dedented."""

    page: str
    number: int
    place: str
    """Where it is run; empty: in a copy of the checkout."""
    text: str


def _blocks() -> list[Block]:
    pages = [_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *sorted((_ROOT / "docs").rglob("*.md"))]
    return [
        Block(
            str(page.relative_to(_ROOT)), number, place, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        )
        for page in pages
        for number, (indent, place, text) in enumerate(_BLOCK.findall(page.read_text(encoding="utf-8")), 1)
    ]


BLOCKS = _blocks()


def of(place: str) -> list[Block]:
    return [block for block in BLOCKS if block.place == place]


def name(block: Block) -> str:
    return f"{block.page}-{block.number}"


def run(script: str, cwd: Path, environ: dict[str, str], within: list[str] | None = None) -> str:
    """What ``script`` wrote; it must end well."""
    done = subprocess.run(
        [*(within or []), "bash", "-eu", "-o", "pipefail", "-c", script],
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patient(240),
        check=False,
    )
    assert done.returncode == 0, f"{script}\nended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{_BIN}:{os.environ['PATH']}:/usr/sbin:/sbin", "COLUMNS": "200", **more}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout that may be written to, with the environment of this one."""
    copy = tmp_path_factory.mktemp("docs") / "checkout"
    shutil.copytree(_ROOT, copy, ignore=shutil.ignore_patterns(*_NEVER_COPIED))
    (copy / ".venv").symlink_to(_ROOT / ".venv")
    uv = _ROOT / ".uv" if (_ROOT / ".uv").is_dir() else None
    if uv is not None:
        (copy / ".uv").symlink_to(uv)
    elif found := shutil.which("uv"):
        (copy / ".uv" / "bin").mkdir(parents=True)
        (copy / ".uv" / "bin" / "uv").symlink_to(found)
    else:
        pytest.skip("uv is not installed: run ./check --fast once")
    return copy


@pytest.mark.parametrize("block", of(""), ids=name)
def test_what_is_run_in_a_checkout(block: Block, checkout: Path) -> None:
    run(block.text, checkout, environment())


_STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>"$STAND_INS_LOG"
"""


def test_what_is_run_on_a_host(checkout: Path, tmp_path: Path) -> None:
    """Page after page, in the order of installation, in one tree: each finds what the ones before it have made."""
    # The upgrade comes last: its way back puts the host's journal aside.
    order = (
        "docs/install.md",
        "docs/configuration.md",
        "docs/operate/runbooks/epoch.md",
        "docs/operate/upgrade.md",
    )
    blocks = sorted(of("host"), key=lambda block: order.index(block.page))
    assert len(blocks) > 5
    host, stand_ins, log = tmp_path / "host", tmp_path / "stand-ins", tmp_path / "log"
    stand_ins.mkdir()
    for command in ("systemctl", "systemd-sysusers", "chown"):
        (stand_ins / command).write_text(_STAND_IN, encoding="utf-8")
        (stand_ins / command).chmod(0o755)
    for folder in (
        "etc/mosquitto",
        "usr/lib/sysusers.d",
        "etc/systemd/system",
        "root",
        "var/lib/caesura",
        "var/backups",
    ):
        (host / folder).mkdir(parents=True)
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("mosquitto_passwd is not installed (on Debian: apt-get install mosquitto)")
    (checkout / "ca.pem").write_text("a certificate\n", encoding="utf-8")
    for service in ("coordinator", "host-updater"):
        (host / "var/lib/caesura" / service).mkdir()
    _make_stores(host / "var/lib/caesura")
    environ = environment(STAND_INS_LOG=str(log))
    environ["PATH"] = f"{stand_ins}:{environ['PATH']}"
    users = ""
    for block in blocks:
        text = block.text
        users = next(iter(re.findall(r'^users=".*?"$', text, re.DOTALL | re.MULTILINE)), users)
        for folder in _HOST_FOLDERS:
            text = re.sub(
                rf"(?<![\w/]){re.escape(folder)}(?=[/\s\"]|$)", f"{host}{folder}", text, flags=re.MULTILINE
            )
        run(f"{users}\n{text}" if users not in text else text, checkout, environ)
    assert (host / "opt/caesura/bin/caesura-coordinator").is_file()
    assert (host / "etc/systemd/system/caesura-pause-guard.service").is_file()
    assert "user host_host-1" in (host / "etc/mosquitto/caesura.acl").read_text(encoding="utf-8")
    hashed = (host / "etc/mosquitto/caesura.passwd").read_text(encoding="utf-8").splitlines()
    assert len(hashed) == 8
    assert all(re.fullmatch(r"[\w-]+:\$\d\$.+", line) for line in hashed), (
        "a hash in the place of each password"
    )
    assert (host / "etc/caesura/host-updater.password").stat().st_mode & 0o077 == 0
    assert (host / "var/backups/caesura-coordinator.sqlite").stat().st_size > 0
    asked = log.read_text(encoding="utf-8")
    for wanted in (
        "daemon-reload",
        "restart mosquitto",
        "reload mosquitto",
        "stop caesura-host-updater",
    ):
        assert wanted in asked


def _make_stores(folder: Path) -> None:
    """Stores as services have left them: each is started once, with a broker that is not there, and stopped."""
    for service, file in (("coordinator", "coordinator.sqlite"), ("host-updater", "journal.sqlite")):
        state = folder / service
        prefix = f"CAESURA_{service.upper().replace('-', '_')}"
        (state / "host.toml").write_text('host = "host-1"\n', encoding="utf-8")
        (state / "updates.d").mkdir()
        environ = environment(
            **{
                f"{prefix}_STATE_DIR": str(state),
                f"{prefix}_BROKER_URL": "mqtt://127.0.0.1:1",
                f"{prefix}_HEALTH_LISTEN": f"unix:{state}/health",
            }
        )
        if service == "host-updater":
            environ |= {
                f"{prefix}_HOST_FILE": str(state / "host.toml"),
                f"{prefix}_UPDATES_DIR": str(state / "updates.d"),
            }
        process = subprocess.Popen(
            [_BIN / f"caesura-{service}"], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _until((state / file).is_file, f"{service} has a store", process)
        process.terminate()
        process.wait(patient(60))


def _until(
    done: Callable[[], bool], what: str, process: subprocess.Popen[str] | subprocess.Popen[bytes]
) -> None:
    def holds() -> bool:
        if done():
            return True
        assert process.poll() is None, f"ended before: {what}"
        return False

    until(holds, 120, lambda: what)


# -- in a network of its own ----------------------------------------------------------------------------------


def _own_network() -> list[str]:
    words = ["unshare", "-n"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*words, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("a network of its own needs root and unshare (on Debian: util-linux)")
    for tool, package in (
        ("curl", "curl"),
        ("mosquitto_sub", "mosquitto-clients"),
        ("mosquitto", "mosquitto"),
        ("ip", "iproute2"),
    ):
        if shutil.which(tool, path=environment()["PATH"]) is None:
            pytest.skip(f"{tool} is not installed (on Debian: apt-get install {package})")
    return [*words, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@dataclass(frozen=True)
class Fleet:
    """A fleet that runs, the way into its network, and the environment of its operator."""

    within: list[str]
    environ: dict[str, str]
    run_before: set[str] = field(default_factory=set)

    def caesura(self, words: str) -> str:
        return run(f".venv/bin/caesura {words}", _ROOT, self.environ, self.within)

    def idle(self) -> bool:
        rollouts = json.loads(self.caesura("history --json"))
        rows = rollouts if isinstance(rollouts, list) else rollouts["rollouts"]
        return all(row["status"] in {"completed", "aborted", "halted"} for row in rows)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """``./demo --keep``, after its rollout."""
    network = _own_network()
    out = tmp_path_factory.mktemp("demo") / "out"
    mark = "DOC_TEST=demo"
    with out.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*network, _BIN / "caesura", "demo", "--keep"],
            cwd=_ROOT,
            env=environment(DOC_TEST="demo"),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _until(lambda: "Still running" in out.read_text(encoding="utf-8"), "the demo's rollout", process)
        text = out.read_text(encoding="utf-8")
        url = re.search(r"mqtt://127\.0\.0\.1:\d+", text)
        assert url, text
        yield Fleet(
            ["nsenter", "-t", str(process.pid), "-n"],
            environment(CAESURA_CTL_BROKER_URL=url[0], DOC_TEST="demo"),
        )
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patient(60))
        _kill(mark)


def _kill(mark: str) -> None:
    import asyncio  # noqa: PLC0415 - here only: the rest of this file is what a shell does

    asyncio.run(kill_marked(mark))


@pytest.mark.parametrize("block", of("demo"), ids=name)
def test_what_is_run_beside_the_demo(block: Block, demo: Fleet) -> None:
    until(demo.idle, 120, lambda: "the end of the rollout of the block before")
    followers: list[tuple[str, subprocess.Popen[str]]] = []
    # README shows some of what the longer page shows: once is enough.
    lines = [line for line in block.text.splitlines() if line not in demo.run_before]
    demo.run_before.update(lines)
    for line in lines:
        if line.startswith("export "):  # the fixture has the address that this demo printed
            continue
        if not _FOLLOWS.search(line):
            assert run(line, _ROOT, demo.environ, demo.within).strip(), f"{line}: says nothing"
            continue
        process = subprocess.Popen(
            # A test run may be a shell's background job, which ignores SIGINT, and so would this.
            [*demo.within, "env", "--default-signal=INT", "bash", "-c", f"exec {line}"],
            cwd=_ROOT,
            env={**demo.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        followers.append((line, process))
    if not followers:
        return
    if not any("freeze" in line for line in lines):
        demo.caesura("freeze --vm web-01 --for 1s --notice 1s")
    for line, process in followers:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=patient(60))
        assert first.strip(), f"{line}: showed nothing\n{rest}"
        assert process.returncode in {0, 130, -signal.SIGINT}, f"{line}: {process.returncode}\n{first}{rest}"


def test_what_is_run_on_a_laptop(tmp_path: Path) -> None:
    """The page is followed from its first line to its last: its jobs, a freeze, the document, the end of all jobs."""
    network = _own_network()
    first, second = of("laptop")
    start, (freeze, look) = first.text, second.text.splitlines()
    script = f"""
set -m
mosquitto -p 1883 >mosquitto.log 2>&1 &
{start}
for _ in $(seq 600); do
  caesura status --json 2>/dev/null | grep -q '"app-1"' && break
  sleep 0.2
done
{freeze}
until {look} | grep -q EventId; do sleep 0.1; done # it is announced in the next moment
{look}
echo
while {look} | grep -q '"Scheduled"'; do sleep 0.2; done
echo started
kill %4 %3 %2 %1
wait
"""
    mark = "DOC_TEST=laptop"
    try:
        out = run(script, tmp_path, environment(DOC_TEST="laptop"), network)
    finally:
        _kill(mark)
    assert '"EventStatus":"Scheduled"' in out.replace(" ", "")
    assert out.endswith("started\n"), "the notice ended"


@pytest.mark.parametrize("block", of("broker"), ids=name)
def test_what_removes_retained_messages_removes_these_and_no_others(block: Block, tmp_path: Path) -> None:
    network = _own_network()
    folder = "caesura/v1/host/host-3"
    rollout = "caesura/v1/fleet/rollout/20260420-221158-1f3a"
    removed = {
        "docs/operate/runbooks/host-lost.md": {
            f"{folder}/presence", f"{folder}/inventory", f"{folder}/inventory/1", f"{folder}/vm/web-1/status"
        },
        "docs/operate/upgrade.md": {rollout},
    }[block.page]  # fmt: skip
    others = {
        "caesura/v1/host/host-1/presence",
        "caesura/v1/host/host-30/inventory",
        f"{rollout}/wave/0/state",
    }
    (tmp_path / "passwords").mkdir()
    for user in ("host_host-3", "coordinator"):
        (tmp_path / "passwords" / user).write_text("secret\n", encoding="utf-8")
    text = block.text.replace("/root/caesura-passwords", str(tmp_path / "passwords"))
    plain = text.replace("-h broker.example.net -p 8883 --cafile /etc/caesura/ca.pem", "-h 127.0.0.1 -p 1883")
    assert plain != text
    seeds = "\n".join(f"mosquitto_pub -q 1 -r -m x -t {topic}" for topic in sorted(removed | others))
    script = f"""
mosquitto -p 1883 >mosquitto.log 2>&1 &
until mosquitto_pub -q 1 -m x -t up 2>/dev/null; do sleep 0.1; done
{seeds}
{plain}
mosquitto_sub --retained-only -F %t -W 2 -t 'caesura/#' || test $? = 27 # its time is over
kill %1
"""
    left = run(script, tmp_path, environment(), network)
    assert set(left.split()) == others

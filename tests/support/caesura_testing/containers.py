"""A Docker engine of the tests' own, with the compose plugin: started, used, stopped, and the machine left as it was.

It runs on a socket and a data folder of its own, so it does not meet an engine that the machine has. The data
folder is kept between runs: images and build cache are what takes time.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import msgspec

from caesura_testing.patience import patient

_START_S = 60.0
_STOP_S = 30.0
_LOOK_S = 0.05
_TAIL = 4000
"""Characters of a failed command's output that its error shows."""


class CannotRun(RuntimeError):
    """What this machine lacks for containers; the text says what to install."""


class CommandFailed(RuntimeError):
    """A command ended with another code than 0; the text has the end of what it said."""


class Result(msgspec.Struct, frozen=True):
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def default_cache() -> Path:
    """Where downloads, images and build cache are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME", "") or str(Path.home() / ".cache")
    return Path(base) / "caesura" / "containers"


def missing_tools() -> str:
    """What is missing for an engine of our own, in words; empty when nothing is."""
    if os.geteuid() != 0:
        return "starting a Docker engine needs root"
    needed = {
        "dockerd": "docker.io",
        "docker": "docker.io",
        "containerd": "containerd",
        "iptables": "iptables",
        "debootstrap": "debootstrap",
    }
    packages = sorted({package for tool, package in needed.items() if _find(tool) is None})
    return f"not installed (on Debian: apt-get install {' '.join(packages)})" if packages else ""


def _find(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Engine:
    """A running engine: commands go to its socket.

    Args:
        socket: its unix socket.
        config: the folder that stands for ~/.docker, with the compose plugin.
    """

    def __init__(self, socket: Path, config: Path, argv: Sequence[str] = ()) -> None:
        self.socket = socket
        self._argv = list(argv)
        self._log = socket.parent / "log"
        self.daemon: subprocess.Popen[bytes] | None = None
        inherited = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CAESURA_", "COMPOSE_", "DOCKER_"))
        }
        self.environ = {
            **inherited,
            "DOCKER_HOST": f"unix://{socket}",
            "DOCKER_CONFIG": str(config),
        }

    def start(self) -> None:
        """Start the daemon, and wait until it answers. Raises CannotRun."""
        with self._log.open("ab") as log:
            daemon = self.daemon = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        _await(lambda: daemon.poll() is not None or self.run("info", check=False).code == 0, _START_S)
        if daemon.poll() is not None or self.run("info", check=False).code != 0:
            raise CannotRun(f"dockerd did not start:\n{self._log.read_text(errors='replace')[-_TAIL:]}")

    def kill(self) -> None:
        """Kill -9 the daemon, and wait until it is gone."""
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait(_STOP_S)

    def run(
        self,
        *words: str,
        cwd: Path | None = None,
        environ: Mapping[str, str] | None = None,
        check: bool = True,
        timeout_s: float = 300.0,
    ) -> Result:
        """``docker`` with these words.

        Raises:
            CommandFailed: with ``check``, when it did not end with 0.
        """
        done = subprocess.run(
            ["docker", *words],
            cwd=cwd,
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patient(timeout_s),
            check=False,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout[-_TAIL:]}\n{done.stderr[-_TAIL:]}"
            raise CommandFailed(f"docker {' '.join(words)} ended with {done.returncode}:\n{said}")
        return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def engine(cache: Path, plugin: Path | None, *options: str, own_containerd: bool = False) -> Iterator[Engine]:
    """An engine while the block runs; nothing of it runs afterwards, and the machine's network is as it was.

    Args:
        cache: keeps its data; one engine at a time uses it.
        plugin: the compose plugin's program; None: without.
        options: more words for the daemon's command line.
        own_containerd: containerd is a process of its own, as it is where systemd starts both, and outlives a daemon that is
            killed; else the daemon's child, which dies with it.

    Raises:
        CannotRun: it did not start; the text has the end of its log.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (
        _alone(cache / "lock"),
        _no_groups_left(),
        _network_as_before(),
        tempfile.TemporaryDirectory(prefix="caesura-docker-") as name,
        _containerd(cache, Path(name)) if own_containerd else nullcontext(),
    ):
        folder = Path(name)
        plugins = folder / "config" / "cli-plugins"
        plugins.mkdir(parents=True)
        if plugin is not None:
            (plugins / "docker-compose").symlink_to(plugin)
        socket = folder / "docker.sock"
        argv = [
            # Killed with us, however we end; what is left on its data is removed by the next run.
            *(sys.executable, "-m", "caesura.bus.pdeathsig", str(os.getpid())),
            _find("dockerd") or "dockerd",
            f"--data-root={cache / 'data'}",
            f"--exec-root={folder / 'exec'}",
            f"--pidfile={folder / 'pid'}",
            f"--host=unix://{socket}",
            *options,
        ]
        if own_containerd:
            argv.append(f"--containerd={folder / 'containerd.sock'}")
        found = Engine(socket, folder / "config", argv)
        try:
            found.start()
            _remove_all(found)
            try:
                yield found
            finally:
                _remove_all(found)
        finally:
            daemon = found.daemon
            if daemon is not None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(_STOP_S)
                except subprocess.TimeoutExpired:
                    with suppress(ProcessLookupError):
                        os.killpg(daemon.pid, signal.SIGKILL)
                    daemon.wait(_STOP_S)
            # dockerd binds its data folder to itself, and leaves that with live-restore.
            while _is_mounted(cache / "data"):
                _tool("umount", str(cache / "data"))


@contextmanager
def _containerd(cache: Path, folder: Path) -> Iterator[None]:
    """A containerd on a socket of its own, without the plug-in for Kubernetes."""
    config = folder / "containerd.toml"
    config.write_text(
        f'version = 2\nroot = "{cache / "containerd"}"\nstate = "{folder / "containerd"}"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\naddress = "{folder / "containerd.sock"}"\n'
    )
    with (folder / "containerd.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "caesura.bus.pdeathsig", str(os.getpid())),
                *(_find("containerd") or "containerd", "--config", str(config)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)


def _is_mounted(folder: Path) -> bool:
    """Also for a folder that is bound to itself, which ``is_mount`` does not see."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return any(line.split()[4] == str(folder.resolve()) for line in lines)


def _remove_all(found: Engine) -> None:
    """Containers, volumes and networks, this time's and what a killed run left; images and build cache stay."""
    if names := found.run("ps", "-aq").out.split():
        found.run("rm", "-fv", *names)
    if names := found.run("volume", "ls", "-q").out.split():
        found.run("volume", "rm", "-f", *names)
    found.run("network", "prune", "-f")
    found.run("image", "prune", "-f")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait for another run on this cache to end."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _no_groups_left() -> Iterator[None]:
    """dockerd leaves the empty cgroups in which its containers were (cgroups(7)); another engine's stay."""
    root = Path("/sys/fs/cgroup")

    def there() -> set[Path]:
        return {place for place in (root / "docker", *root.glob("*/docker")) if place.is_dir()}

    had = there()
    try:
        yield
    finally:
        for place in there() - had:
            for folder in [*sorted(place.rglob("*/"), reverse=True), place]:
                with suppress(OSError):  # a file, or in use: then it is not ours to remove
                    folder.rmdir()


@contextmanager
def _network_as_before() -> Iterator[None]:
    """dockerd turns ip_forward on, writes into iptables and leaves its bridge: take that back."""
    forward = Path("/proc/sys/net/ipv4/ip_forward")
    was = forward.read_text(encoding="utf-8")
    had_bridge = Path("/sys/class/net/docker0").exists()
    tables = {
        family: _tool(f"{family}-save")
        for family in ("iptables", "ip6tables")
        if _find(f"{family}-save") is not None
    }
    try:
        yield
    finally:
        for family, rules in tables.items():
            _flush(family)
            _tool(f"{family}-restore", text=rules)
        if not had_bridge and Path("/sys/class/net/docker0").exists():
            _tool("ip", "link", "delete", "docker0")
        forward.write_text(was, encoding="utf-8")


def _flush(family: str) -> None:
    """Empty what dockerd made: restoring does not touch tables that the saved text does not name."""
    for table in ("filter", "nat", "raw"):
        for words in (("-F",), ("-X",)):
            with suppress(CommandFailed):  # a table that this kernel lacks has no rules
                _tool(family, "-w", "-t", table, *words)
    with suppress(CommandFailed):
        _tool(family, "-w", "-P", "FORWARD", "ACCEPT")


def _tool(name: str, *words: str, text: str = "") -> str:
    done = subprocess.run(
        [_find(name) or name, *words], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CommandFailed(f"{name} {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _await(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Look until it holds; the engine announces nothing to wait for."""
    end = time.monotonic() + patient(timeout_s)
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(_LOOK_S)
    return held


def main() -> int:
    """Whether this machine can run the tests in containers; why not, on standard output."""
    missing = missing_tools()
    if missing:
        sys.stdout.write(f"{missing}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

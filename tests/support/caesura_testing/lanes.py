"""The lanes of ``./check``: what each runs, and a runner that has several of them under way at once.

Standard library only: ``./check --help`` needs no environment.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

CORES = os.cpu_count() or 1
LOGS = Path(".lanes")
_SKIPPED = 77
"""The exit code of a lane whose tool is missing, after a line ``SKIPPED: why`` (the convention of Automake)."""
_SAY_EVERY_S = 30.0
_END_S = 20.0
"""s: for the lanes to end after a signal, before they are killed."""

# Half as many again as there are cores: unit tests wait for a process or a thread a third of their time. Not more: each worker imports and
# collects all of them for itself. Tests of one file stay in one process, where its fixtures are shared.
_WORKERS = f"-n {min(CORES + (CORES + 1) // 2, 8)} --dist loadfile"

_JOURNEYS = ("demo", "docs", "page", "qemu")
_CLUSTERS = ("broker_clusters", "high_availability")
_HOSTS = ("doctor", "guard", "libvirt", "memory", "proxmox", "update", "vm")


class Lane(NamedTuple):
    """One thing that must hold.

    Args:
        about: one line for ``--help``.
        script: POSIX sh, run with ``-eu`` and the environment's commands on the path.
        fast: it is in the inner loop.
        named: it runs only when it is named: it takes minutes to hours.
        alone: it begins when all others have ended: what it emulates has a time limit of its own.
    """

    about: str
    script: str
    fast: bool = False
    named: bool = False
    alone: bool = False


LANES = {
    # Those of seconds first; then the longest, which wait most of the time: four of them need hardly more than two.
    "format": Lane("ruff format finds nothing to change", "ruff format --check .", fast=True),
    "lint": Lane("ruff check", "ruff check .", fast=True),
    "layers": Lane("import-linter: who may import what", "lint-imports", fast=True),
    "generated": Lane(
        "files made from the topic table and the settings are fresh",
        """
        python -m caesura.contract.generated --check
        python docs/generate_reference.py --check
        python -m grafana.generate --check
        """,
        fast=True,
    ),
    "docs": Lane(
        "the docs build as a site, without a broken link or a missing anchor, into .lanes/site",
        # Not --quiet: MkDocs then does not count the warnings that --strict is for.
        "NO_MKDOCS_2_WARNING=1 mkdocs build --strict",
        fast=True,
    ),
    "integration": Lane(
        "tests/integration: real Mosquitto, embedded broker, frozen processes, HTTP, promtool",
        "pytest -q -m 'not nats' tests/integration",
    ),
    "clusters": Lane(
        f"tests/e2e/{{{','.join(_CLUSTERS)}}}: coordinators that share PostgreSQL, brokers of three nodes",
        "pytest -q -m 'not nats' " + " ".join(f"tests/e2e/{name}" for name in _CLUSTERS),
    ),
    "journeys": Lane(
        f"tests/e2e/{{{','.join(_JOURNEYS)}}}: what people see and type, and QEMU guests",
        "pytest -q " + " ".join(f"tests/e2e/{name}" for name in _JOURNEYS),
    ),
    "e2e": Lane(
        "tests/e2e: the installed commands as processes, faults included",
        "pytest -q tests/e2e "
        + " ".join(
            f"--ignore tests/e2e/{name}"
            for name in (
                *_JOURNEYS,
                *_CLUSTERS,
                *_HOSTS,
                *("clients", "compose", "containers", "kexec", "soak"),
            )
        ),
    ),
    "compose": Lane(
        "tests/e2e/{containers,compose}: containers as VMs; docker compose up; engines of their own, stand-in images (root; minutes)",
        """
        why=$(python -m caesura_testing.containers) || { echo "SKIPPED: $why"; exit 77; }
        pytest -q tests/e2e/containers
        pytest -q -s tests/e2e/compose
        """,
    ),
    "hosts": Lane(
        f"tests/e2e/{{{','.join(_HOSTS)}}}: a host with its guard; libvirt, Proxmox",
        "pytest -q " + " ".join(f"tests/e2e/{name}" for name in _HOSTS),
    ),
    "types": Lane("mypy --strict", "mypy", fast=True),
    "unit": Lane(
        "tests/unit, tests/contract and tests/architecture",
        f"pytest -q {_WORKERS} tests/unit tests/contract tests/architecture",
        fast=True,
    ),
    "clients": Lane(
        "tests/e2e/clients: clients of Azure's metadata, unmodified, at 169.254.169.254 in a network namespace (npm, resource-agents)",
        """
        agent=/usr/lib/ocf/resource.d/heartbeat/azure-events-az
        command -v npm >/dev/null 2>&1 || { echo "SKIPPED: npm is not installed (on Debian: apt-get install npm)"; exit 77; }
        [ -e "$agent" ] || { echo "SKIPPED: $agent is missing (on Debian: apt-get install resource-agents)"; exit 77; }
        apart="unshare -Urn"
        $apart true 2>/dev/null || apart="unshare -n"
        $apart true 2>/dev/null || { echo "SKIPPED: neither user nor network namespaces are allowed here"; exit 77; }
        rm -rf .lanes/clients
        mkdir -p .lanes/clients
        "$UV" venv --quiet --python python3 .lanes/clients/venv
        "$UV" export --quiet --locked --only-group clients --no-emit-project --format requirements-txt >.lanes/clients/requirements.txt
        VIRTUAL_ENV=$PWD/.lanes/clients/venv "$UV" pip install --quiet -r .lanes/clients/requirements.txt
        (cd tests/e2e/clients/node && npm ci --no-audit --no-fund --loglevel=error)
        $apart sh -euc 'ip link set lo up; ip addr add 169.254.169.254/32 dev lo; exec pytest -q tests/e2e/clients'
        """,
    ),
    "kexec": Lane(
        "tests/e2e/kexec: Debian hosts in emulation, their kernel replaced under running guests (debootstrap as root, once; minutes)",
        """
        why=$(python -m caesura_nested_host.image --missing) || { echo "SKIPPED: $why"; exit 77; }
        python -m caesura_nested_host.image
        pytest -q -rP -n 2 --dist load tests/e2e/kexec
        """,
        alone=True,
    ),
    "kexec-all": Lane(
        "the same with every fallback and the arrival by a unit",
        """
        why=$(python -m caesura_nested_host.image --missing) || { echo "SKIPPED: $why"; exit 77; }
        python -m caesura_nested_host.image
        CAESURA_TEST_KEXEC=all pytest -q -rP -n 2 --dist load tests/e2e/kexec
        """,
        named=True,
        alone=True,
    ),
    "asyncapi": Lane(
        "docs/asyncapi.yaml passes the official AsyncAPI parser (npm)",
        """
        command -v npm >/dev/null 2>&1 || { echo "SKIPPED: npm is not installed (on Debian: apt-get install npm)"; exit 77; }
        cd tests/contract/asyncapi
        npm ci --no-audit --no-fund --loglevel=error
        node validate.mjs ../../../docs/asyncapi.yaml
        """,
    ),
    "wheel": Lane(
        "the built wheel, installed alone, has and imports every module, starts every command and holds an author's driver to the suite",
        """
        rm -rf .lanes/wheel
        mkdir -p .lanes/wheel
        "$UV" build --quiet --wheel --out-dir .lanes/wheel/dist
        "$UV" venv --quiet --python python3 .lanes/wheel/venv
        "$UV" export --quiet --locked --all-extras --no-default-groups --no-emit-project --format requirements-txt >.lanes/wheel/requirements.txt
        VIRTUAL_ENV=$PWD/.lanes/wheel/venv "$UV" pip install --quiet -r .lanes/wheel/requirements.txt .lanes/wheel/dist/*.whl
        tests/architecture/wheel.sh "$PWD/.lanes/wheel/venv"
        "$UV" venv --quiet --python python3 .lanes/wheel/author
        "$UV" export --quiet --locked --extra conformance --no-default-groups --no-emit-project --format requirements-txt >.lanes/wheel/author.txt
        VIRTUAL_ENV=$PWD/.lanes/wheel/author "$UV" pip install --quiet -r .lanes/wheel/author.txt .lanes/wheel/dist/*.whl
        tests/architecture/author.sh "$PWD/.lanes/wheel/author"
        """,
    ),
    "nats": Lane(
        "NATS JetStream as the broker, experimental: the bus conformance suite, access rules, rollouts with nodes killed; on an idle "
        "machine (minutes)",
        "pytest -q -m nats tests/integration/bus/test_nats.py tests/e2e/broker_clusters",
        named=True,
    ),
    "soak": Lane(
        "random kills, and one fault inside each pause, each for a minute and longer; CAESURA_SOAK_S=300 for five; the seeds are "
        "printed",
        "pytest -q -s tests/e2e/soak",
        named=True,
    ),
    "takeover": Lane(
        "two coordinators on one PostgreSQL: started at once a hundred times, and every loss of the leader in every state of a wave (half an hour)",
        "CAESURA_TEST_TAKEOVER_ALL=1 pytest -q tests/e2e/high_availability",
        named=True,
    ),
    "mutation": Lane(
        "plants each defect of tests/mutation/mutations.toml in a copy of the tree; some test must notice it (minutes)",
        "python tests/mutation/run.py",
        named=True,
    ),
}


class Result(NamedTuple):
    """How a lane ended.

    Args:
        code: its exit code; negative: the signal that ended it.
        seconds: on the wall clock.
        cpu_s: CPU seconds of all its processes.
        unsteady: tests that failed and passed when they were run once more, alone; see ``second_look``.
    """

    lane: str
    code: int
    seconds: float
    cpu_s: float
    unsteady: tuple[str, ...] = ()

    @property
    def skipped(self) -> bool:
        return self.code == _SKIPPED

    def line(self) -> str:
        """One line for the person who reads along."""
        how = "passed" if self.code == 0 else "skipped" if self.skipped else "FAILED"
        return f"== {self.lane} {how} ({self.seconds:.0f} s, {self.cpu_s:.0f} s of CPU)"


class Run:
    """Lanes under way, ``jobs`` at once, in order.

    With one job a lane writes to the terminal. With several each writes to ``.lanes/<lane>.log``, which is printed when it ended.
    Lanes that go alone begin when all others have ended.
    """

    def __init__(self, lanes: Iterable[str], *, jobs: int, out: TextIO | None = None) -> None:
        self._waiting = sorted(lanes, key=lambda name: LANES[name].alone)
        self._jobs = min(jobs, len(self._waiting))
        self._out = out or sys.stdout
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._under_way: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._stopped = False
        self.results: list[Result] = []

    def run(self) -> None:
        """Run them all. Raises KeyboardInterrupt, after all that was under way has ended."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._jobs)]
        said = time.monotonic()
        try:
            for thread in threads:
                thread.start()  # which may be interrupted when the thread has begun its lane
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(0.2)
                if self._jobs > 1 and time.monotonic() - said > _SAY_EVERY_S:
                    said = time.monotonic()
                    self._say_progress(said)
        except KeyboardInterrupt:
            self._stop(threads)
            raise

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._stopped and self._waiting and self._must_wait(self._waiting[0]):
                    self._ended.wait()
                if self._stopped or not self._waiting:
                    return
                lane = self._waiting.pop(0)
                log = None
                if self._jobs > 1:
                    LOGS.mkdir(exist_ok=True)
                    log = (LOGS / f"{lane}.log").open("wb")
                else:
                    self._say(f"== {lane}")
                unsteady = (LOGS / f"{lane}.unsteady").absolute()
                unsteady.unlink(missing_ok=True)
                begun = time.monotonic()
                process = subprocess.Popen(
                    ("/bin/sh", "-euc", LANES[lane].script),
                    env=_environ(unsteady),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                self._under_way[lane] = process, begun
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            result = Result(
                lane,
                process.returncode,
                time.monotonic() - begun,
                usage.ru_utime + usage.ru_stime,
                tuple(unsteady.read_text().split("\n")[:-1]) if unsteady.exists() else (),
            )
            with self._lock:
                del self._under_way[lane]
                self._ended.notify_all()
                self.results.append(result)
                if log is not None:
                    log.close()
                    self._say(f"== {lane}\n{Path(log.name).read_text(errors='replace').rstrip()}")
                self._say(f"{result.line()}\n")

    def _must_wait(self, lane: str) -> bool:
        """Whether it would not be alone, or another one is."""
        return bool(self._under_way) and (
            LANES[lane].alone or any(LANES[other].alone for other in self._under_way)
        )

    def _say(self, text: str) -> None:
        encoding = getattr(self._out, "encoding", None) or "utf-8"
        # What tests print is any text; the terminal may take less.
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._out, flush=True)

    def _say_progress(self, now: float) -> None:
        with self._lock:
            parts = [
                f"{lane} {now - begun:.0f} s ({LOGS}/{lane}.log)"
                for lane, (_, begun) in self._under_way.items()
            ]
            if parts:
                self._say(f".. {', '.join(parts)}; {len(self._waiting)} more to do")

    def _stop(self, threads: Sequence[threading.Thread]) -> None:
        with self._lock:
            self._stopped = True
            self._ended.notify_all()
            processes = [process for process, _ in self._under_way.values()]
        for number in (signal.SIGINT, signal.SIGKILL):
            for process in processes:
                if process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
            end = time.monotonic() + _END_S
            for thread in threads:
                with suppress(RuntimeError):  # one that was not started begins no lane any more
                    thread.join(max(0.0, end - time.monotonic()))
            if not any(thread.is_alive() for thread in threads):
                return


def _environ(unsteady: Path) -> dict[str, str]:
    """In CI the tests of a lane get a second look: one that is unsteady is named, and stops no landing."""
    if os.environ.get("CI") != "true":
        return dict(os.environ)
    LOGS.mkdir(exist_ok=True)
    return {**os.environ, "CAESURA_TEST_UNSTEADY": str(unsteady)}


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return count


def parser() -> argparse.ArgumentParser:
    """The command line of ``./check``."""
    names = "\n".join(f"  {name:<12} {lane.about}" for name, lane in LANES.items() if not lane.named)
    only = "\n".join(f"  {name:<12} {lane.about}" for name, lane in LANES.items() if lane.named)
    made = argparse.ArgumentParser(
        prog="./check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Everything that must hold before a commit lands. Runs all lanes but those that take hours, or only those named,\n"
        "and says which failed. A lane whose tool is missing says SKIPPED and why; with CI=true that is a failure. With CI=true, up to three\n"
        "tests of a lane that failed are run once more, alone; those that pass then are named UNSTEADY at the end.",
        epilog=f"lanes:\n{names}\n\nonly when named:\n{only}\n\nexamples:\n  ./check --fast\n  ./check types unit\n  ./check --jobs 1 e2e\n\n"
        "exit codes: 0 all lanes passed (or were skipped outside CI), 1 a lane failed, 2 bad usage or no environment,\n"
        "130 interrupted",
    )
    made.add_argument("lanes", metavar="LANE", nargs="*", help="only these lanes")
    made.add_argument(
        "--fast",
        action="store_true",
        help="the inner loop: what needs no broker, no processes, no build and no npm",
    )
    made.add_argument(
        "--jobs",
        type=_count,
        default=min(CORES + 2, 6),
        metavar="N",
        help="lanes at once (default here: %(default)s). With 1 a lane writes to the terminal while it runs",
    )
    return made


def chosen(wanted: Sequence[str], *, fast: bool) -> list[str]:
    """The lanes to run, each once, in the order of the table: the longest begins first.

    Raises:
        ValueError: there is no such lane.
    """
    for name in wanted:
        if name not in LANES:
            raise ValueError(f"no lane {name!r}; see ./check --help")
    every = not wanted and not fast
    return [
        name
        for name, lane in LANES.items()
        if name in wanted or (fast and lane.fast) or (every and not lane.named)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """``./check``, in its environment."""
    arguments = parser().parse_args(argv)
    try:
        lanes = chosen(arguments.lanes, fast=arguments.fast)
    except ValueError as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    begun = time.monotonic()
    run = Run(lanes, jobs=arguments.jobs)
    try:
        run.run()
    except KeyboardInterrupt:
        print("check: interrupted", file=sys.stderr)
        return 130
    skipped = [each.lane for each in run.results if each.skipped]
    failed = [each.lane for each in run.results if each.code and not each.skipped]
    failed += [f"{lane} (no result)" for lane in lanes if lane not in {each.lane for each in run.results}]
    print(*(each.line() for each in run.results), sep="\n")
    if skipped:
        print(f"skipped: {' '.join(skipped)}")
    if skipped and os.environ.get("CI") == "true":
        failed.append(f"{' '.join(skipped)} (skipped, which CI does not allow)")
    for each in run.results:
        for test in each.unsteady:
            print(f"UNSTEADY, failed once and passed alone; find out why: {test} ({each.lane})")
    took = time.monotonic() - begun
    if failed:
        print(f"check FAILED after {took:.0f} s: {' '.join(failed)}")
        return 1
    print(f"check passed in {took:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

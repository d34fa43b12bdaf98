"""Plants each mutation of ``mutations.toml`` in a scratch copy of the tree and shows that its tests notice it.

    python tests/mutation/run.py [--only ID ...] [--jobs N] [--json FILE]

The working tree is only read. Each worker has a copy of its own; in it one mutation is planted at a time, the tests
that must kill it run with a time limit, and the file is restored. Before that the same tests run once on the copy as
it is: a test that fails there shows nothing.

Outcomes: ``killed``; ``survived`` (the tests passed: a hole); ``broken`` (the tests did not run to an end: a mutation
that does not even import, no such test, the time limit). Exit code 0 only if every mutation was killed, 1 otherwise,
2 for a mutation whose text is not in its file exactly once: it is named, and nothing runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("mutations.toml")
LIMIT_S = 180.0
"""s: the tests of one mutation; those of most take some 2 s. Past it a mutation counts as ``broken``, not as killed."""
_COPIED = ("docs", "deploy", "examples", "grafana", "services", "shared", "tests", "tools", "benchmarks")
"""What tests may read, apart from the files of the root."""

Outcome = Literal["killed", "survived", "broken"]


class Mutation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One planted defect."""

    id: str
    invariant: str
    """The rule of docs/architecture.md that it breaks: ``I1`` to ``I12``."""
    what: str
    """The defect, in words."""
    file: str
    old: str
    """Stands in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """pytest arguments: at least one of these tests must fail."""


class Result(NamedTuple):
    """What became of one mutation."""

    mutation: Mutation
    outcome: Outcome
    seconds: float
    detail: str


def load(table: Path = TABLE) -> list[Mutation]:
    """Every mutation of the table.

    Raises:
        msgspec.ValidationError: a row of the wrong shape.
    """
    return msgspec.convert(tomllib.loads(table.read_text(encoding="utf-8"))["mutation"], list[Mutation])


def unfit(mutations: Iterable[Mutation], root: Path = ROOT) -> list[str]:
    """Why mutations cannot be planted, each with its id; empty when all can."""
    found = []
    for each in mutations:
        path = root / each.file
        if not path.is_file():
            found.append(f"{each.id}: there is no file {each.file}")
            continue
        times = path.read_text(encoding="utf-8").count(each.old)
        if times != 1:
            found.append(
                f"{each.id}: its text is {times} times in {each.file}, not once: bring `old` up to date, "
                f"or replace the mutation:\n    {each.old.strip()}"
            )
        if each.old == each.new:
            found.append(f"{each.id}: changes nothing")
        found += [
            f"{each.id}: there is no test file {name}"
            for name in (test.partition("::")[0] for test in each.tests)
            if not (root / name).exists()
        ]
    return found


class Scratch:
    """A copy of the tree in which tests run with their own copy of every package."""

    def __init__(self, parent: Path, name: str) -> None:
        self.root = parent / name
        self.root.mkdir()
        for folder in _COPIED:
            shutil.copytree(
                ROOT / folder,
                self.root / folder,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", ".lanes", "node_modules"),
            )
        for path in ROOT.iterdir():
            if path.is_file() and path.name != ".git":
                shutil.copy2(path, self.root / path.name)
        self._environ = {
            **os.environ,
            "PYTHONPATH": ":".join(
                str(self.root / each) for each in ("services", "shared", "tools", "tests/support")
            ),
        }
        self._environ.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # to compile everything takes longer than most tests
        self._stamp = 1_000_000_000
        self._process: subprocess.Popen[str] | None = None

    def packages_are_the_copies(self) -> None:
        """Raises RuntimeError if tests would import the working tree's packages."""
        code = (
            "import caesura_coordinator, caesura, sys; print(caesura_coordinator.__file__, caesura.__file__)"
        )
        told = subprocess.run(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=self._environ,
            text=True,
            capture_output=True,
            check=True,
        )
        if any(not path.startswith(str(self.root)) for path in told.stdout.split()):
            raise RuntimeError(f"the copy in {self.root} is not what is imported: {told.stdout}")

    def test(self, tests: Sequence[str], limit_s: float) -> tuple[int, str]:
        """Exit code of pytest and the last lines that it said; -1: the time limit."""
        argv = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--no-header",
            "--tb=no",
            "-p",
            "no:cacheprovider",
        ]
        argv += ["--hypothesis-profile", "first-failure"]
        self._process = process = subprocess.Popen(
            [*argv, *tests],
            cwd=self.root,
            env=self._environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            told, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return -1, f"not at an end after {limit_s:g} s"
        finally:
            self.end()
            process.communicate()
        lines = [line for line in told.splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return process.returncode, (failed or lines[-3:] or ["no output"])[0]

    def end(self) -> None:
        """End the tests that are under way, with all that they started in their session."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _write(self, path: Path, text: str) -> None:
        """With a time that the file never had: bytecode is taken for fresh by size and whole seconds."""
        path.write_text(text, encoding="utf-8")
        self._stamp += 1
        os.utime(path, (self._stamp, self._stamp))

    def plant(self, mutation: Mutation, limit_s: float) -> Result:
        """Plant it, run its tests, restore the file."""
        began = time.monotonic()
        path = self.root / mutation.file
        before = path.read_text(encoding="utf-8")
        self._write(path, before.replace(mutation.old, mutation.new))
        try:
            code, said = self.test(mutation.tests, limit_s)
        finally:
            self._write(path, before)
        outcome: Outcome = "survived" if code == 0 else "killed" if code == 1 else "broken"
        return Result(mutation, outcome, time.monotonic() - began, said)


@contextmanager
def _ended_with(pool: ThreadPoolExecutor, copies: Iterable[Scratch]) -> Iterator[None]:
    """An interrupt ends what is under way and starts nothing more; else the pool would run all that was submitted."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for each in copies:
            each.end()
        raise


def run(mutations: Sequence[Mutation], jobs: int, limit_s: float) -> list[Result]:
    """Plant them all, some side by side; one line of progress each.

    Raises:
        RuntimeError: the tests do not pass on the unchanged copy.
    """
    with tempfile.TemporaryDirectory(prefix="caesura-mutation-") as folder:
        copies = [Scratch(Path(folder), f"copy-{number}") for number in range(jobs)]
        copies[0].packages_are_the_copies()
        tests = sorted({test for each in mutations for test in each.tests})
        print(f"unchanged: {len(tests)} test files and tests ...", flush=True)
        code, said = copies[0].test(tests, limit_s * 5)
        if code != 0:
            raise RuntimeError(f"the tests do not pass without any mutation: {said}")
        free, turn = list(copies), threading.Lock()

        def work(mutation: Mutation) -> Result:
            with turn:
                copy = free.pop()
            try:
                return copy.plant(mutation, limit_s)
            finally:
                with turn:
                    free.append(copy)

        results = []
        with ThreadPoolExecutor(jobs) as pool, _ended_with(pool, copies):
            for done in as_completed([pool.submit(work, each) for each in mutations]):
                result = done.result()
                results.append(result)
                mark = "killed  " if result.outcome == "killed" else result.outcome.upper().ljust(8)
                print(
                    f"[{len(results):>3}/{len(mutations)}] {mark} {result.seconds:5.1f} s  "
                    f"{result.mutation.invariant:<3}  {result.mutation.id}"
                    + (
                        ""
                        if result.outcome == "killed"
                        else f"\n          {result.mutation.what}\n          {result.detail}"
                    ),
                    flush=True,
                )
        return results


def summary(results: Sequence[Result], seconds: float) -> dict[str, object]:
    """The figures of a run."""
    by_invariant: dict[str, list[int]] = {}
    for each in sorted(results, key=lambda result: int(result.mutation.invariant[1:])):
        counts = by_invariant.setdefault(each.mutation.invariant, [0, 0])
        counts[0] += each.outcome == "killed"
        counts[1] += 1
    return {
        "mutations": len(results),
        "killed": sum(each.outcome == "killed" for each in results),
        "survived": sorted(each.mutation.id for each in results if each.outcome == "survived"),
        "broken": sorted(each.mutation.id for each in results if each.outcome == "broken"),
        "by_invariant": {name: f"{killed}/{total}" for name, (killed, total) in by_invariant.items()},
        "seconds": round(seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description="plants mutations in a scratch copy; shows that tests kill each"
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="only these mutations")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="copies side by side")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for the tests of one mutation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    mutations = load()
    if arguments.only:
        unknown = set(arguments.only) - {each.id for each in mutations}
        if unknown:
            parser.error(f"no mutation {', '.join(sorted(unknown))} in {TABLE.name}")
        mutations = [each for each in mutations if each.id in arguments.only]
    why_not = unfit(mutations)
    if why_not:
        print("these mutations cannot be planted:\n" + "\n".join(why_not), file=sys.stderr)
        return 2
    began = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results = run(mutations, max(1, min(arguments.jobs, len(mutations))), arguments.limit)
    except RuntimeError as error:
        print(f"mutation: {error}", file=sys.stderr)
        return 1
    figures = summary(results, time.monotonic() - began)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["killed"] == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What signals do to a demo: nothing cuts its clean-up short, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from caesura.runtime.processes import cgroup_name, marked_processes
from caesura_demo import sweeper as sweeper_module
from caesura_demo.service_processes import Processes
from caesura_demo.sweeper import start_sweeper
from caesura_demo.workspace import CleanUp, Interrupted
from caesura_testing.collector import PATIENCE_S, eventually


class Run:
    """A body that waits, then cleans up in two steps that end when they are told to."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.up, self.over, self.clean = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.clean_up = CleanUp(self.story.append)
        self.task = asyncio.create_task(self.clean_up.run(self.body))

    async def body(self) -> int:
        try:
            self.up.set()
            await self.over.wait()
            self.story.append("over")
            return 0
        finally:
            await self.clean_up.step(self.step("one"))
            await self.clean_up.step(self.step("two"))

    async def step(self, name: str) -> None:
        self.story.append(f"begin {name}")
        waits = {asyncio.create_task(each.wait()) for each in (self.clean, self.clean_up.hurry)}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        self.story.append(f"end {name}")

    async def press(self, number: signal.Signals = signal.SIGINT) -> None:
        """Send a signal, and let the loop handle it."""
        handled = asyncio.Event()
        loop = asyncio.get_running_loop()
        os.kill(os.getpid(), number)
        # The loop reads its signals from a pipe: what is scheduled after a turn of select comes after them.
        loop.call_later(0.01, handled.set)
        await handled.wait()

    async def until(self, said: str) -> None:
        await eventually(lambda: said in self.story)


_ALREADY = "already cleaning up; press again to kill everything at once"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_first_signal_during_the_clean_up_is_acknowledged_and_changes_nothing(
    number: signal.Signals,
) -> None:
    run = Run()
    await run.up.wait()
    run.over.set()
    await run.until("begin one")
    await run.press(number)
    assert run.story == ["over", "begin one", _ALREADY]
    run.clean.set()
    assert await run.task == 0
    assert run.story[3:] == ["end one", "begin two", "end two"]


async def test_a_second_signal_during_the_clean_up_makes_it_hurry_but_skips_nothing() -> None:
    run = Run()
    await run.up.wait()
    await run.press()
    await run.until("begin one")
    await run.press()
    assert run.story == ["begin one", _ALREADY]
    await run.press()
    with pytest.raises(Interrupted):
        await run.task
    assert run.story[2:] == ["killing everything at once", "end one", "begin two", "end two"]


async def test_the_first_signal_cancels_and_everything_is_cleaned_up() -> None:
    run = Run()
    await run.up.wait()
    run.clean.set()
    await run.press(signal.SIGTERM)
    with pytest.raises(Interrupted):
        await run.task
    assert run.story == ["begin one", "end one", "begin two", "end two"]


_STUBBORN = (
    "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('up', flush=True)\n"
    "time.sleep(1000)\n"
)


async def test_when_hurried_even_stubborn_and_stopped_services_are_gone_at_once(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(_STUBBORN)
    processes = Processes(f"test-{os.getpid()}", tmp_path)
    environment = {"PYTHONPATH": str(tmp_path)}
    for name in ("a", "b"):
        await processes.start(name, "stubborn", environment)
        await eventually(lambda name=name: "up" in (tmp_path / f"{name}.log").read_text())  # type: ignore[misc]
    os.kill(processes.running["b"].pid, signal.SIGSTOP)
    hurry = asyncio.Event()
    stopping = asyncio.create_task(processes.stop(hurry))
    await asyncio.sleep(0)
    assert len(list(marked_processes(processes.mark))) == 2
    hurry.set()
    await stopping
    assert list(marked_processes(processes.mark)) == []
    assert {each.returncode for each in processes.running.values()} <= {-signal.SIGKILL, None}


async def test_an_empty_cgroup_of_a_killed_service_goes_too(tmp_path: Path) -> None:
    mount = Path("/sys/fs/cgroup")
    name = cgroup_name("host-x", tmp_path)
    place = next((each for each in (mount, mount / "freezer") if (each / "cgroup.procs").exists()), None)
    if place is None or not os.access(place, os.W_OK):
        pytest.skip("no cgroup hierarchy that this user may write to")
    left, other = place / name / "web-1", place / f"{name}-other" / "web-1"
    for each in (left, other):
        each.mkdir(parents=True)
    try:
        await Processes("test-cgroups", tmp_path, [name]).stop()
        assert not (place / name).exists()
        assert other.exists(), "somebody else's"
    finally:
        for each in (left, other):
            for folder in (each, each.parent):
                with suppress(OSError):
                    folder.rmdir()


def test_its_name_is_the_one_that_the_host_updater_uses(tmp_path: Path) -> None:
    """Two hosts of one name on a machine are told apart by their state folders."""
    names = {cgroup_name("host-1", tmp_path / each) for each in ("a", "b")}
    assert len(names) == 2
    assert all(each.startswith("caesura-host-1-") for each in names)
    updater = importlib.util.find_spec("caesura_host_updater.drivers.process.plugin")
    assert updater is not None
    assert "cgroup_name(" in Path(updater.origin or "").read_text()


@pytest.mark.parametrize("state", ["well", "hung", "dead"])
async def test_a_sweeper_that_is_dismissed_sweeps_nothing(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    sweeper = await start_sweeper(f"CAESURA_DEMO_RUN=dismissed-{os.getpid()}", [])
    sweeper.remember(kept)
    process = sweeper._process
    if state == "hung":
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(sweeper_module, "_DISMISSED_S", 0.1)
    elif state == "dead":
        process.kill()
        await process.wait()
    await sweeper.dismiss()
    assert process.returncode is not None
    assert kept.exists()


async def test_a_sweeper_whose_demo_died_kills_what_is_marked_and_removes_the_folders(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    mark = f"CAESURA_DEMO_RUN=died-{os.getpid()}"
    name, value = mark.split("=")
    hung = await asyncio.create_subprocess_exec("sleep", "1000", env={**os.environ, name: value})
    os.kill(hung.pid, signal.SIGSTOP)
    # As the demo starts it, but for the time that services have to drain.
    code = "import sys; from caesura_demo import sweeper; sweeper._DRAIN_S = 0.0; sys.exit(sweeper.main())"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, mark, stdin=asyncio.subprocess.PIPE
    )
    await process.communicate(f"{folder}\n".encode())  # and no `done`
    assert process.returncode == 0
    async with asyncio.timeout(PATIENCE_S):
        assert await hung.wait() == -signal.SIGKILL
    assert not folder.exists()

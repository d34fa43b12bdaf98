"""The host updater's connection to a real pause guard, with a made-up daemon of libvirt's as the witness."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from caesura_host_updater.guard_client import GuardClient, GuardUnavailable
from caesura_testing.libvirt_answers import UUID, Daemon, good, reply
from caesura_testing.patience import patient
from caesura_vmcontrol.libvirt_rpc import LibvirtPlan

pytestmark = pytest.mark.asyncio

_STATE, _RESUME = 212, 28


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """With a domain that is paused until it is resumed."""
    made = Daemon(tmp_path / "s")
    made.answer = lambda procedure, serial, arguments: (
        reply(procedure, serial, b"\0\0\0\1\0\0\0\1")
        if procedure == _STATE and _RESUME in made.called
        else good(procedure, serial, arguments)
    )
    yield made
    made.close()


@pytest_asyncio.fixture
async def client(tmp_path: Path) -> AsyncIterator[GuardClient]:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    made = GuardClient(folder, spawn=True)
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("dropped", [False, True])
async def test_what_is_dropped_is_not_resumed(client: GuardClient, daemon: Daemon, dropped: bool) -> None:
    """Somebody else had paused it; the guard cannot know that by itself."""
    plan = LibvirtPlan("web-1", daemon.path, "qemu:///system", UUID, 7, 0, 0)
    await client.arm("op", time.monotonic() + 60, [plan])
    if dropped:
        await client.drop("op", ["web-1"])
    record = await client.disarm("op", 20.0)
    assert (record is None) is dropped
    assert (_RESUME in daemon.called) is not dropped


async def test_a_daemon_that_is_slow_at_the_end_is_waited_for(client: GuardClient, daemon: Daemon) -> None:
    """Longer than an operation waits for its end: it is disarmed behind it, and nothing was resumed."""
    answers = threading.Event()
    made = daemon.answer

    def slow(procedure: int, serial: int, arguments: bytes) -> bytes | None:
        answers.wait(patient(60))
        return (
            reply(procedure, serial, b"\0\0\0\1\0\0\0\1")
            if procedure == _STATE
            else made(procedure, serial, arguments)
        )

    daemon.answer = slow
    keeping = asyncio.create_task(client.run())
    try:
        plan = LibvirtPlan("web-1", daemon.path, "qemu:///system", UUID, 7, 0, 0)
        await client.arm("op", time.monotonic() + patient(60), [plan])
        with pytest.raises(GuardUnavailable, match="did not confirm"):
            await client.disarm("op", 0.1)
        answers.set()
        async with asyncio.timeout(patient(20)):
            while await client.held() is not None:  # noqa: ASYNC110 - it notifies nobody
                await asyncio.sleep(0.02)
    finally:
        answers.set()
        keeping.cancel()
    assert _RESUME not in daemon.called


async def test_a_way_out_that_is_none_for_the_guard_is_logged_and_a_risk(
    client: GuardClient, daemon: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qmp = str(tmp_path / "none")
    plan = LibvirtPlan("web-1", daemon.path, "qemu:///system", UUID, 7, 0, 0, (qmp,))
    assert await client.inspect([plan])
    assert qmp in client.pause_risk("web-1"), "before the first pause"
    assert not await client.inspect([plan])
    await client.arm("op", time.monotonic() + patient(60), [plan])
    said = capsys.readouterr()
    assert "guard.socket_unusable" in said.out + said.err
    assert qmp in client.pause_risk("web-1")
    assert client.pause_risk("web-2") == ""
    await client.drop("op", ["web-1"])
    await client.disarm("op")

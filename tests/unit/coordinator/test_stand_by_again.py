"""A coordinator with a shared store begins again when it has lost store or lead, unless it was asked to stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from caesura.runtime.serve import serve
from caesura.runtime.shared_rows import StoreLost
from caesura_coordinator import __main__ as root
from caesura_coordinator.leadership import LeadershipLost
from caesura_coordinator.settings import CoordinatorSettings
from caesura_testing.patience import patient

pytest.importorskip("psycopg")

_SETTINGS = CoordinatorSettings(state_dir="/x", store="postgresql://u@127.0.0.1/d")


async def _for_ever() -> None:
    await asyncio.Event().wait()


class _Runs:
    """What takes the place of the coordinator: runs the given tasks, counts."""

    def __init__(
        self, lose: Callable[[], Awaitable[None]], drain: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.count = 0
        self._lose = lose
        self._drain = drain

    async def __call__(self, *_: object, stop: asyncio.Event) -> None:
        self.count += 1
        if self.count > 1:
            raise ZeroDivisionError
        await serve({"store": self._lose, "bus": _for_ever}, drain=self._drain or _no_drain, stop=stop)


async def _no_drain() -> None:
    pass


async def _run(runs: _Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "_serve", runs)
    async with asyncio.timeout(patient(10)):
        await root._run_shared(_SETTINGS)


async def test_without_a_signal_it_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lose() -> None:
        raise StoreLost("d", "it ended")

    runs = _Runs(lose)
    with pytest.raises(ZeroDivisionError):
        await _run(runs, monkeypatch)
    assert runs.count == 2


async def test_a_stop_is_not_forgotten_when_the_database_goes_during_the_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draining = asyncio.Event()

    async def lose() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await draining.wait()
        raise StoreLost("d", "it ended")

    async def drain() -> None:
        draining.set()
        await _for_ever()

    runs = _Runs(lose, drain)
    await _run(runs, monkeypatch)
    assert runs.count == 1


@pytest.mark.parametrize("lost", [StoreLost("d", "it ended"), LeadershipLost("to another")])
async def test_a_signal_during_the_drain_after_a_loss_ends_it(
    lost: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose() -> None:
        raise lost

    async def drain() -> None:
        asked = asyncio.Event()
        os.kill(os.getpid(), signal.SIGTERM)
        asyncio.get_running_loop().call_later(0.05, asked.set)
        await asked.wait()  # the loop calls the handler in the meantime

    runs = _Runs(lose, drain)
    await _run(runs, monkeypatch)
    assert runs.count == 1

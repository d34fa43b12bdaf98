"""What Tab completes, and that a shell never waits long for it."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import click
import msgspec
import pytest
from click.shell_completion import ShellComplete

from caesura.contract import messages as m
from caesura.contract.examples import examples
from caesura_ctl import completion
from caesura_ctl.cli import caesura
from caesura_ctl.fleet_view import FleetView
from caesura_testing.patience import patient
from caesura_testing.rollouts import whole_rollout


def _picture() -> FleetView:
    fleet_view = FleetView()
    for each in examples():
        fleet_view.fold(each.message)
    newest = whole_rollout("20260420-221158-1f3a", update="qemu-security")
    fleet_view.fold(newest)
    older = msgspec.structs.replace(newest, rollout="older", created_at=newest.created_at - timedelta(days=1))
    fleet_view.fold(older)
    return fleet_view


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A broker that retains the examples; the kinds that were asked for."""
    asked: list[str] = []

    def ask(kind: str, _: str | None) -> FleetView:
        asked.append(kind)
        return _picture()

    monkeypatch.setattr(completion, "_asked", ask)
    return asked


def _completed(words: list[str], incomplete: str = "") -> list[str]:
    shell = ShellComplete(caesura, {}, "caesura", "_CAESURA_COMPLETE")
    return [each.value for each in shell.get_completions(words, incomplete)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["roll"], ["qemu-security"]),
        (["history"], ["20260420-221158-1f3a", "older"]),
        (["plan"], ["qemu-security"]),
        (["roll", "qemu-security", "--set"], ["web"]),
        (["roll", "qemu-security", "--host"], ["host-1"]),
        (["roll", "qemu-security", "--vm"], ["web-1"]),
        (["roll", "qemu-security", "--exclude-set"], ["web"]),
        (["roll", "qemu-security", "--exclude-host"], ["host-1"]),
        (["roll", "qemu-security", "--exclude-vm"], ["web-1"]),
        (["roll", "qemu-security", "--canary"], ["host-1"]),
        (["freeze", "--vm"], ["web-1"]),
        (["tail", "--host"], ["host-1"]),
        (["watch"], ["20260420-221158-1f3a", "older"]),
        (["abort"], ["20260420-221158-1f3a", "older"]),
        (["resume"], ["20260420-221158-1f3a", "older"]),
    ],
)
def test_names_are_completed(words: list[str], expected: list[str], known: list[str]) -> None:
    assert _completed(words) == expected
    assert len(known) == 1


def test_only_what_begins_so(known: list[str]) -> None:
    assert _completed(["watch"], "old") == ["older"]
    assert _completed(["roll"], "x") == []
    assert known


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A broker that takes the connection and says nothing."""
    await reader.read()
    writer.close()


async def test_a_broker_that_is_silent_completes_nothing_and_the_shell_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(completion, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(completion, "_SETTLED_S", 0.1)
    async with await asyncio.start_server(_silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        begun = time.monotonic()
        found = await asyncio.to_thread(_tab, f"mqtt://127.0.0.1:{port}")
        assert found == []
        assert time.monotonic() - begun < patient(5.0)


def test_no_broker_and_no_settings_complete_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert _tab("mqtt://127.0.0.1:1") == []
    assert _tab("nonsense") == []
    assert capfd.readouterr() == ("", ""), "a shell would show it"


def _tab(broker: str) -> list[Any]:
    context = click.Context(caesura)
    context.params["broker"] = broker
    return completion.complete("host")(context, click.Argument(["x"]), "")


def test_each_kind_has_names() -> None:
    kinds: tuple[completion.Kind, ...] = ("set", "host", "vm", "update", "rollout")
    assert all(list(completion.names(_picture(), kind)) for kind in kinds)
    assert not any(list(completion.names(FleetView(), kind)) for kind in kinds)
    assert isinstance(_picture().rollouts["older"], m.RolloutState)

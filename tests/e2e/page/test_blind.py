"""What the live page says of what it cannot know: as of when, and nothing red without knowledge."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from caesura.bus.local_broker import free_port
from caesura.contract import messages as m
from caesura_testing.rollouts import announce, wave_state, whole_rollout
from caesura_testing.sandbox import Vm

_LIVE = "document.getElementById('link-text').textContent === 'live'"
_STANDS = "document.querySelectorAll('.standing li').length === 1"


def _contains(node: str, text: str) -> str:
    return f"document.getElementById('{node}').textContent.includes('{text}')"


async def _freeze(booth: Any, budget_s: float = 2.0) -> None:
    now = datetime.now(UTC)
    wave = wave_state(wave=0, status="started", domains={"web": 0}, hosts=("h1",), vms=("web-1",))
    rollout = whole_rollout(
        rollout="r1",
        update="patch",
        status="running",
        policy=m.Policy(),
        sets=("web",),
        waves=(wave,),
        created_at=now,
    )
    await announce(booth.post, rollout)
    message = m.VmFrozen(
        vm="web-1",
        host="h1",
        set="web",
        update_domain=0,
        operation="o",
        method="freeze",
        budget_s=budget_s,
        at=now,
    )
    await booth.post.send(message, host="h1", set="web", ud=0, vm="web-1")


async def _nothing_is_counted_on(visited: Any) -> None:
    """Longer than the budget, and the page still says what was heard, and when."""
    standing = await visited.text(".standing .secs")
    lane = await visited.text(".lane .now")
    assert " of 2 s at " in standing
    await visited.until("Date.now() / 1000 > window.begun + 4 || !(window.begun ??= Date.now() / 1000)")
    assert await visited.text(".standing .secs") == standing
    assert await visited.text(".lane .now") == lane
    assert "beyond the budget" not in await visited.text("#alarms")
    assert await visited.page.locator(".standing .over").count() == 0
    assert "1 VM was paused at the last report" in await visited.text(".line")
    assert "web-1 was paused then; the pause guard had to end that by " in await visited.text("#alarms")


async def test_an_exporter_that_is_gone(booth: Any, visit: Callable[..., Any]) -> None:
    visited = await visit(f"http://127.0.0.1:{booth.wire.listen_port}/")
    await _freeze(booth)
    await visited.until(_STANDS)
    await booth.wire.cut()
    await visited.until(_contains("link-text", "exporter not reached since "))
    await visited.until(_contains("shout", "The exporter is not reached: nothing received since "))
    await _nothing_is_counted_on(visited)
    await booth.wire.mend()
    await visited.until(_LIVE)
    await visited.until(_contains("shout", "The exporter is reached again"))
    # Now it is heard of again: it does stand still, and too long.
    await visited.until(_contains("alarm-list", "Paused beyond the budget"))
    await visited.until(_contains("shout", "Paused beyond the budget: web-1"))


async def test_a_connection_that_goes_dead_without_a_word(booth: Any, visit: Callable[..., Any]) -> None:
    visited = await visit(f"http://127.0.0.1:{booth.wire.listen_port}/")
    await visited.until(_LIVE)
    booth.wire.hush()
    await visited.until(_contains("link-text", "silent since "), timeout_s=30)
    await visited.until(_contains("alarm-list", "nothing received since "))
    booth.wire._open.set()
    await visited.until(_LIVE, timeout_s=30)
    assert await visited.page.is_hidden("#alarms")


async def test_a_stream_that_ends_in_its_time_is_opened_anew_without_a_word(
    booth: Any, visit: Callable[..., Any]
) -> None:
    booth.page._lifetime_s = 0.5
    visited = await visit(booth.url)
    await visited.until(_LIVE)
    await visited.page.evaluate(
        """() => { window.said = [];
          new MutationObserver(() => window.said.push(document.getElementById("link-text").textContent))
            .observe(document.getElementById("link-text"), { childList: true, characterData: true, subtree: true }); }"""
    )
    opened = (
        "performance.getEntriesByType('resource').filter((each) => each.name.endsWith('/live/events')).length"
    )
    await visited.until(f"{opened} >= 3")
    assert await visited.page.evaluate("window.said") == []
    assert visited.errors == []


async def test_a_stream_of_beats_alone_is_live_and_keeps_the_clock(
    booth: Any, visit: Callable[..., Any]
) -> None:
    visited = await visit(booth.url)
    await visited.until(_LIVE)
    # The client's clock steps by an hour: the page goes by the exporter's.
    await visited.page.evaluate("const now = Date.now; Date.now = () => now() + 3600e3")
    before = await visited.text("#clock")
    await visited.until(f"document.getElementById('clock').textContent !== '{before}'")
    assert abs(_seconds(await visited.text("#clock")) - _seconds(before)) < 60


def _seconds(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.split(":"))
    return (hours * 60 + minutes) * 60 + seconds


async def test_an_exporter_without_a_broker(booth: Any, visit: Callable[..., Any]) -> None:
    visited = await visit(booth.url)
    await _freeze(booth)
    await visited.until(_STANDS)
    booth.broker.down()
    await visited.until("document.getElementById('link-text').textContent === 'no broker'")
    await visited.until(_contains("shout", "The exporter is not connected to the broker"))
    await _nothing_is_counted_on(visited)
    booth.broker.up()
    await visited.until(_contains("shout", "The exporter is connected to the broker again"))


async def test_a_host_updater_that_dies_in_a_pause(
    stages: Callable[..., Any], visit: Callable[..., Any]
) -> None:
    stage = await stages(up=False, host_1=[Vm(name="web-1", set="web", update_domain=0)])
    listen = f"127.0.0.1:{free_port()}"
    stage.sandbox.service("exporter", "caesura_metrics_exporter", {"LISTEN": listen, "HEALTH_LISTEN": ""})
    stage.sandbox.update("slow", ["sleep", "20"])
    await stage.sandbox.start("exporter")
    await stage.up("host-1")
    visited = await visit(f"http://{listen}/")
    await stage.roll("slow", budget_s=3.0)
    await stage.frozen("web-1")
    await visited.until(_STANDS)
    await stage.sandbox.kill("host-1")
    await visited.until(_contains("alarm-list", "host-1 is silent"))
    await visited.until(_contains("shout", "host-1 is silent"))
    await stage.none_frozen(20)
    await visited.until(_contains("alarm-list", "the pause guard had to end that by "))
    await visited.until("Date.now() / 1000 > window.begun + 4 || !(window.begun ??= Date.now() / 1000)")
    assert "beyond the budget" not in await visited.text("#alarms")
    assert re.fullmatch(r"frozen\s+[\d.]+ m?s at [\d:]+", await visited.text(".lane .now"))

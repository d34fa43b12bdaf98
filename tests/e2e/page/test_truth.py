"""That the live page says what is so, of more than one rollout, set, day and connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from playwright.async_api import Route

from caesura.contract import messages as m
from caesura_testing.rollouts import announce, wave_state, whole_rollout

_LIVE = "document.getElementById('link-text').textContent === 'live'"


def _now() -> datetime:
    return datetime.now(UTC)


async def _roll(booth: Any, name: str, *vms: str, **more: Any) -> None:
    wave = wave_state(wave=0, status="started", domains={name: 0}, hosts=("h1",), vms=vms)
    given: dict[str, Any] = {"status": "running", "waves": (wave,), "created_at": _now(), **more}
    rollout = whole_rollout(rollout=name, update=f"patch-{name}", policy=m.Policy(), sets=(name,), **given)
    await announce(booth.post, rollout)


def _fact(vm: str, set_name: str, domain: int) -> dict[str, Any]:
    names = {"vm": vm, "host": "h1", "set": set_name, "update_domain": domain, "operation": "o"}
    return {**names, "method": "freeze", "budget_s": 30, "at": _now()}


async def _freeze(booth: Any, vm: str, set_name: str = "web", domain: int = 0) -> None:
    message = m.VmFrozen(**_fact(vm, set_name, domain))
    await booth.post.send(message, host="h1", set=set_name, ud=domain, vm=vm)


async def _resume(booth: Any, vm: str, set_name: str = "web", domain: int = 0) -> None:
    fact = _fact(vm, set_name, domain)
    message = m.VmResumed(pause_s=1.0, within_budget=True, resumed_by="updater", **fact)
    await booth.post.send(message, host="h1", set=set_name, ud=domain, vm=vm)


async def test_of_two_rollouts_each_is_said_what_is_its_own(booth: Any, visit: Callable[..., Any]) -> None:
    await _roll(booth, "db", "db-1", created_at=_now() - timedelta(seconds=60))
    await _roll(booth, "web", "web-1")
    await _freeze(booth, "db-1", "db")
    visited = await visit(booth.url)
    await visited.until("document.querySelectorAll('.standing li').length === 1")
    assert (await visited.text("#rollout-title")).startswith("patch-web")
    assert "no VM is paused" in await visited.text(".line")
    assert "started" in await visited.text(".waves li")
    await _freeze(booth, "web-1", "web")
    await visited.until("document.querySelector('.line').textContent.includes('1 VM is paused')")
    assert "frozen" in await visited.text(".waves li")


async def test_a_lane_counts_more_than_are_named(booth: Any, visit: Callable[..., Any]) -> None:
    for number in range(250):
        await _freeze(booth, f"web-{number}")
    visited = await visit(booth.url)
    await visited.until("document.querySelector('.lane .now').textContent.includes('250 VMs')")


async def test_what_was_not_today_has_its_day(booth: Any, visit: Callable[..., Any]) -> None:
    before = _now() - timedelta(days=7)
    ended: dict[str, Any] = {"status": "completed", "ended_at": before + timedelta(seconds=60)}
    await _roll(booth, "web", created_at=before, **ended)
    visited = await visit(booth.url, locale="en-GB", timezone_id="UTC")
    await visited.until("document.querySelector('.facts') !== null")
    day = f"{before.day} {before:%b} {before.year}, "
    assert f"started {day}" in await visited.text(".facts")
    assert f"ended {day}" in await visited.text(".facts")
    await _roll(booth, "web")
    await visited.until("document.querySelector('.chip.running') !== null")
    assert str(before.year) not in await visited.text(".facts")


async def test_a_late_answer_to_a_poll_does_not_undo_what_the_stream_said(
    booth: Any, visit: Callable[..., Any]
) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def late(route: Route) -> None:
        response = await route.fetch()
        body = await response.body()
        asked.set()
        await answer.wait()
        await route.fulfill(response=response, body=body)

    booth.exporter.stream.limit = 0
    await _freeze(booth, "web-1")
    visited = await visit("about:blank")
    await visited.page.route("**/live/state", late)
    await visited.page.goto(booth.url)
    await asked.wait()
    await _resume(booth, "web-1")
    booth.exporter.stream.limit = 4
    await visited.until(_LIVE)
    await visited.until("document.getElementById('standing-body').textContent.includes('No VM')")
    async with visited.page.expect_request_finished(lambda request: "state" in request.url):
        answer.set()
    await visited.until(f"!({_LIVE}) || (window.looks = (window.looks || 0) + 1) > 20")
    assert await visited.text("#link-text") == "live"
    assert await visited.text("#standing-body") == "No VM is paused."


async def test_the_keyboard_stays_where_it_is_when_a_set_comes(booth: Any, visit: Callable[..., Any]) -> None:
    await _freeze(booth, "web-1")
    visited = await visit(booth.url)
    await visited.until("document.querySelector('g.seg[tabindex=\"0\"]') !== null")
    await visited.page.focus("g.seg[tabindex='0']")
    for number, name in enumerate(("db", "zoo")):
        await _freeze(booth, f"{name}-1", name)
        await visited.until(f"document.querySelectorAll('.set h3').length === {number + 2}")
    assert (await visited.page.evaluate("document.activeElement.dataset.id")).startswith("web/ud/0|")
    # A stretch that is no more passes the keyboard on to the next of its lane.
    lost = await visited.page.evaluate("document.activeElement.dataset.id")
    for number in range(60):
        await _resume(booth, "web-1")
        await _freeze(booth, f"web-{number}")
        await _resume(booth, f"web-{number}")
    await visited.until(f"document.querySelector('g.seg[data-id=\"{lost}\"]') === null")
    assert (await visited.page.evaluate("document.activeElement.dataset.id || ''")).startswith("web/ud/0|")


async def test_vms_in_no_set_are_one_group(booth: Any, visit: Callable[..., Any]) -> None:
    names = ["web", *(f"solo-{number}" for number in range(23))]
    records = [m.VmRecord(vm=name, set=f"_{name}", update_domain=0, state="running") for name in names]
    records.append(m.VmRecord(vm="web-1", set="web", update_domain=0, state="running"))
    inventory = m.HostInventory(host="h1", driver="process", epoch=1, vms=tuple(records))
    await booth.post.send(inventory, host="h1")
    visited = await visit(booth.url)
    await visited.until("document.querySelectorAll('.lane').length === 25")
    headings = await visited.page.locator(".set h3").all_inner_texts()
    assert headings == ["web 1 domain, 1 VM", "VMs in no set 24"]
    options = await visited.page.locator("#set option").all_inner_texts()
    assert options == ["all (2)", "web", "VMs in no set"]
    await visited.page.select_option("#set", "_")
    await visited.until("document.querySelectorAll('.lane').length === 24")


async def test_what_only_an_inventory_says_has_no_beginning(booth: Any, visit: Callable[..., Any]) -> None:
    record = m.VmRecord(vm="web-1", set="web", update_domain=0, state="paused")
    await booth.post.send(m.HostInventory(host="h1", driver="process", epoch=1, vms=(record,)), host="h1")
    visited = await visit(booth.url)
    await visited.until("document.querySelectorAll('.standing li').length === 1")
    assert await visited.text(".standing .secs") == "paused, since when is not known"
    assert "since when is not known, 1 VM" in await visited.text(".lane .now")
    behind = {**_fact("db-1", "db", 0), "at": _now() - timedelta(seconds=60)}
    await booth.post.send(m.VmFrozen(**behind), host="h1", set="db", ud=0, vm="db-1")
    await visited.until("document.querySelectorAll('.standing li').length === 2")
    seconds = await visited.page.locator(".standing .secs").all_inner_texts()
    assert any(each.startswith("\N{GREATER-THAN OR EQUAL TO} ") for each in seconds)
    assert "beyond the budget" not in await visited.text("body")
    await visited.page.select_option("#set", "web")
    await visited.page.focus("g.seg[tabindex='0']")
    assert "began earlier; when is not known" in await visited.text("#tip")


async def test_every_domain_says_what_it_waits_for(booth: Any, visit: Callable[..., Any]) -> None:
    names = tuple(f"s{number:02}" for number in range(12))
    done = wave_state(wave=0, status="completed")
    wave = wave_state(wave=1, status="pending", domains=dict.fromkeys(names, 1), hosts=(), vms=())
    rollout = whole_rollout(
        rollout="r1",
        update="patch",
        status="running",
        policy=m.Policy(),
        sets=names,
        waves=(done, wave),
        created_at=_now(),
    )
    await announce(booth.post, rollout)
    visited = await visit(booth.url)
    await visited.until("document.querySelectorAll('.lane').length === 12")
    said = await visited.page.locator(".lane .now").all_inner_texts()
    assert [each.strip() for each in said] == ["waits for wave 2"] * 12


async def test_what_lasts_is_named_before_what_is_over(booth: Any, visit: Callable[..., Any]) -> None:
    for number in range(30):
        fact = _fact(f"db-{number}", "db", 0)
        message = m.VmResumed(pause_s=1.0, within_budget=True, resumed_by="guard", **fact)
        await booth.post.send(message, host="h1", set="db", ud=0, vm=f"db-{number}")
    await _freeze(booth, "web-1", domain=0)
    await _freeze(booth, "web-2", domain=1)
    visited = await visit(booth.url)
    await visited.until("document.querySelectorAll('#alarm-list > li').length === 2")
    alarms = await visited.page.locator("#alarm-list > li").all_inner_texts()
    assert "Two domains of a set at once" in alarms[0]
    assert "The pause guard had to act (30)" in alarms[1], "one of a kind, not one each"
    assert "and 29 more of the same" in alarms[1]

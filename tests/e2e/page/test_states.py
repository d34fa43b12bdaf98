"""What the live page shows when things are wrong, many, or hostile."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_testing.browser import poor_contrast
from caesura_testing.rollouts import announce, changed, wave_state, whole_rollout

_MARKUP = '<img src=x onerror="window.hacked=1"> & </script><script>window.hacked=2</script>'

_SPACING = (
    "* { line-height: 1.5 !important; letter-spacing: .12em !important; word-spacing: .16em !important }"
)
"""What readers may set: WCAG 2.2, success criterion 1.4.12."""


def _now() -> datetime:
    return datetime.now(UTC)


def _rollout(update: str = "patch", status: m.RolloutStatus = "running", reason: str = "") -> WholeRollout:
    failed: m.WaveStatus = "failed" if status == "halted" else "started"
    return whole_rollout(
        rollout="r1",
        update=update,
        status=status,
        reason=reason,
        policy=m.Policy(),
        sets=("web",),
        waves=(
            wave_state(
                wave=0, status=failed, domains={"web": 0}, hosts=("h1",), vms=("web-1",), reason=reason
            ),
        ),
        requested_by=update[:63],
        created_at=_now(),
    )


async def _freeze(booth: Any, vm: str, domain: int) -> None:
    message = m.VmFrozen(
        vm=vm,
        host="h1",
        set="web",
        update_domain=domain,
        operation="o",
        method="freeze",
        budget_s=5,
        at=_now(),
    )
    await booth.post.send(message, host="h1", set="web", ud=domain, vm=vm)


async def test_hostile_text_is_text(booth: Any, visit: Callable[..., Any]) -> None:
    # The name of an update cannot be hostile: the contract allows letters, digits, _ and -.
    rollout = _rollout(status="halted", reason=_MARKUP)
    wrote = m.FailedUpdate(
        host="h1", outcome="failed", exit_code=3, output_tail=f"{_MARKUP}\n\x1b[2J\u202eend"
    )
    wave = msgspec.structs.replace(rollout.waves[0], failed_updates=(wrote,))
    await announce(booth.post, changed(rollout, waves=(wave,)))
    refused = m.RequestAnswered(request="q", accepted=False, reason=_MARKUP)
    await booth.post.send(refused, client="c")
    visited = await visit(booth.url)
    await visited.until(
        "document.querySelector('.log tbody') !== null && document.querySelector('.chip') !== null"
    )
    assert _MARKUP in await visited.text("#alarms")
    output = await visited.text(".failed-update")
    assert "on h1: failed, exit code 3" in output
    assert f"{_MARKUP}\n\\u001b[2J\\u202eend" in output
    assert _MARKUP in await visited.text("#log-body")
    await visited.page.focus("g.seg[tabindex='0']")
    assert _MARKUP in await visited.text("#tip")
    await visited.page.click("#as-table summary")
    assert await visited.page.evaluate("window.hacked === undefined")
    assert await visited.page.locator("main img, main script").count() == 0
    assert visited.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_what_is_wrong_is_loud_and_readable(booth: Any, visit: Callable[..., Any], scheme: str) -> None:
    visited = await visit(booth.url, color_scheme=scheme, reduced_motion="reduce")
    await visited.until("document.getElementById('link-text').textContent === 'live'")
    await _freeze(booth, "web-1", 0)
    await _freeze(booth, "web-2", 1)
    await visited.until(
        "document.getElementById('alarm-list').textContent.includes('Two domains of a set at once')"
    )
    await visited.until("document.getElementById('shout').textContent.includes('domains 0 and 1 of set web')")
    resumed = m.VmResumed(
        vm="web-1",
        host="h1",
        set="web",
        update_domain=0,
        operation="o",
        method="freeze",
        pause_s=9.5,
        budget_s=5,
        within_budget=False,
        resumed_by="guard",
        at=_now(),
    )
    await booth.post.send(resumed, host="h1", set="web", ud=0, vm="web-1")
    unsynced = m.VmClockSynced(
        vm="web-1",
        host="h1",
        set="web",
        update_domain=0,
        synced=False,
        by="nobody",
        error_after_s=-9.5,
        reason="no answer",
        at=_now(),
    )
    await booth.post.send(unsynced, host="h1", set="web", ud=0, vm="web-1")
    await announce(booth.post, _rollout(status="halted", reason="web-1 is not well"))
    await visited.until("document.querySelector('.chip.halted') !== null")
    await visited.until("document.getElementById('shout').textContent.includes('web-1 is not well')")
    alarms = await visited.text("#alarms")
    for words in ("Rollout halted", "longer than its budget", "pause guard", "Clock not synced", "no answer"):
        assert words in alarms
    assert await visited.page.locator("path.over").count() == 1, "a pause over its budget is a cross"
    assert "1 not synced \N{MINUS SIGN}9.50 s" in await visited.text(".clock.bad")
    looked, poor = await poor_contrast(visited.page)
    assert looked > 40
    assert poor == []
    assert visited.errors == []


async def test_a_lost_broker_is_said(booth: Any, visit: Callable[..., Any]) -> None:
    visited = await visit(booth.url)
    await visited.until("document.getElementById('link-text').textContent === 'live'")
    booth.broker.down()
    await visited.until("document.getElementById('link-text').textContent === 'no broker'")
    assert "not connected to the broker" in await visited.text("#alarms")
    booth.broker.up()
    await visited.until("document.getElementById('link-text').textContent === 'live'")
    assert await visited.page.is_hidden("#alarms")


async def test_a_large_fleet_is_cut_and_can_be_chosen_from(booth: Any, visit: Callable[..., Any]) -> None:
    for number in range(100):
        records = tuple(
            m.VmRecord(vm=f"s{number}-{domain}", set=f"set-{number}", update_domain=domain, state="running")
            for domain in range(20)
        )
        inventory = m.HostInventory(host=f"h{number}", driver="process", epoch=1, vms=records)
        await booth.post.send(inventory, host=f"h{number}")
    visited = await visit(booth.url, width=1600)
    await visited.until("document.querySelectorAll('#set option').length === 101")
    await visited.until("document.getElementById('more').textContent.includes('of 2000 domains')")
    assert await visited.page.locator(".lane").count() == 12, "nothing happens in any of them"
    await visited.page.click("#unfold")
    await visited.until("document.querySelectorAll('.lane').length === 60")
    await visited.page.select_option("#set", "set-42")
    await visited.until("document.querySelectorAll('.lane').length === 20")
    assert await visited.page.is_hidden("#more")
    assert visited.errors == []


async def test_without_a_stream_it_asks_now_and_then(booth: Any, visit: Callable[..., Any]) -> None:
    booth.exporter.stream.limit = 0
    await _freeze(booth, "web-1", 0)
    visited = await visit(booth.url)
    await visited.until("document.getElementById('link-text').textContent === 'polling'")
    assert await visited.states("web/ud/0") == ["frozen"]
    booth.exporter.stream.limit = 1
    await visited.until("document.getElementById('link-text').textContent === 'live'")


@pytest.mark.parametrize("width", [360, 768, 1600])
async def test_an_empty_fleet_and_no_sideways_scroll(
    booth: Any, visit: Callable[..., Any], width: int
) -> None:
    visited = await visit(booth.url, width=width)
    await visited.until("document.getElementById('link-text').textContent === 'live'")
    assert "No rollout yet" in await visited.text("#rollout-title")
    name = "x" * 63
    for domain in (0, 19):
        message = m.VmFrozen(
            vm=name,
            host=name,
            set=name,
            update_domain=domain,
            operation="o",
            method="freeze",
            budget_s=5,
            at=_now(),
        )
        await booth.post.send(message, host=name, set=name, ud=domain, vm=name)
    await announce(booth.post, _rollout("y" * 63, "halted", "z" * 500))
    await visited.until("document.querySelector('.chip.halted') && document.querySelector('.standing li')")
    for spacing in ("", _SPACING):
        await visited.page.evaluate(
            "(text) => { const sheet = new CSSStyleSheet(); sheet.replaceSync(text); document.adoptedStyleSheets = [sheet]; }",
            spacing,
        )
        assert await visited.page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
    assert visited.errors == []


async def test_without_scripts_it_says_where_the_facts_are(booth: Any, visit: Callable[..., Any]) -> None:
    visited = await visit(booth.url, java_script_enabled=False)
    assert await visited.page.is_hidden("#link")
    assert await visited.page.is_hidden("main")
    assert await visited.page.is_visible("noscript a[href='live/state']")


async def test_colours_that_are_forced_and_paper(booth: Any, visit: Callable[..., Any]) -> None:
    async def dot(visited: Any) -> str:
        found: str = await visited.page.evaluate(
            "getComputedStyle(document.querySelector('.dot')).backgroundColor"
        )
        return found

    forced = await visit(booth.url, forced_colors="active")
    plain = await visit(booth.url)
    for visited in (forced, plain):
        await visited.until("document.getElementById('link-text').textContent === 'live'")
    assert await dot(forced) == await dot(plain), "the dot is seen"
    dark = await visit(booth.url, color_scheme="dark")
    ink = "getComputedStyle(document.body).color"
    assert await dark.page.evaluate(ink) != await plain.page.evaluate(ink)
    await dark.page.emulate_media(media="print")
    assert await dark.page.evaluate(ink) == await plain.page.evaluate(ink), "dark ink on paper"


async def test_what_did_not_move_is_not_drawn_again(booth: Any, visit: Callable[..., Any]) -> None:
    await _freeze(booth, "web-1", 0)
    visited = await visit(booth.url)
    await visited.until("document.querySelector('g.seg') !== null")
    await visited.page.locator("input[value='3600']").check(force=True)
    # Each drawing makes the axis anew; at this scale a pixel is some five seconds.
    await visited.page.evaluate(
        """() => { window.drawn = 0; window.said = new Set();
          new MutationObserver(() => { window.drawn += 1; }).observe(document.querySelector(".axis"), { childList: true }); }"""
    )
    await visited.until("window.said.add(document.querySelector('.lane .now').textContent).size > 8")
    assert await visited.page.evaluate("window.drawn") <= 2, "not with every tick"

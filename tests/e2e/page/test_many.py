"""A fleet of 300 VMs on the live page, halted and beyond its budgets: what is wrong and who is paused come first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_testing.browser import poor_contrast
from caesura_testing.rollouts import announce, changed, wave_state, whole_rollout

REASON = "update qemu-security failed on host-03: exit code 3"
_PER_HOST = 10


def _now() -> datetime:
    return datetime.now(UTC)


def _place(number: int) -> tuple[str, int, str]:
    """Set, domain and host of VM ``number``: 20 sets of 3 domains with 5 VMs each."""
    return f"set-{number // 15:02}", number % 15 // 5, f"host-{number // _PER_HOST:02}"


async def fleet(booth: Any) -> None:
    for host in range(30):
        records = []
        for number in range(host * _PER_HOST, (host + 1) * _PER_HOST):
            name, domain, _ = _place(number)
            records.append(m.VmRecord(vm=f"vm-{number:03}", set=name, update_domain=domain, state="running"))
        inventory = m.HostInventory(host=f"host-{host:02}", driver="process", epoch=1, vms=tuple(records))
        await booth.post.send(inventory, host=inventory.host)
        await booth.post.send(
            m.HostPresence(host=inventory.host, online=True, instance="i"), host=inventory.host
        )


def rollout(status: m.RolloutStatus, waves: tuple[m.WaveStatus, ...], reason: str = "") -> WholeRollout:
    sets = tuple(f"set-{number:02}" for number in range(20))
    made = tuple(
        wave_state(
            wave=number,
            status=each,
            domains=dict.fromkeys(sets, number),
            hosts=("host-01",),
            vms=tuple(f"vm-{vm:03}" for vm in range(300) if _place(vm)[1] == number),
            started_at=_now() - timedelta(seconds=30) if each in {"started", "failed"} else None,
            ended_at=_now() if each == "failed" else None,
            reason=reason if each == "failed" else "",
        )
        for number, each in enumerate(waves)
    )
    return whole_rollout(
        rollout="20260420-221158-1f3a",
        update="qemu-security",
        status=status,
        reason=reason,
        policy=m.Policy(budget_s=5.0),
        sets=sets,
        waves=made,
        requested_by="ops",
        created_at=_now() - timedelta(seconds=60),
    )


def _fact(number: int, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    name, domain, host = _place(number)
    vm = f"vm-{number:03}"
    fact = {"vm": vm, "host": host, "set": name, "update_domain": domain, "operation": f"op-{host}"}
    return {**fact, "method": "freeze", "budget_s": 5.0, "at": _now(), **more}, {
        "host": host,
        "set": name,
        "ud": domain,
        "vm": vm,
    }


async def freeze(booth: Any, numbers: list[int]) -> None:
    for number in numbers:
        fact, place = _fact(number)
        await booth.post.send(m.VmFrozen(**fact), **place)


async def resume(booth: Any, numbers: list[int], **more: Any) -> None:
    for number in numbers:
        fact, place = _fact(number)
        values = {"pause_s": 9.0, "within_budget": False, "resumed_by": "guard", **more}
        await booth.post.send(m.VmResumed(**fact, **values), **place)


def first_domain() -> list[int]:
    return [number for number in range(300) if _place(number)[1] == 0]


async def _top(visited: Any, selector: str) -> float:
    found: float = await visited.page.evaluate(
        f"document.querySelector({selector!r}).getBoundingClientRect().top + scrollY"
    )
    return found


@pytest.mark.parametrize("width", [1280, 390])
async def test_300_vms_of_which_a_third_is_beyond_its_budget(
    booth: Any, visit: Callable[..., Any], width: int
) -> None:
    await fleet(booth)
    await announce(booth.post, rollout("running", ("started", "pending", "pending")))
    await freeze(booth, first_domain())
    visited = await visit(booth.url, width=width)
    await visited.until(
        "document.getElementById('standing-count').textContent === '100 VMs, 100 over budget'"
    )
    assert "100 over budget" in await visited.text("#numbers")
    alarms = await visited.page.locator("#alarm-list > li").all_inner_texts()
    assert len([each for each in alarms if "beyond the budget" in each]) == 1, "one, not a hundred"
    assert "(100)" in next(each for each in alarms if "beyond the budget" in each)
    assert await visited.page.is_hidden("#pin"), "the alarms are in sight"
    assert await visited.page.locator(".standing li.over").count() == 24
    # Who is paused comes before the domains, whose idle ones are folded.
    assert await _top(visited, "#standing") < await _top(visited, "#lanes")
    assert await _top(visited, "#standing") < (900 if width > 1000 else 1500)
    assert await visited.page.locator(".lane").count() == 20, "those in which something happens"
    assert "20 of 60 domains are drawn" in await visited.text("#more")
    height = await visited.page.evaluate("document.documentElement.scrollHeight")
    assert height < (3300 if width > 1000 else 5000), "it was 4,800 px high, and more on a phone"
    assert await visited.page.locator(".lane .now[data-late='yes']").count() == 20
    assert "1 of 3 domains, 15 VMs" in await visited.text(".set h3")
    await visited.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    await visited.until("!document.getElementById('pin').hidden")
    assert "100 VMs paused beyond the budget" in await visited.text("#pin")
    assert await visited.page.evaluate("document.documentElement.scrollWidth") <= width
    looked, poor = await poor_contrast(visited.page)
    assert looked > 40
    assert poor == []
    assert visited.errors == []


async def test_a_halt_stays_in_sight_and_says_nothing_of_what_it_never_reached(
    booth: Any, visit: Callable[..., Any]
) -> None:
    await fleet(booth)
    done = rollout("completed", ("completed",) * 3)
    earlier = {"rollout": "earlier", "created_at": _now() - timedelta(seconds=600), "ended_at": _now()}
    before = changed(done, **earlier)
    running = changed(
        before, status="running", ended_at=None, waves=rollout("running", ("verifying",) * 3).waves
    )
    await announce(booth.post, running)
    await announce(booth.post, before)
    await announce(booth.post, rollout("halted", ("failed", "pending", "pending"), REASON))
    await resume(booth, first_domain()[:60])
    await booth.post.send(m.HostPresence(host="host-07", online=False, instance="i"), host="host-07")
    visited = await visit(booth.url, width=1280)
    await visited.until("document.querySelector('.chip.halted') !== null")
    await visited.until("document.getElementById('numbers').textContent.includes('without host-07')")
    assert "29 of 30" in await visited.text("#numbers")
    assert "Wave 1 stopped the rollout" in await visited.text(".line")
    assert [each.split()[0] for each in await visited.page.locator(".waves b").all_inner_texts()] == [
        "1",
        "2",
        "3",
    ]
    assert "not reached" in await visited.text(".waves li:nth-child(2)")
    alarms = await visited.page.locator("#alarm-list > li").all_inner_texts()
    assert len(alarms) == 3, "a halt, the overruns, the guard: one of each"
    assert REASON in alarms[0]
    assert "Pause longer than its budget (60)" in alarms[1]
    # However far down one reads.
    await visited.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    await visited.until("!document.getElementById('pin').hidden")
    assert REASON in await visited.text("#pin")
    assert await visited.page.locator("#pin").is_visible()
    await visited.page.select_option("#set", "set-03")
    await visited.until("document.querySelectorAll('.lane').length === 3")
    said = await visited.page.locator(".lane .now").all_inner_texts()
    assert "verified" not in " ".join(said[1:]), said
    assert [each.strip() for each in said[1:]] == ["not reached (wave 2)", "not reached (wave 3)"]
    # Given up: why it failed is still there, and what it never reached is not called verified.
    aborted = rollout(
        "aborted", ("failed", "pending", "pending"), f"aborted by the operator; it had halted: {REASON}"
    )
    await announce(booth.post, aborted)
    await visited.until("document.querySelector('.chip.aborted') !== null")
    assert REASON in await visited.text("#rollout-body")
    assert visited.errors == []


async def test_many_waves_are_folded_around_the_one_that_is_under_way(
    booth: Any, visit: Callable[..., Any]
) -> None:
    waves = tuple(
        wave_state(
            wave=number,
            status="completed" if number < 20 else "pending",
            domains={f"_vm-{number}": 0},
            hosts=("h",),
            vms=(f"vm-{number}",),
        )
        for number in range(60)
    )
    state = rollout("running", ("started",))
    await announce(booth.post, changed(state, waves=waves))
    visited = await visit(booth.url)
    await visited.until("document.querySelectorAll('.waves li').length === 12")
    assert "1 to 19" in await visited.text(".waves li:first-child")
    assert "30 to 60" in await visited.text(".waves li:last-child")


async def test_one_drawing_is_of_one_instant(booth: Any, visit: Callable[..., Any]) -> None:
    """Or a VM is beyond its budget in the list of the paused, and not yet in the alarm above it."""
    visited = await visit(booth.url)
    found = await visited.page.evaluate(
        """async () => {
          const script = document.querySelector("script[type=module]").src;
          const { Model } = await import(new URL("model.js", script).href);
          const model = new Model(), seen = [];
          model.atOneInstant(() => {
            const begun = performance.now();
            seen.push(model.now());
            while (performance.now() < begun + 20);
            seen.push(model.now());
          });
          return [...seen, model.now()];
        }"""
    )
    assert found[0] == found[1] < found[2]

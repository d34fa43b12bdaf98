"""10,000 VMs on 1,000 hosts, in 50 sets of 20 domains, in the middle of a rollout: the page stays small and quick, and what is
paused or wrong is in view."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from playwright.async_api import CDPSession

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_testing.patience import patient
from caesura_testing.rollouts import announce, wave_state, whole_rollout

VMS, HOSTS, SETS, DOMAINS = 10_000, 1_000, 50, 20
WAVE = 19
"""The wave that is under way; those before it are done."""
_ROLLOUT = "20260420-221158-1f3a"
_MOST_BYTES = 2_000_000
_MOST_TASK_S = 0.2
_LATE = 7
_VIEW_PX = 900


def _place(number: int) -> tuple[str, int, str]:
    """Set, domain and host of a VM: a host holds ten VMs of ten sets and one domain; ten VMs of a set are of one domain."""
    host = number // 10
    return f"set-{(host // DOMAINS * 10 + number % 10) % SETS:02}", host % DOMAINS, f"host-{host:04}"


def _of(wave: int) -> list[int]:
    return [number for number in range(VMS) if _place(number)[1] == wave]


class Fleet:
    """What such a fleet says."""

    def __init__(self, booth: Any) -> None:
        self._booth = booth
        self._now = datetime.now(UTC)

    async def there(self) -> None:
        for host in range(HOSTS):
            records = tuple(
                m.VmRecord(
                    vm=f"vm-{number:05}",
                    set=_place(number)[0],
                    update_domain=_place(number)[1],
                    state="running",
                    state_detail="paused from outside" if number == 9_999 else "",
                )
                for number in range(host * 10, host * 10 + 10)
            )
            name = f"host-{host:04}"
            inventory = m.HostInventory(host=name, driver="qemu", epoch=1, vms=records, guard="ready")
            await self._booth.post.send(inventory, host=name)
            here = m.HostPresence(host=name, online=True, instance="i")
            await self._booth.post.send(here, host=name)
        gone = m.HostPresence(host="host-0123", online=False, instance="i")
        await self._booth.post.send(gone, host="host-0123")

    def rollout(self) -> WholeRollout:
        waves = tuple(
            wave_state(
                wave=wave,
                status="completed" if wave < WAVE else "started" if wave == WAVE else "pending",
                domains={f"set-{name:02}": wave for name in range(SETS)},
                hosts=tuple(sorted({_place(number)[2] for number in _of(wave)})),
                vms=tuple(f"vm-{number:05}" for number in _of(wave)),
                started_at=self._now - timedelta(seconds=60 * (WAVE + 1 - wave)) if wave <= WAVE else None,
                ended_at=self._now - timedelta(seconds=60 * (WAVE - wave)) if wave < WAVE else None,
            )
            for wave in range(DOMAINS)
        )
        return whole_rollout(
            rollout=_ROLLOUT,
            update="qemu-security",
            status="running",
            policy=m.Policy(budget_s=20.0),
            sets=tuple(f"set-{name:02}" for name in range(SETS)),
            waves=waves,
            requested_by="ops",
            created_at=self._now - timedelta(seconds=600),
        )

    async def say(self, kind: Any, number: int, **more: Any) -> None:
        name, domain, host = _place(number)
        vm = f"vm-{number:05}"
        fact = {"vm": vm, "host": host, "set": name, "update_domain": domain, "operation": f"op-{host}"}
        message = kind(**{**fact, "method": "freeze", "budget_s": 20.0, **more})
        await self._booth.post.send(message, host=host, set=name, ud=domain, vm=vm)

    async def frozen(self, numbers: list[int], **more: Any) -> None:
        for number in numbers:
            await self.say(m.VmFrozen, number, **({"at": datetime.now(UTC)} | more))

    async def resumed(self, numbers: list[int], **more: Any) -> None:
        values = {"pause_s": 2.5, "within_budget": True, "resumed_by": "updater", "at": datetime.now(UTC)}
        for number in numbers:
            await self.say(m.VmResumed, number, **(values | more))


class Watched:
    """What the page's main thread does and what comes over the wire, as Chromium measures it."""

    def __init__(self, session: CDPSession) -> None:
        self._session = session
        self.bytes = 0
        self._events: list[dict[str, Any]] = []
        session.on("Network.dataReceived", self._received)
        session.on("Tracing.dataCollected", lambda event: self._events.extend(event["value"]))

    def _received(self, event: dict[str, Any]) -> None:
        self.bytes += event["dataLength"]

    async def start(self) -> None:
        await self._session.send("Network.enable")
        await self._session.send(
            "Tracing.start",
            {"traceConfig": {"includedCategories": ["toplevel"]}, "transferMode": "ReportEvents"},
        )

    async def longest_task_s(self) -> float:
        """Seconds of CPU of the longest task of any renderer's main thread: not of the clock, which runs on while others have the CPU."""
        done = asyncio.Event()
        self._session.on("Tracing.tracingComplete", lambda _: done.set())
        await self._session.send("Tracing.end")
        async with asyncio.timeout(patient(30)):
            await done.wait()
        mains = {
            (event["pid"], event["tid"])
            for event in self._events
            if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
        }
        tasks = [
            event.get("tdur", event["dur"]) / 1e6
            for event in self._events
            if event.get("ph") == "X" and "RunTask" in event["name"] and (event["pid"], event["tid"]) in mains
        ]
        assert tasks, sorted({event["name"] for event in self._events})[:50]
        return float(max(tasks))


async def _top(visited: Any, selector: str) -> float:
    found: float = await visited.page.evaluate(
        f"document.querySelector({selector!r}).getBoundingClientRect().top"
    )
    return found


@pytest.mark.timeout(180)
async def test_10_000_vms_near_the_end_of_a_rollout(booth: Any, visit: Callable[..., Any]) -> None:
    """Every domain has a history then: the page is as large as it gets."""
    fleet = Fleet(booth)
    await fleet.there()
    await announce(booth.post, fleet.rollout())
    for wave in range(WAVE):
        await fleet.frozen(_of(wave))
        await fleet.resumed(_of(wave))
    mine = _of(WAVE)
    await fleet.frozen(mine[:_LATE], budget_s=0.5)
    await fleet.frozen(mine[_LATE:])

    visited = await visit("about:blank", height=_VIEW_PX)
    watched = Watched(await visited.page.context.new_cdp_session(visited.page))
    await watched.start()
    visited.url = booth.url
    await visited.page.goto(booth.url)
    # On a busy machine those with a budget of 20 s may be beyond it, too, by the time that it is looked at.
    await visited.until(
        "/^500 VMs, \\d+ over budget$/.test(document.getElementById('standing-count').textContent)"
    )
    # What is paused or wrong is there without scrolling: the alarms, the rollout's wave, the VMs beyond their budget first.
    alarms = await visited.page.locator("#alarm-list > li").all_inner_texts()
    assert len(alarms) == 2, "one for each kind of what is wrong"
    assert any(re.search(r"beyond the budget.*\(\d+\)", each, re.DOTALL) for each in alarms), alarms
    assert any("vm-09999" in each for each in alarms), alarms
    assert "without host-0123" in await visited.text("#numbers")
    assert await _top(visited, "#alarm-list > li:last-child") < _VIEW_PX
    assert await _top(visited, ".standing li.over") < _VIEW_PX
    assert await visited.page.locator(".standing li.over").count() >= _LATE
    assert "500 VMs are paused" in await visited.text("#rollout-body")
    # The rest is drawn, too, as far as something happens in it.
    await visited.until("document.querySelectorAll('.lane').length >= 12")
    await visited.until("document.querySelectorAll('#log-body tr').length > 50")
    assert "of 1000 domains are drawn" in await visited.text("#more")

    for start in range(0, 400, 100):  # changes come on top of the first picture
        await fleet.resumed(mine[_LATE + start : _LATE + start + 100])
        left = 500 - start - 100
        await visited.until(
            f"document.getElementById('standing-count').textContent.startsWith('{left} VMs, ')"
        )
    longest_s = await watched.longest_task_s()
    assert watched.bytes < _MOST_BYTES, f"{watched.bytes} bytes"
    assert longest_s < patient(_MOST_TASK_S), f"a task of {longest_s * 1000:.0f} ms"
    assert visited.errors == []
    print(f"transferred {watched.bytes} bytes, longest task {longest_s * 1000:.0f} ms of CPU")  # noqa: T201

"""A rollout that replaces the kernel of hosts under their running guests: everything installed from the wheel, seen from outside.

Broker and coordinator run on this machine; each host is a Debian system in emulation with host updater and pause guard in their units.
What is asserted of the guests comes from their serial lines, read with this machine's clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from caesura.contract import messages as m
from caesura_nested_host.fleet_host import SLOW, FleetHost
from caesura_nested_host.image import Image
from caesura_nested_host.machine import running
from caesura_testing.nested_guests import (
    ROLLOUT_S,
    TEST_S,
    TRIES,
    assert_clock_kept,
    assert_continued,
    roll,
    until_ready,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(TEST_S)]


async def test_two_hosts_go_to_the_new_kernel_and_one_of_them_back(
    stages: Callable[..., Any], image: Image, tmp_path: Path
) -> None:
    stage = await stages(up=False)
    port = urlsplit(stage.sandbox.broker.url).port
    hosts = [FleetHost(f"host-{number}", image, tmp_path / str(number), domain=number) for number in (1, 2)]
    with running(*(each.machine for each in hosts)):
        await stage.sandbox.start("coordinator")
        try:
            await asyncio.gather(*(asyncio.to_thread(each.prepare, port) for each in hosts))
            await asyncio.gather(*(asyncio.to_thread(each.start_updater) for each in hosts))
            await until_ready(stage, *hosts)
            await roll_to(stage, hosts, "kernel-new", image.new)
            # Back is a rollout like any other.
            await roll_to(stage, hosts[:1], "kernel-old", image.old)
        except BaseException:
            for host in hosts:
                print(await asyncio.to_thread(host.account))
            raise


async def roll_to(stage: Any, hosts: Sequence[FleetHost], update: str, release: str) -> None:
    """Rollouts until every host is on the kernel, domain by domain.

    Ends are allowed by their names, for a busy machine's emulation is slow: a pause that was over its 30 s ("late"), and a guest
    that was not prepared or saved in time, so that it continued in the old kernel. They halt the rollout; another one takes the rest.
    """
    left = {host.name: host for host in hosts}
    clocks = {host.name: await asyncio.to_thread(host.clock_offset_s) for host in hosts}
    tries = 0
    while left:
        tries += 1
        begun = time.monotonic()
        rollout = await roll(stage, hosts, update, selection=m.Selection(hosts=tuple(left)))
        state = await stage.ended(rollout, timeout_s=ROLLOUT_S)
        print(f"\n{update}: {state.status} {state.codes} {state.reason} in {time.monotonic() - begun:.0f} s")
        for report in await stage.reports(rollout):
            host = left[report.host]
            print(
                f"{report.host}: {report.status} {report.codes} {[(vm.vm, vm.pause_s, vm.detail) for vm in report.vms]}"
            )
            assert {vm.state for vm in report.vms} <= {"running"}
            await asyncio.to_thread(assert_continued, host, begun, release)
            if SLOW & set(report.codes):
                assert tries < TRIES, report.reason
                continue
            assert {vm.vm for vm in report.vms} == set(host.guests)
            assert report.status == "completed" or set(report.codes) == {"pause_over_budget"}, report
            assert all(f"under kernel {release} by the initramfs" in vm.detail for vm in report.vms), report
            assert (await asyncio.to_thread(host.machine.run, "uname -r")).strip() == release
            await asyncio.to_thread(assert_clock_kept, host, clocks[host.name])
            del left[report.host]
        if state.status == "completed":
            assert not left
        else:
            await stage.give_up(rollout)
        await until_ready(stage, *hosts)

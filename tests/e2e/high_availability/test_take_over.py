"""A leader is lost in every state of a wave, in every way: the other continues its rollout, and nobody sees an event lost, repeated or going back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

_STATES = ("scheduled", "frozen", "verifying", "soaking")
_ALL = bool(os.environ.get("CAESURA_TEST_TAKEOVER_ALL"))
"""The whole matrix: ``./check takeover``."""


def states(*in_ci: str) -> pytest.MarkDecorator:
    """The states of a wave in which the leader is lost."""
    return pytest.mark.parametrize("state", _STATES if _ALL else in_ci)


@states(*_STATES)
async def test_the_leader_is_killed(state: str, duo: Callable[..., Any]) -> None:
    pair = await duo()
    await pair.up()
    rollout = await pair.stage.roll(soak_s=2.0)
    async with pair.stage.held_in(state, rollout):
        await pair.sandbox.kill("one")
        await pair.until_leads("two")
    await pair.done(rollout)


@states("scheduled", "frozen")
async def test_the_leader_is_stopped_and_wakes_up(state: str, duo: Callable[..., Any]) -> None:
    """Its connections stay open: the database ends its session, and when it wakes it has no authority."""
    pair = await duo()
    await pair.up()
    rollout = await pair.stage.roll(soak_s=2.0)
    async with pair.stage.held_in(state, rollout):
        pair.sandbox.signal("one", signal.SIGSTOP)
        await pair.until_leads("two")
        pair.sandbox.signal("one", signal.SIGCONT)
    await pair.until_stands_by("one")
    await pair.done(rollout)
    # And back: the first continues what the second has begun.
    await pair.sandbox.kill("two")
    await pair.until_leads("one")


@states("scheduled", "verifying")
async def test_the_leader_is_cut_off_from_its_database(state: str, duo: Callable[..., Any]) -> None:
    pair = await duo()
    await pair.up()
    rollout = await pair.stage.roll(soak_s=2.0)
    async with pair.stage.held_in(state, rollout):
        pair.databases["one"].stall()
        await pair.until_leads("two")
        status = pair.status("one")
        assert status is not None
        assert status.online
        await pair.sandbox.until(
            lambda: "store" in pair.status("one").waits_for or "postgresql" in pair.status("one").waits_for,
            20,
            "it says what it waits for",
        )
    pair.databases["one"].cut()
    pair.databases["one"].flow()
    await pair.until_stands_by("one")
    await pair.done(rollout)


@pytest.mark.parametrize("how", ["reset", "silent"])
@states("scheduled", "soaking")
async def test_the_leader_is_cut_off_from_the_broker(state: str, how: str, duo: Callable[..., Any]) -> None:
    """It decides nothing that nobody would receive, and gives way, also when the connection looks alive."""
    pair = await duo()
    await pair.up()
    rollout = await pair.stage.roll(soak_s=2.0)
    async with pair.stage.held_in(state, rollout):
        pair.brokers["one"].stall()
        if how == "reset":
            pair.brokers["one"].cut()
        await pair.until_leads("two")
    pair.brokers["one"].cut()
    pair.brokers["one"].flow()
    await pair.until_stands_by("one")
    await pair.done(rollout)


@states("frozen")
async def test_the_leader_is_cut_off_from_database_and_broker_at_once(
    state: str, duo: Callable[..., Any]
) -> None:
    """As by its network: nothing tells anybody. It lost the lead before it can be reached again."""
    pair = await duo()
    await pair.up()
    rollout = await pair.stage.roll(soak_s=2.0)
    async with pair.stage.held_in(state, rollout):
        for path in (pair.databases["one"], pair.brokers["one"]):
            path.stall()
        await pair.until_leads("two")
    for path in (pair.databases["one"], pair.brokers["one"]):
        path.cut()
        path.flow()
    await pair.until_stands_by("one")
    await pair.done(rollout)


@states("scheduled", "frozen")
async def test_the_database_is_restarted(state: str, duo: Callable[..., Any]) -> None:
    pair = await duo()
    await pair.up()
    rollout = await pair.stage.roll(soak_s=2.0)
    async with pair.stage.held_in(state, rollout):
        await pair.server.kill()
        await pair.sandbox.until(
            lambda: all(pair.status(name).waits_for.startswith("cannot") for name in ("one", "two")),
            30,
            "both say that they wait for the store",
        )
        await pair.server.start()
    await pair.done(rollout)


async def test_a_rollout_waits_for_its_store_and_says_so(duo: Callable[..., Any]) -> None:
    """The database hangs for less than the lease: nobody takes over, nothing is decided meanwhile, and it continues."""
    pair = await duo(lease_s="60")
    await pair.up()
    rollout = await pair.stage.roll()
    await pair.stage.wave(rollout, 0, "scheduled")
    pair.databases["one"].stall()
    await pair.sandbox.until(lambda: "has not answered" in pair.status("one").waits_for, 30, "it says so")
    assert pair.status("one").leads
    assert not pair.sandbox.watch.pauses
    pair.databases["one"].flow()
    await pair.done(rollout)
    assert pair.status("one").leads
    assert pair.status("one").waits_for == ""


async def test_a_promoted_replica_has_everything(duo: Callable[..., Any]) -> None:
    pair = await duo(lease_s="6")  # two servers need more than two seconds each
    replica = await pair.server.replica()
    try:
        hosts = f"127.0.0.1:{pair.server.port},127.0.0.1:{replica.port}"
        for name in ("one", "two"):
            _, environment = pair.sandbox.environments[name]
            environment["CAESURA_COORDINATOR_STORE"] = f"postgresql://caesura@{hosts}/caesura"
        await pair.up()
        rollout = await pair.stage.roll(soak_s=2.0)
        async with pair.stage.held_in("scheduled", rollout):
            await pair.server.kill()
            await replica.sql("ALTER SYSTEM RESET synchronous_standby_names", database="postgres")
            await replica.promote()
        await pair.done(rollout)
    finally:
        await replica.close()


@pytest.mark.parametrize("number", range(100 if _ALL else 3))
async def test_both_are_started_at_once(number: int, duo: Callable[..., Any]) -> None:
    pair = await duo()
    await asyncio.gather(
        *(pair.sandbox.start(name) for name in ("one", "two", "host-1", "host-2", "metadata"))
    )
    await pair.stage.ready("host-1", "host-2")
    leader = pair.stage.fleet_view.coordinator.coordinator.rsplit("-", 1)[0]
    await pair.until_stands_by("two" if leader == "one" else "one")
    rollout = await pair.stage.roll()
    await pair.done(rollout)
    assert pair.stage.fleet_view.coordinator.epoch == 1


async def test_status_shows_who_leads_and_who_stands_by(duo: Callable[..., Any]) -> None:
    pair = await duo()
    await pair.up()
    shown = await asyncio.create_subprocess_exec(
        "caesura", "status", "--broker", pair.sandbox.broker.url, stdout=asyncio.subprocess.PIPE
    )
    text = (await shown.communicate())[0].decode()
    assert "one: leads" in text
    assert "two: stands by: another coordinator leads" in text


async def test_a_standby_that_is_killed_is_not_counted_until_it_is_back(duo: Callable[..., Any]) -> None:
    """It says goodbye to nobody: its last will takes back what it said."""
    pair = await duo()
    await pair.up()
    await pair.sandbox.kill("two")
    await pair.sandbox.until(lambda: not pair.status("two").online, 30, "it is seen as gone")
    # On a busy machine it may have lost the lead meanwhile, and gets it again.
    await pair.sandbox.until(lambda: pair.leads("one"), 30, "the other one leads")
    await pair.sandbox.start("two")
    await pair.until_stands_by("two")


async def test_a_store_that_must_not_be_used_ends_the_service_by_name(duo: Callable[..., Any]) -> None:
    pair = await duo()
    await pair.up()
    await pair.sandbox.stop("two")
    await pair.server.sql("UPDATE caesura.store SET version = 99")
    await pair.sandbox.start("two")
    assert await pair.sandbox.until_exit("two", 20) == 2
    assert "schema version 99" in pair.sandbox.events("two")[-1]["why"]
    assert pair.leads("one"), "the older leader stays until it is replaced"


async def test_those_that_share_a_store_do_not_fight_a_coordinator_with_another_one(
    duo: Callable[..., Any],
) -> None:
    pair = await duo()
    await pair.up()
    pair.sandbox.coordinator("stranger")
    await pair.sandbox.start("stranger")
    await pair.until_leads("stranger")
    await pair.sandbox.until(
        lambda: all("with another store" in pair.status(name).waits_for for name in ("one", "two")),
        30,
        "both stand by and say why",
    )
    epoch = pair.stage.fleet_view.coordinator.epoch
    assert pair.leads("stranger")
    await pair.sandbox.stop("stranger")
    await pair.sandbox.until(lambda: pair.leads("one") or pair.leads("two"), 30, "one of them leads again")
    assert pair.stage.fleet_view.coordinator.epoch == epoch + 1

"""Read-only commands: status, watch, history, updates, tail."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import click
import msgspec
from rich.text import Text

from caesura.contract import messages as m
from caesura.contract.codec import Received
from caesura.contract.topics import CHANNELS, PREFIX
from caesura_ctl.completion import complete
from caesura_ctl.console import visible_json
from caesura_ctl.errors import NotCompleted
from caesura_ctl.follow import REFRESH_S, conclude, follow
from caesura_ctl.name_params import NAME, SET_NAME
from caesura_ctl.options import Context, common, epilog, note, print_json, run
from caesura_ctl.session import connect
from caesura_ctl.tables import (
    attention_view,
    documents_view,
    domains_view,
    history_view,
    hosts_view,
    rollout_view,
)
from caesura_ctl.updates_table import updates_view
from caesura_ctl.version_skew import not_together

_THINGS = ("the store", "the broker", "the end of ", "a sign of ", "its next try")
"""How what a standby waits for begins where it is a thing, and not a sentence of its own."""


@click.command(epilog=epilog("caesura status", "caesura status --json"))
@common
def status(broker: str | None, *, as_json: bool) -> None:
    """Show coordinator, hosts, sets and domains, open events, and the current rollout."""

    async def body(context: Context) -> None:
        async with connect(context.settings) as session:
            await session.settled()
            fleet_view = session.fleet_view
        rollout = fleet_view.latest()
        if context.json:
            print_json(
                {
                    "coordinator": fleet_view.coordinator,
                    "coordinators": [
                        {
                            **msgspec.to_builtins(each),
                            "silent_s": round(fleet_view.silence_s(each.coordinator), 1),
                        }
                        for each in sorted(
                            fleet_view.coordinators.values(), key=lambda each: each.coordinator
                        )
                    ],
                    "hosts": [
                        {"online": fleet_view.is_online(name), "inventory": each}
                        for name, each in sorted(fleet_view.hosts.items())
                    ],
                    "agents": sorted(fleet_view.agents.values(), key=lambda each: each.vm),
                    "publishers": fleet_view.publishers,
                    "documents": sorted(fleet_view.documents.values(), key=lambda each: each.set),
                    "rollout": rollout,
                }
            )
            return
        boss = fleet_view.coordinator
        context.console.print(
            # A last will has no epoch.
            f"coordinator: {boss.coordinator}, {f'epoch {boss.epoch}, ' if boss.epoch else ''}{'online' if boss.online else 'OFFLINE'}"
            if boss
            else "coordinator: never seen on this broker"
        )
        for each in sorted(
            fleet_view.coordinators.values(), key=lambda each: (not each.leads, each.coordinator)
        ):
            role = _role(
                each,
                boss.epoch if boss else 0,
                fleet_view.silence_s(each.coordinator),
                announced_gone=boss is not None and not boss.online,
            )
            context.console.print(Text(f"  {each.coordinator}: {role}"))
        silent = sorted(
            vm
            for vm, (_, record) in fleet_view.vm_places().items()
            if record.agent and not _online(fleet_view.agents.get(vm))
        )
        context.console.print(hosts_view(fleet_view))
        context.console.print(domains_view(fleet_view))
        if (attention := attention_view(fleet_view)) is not None:
            context.console.print(attention)
        for line in not_together(fleet_view.hosts):
            context.console.print(Text(line))
        if silent:
            context.console.print(f"agents silent: {', '.join(silent)}")
        if any(document.events for document in fleet_view.documents.values()):
            context.console.print(documents_view(fleet_view))
        if rollout:
            context.console.print(rollout_view(rollout, fleet_view, datetime.now(UTC)))

    run(body, broker, as_json=as_json)


def _role(
    coordinator: m.CoordinatorStatus, epoch: int, silence_s: float = 0.0, *, announced_gone: bool = False
) -> str:
    """What one of several coordinators does, in words.

    Args:
        epoch: of the one that leads.
        silence_s: how long it has announced nothing while another did; 0: it may be there.
        announced_gone: whether the one that led is gone, as the broker says, and no other leads.
    """
    if coordinator.leads and announced_gone:
        return f"led with epoch {coordinator.epoch}, it is not on the broker"
    if coordinator.leads and coordinator.epoch < epoch:  # it was killed: nobody takes back what it said last
        return f"led with epoch {coordinator.epoch}, it has sent nothing since"
    if coordinator.leads:
        silence_s = 0.0  # it is on the bus: the clock of another one is ahead
    if coordinator.online and silence_s:
        return f"stood by, it has sent nothing for {silence_s:.0f} s"
    role = "leads" if coordinator.leads else "stands by" if coordinator.online else "OFFLINE"
    if not coordinator.waits_for:
        return role
    # Nothing that it decides is stored, so no rollout moves until then.
    if coordinator.leads:
        return f"{role}, rollouts wait for {coordinator.waits_for}"
    if coordinator.waits_for.startswith(_THINGS):
        return f"{role}, waits for {coordinator.waits_for}"
    return f"{role}: {coordinator.waits_for}"


def _online(agent: m.AgentPresence | None) -> bool:
    return agent is not None and agent.online


@click.command(epilog=epilog("caesura watch", "caesura watch 20260420-221158-1f3a"))
@click.argument("rollout", default="", shell_complete=complete("rollout"))
@common
def watch(rollout: str, broker: str | None, *, as_json: bool) -> None:
    """Watch a rollout live: sets and update domains, waves, who is paused now.

    Without ROLLOUT: the newest one. Ends with it; Ctrl-C stops watching, not the rollout. Hosts publish pauses
    as they happen, and the bus does not keep them: earlier ones are not shown. With --json, "pauses" are those
    that this command received, and "pauses_complete" says whether these are all.
    """

    async def body(context: Context) -> None:
        async with connect(context.settings) as session:
            await session.settled()
            latest = session.fleet_view.latest()
            chosen = rollout or (latest.rollout if latest else "")
            if chosen not in session.fleet_view.rollouts:
                raise NotCompleted(
                    f"no rollout {chosen!r} on this broker; see: caesura history"
                    if chosen
                    else "no rollout yet"
                )
            conclude(session, context, await follow(session, context, chosen))

    run(body, broker, as_json=as_json)


@click.command(
    epilog=epilog(
        "caesura history", "caesura history --limit 5 --json", "caesura history 20260420-221158-1f3a"
    )
)
@click.argument("rollout", default="", shell_complete=complete("rollout"))
@click.option(
    "--limit",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="How many to show, newest first.",
)
@common
def history(rollout: str, limit: int, broker: str | None, *, as_json: bool) -> None:
    """List past rollouts, newest first; with ROLLOUT, that one: its waves, its reason, the last output of failed updates."""

    async def body(context: Context) -> None:
        async with connect(context.settings, [m.RolloutState]) as session:
            await session.settled()
            one = session.fleet_view.rollouts.get(rollout) if rollout else None
            if rollout and one is None:
                raise NotCompleted(f"no rollout {rollout!r} on this broker; see: caesura history")
            rollouts = sorted(
                session.fleet_view.rollouts.values(), key=lambda each: each.created_at, reverse=True
            )[:limit]
        if one is not None:
            if context.json:
                print_json(one)
            else:
                context.console.print(rollout_view(one, session.fleet_view, datetime.now(UTC)))
        elif context.json:
            print_json(rollouts)
        elif rollouts:
            context.console.print(history_view(rollouts))
        else:
            context.console.print("no rollout yet")

    run(body, broker, as_json=as_json)


@click.command(epilog=epilog("caesura updates", "caesura updates --json"))
@common
def updates(broker: str | None, *, as_json: bool) -> None:
    """List the updates that the hosts know how to apply, and the files in updates.d that they refused."""

    async def body(context: Context) -> None:
        async with connect(context.settings, [m.HostInventory]) as session:
            await session.settled()
            fleet_view = session.fleet_view
        if context.json:
            print_json(
                {
                    name: {
                        "updates": each.updates,
                        "refused": each.refused_updates,
                        "installed": each.installed,
                    }
                    for name, each in sorted(fleet_view.hosts.items())
                }
            )
        elif fleet_view.hosts:
            context.console.print(updates_view(fleet_view))
        else:
            context.console.print("no host has reported yet")

    run(body, broker, as_json=as_json)


@click.command(
    epilog=epilog(
        "caesura tail",
        "caesura tail --type caesura.vm.resumed.v1 --set web",
        "caesura tail --vm web-1 --json | jq .data",
    ),
)
@click.option(
    "--type",
    "kinds",
    multiple=True,
    metavar="TYPE",
    help="Only this CloudEvents type; may be given several times.",
)
@click.option(
    "--set",
    "set_name",
    type=SET_NAME,
    shell_complete=complete("set"),
    metavar="NAME",
    help="Only messages of this set.",
)
@click.option(
    "--host", type=NAME, shell_complete=complete("host"), metavar="NAME", help="Only messages of this host."
)
@click.option(
    "--vm", type=NAME, shell_complete=complete("vm"), metavar="NAME", help="Only messages of this VM."
)
@click.option("--count", type=click.IntRange(1), help="Stop after this many messages.")
@common
def tail(
    broker: str | None, *, as_json: bool, kinds: tuple[str, ...], count: int | None, **wanted: str | None
) -> None:
    """Follow the bus: every message as it arrives, one per line; retained ones come first.

    Any MQTT client can do the same: see examples/consumer.py.
    """
    known = {channel.message.TYPE for channel in CHANNELS}
    for kind in kinds:
        if kind not in known:
            raise click.BadParameter(f"{kind!r} is none of {', '.join(sorted(known))}", param_hint="--type")
    filters = {"set": wanted["set_name"], "host": wanted["host"], "vm": wanted["vm"]}

    async def body(context: Context) -> None:
        done = asyncio.Event()
        shown = 0

        async def show(received: Received) -> None:
            nonlocal shown
            if done.is_set() or not _matches(received, kinds, filters):
                return
            _print_message(context, received)
            shown += 1
            if shown == count:
                done.set()

        async with connect(context.settings, listener=show) as session:
            while not done.is_set():
                for each in session.connection.news():
                    note(each, as_json=context.json)
                with suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S):
                        await done.wait()

    run(body, broker, as_json=as_json)


def _matches(received: Received, kinds: tuple[str, ...], filters: dict[str, str | None]) -> bool:
    if kinds and received.header.type not in kinds:
        return False
    body: dict[str, Any] = msgspec.to_builtins(received.message)
    return all(
        value is None or value in {received.parameters.get(name), body.get(name)}
        for name, value in filters.items()
    )


def _print_message(context: Context, received: Received) -> None:
    topic = received.channel.topic(**received.parameters)
    if context.json:
        header = msgspec.to_builtins(received.header)
        print_json({"topic": topic, **header, "data": received.message})
        return
    context.console.print(
        f"{received.header.time:%H:%M:%S.%f}",
        Text(topic.removeprefix(PREFIX + "/"), style="bold"),
        Text(visible_json(msgspec.json.encode(received.message))),  # no markup: the text comes from others
        soft_wrap=True,
    )

"""Makes a run of the options of the command line, which are checked against each other. A module of its own: ``--help`` does not need what it imports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from caesura.contract.names import InvalidName, check_name
from caesura_rehearse.commands.run import RunOptions, refused_together
from caesura_rehearse.network.address import GATEWAY, with_port
from caesura_rehearse.results.expectations import Expectation
from caesura_rehearse.scenarios.reader import read_scenario
from caesura_rehearse.scenarios.scenario import Scenario
from caesura_rehearse.simulation.faults import Fault
from caesura_rehearse.simulation.members import SetMember, check_known, members_of
from caesura_rehearse.simulation.orders import EVENT_NAMES, Order
from caesura_rehearse.simulation.placeholders import NAMES, fill


def run_options(
    context: click.Context, argv: tuple[str, ...], options: dict[str, Any], *, as_json: bool
) -> RunOptions:
    """What the command line asks for, after all that can be checked without starting anything.

    Args:
        argv: the program.
        options: those of the command, by name.

    Raises:
        UsageError: options exclude or need each other.
        ConfigError: a scenario, a name or a placeholder cannot be used.
    """
    events = [
        ("--scenario", options["scenario"]),
        ("--freeze", options["freeze"] is not None),
        *((f"--{each}", options[each]) for each in EVENT_NAMES if each != "freeze"),
        ("--replay", options["replay"]),
    ]
    container = options["container"] or options["compose_service"]
    address = with_port(options["address"]) if options["address"] else ""
    for why in (
        refused_together(events),
        refused_together(
            [
                ("a program after --", argv),
                *(
                    (f"--{each}", options[each.replace("-", "_")])
                    for each in ("pid", "cgroup", "container", "compose-service")
                ),
            ]
        ),
        _event_refused(options, [name for name, given in events if given]),
        refused_together([(f"--{each}", options[each]) for each in ("netns", "proxy", "address")]),
        _network_refused(options, has_program=bool(argv), has_container=bool(container)),
        _container_refused(context, address, has_container=bool(container)),
    ):
        if why:
            raise click.UsageError(why, context)
    wanted = next((name.removeprefix("--") for name, given in events if given and name != "--replay"), None)
    scenario = read_scenario(options["scenario"]) if wanted == "scenario" else None
    members = _members(context, options, scenario)
    _check_members(context, options, scenario, members, argv)
    order = None
    if wanted is not None and scenario is None:
        order = Order(
            event=EVENT_NAMES[wanted],
            notice_s=options["notice"],
            duration_s=options["freeze"] or 0.0,
            source=options["source"].title(),
            grace_s=options["grace"],
        )
    return RunOptions(
        argv=argv,
        pid=options["pid"],
        cgroup=options["cgroup"],
        container=options["container"] or "",
        compose_service=options["compose_service"] or "",
        engine=options["engine"] or "",
        order=order,
        replay=options["replay"],
        pause_at_start_s=options["pause_at_start"] or 0.0,
        scenario=scenario,
        expectations=(*(scenario.expectations if scenario else ()), *options["expectations"]),
        members=members,
        port=options["port"],
        speed=options["speed"],
        settle_s=options["settle"],
        freezer=options["freezer"],
        proxy=options["proxy"],
        netns=options["netns"],
        publish=options["publish"],
        address=address,
        faults=tuple(options["faults"]),
        broker=options["broker"] or "",
        control=options["control"],
        own_stdout=as_json,
    )


def _event_refused(options: dict[str, Any], ordered: list[str]) -> str:
    """Which option does not fit what is ordered or replayed; empty: all do."""
    if options["replay"]:
        if options["notice"] is not None:
            return "--notice and --replay exclude each other: a recording has its own times"
        if options["broker"]:
            return "--broker and --replay exclude each other: what was recorded is not on the bus"
        return ""
    if options["pause_at_start"] is not None:
        return "--pause-at-start needs --replay"
    if options["scenario"] and options["notice"] is not None:
        return "--notice is for an event of the command line: the scenario has its own"
    if not ordered and (options["notice"] is not None or options["expectations"]):
        return "--notice and --expect need an event: --freeze, --reboot, --redeploy, --preempt or --terminate, or a --scenario"
    return ""


def _network_refused(options: dict[str, Any], *, has_program: bool, has_container: bool) -> str:
    """Which option of the network has nothing that it is for; empty: each has."""
    if options["proxy"] and not has_program:
        return "--proxy needs a program after --"
    if options["netns"] and not (has_program or has_container):
        return "--netns needs a program after --, or a container"
    if options["publish"] and (not options["netns"] or has_container):
        return "--publish needs --netns and a program: without it the program has the network of this machine"
    return ""


def _container_refused(context: click.Context, address: str, *, has_container: bool) -> str:
    """Which option is for containers only; empty: there is one, or none is given."""
    if has_container:
        return ""
    if context.get_parameter_source("engine") == ParameterSource.COMMANDLINE:
        return "--engine needs --container or --compose-service"
    return (
        "--address gateway needs --container or --compose-service"
        if address.startswith(f"{GATEWAY}:")
        else ""
    )


def _members(
    context: click.Context, options: dict[str, Any], scenario: Scenario | None
) -> tuple[SetMember, ...]:
    """The VMs. Raises UsageError: options for them contradict each other, or the scenario."""
    count, set_name, vm = options["vms"], options["set_name"], options["vm"]
    if scenario is not None and scenario.members:
        for name, key in (("--vms", "vms"), ("--vm", "vm"), ("--set", "set_name")):
            if context.get_parameter_source(key) == ParameterSource.COMMANDLINE:
                raise click.UsageError(
                    f"{name}: this scenario says itself which VMs there are, see [[set]] in {scenario.file}",
                    context,
                )
        return scenario.members
    if count is None:
        return (SetMember(vm=vm or f"{set_name}-1", set=set_name),)
    if vm is not None:
        raise click.UsageError(
            f"--vm and --vms exclude each other: with --vms the names are {set_name}-1 to {set_name}-{count}",
            context,
        )
    return members_of(set_name, count)


def _check_members(
    context: click.Context,
    options: dict[str, Any],
    scenario: Scenario | None,
    members: Sequence[SetMember],
    argv: Sequence[str],
) -> None:
    """Whether all that names VMs names these, and what is for one VM is not for several. Raises UsageError and ConfigError."""
    try:
        for each in members:
            check_name("VM", each.vm)
            check_name("set", each.set)
    except InvalidName as error:
        raise click.UsageError(str(error), context) from error
    several = len(members) > 1
    if (
        several
        and not argv
        and any(options[each] for each in ("pid", "cgroup", "container", "compose_service"))
    ):
        raise click.UsageError("several VMs need a program after --, which each of them runs", context)
    for name in ("address", "publish", "replay"):
        if several and options[name]:
            raise click.UsageError(f"--{name} is for one VM, here are {len(members)}", context)
    named: list[Expectation | Fault] = [*options["expectations"], *options["faults"]]
    if scenario is not None:
        scenario.check_members(members)
        named += [*scenario.expectations, *scenario.faults]
    check_known("VM", [each.vm for each in named if each.vm], [each.vm for each in members])
    fill(argv, dict.fromkeys(NAMES, ""), strict=several)

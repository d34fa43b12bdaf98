"""Commands that send requests: plan, roll, freeze, abort, resume."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from caesura.contract import messages as m
from caesura.lifecycle.budget import budget_refusal
from caesura_ctl.blast import again, confirm, everything, limits, limits_from
from caesura_ctl.completion import complete
from caesura_ctl.durations import BUDGET, show_duration
from caesura_ctl.errors import RefusedByCoordinator, RequestInterrupted
from caesura_ctl.follow import conclude, follow
from caesura_ctl.name_params import NAME
from caesura_ctl.options import Context, common, epilog, policy, policy_from, print_json, run, selection
from caesura_ctl.session import R, Session, check, connect, new_request_id
from caesura_ctl.tables import plan_view


def _chosen(options: dict[str, Any]) -> m.Selection:
    return m.Selection(sets=options["sets"], hosts=options["hosts"], vms=options["vms"])


async def _start(
    session: Session, context: Context, request: m.RolloutRequested | m.FreezeRequested, *, detach: bool
) -> None:
    answer = await (session.ask(request) if request.plan_only else _ask(session, request))
    if answer.plan is not None and not context.json:
        context.console.print(plan_view(answer.plan))
    if not answer.accepted:
        if context.json:
            print_json(answer)
        raise RefusedByCoordinator(answer.reason + await _refused_files(session, request))
    if request.plan_only or detach or not answer.rollout:
        if context.json:
            print_json(answer)
        elif answer.rollout:
            context.console.print(f"{_accepted(answer)}; follow it with: caesura watch {answer.rollout}")
        elif answer.reason:
            context.console.print(answer.reason)
        return
    if not context.json:
        context.console.print(f"{_accepted(answer)}; Ctrl-C stops watching, not the rollout")
    state = await follow(session, context, answer.rollout)
    conclude(session, context, state)


def _accepted(answer: m.RequestAnswered) -> str:
    if not answer.queued_behind:
        return f"rollout {answer.rollout} started"
    at = f", not before {answer.not_before:%Y-%m-%d %H:%M:%S}Z" if answer.not_before is not None else ""
    return f"rollout {answer.rollout} is {answer.reason}{at}"


async def _ask(session: Session, request: R) -> m.RequestAnswered:
    """Send a request that changes something.

    Raises:
        RequestInterrupted: a signal ended the command in the meantime.
    """
    try:
        return await session.ask(request)
    except asyncio.CancelledError:
        raise RequestInterrupted from None


async def _refused_files(session: Session, request: m.RolloutRequested | m.FreezeRequested) -> str:
    """The hosts that refused the update's file: an update that no host defines may have an error in its file."""
    if isinstance(request, m.FreezeRequested):
        return ""
    await session.settled()
    file = f"{request.update}.toml"
    hosts = [
        name
        for name, inventory in sorted(session.fleet_view.hosts.items())
        if any(each.file == file for each in inventory.refused_updates)
    ]
    return f"; {file} was refused by {', '.join(hosts)}: see caesura updates" if hosts else ""


@click.command(
    epilog=epilog("caesura plan qemu-security", "caesura plan qemu-security --set web --notice 30s --json"),
)
@click.argument("update", type=NAME, shell_complete=complete("update"))
@selection
@everything
@limits
@again
@policy
@common
def plan(update: str, broker: str | None, *, as_json: bool, **options: Any) -> None:
    """Show what a rollout of UPDATE would do: waves, method and reason per VM, refusals, an estimate.

    Nothing is changed, so without a selection the whole fleet is planned without confirmation; `roll` asks. Exit code 3 if the plan is refused.
    """

    async def body(context: Context) -> None:
        async with connect(context.settings) as session:
            request = m.RolloutRequested(
                request=new_request_id(),
                update=update,
                selection=_chosen(options),
                policy=policy_from(options),
                limits=limits_from(options),
                plan_only=True,
            )
            await _start(session, context, request, detach=True)

    run(body, broker, as_json=as_json)


@click.command(
    epilog=epilog(
        "caesura roll qemu-security --set web --notice 2m --soak 5m",
        "caesura roll qemu-security --all --canary 1 --soak 30m --max-hosts 4 --exclude-host host-9",
        "caesura roll qemu-security --host host-3 --detach --json",
    ),
)
@click.argument("update", type=NAME, shell_complete=complete("update"))
@selection
@everything
@limits
@again
@policy
@click.option(
    "--queue/--no-queue",
    default=False,
    show_default=True,
    help="If another rollout holds one of the sets: wait for its end, or be refused.",
)
@click.option("--detach", is_flag=True, help="Return as soon as the rollout has started or is queued.")
@common
def roll(
    update: str, broker: str | None, *, as_json: bool, queue: bool, detach: bool, **options: Any
) -> None:
    """Roll UPDATE out, one domain of a set at a time, and watch it to its end.

    UPDATE is a name from updates.d of the hosts (see: caesura updates). Hosts that already have it are skipped. Without a
    selection it asks on a terminal, and otherwise requires --all. With --queue it waits for rollouts that hold its sets; its plan is
    made now and not again.
    """
    confirm("roll out", options, as_json=as_json, what=update)

    async def body(context: Context) -> None:
        async with connect(context.settings) as session:
            request = m.RolloutRequested(
                request=new_request_id(),
                update=update,
                selection=_chosen(options),
                policy=policy_from(options),
                limits=limits_from(options),
                queue=queue,
            )
            await _start(session, context, request, detach=detach)

    run(body, broker, as_json=as_json)


@click.command(
    epilog=epilog(
        "caesura freeze --vm web-1 --for 9s --notice 15s",
        "caesura freeze --set web --for 2s --notice 1m --soak 10s",
        "caesura freeze --set web --for 2s --no-queue",
    ),
)
@click.option("--for", "hold", type=BUDGET, required=True, help="How long to stay frozen, for example 9s.")
@selection
@everything
@limits
@policy
@click.option("--plan-only", is_flag=True, help="Only show what would happen.")
@click.option(
    "--queue/--no-queue",
    default=True,
    show_default=True,
    help="If another rollout holds one of the sets: wait for its end, or be refused.",
)
@click.option("--detach", is_flag=True, help="Return as soon as it has started or is queued.")
@common
def freeze(
    hold: float,
    broker: str | None,
    *,
    as_json: bool,
    plan_only: bool,
    queue: bool,
    detach: bool,
    **options: Any,
) -> None:
    """Freeze VMs on demand, with notice through the Scheduled Events API, one domain of a set at a time.

    For testing that an application survives a Freeze: nothing is updated, the VMs are only paused. If another rollout holds one of the
    sets, it is queued behind that one: announced at once with a later NotBefore, and started when that one has ended. It never
    runs beside it.
    """
    # The planner's rule and the host's: here it costs no question and no answer.
    if why := budget_refusal(options["budget"], hold):
        raise click.UsageError(f"--for {show_duration(hold)}: {why}")
    if not plan_only:
        confirm("freeze VMs", options, as_json=as_json)

    async def body(context: Context) -> None:
        async with connect(context.settings) as session:
            request = m.FreezeRequested(
                request=new_request_id(),
                selection=_chosen(options),
                hold_s=hold,
                policy=policy_from(options),
                limits=limits_from(options),
                plan_only=plan_only,
                queue=queue,
            )
            await _start(session, context, request, detach=detach)

    run(body, broker, as_json=as_json)


@click.command(epilog=epilog("caesura abort", "caesura abort 20260420-221158-1f3a --reason 'wrong update'"))
@click.argument("rollout", default="", shell_complete=complete("rollout"))
@click.option("--reason", default="", help="Why; it is kept in the record.")
@common
def abort(rollout: str, reason: str, broker: str | None, *, as_json: bool) -> None:
    """Abort a rollout in any state; no VM stays paused.

    Without ROLLOUT: the only one that has not ended.
    """

    async def body(context: Context) -> None:
        request = m.AbortRequested(request=new_request_id(), rollout=rollout, reason=reason)
        check(request)
        async with connect(context.settings) as session:
            await _send_control(session, context, request, "aborting")

    run(body, broker, as_json=as_json)


@click.command(epilog=epilog("caesura resume", "caesura resume 20260420-221158-1f3a --detach"))
@click.argument("rollout", default="", shell_complete=complete("rollout"))
@click.option("--detach", is_flag=True, help="Return at once instead of watching to the end.")
@common
def resume(rollout: str, broker: str | None, *, as_json: bool, detach: bool) -> None:
    """Resume a halted rollout: the failed wave is tried again, completed hosts are not paused again.

    Without ROLLOUT: the only one that has not ended.
    """

    async def body(context: Context) -> None:
        request = m.ResumeRequested(request=new_request_id(), rollout=rollout)
        check(request)
        async with connect(context.settings) as session:
            await session.settled()
            before = dict(session.fleet_view.rollouts)
            started = await _send_control(session, context, request, "resuming", last_word=detach)
            if not detach:
                if session.fleet_view.rollouts.get(started) is before.get(started):
                    # The retained state still says halted; the coordinator's next message may be its last one, too.
                    session.fleet_view.rollouts.pop(started, None)
                conclude(session, context, await follow(session, context, started))

    run(body, broker, as_json=as_json)


async def _send_control(
    session: Session,
    context: Context,
    request: m.AbortRequested | m.ResumeRequested,
    word: str,
    *,
    last_word: bool = True,
) -> str:
    """Send the request and print the answer; as JSON only if no other output follows, since a script reads one document."""
    answer = await _ask(session, request)
    if context.json and (last_word or not answer.accepted):
        print_json(answer)
    if not answer.accepted:
        raise RefusedByCoordinator(answer.reason)
    if not context.json:
        context.console.print(f"{word} rollout {answer.rollout}")
    return answer.rollout

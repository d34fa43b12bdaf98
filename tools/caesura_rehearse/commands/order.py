"""``caesura rehearse freeze`` and so on: orders for a rehearsal that runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from caesura.contract.messages import EventType
from caesura.runtime.errors import CaesuraError
from caesura.runtime.visible import visible
from caesura_ctl.durations import DURATION, Duration, show_duration
from caesura_ctl.errors import fail
from caesura_ctl.name_params import NAME
from caesura_ctl.options import print_json
from caesura_rehearse.control.file import ControlAddress, NoRehearsal, find_control
from caesura_rehearse.simulation.orders import EVENT_NAMES, MAX_PAUSE_S, MINIMUM_NOTICE_S

F = TypeVar("F", bound=Callable[..., Any])

_ROLLOUT_MOST_S = 8 * 86400.0  # s: a notice may be a week
_WAIT_MORE_S = 60.0  # s: more than the rehearsal itself waits

_ABOUT: dict[EventType, str] = {
    "Freeze": "Order a Freeze: the program is paused, and continues.",
    "Reboot": "Order a Reboot: SIGTERM, later SIGKILL, and the program is started again.",
    "Redeploy": "Order a Redeploy: as a Reboot, under another name.",
    "Preempt": "Order a Preempt (spot eviction): SIGTERM, later SIGKILL.",
    "Terminate": "Order a Terminate (scale set delete): SIGTERM, later SIGKILL.",
}


def _common(command: F) -> F:
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return click.option(
        "--control",
        type=click.Path(dir_okay=False, path_type=Path),
        help="The control file of the rehearsal, if several run.",
    )(command)


def _asked(work: Callable[[ControlAddress], Any], control: Path | None, *, as_json: bool) -> Any:
    try:
        return work(find_control(control))
    except CaesuraError as error:
        fail(error, as_json=as_json)


def _show(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(record)
        return
    if "rollout_id" in record:
        waves = "; ".join(", ".join(each) for each in record["waves"])
        state = record["outcome"] or f"update domain {record['waves_begun']} of {len(record['waves'])}"
        click.echo(visible(f"{record['rollout_id']}  {record['event']} of {waves}: {state}"))
        return
    state = record["outcome"] or ("started" if record["started"] is not None else "scheduled")
    click.echo(visible(f"{record['event_id']}  {record['event']} of {', '.join(record['vms'])}: {state}"))


def _order_command(word: str, event: EventType) -> click.Command:
    @click.command(word, help=f"{_ABOUT[event]} For a rehearsal that runs.")
    @click.option(
        "--notice",
        type=DURATION,
        show_default=f"the real one's minimum, {show_duration(MINIMUM_NOTICE_S[event])}",
        help="Time until NotBefore.",
    )
    @click.option(
        "--vm",
        "vms",
        type=NAME,
        multiple=True,
        metavar="NAME",
        help="A VM; several of one update domain. [default: the first update domain]",
    )
    @click.option(
        "--set",
        "sets",
        type=NAME,
        multiple=True,
        metavar="NAME",
        help="A set: its update domains one after the other.",
    )
    @click.option("--source", type=click.Choice(["platform", "user"]), default="platform", show_default=True)
    @click.option("--wait", is_flag=True, help="Wait until the event is over.")
    @_common
    def order(
        *,
        notice: float | None,
        vms: tuple[str, ...],
        sets: tuple[str, ...],
        source: str,
        wait: bool,
        control: Path | None,
        as_json: bool,
        **more: Any,
    ) -> None:
        body: dict[str, Any] = {
            "event": event,
            "notice_s": notice,
            "vms": list(vms),
            "source": source.title(),
        }
        if "for_s" in more:
            body["duration_s"] = more["for_s"]
        if vms and sets:
            raise click.UsageError("--vm and --set exclude each other")

        def work(address: ControlAddress) -> Any:
            if sets:
                return _roll(address, {**body, "sets": list(sets)}, wait=wait)
            record = address.call("POST", "/v1/events", body)
            if wait:
                took_s = record["notice_s"] + record["duration_s"] + _WAIT_MORE_S
                record = address.call(
                    "POST", f"/v1/events/{record['event_id']}/wait", {"step": "ended"}, timeout_s=took_s
                )
            return record

        _show(_asked(work, control, as_json=as_json), as_json=as_json)

    if event == "Freeze":
        order = click.option(
            "--for",
            "for_s",
            type=Duration(most_s=MAX_PAUSE_S),
            default=9.0,
            show_default="9s",
            help="How long it is paused; 0s: announced only.",
        )(order)
    return order


def _roll(address: ControlAddress, body: dict[str, Any], *, wait: bool) -> Any:
    record = address.call("POST", "/v1/rollouts", body)
    if wait:
        # The rehearsal knows best when it is over, and ends it in any case.
        record = address.call(
            "POST", f"/v1/rollouts/{record['rollout_id']}/wait", {}, timeout_s=_ROLLOUT_MOST_S
        )
    return record


def _event_command(word: str, about: str) -> click.Command:
    @click.command(word, help=about)
    @click.argument("event_id", required=False)
    @_common
    def on_event(*, event_id: str | None, control: Path | None, as_json: bool) -> None:
        def work(address: ControlAddress) -> Any:
            wanted = event_id or _only_open(address)
            return address.call("POST", f"/v1/events/{wanted}/{word}", {})

        _show(_asked(work, control, as_json=as_json), as_json=as_json)

    return on_event


def _only_open(address: ControlAddress) -> str:
    waiting = [
        each["event_id"]
        for each in address.call("GET", "/v1/state")["events"]
        if not each["outcome"] and each["started"] is None
    ]
    if len(waiting) != 1:
        raise NoRehearsal(
            f"name one of the scheduled events: {', '.join(waiting)}" if waiting else "no event is scheduled"
        )
    return str(waiting[0])


@click.command("state")
@_common
def state(*, control: Path | None, as_json: bool) -> None:
    """What was ordered and seen so far, in a rehearsal that runs."""
    report = _asked(lambda address: address.call("GET", "/v1/state"), control, as_json=as_json)
    if as_json:
        print_json(report)
        return
    for record in report["events"]:
        _show(record, as_json=False)
    polls = sum(report["polls"].values())
    click.echo(f"{polls} requests for the document, {len(report['approvals'])} approvals")


ORDER_COMMANDS: tuple[click.Command, ...] = (
    *(_order_command(word, event) for word, event in EVENT_NAMES.items()),
    _event_command("cancel", "Take a scheduled event back; without EVENT_ID the only one that there is."),
    _event_command(
        "approve",
        "Approve a scheduled event in the place of the program; without EVENT_ID the only one that there is.",
    ),
    state,
)

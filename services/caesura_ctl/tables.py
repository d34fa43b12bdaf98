"""Rich tables of the fleet view. Pure: from a view and a time to a printable object."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import median

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from caesura.contract import messages as m
from caesura.contract.parts import WholeRollout
from caesura_ctl.columns import Columns, first_of
from caesura_ctl.durations import show_duration, show_pause
from caesura_ctl.fleet_view import FleetView, Pause
from caesura_ctl.memory_proofs import Shown, counted, planned
from caesura_ctl.outputs import failures_view

_STYLE = {
    "pending": "dim",
    "scheduled": "yellow",
    "started": "bold cyan",
    "verifying": "blue",
    "soaking": "blue",
    "completed": "green",
    "running": "cyan",
    "failed": "bold red",
    "cancelled": "magenta",
    "halted": "bold red",
    "aborted": "magenta",
    "aborting": "magenta",
    "queued": "yellow",
}


_NO_PROOF = frozenset({"live", "reboot", "skip"})
"""Methods without a proof of memory: they do not pause, or do not keep memory."""


def _status(text: str) -> Text:
    return Text(text, style=_STYLE.get(text, ""))


def _rollout_status(rollout: WholeRollout) -> Text:
    return _status("queued" if _queued_behind(rollout) else rollout.status)


def _queued_behind(rollout: WholeRollout) -> str:
    return f"behind {rollout.queued_behind}" if rollout.status == "running" and rollout.queued_behind else ""


def set_name(name: str) -> str:
    """A set as displayed: a VM outside any set is in brackets."""
    return f"({name[1:]})" if name.startswith("_") else name


def _domains(domains: dict[str, int]) -> str:
    return ", ".join(f"{set_name(name)}/{domain}" for name, domain in sorted(domains.items()))


def plan_view(plan: m.Plan) -> RenderableType:
    """A plan: waves, then the skipped VMs, then the refusals."""
    parts: list[RenderableType] = []
    if plan.waves:
        reasons = ["\n".join(sorted({f"{vm.method}: {vm.reason}" for vm in wave.vms})) for wave in plan.waves]
        alike = len(set(reasons)) == 1
        table = Columns(
            ">wave",
            "set/domain",
            "hosts",
            ">VMs",
            *(() if alike else ("~method and why",)),
            "~memory proof",
            drop=("set/domain",),
            title=f"Plan: {plan.update or 'freeze on demand'}",
        )
        for wave, reason in zip(plan.waves, reasons, strict=True):
            table.add_row(
                f"{wave.wave + 1}{' canary' if wave.canary else ''}",
                _domains(wave.domains),
                ", ".join(wave.hosts),
                str(len(wave.vms)),
                *(() if alike else (reason,)),
                planned(wave.vms) if any(vm.method not in _NO_PROOF for vm in wave.vms) else "",
            )
        parts.append(table)
        if alike:
            parts.append(Text(reasons[0]))
        parts.append(
            Text(
                f"{_count(sum(len(wave.vms) for wave in plan.waves), 'VM')} in {_count(len(plan.waves), 'wave')}, "
                f"{_each(plan)}; about {show_duration(plan.estimate_s)} in all if every notice runs out"
            )
        )
        if limit := _limit(plan):
            parts.append(Text(limit))
    if plan.skipped:
        table = Columns("VM", "host", "~why", title="Skipped", drop=("host",))
        for vm in plan.skipped:
            table.add_row(vm.vm, vm.host, vm.reason)
        parts.append(table)
    if plan.refusals:
        table = Columns("what", "~why", title="Refused: nothing was started")
        for refusal in plan.refusals:
            table.add_row(Text(refusal.subject, style="bold red"), refusal.reason)
        parts.append(table)
    return Group(*parts)


def _each(plan: m.Plan) -> str:
    """What happens to each VM, and for how long."""
    if plan.event_type == "Reboot":
        return "each shut down, and started again after the update: its memory is lost"
    return f"each paused about {show_duration(plan.expected_pause_s)}"


def _limit(plan: m.Plan) -> str:
    if not plan.max_hosts:
        return ""
    most = f"at most {_count(plan.max_hosts, 'host')} in a wave"
    if plan.max_hosts_by_default:
        return f"{most} of those with VMs in no set: a tenth of the hosts by default (--max-hosts)"
    return most


def _wave_note(wave: m.WaveState, now: datetime) -> str:
    if wave.status == "scheduled" and wave.not_before is not None:
        left = (wave.not_before - now).total_seconds()
        # A coordinator of version 0.1.0 counts neither: it has one event for each set.
        approved, events = (
            max(wave.approved_count, len(wave.approved)),
            max(wave.event_count, len(wave.events)),
        )
        # Seconds first, since a narrow terminal cuts the end.
        return f"NotBefore in {max(0, left):.0f}s, {approved}/{events} approved" + (
            f"; {wave.reason}" if wave.reason else ""
        )
    return wave.reason


def _paused_so_far(wave: m.WaveState, paused: int, *, observed: bool) -> str:
    """The number of VMs whose pause was received; a wave that started before this session may have had more."""
    if not paused and wave.status in {"pending", "scheduled"}:
        return ""
    if observed or paused == len(wave.vms):
        return f"{paused}/{len(wave.vms)}"
    return f"{paused}+/{len(wave.vms)}" if paused else "-"


MANY = 1000
"""More than any list that is shown completely."""
_EDGES = 6
"""Lines around the rows of a table of waves: title, progress, heading and rules."""
_OUTPUT_LINES = 6
"""Lines of the last output of failed updates, when a rollout must fit the terminal."""


def rollout_view(
    rollout: WholeRollout, fleet_view: FleetView, now: datetime, *, lines: int = 0
) -> RenderableType:
    """One rollout with its waves and their progress.

    Args:
        lines: the room in lines; 0: no limit. With a limit, a wave is one line, and those around the
            first incomplete one are shown.
    """
    done = rollout.waves_completed
    head = Text.assemble(
        ("Rollout ", "bold"),
        rollout.rollout,
        "  ",
        rollout.update or f"freeze on demand, {show_duration(rollout.hold_s)}",
        "  ",
        _rollout_status(rollout),
        f" {behind}" if (behind := _queued_behind(rollout)) else "",
        f"  {done}/{rollout.wave_count} waves",
    )
    table = Columns(
        ">wave",
        "status",
        "set/domain",
        "hosts",
        ">paused now",
        ">paused so far",
        "~note",
        drop=("set/domain", "paused so far", "note")
        if not lines
        else ("paused so far", "set/domain", "note"),
        one_line=bool(lines),
    )
    paused = {vm.vm for vm in fleet_view.pauses_of(rollout.rollout)}
    rest = _rest(rollout, brief=bool(lines))
    shown = _window(rollout.waves, max(1, lines - _EDGES - len(rest)) if lines else len(rollout.waves))
    few = 1 if lines else len(rollout.waves) + MANY
    for wave in shown:
        frozen = [vm for vm in wave.vms if vm in fleet_view.frozen]
        table.add_row(
            str(wave.wave + 1),
            _status(wave.status),
            first_of([f"{set_name(name)}/{domain}" for name, domain in sorted(wave.domains.items())], few),
            first_of(wave.hosts, few),
            str(len(frozen) or ""),
            _paused_so_far(
                wave,
                sum(vm in paused for vm in wave.vms),
                observed=fleet_view.observed_wave(rollout.rollout, wave.wave),
            ),
            # The reason of the halt is printed in full below.
            ""
            if wave.status == "failed" and (lines or (wave.reason and wave.reason in rollout.reason))
            else _wave_note(wave, now),
        )
    parts: list[RenderableType] = [
        head,
        ProgressBar(total=max(1, rollout.wave_count), completed=done, width=60),
    ]
    if rollout.waves or not rollout.wave_count:
        parts.append(table)
    else:
        parts.append(
            Text("Its waves are not on the bus any more: newer rollouts have ended since.", style="dim")
        )
    if len(shown) < len(rollout.waves):
        before, after = shown[0].wave, len(rollout.waves) - shown[-1].wave - 1
        parts.append(Text(f"{before} waves before these, {after} after", style="dim"))
    return Group(*parts, *rest)


def _rest(rollout: WholeRollout, *, brief: bool = False) -> list[Text]:
    """The text below the waves: the reason, the last output of a failed update, and what to do."""
    said = []
    if rollout.reason:
        said.append(Text(rollout.reason, style=_STYLE.get(rollout.status, "")))
    said += failures_view(rollout, most=_OUTPUT_LINES if brief else 0)
    said += [Text(each) for each in next_commands(rollout)]
    return said


def next_commands(rollout: WholeRollout) -> list[str]:
    """What an operator can do about a halted rollout, one per line; empty for any other."""
    if rollout.status != "halted":
        return []
    return [
        # Not that every VM runs: one may have ended, or a host may be away.
        "Nothing is tried again until you say so:",
        f"  caesura history {rollout.rollout}    what happened, and why",
        f"  caesura resume {rollout.rollout}     try the failed wave again",
        f"  caesura abort {rollout.rollout}      give it up",
    ]


def _window(waves: Sequence[m.WaveState], most: int) -> Sequence[m.WaveState]:
    """At most this many waves, starting with the one before the first incomplete one."""
    current = next((at for at, wave in enumerate(waves) if wave.status != "completed"), len(waves))
    first = max(0, min(current - 1, len(waves) - most))
    return waves[first : first + most]


def domains_view(fleet_view: FleetView, *, most: int = MANY * MANY) -> RenderableType:
    """Every set and update domain with its VMs by state, and the VMs paused now.

    Args:
        most: limit of rows; those with a VM that does not run come first if not all fit.
    """
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for vm, (_, record) in fleet_view.vm_places().items():
        row = counts.setdefault((record.set, record.update_domain), {"running": 0, "paused": 0, "other": 0})
        impaired = (
            record.state == "running" and record.state_detail
        )  # the problem is printed below the tables
        column = "paused" if vm in fleet_view.frozen else "other" if impaired else str(record.state)
        row[column if column in row else "other"] += 1
    table = Columns(
        "set", ">update domain", ">VMs", ">running", ">paused", ">other", "~", drop=("", "running", "VMs")
    )
    rows = sorted(counts.items())
    if len(rows) > most:
        rows = sorted(rows, key=lambda each: not (each[1]["paused"] or each[1]["other"]))
    for (name, domain), row in rows[:most]:
        bar = "█" * row["running"] + "░" * row["paused"] + "?" * row["other"]
        table.add_row(
            set_name(name),
            str(domain),
            str(sum(row.values())),
            str(row["running"]),
            Text(str(row["paused"] or ""), style="bold cyan"),
            Text(str(row["other"] or ""), style="bold red"),
            bar[:40],
        )
    if len(rows) <= most:
        return table
    return Group(table, Text(f"{_count(len(rows) - most, 'more domain')}: caesura status", style="dim"))


def live_view(
    fleet_view: FleetView, now: datetime, rollout_id: str = "", *, lines: int = 0, width: int = 80
) -> RenderableType:
    """The live view of ``watch`` and the demo: one rollout, the newest if none is named; then the domains.

    Args:
        lines: of the terminal; 0: no limit.
        width: of the terminal, in characters.
    """
    rollout = fleet_view.rollouts.get(rollout_id) if rollout_id else fleet_view.latest()
    frozen = sorted(fleet_view.frozen.values(), key=lambda each: each.vm)
    names = [f"{each.vm} {max(0.0, (now - each.at).total_seconds()):.1f}s" for each in frozen]
    paused = Text(
        f"paused now: {_fitting(names, width - 16) if lines else ', '.join(names)}", style="bold cyan"
    )
    if not lines:
        top = rollout_view(rollout, fleet_view, now) if rollout else Text("no rollout yet", style="dim")
        return Group(top, *([paused] if frozen else []), domains_view(fleet_view))
    room = max(8, lines - 1 - bool(frozen))
    # A reason may take several lines and is never cut: the waves get the rest.
    extra = sum(len(each.plain) // max(1, width) for each in _rest(rollout, brief=True)) if rollout else 0
    waves = min(len(rollout.waves), max(1, room - extra - _EDGES - 8)) if rollout else 0
    need = waves + _EDGES + 1 + (len(_rest(rollout, brief=True)) if rollout else 0)
    top = (
        rollout_view(rollout, fleet_view, now, lines=need) if rollout else Text("no rollout yet", style="dim")
    )
    left = room - need - extra - 4
    parts: list[RenderableType] = [top, *([paused] if frozen else [])]
    if left > 0:
        parts.append(domains_view(fleet_view, most=left))
    return Group(*parts)


def _fitting(names: Sequence[str], width: int) -> str:
    """As many of these names as fit into a line, and the number of the others."""
    shown = len(names)
    while shown > 1 and len(first_of(names, shown)) > width:
        shown -= 1
    return first_of(names, shown)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def pauses_view(pauses: Iterable[Pause], clocks: dict[tuple[str, str], m.VmClockSynced]) -> RenderableType:
    """Pauses per set and update domain: count, median, max, budget, worst clock error before and after."""
    groups: dict[tuple[str, int], list[Pause]] = {}
    for pause in pauses:
        groups.setdefault((pause.set, pause.update_domain), []).append(pause)
    table = Columns(
        "set",
        ">domain",
        ">pauses",
        ">median",
        ">max",
        ">budget",
        ">clock before",
        ">after",
        "~memory",
        drop=("clock before", "median", "after", "budget"),
    )
    for (name, domain), group in sorted(groups.items()):
        verdicts = [clocks[each.operation, each.vm] for each in group if (each.operation, each.vm) in clocks]
        table.add_row(
            set_name(name),
            str(domain),
            str(len(group)),
            show_pause(median(each.pause_s for each in group)),
            show_pause(max(each.pause_s for each in group)),
            f"{max(each.budget_s for each in group):g}s",
            _worst([each.error_before_s for each in verdicts]),
            _worst([each.error_after_s for each in verdicts]),
            counted((Shown(each, clocks) for each in group), brief=True),
        )
    return table


def _worst(errors: Sequence[float | None]) -> str:
    known = [each for each in errors if each is not None]
    return f"{max(known, key=abs):+.3f}s" if known else "?"


def hosts_view(fleet_view: FleetView) -> RenderableType:
    """Every host: online, guard, its current operation."""
    table = Columns(
        "host",
        "updater",
        "~driver",
        "guard",
        ">VMs",
        ">epoch",
        "busy with",
        drop=("epoch", "driver", "VMs", "busy with"),
    )
    for name, inventory in sorted(fleet_view.hosts.items()):
        online = fleet_view.is_online(name)
        table.add_row(
            name,
            Text("online" if online else "offline", style="green" if online else "bold red"),
            Text.assemble(inventory.driver, (f"  {inventory.driver_detail}", "dim")),
            inventory.guard,
            str(len(inventory.vms)),
            str(inventory.epoch),
            inventory.operation,
        )
    return table


def attention_view(fleet_view: FleetView) -> RenderableType | None:
    """VMs that need attention, with their host's remark, such as who paused them; None: there are none."""
    table = Columns("VM", "host", "state", "~what is wrong", drop=("host",))
    for name, inventory in sorted(fleet_view.hosts.items()):
        for vm in inventory.vms:
            if vm.state_detail:
                table.add_row(vm.vm, name, vm.state, Text(vm.state_detail))
    return table if table.row_count else None


def documents_view(fleet_view: FleetView) -> RenderableType:
    """Open scheduled events of every set."""
    table = Columns(
        "set",
        ">incarnation",
        "event",
        "type",
        "status",
        "NotBefore",
        "host",
        "resources",
        drop=("incarnation", "type", "resources", "host", "event"),
    )
    for name, document in sorted(fleet_view.documents.items()):
        for event in document.events:
            table.add_row(
                set_name(name),
                str(document.incarnation),
                event.event_id,
                event.event_type,
                _status(event.status),
                f"{event.not_before:%H:%M:%S}Z" if event.status == "scheduled" else "",
                event.host,
                ", ".join(event.resources),
            )
    return table


def history_view(rollouts: Sequence[WholeRollout]) -> RenderableType:
    """Rollouts, newest first."""
    table = Columns(
        "rollout",
        "update",
        "status",
        ">waves",
        "sets",
        "started",
        ">took",
        "by",
        "~reason",
        drop=("by", "sets", "took", "started", "waves", "update"),
    )
    for each in rollouts:
        took = show_duration((each.ended_at - each.created_at).total_seconds()) if each.ended_at else ""
        table.add_row(
            each.rollout,
            each.update or f"freeze {show_duration(each.hold_s)}",
            _rollout_status(each),
            f"{each.waves_completed}/{each.wave_count}",
            ", ".join(set_name(name) for name in each.sets),
            f"{each.created_at:%Y-%m-%d %H:%M:%S}Z",
            took,
            each.requested_by,
            each.reason or _queued_behind(each),
        )
    return table

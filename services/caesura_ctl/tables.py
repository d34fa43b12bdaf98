"""Rich tables of the picture. Pure: a picture and a time in, something to print out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from caesura.contract import messages as m
from caesura_ctl.durations import show_duration, show_pause
from caesura_ctl.picture import Pause, Picture
from caesura_ctl.proofs import Shown, counted, planned

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
}


_NO_PROOF = frozenset({"live", "reboot", "skip"})
"""Methods after which no proof of memory is made: nothing pauses, or no memory is kept."""


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    return table


def _status(text: str) -> Text:
    return Text(text, style=_STYLE.get(text, ""))


def set_name(name: str) -> str:
    """A set as shown: a VM outside any set stands in brackets."""
    return f"({name[1:]})" if name.startswith("_") else name


def _domains(domains: dict[str, int]) -> str:
    return ", ".join(f"{set_name(name)}/{domain}" for name, domain in sorted(domains.items()))


def plan_view(plan: m.Plan) -> RenderableType:
    """A plan: waves, then what is skipped, then what is refused."""
    parts: list[RenderableType] = []
    if plan.waves:
        table = _table(
            ">wave",
            "set/domain",
            "hosts",
            ">VMs",
            "method and why",
            "memory proof",
            title=f"Plan: {plan.update or 'freeze on demand'}",
        )
        for wave in plan.waves:
            methods = {f"{vm.method}: {vm.reason}" for vm in wave.vms}
            table.add_row(
                str(wave.wave),
                _domains(wave.domains),
                ", ".join(wave.hosts),
                str(len(wave.vms)),
                "\n".join(sorted(methods)),
                planned(wave.vms) if any(vm.method not in _NO_PROOF for vm in wave.vms) else "",
            )
        parts.append(table)
        parts.append(
            Text(
                f"{_count(sum(len(wave.vms) for wave in plan.waves), 'VM')} in {_count(len(plan.waves), 'wave')}, "
                f"each paused about {show_duration(plan.expected_pause_s)}; at most {show_duration(plan.estimate_s)} in all"
            )
        )
    if plan.skipped:
        table = _table("VM", "host", "why", title="Skipped")
        for vm in plan.skipped:
            table.add_row(vm.vm, vm.host, vm.reason)
        parts.append(table)
    if plan.refusals:
        table = _table("what", "why", title="Refused: nothing was started")
        for refusal in plan.refusals:
            table.add_row(Text(refusal.subject, style="bold red"), refusal.reason)
        parts.append(table)
    return Group(*parts)


def _wave_note(wave: m.WaveState, now: datetime) -> str:
    if wave.status == "scheduled" and wave.not_before is not None:
        left = (wave.not_before - now).total_seconds()
        approved = f"{len(wave.approved)}/{len(wave.events)} approved"
        return f"{approved}, NotBefore in {max(0, left):.0f}s" + (f"; {wave.reason}" if wave.reason else "")
    return wave.reason


def _paused_so_far(wave: m.WaveState, paused: int, *, heard: bool) -> str:
    """Of how many VMs a pause was heard; a wave that began before somebody listened may have had more."""
    if not paused and wave.status in {"pending", "scheduled"}:
        return ""
    if heard or paused == len(wave.vms):
        return f"{paused}/{len(wave.vms)}"
    return f"{paused}+/{len(wave.vms)}" if paused else "-"


def rollout_view(rollout: m.RolloutState, picture: Picture, now: datetime) -> RenderableType:
    """One rollout with its waves and how far each is."""
    done = sum(wave.status == "completed" for wave in rollout.waves)
    head = Text.assemble(
        ("Rollout ", "bold"),
        rollout.rollout,
        "  ",
        rollout.update or f"freeze on demand, {show_duration(rollout.hold_s)}",
        "  ",
        _status(rollout.status),
        f"  {done}/{len(rollout.waves)} waves",
    )
    table = _table(">wave", "status", "set/domain", "hosts", ">paused now", ">paused so far", "note")
    paused = {vm.vm for vm in picture.pauses_of(rollout.rollout)}
    for wave in rollout.waves:
        frozen = [vm for vm in wave.vms if vm in picture.frozen]
        table.add_row(
            str(wave.wave),
            _status(wave.status),
            _domains(wave.domains),
            ", ".join(wave.hosts),
            str(len(frozen) or ""),
            _paused_so_far(
                wave,
                sum(vm in paused for vm in wave.vms),
                heard=picture.heard_wave(rollout.rollout, wave.wave),
            ),
            _wave_note(wave, now),
        )
    parts: list[RenderableType] = [
        head,
        ProgressBar(total=max(1, len(rollout.waves)), completed=done, width=60),
        table,
    ]
    if rollout.reason:
        parts.append(Text(rollout.reason, style=_STYLE.get(rollout.status, "")))
    return Group(*parts)


def domains_view(picture: Picture) -> RenderableType:
    """Every set and update domain with its VMs by state, and who is paused now."""
    counts: dict[tuple[str, int], dict[str, int]] = {}
    for vm, (_, record) in picture.vm_places().items():
        row = counts.setdefault((record.set, record.update_domain), {"running": 0, "paused": 0, "other": 0})
        state = "paused" if vm in picture.frozen else record.state
        row[state if state in row else "other"] += 1
    table = _table("set", ">update domain", ">VMs", ">running", ">paused", ">other", "")
    for (name, domain), row in sorted(counts.items()):
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
    return table


def live_view(picture: Picture, now: datetime, rollout_id: str = "") -> RenderableType:
    """What ``watch`` and the demo show while they run: one rollout, without a name the newest."""
    rollout = picture.rollouts.get(rollout_id) if rollout_id else picture.latest()
    parts: list[RenderableType] = [domains_view(picture)]
    parts.append(rollout_view(rollout, picture, now) if rollout else Text("no rollout yet", style="dim"))
    if picture.frozen:
        paused = ", ".join(
            f"{each.vm} {max(0.0, (now - each.at).total_seconds()):.1f}s"
            for each in sorted(picture.frozen.values(), key=lambda each: each.vm)
        )
        parts.append(Text(f"paused now: {paused}", style="bold cyan"))
    return Group(*parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def pauses_view(pauses: Iterable[Pause], clocks: dict[tuple[str, str], m.VmClockSynced]) -> RenderableType:
    """Pauses per set and update domain: count, median, max, budget, worst clock error before and after."""
    groups: dict[tuple[str, int], list[Pause]] = {}
    for pause in pauses:
        groups.setdefault((pause.set, pause.update_domain), []).append(pause)
    table = _table(
        "set", ">domain", ">pauses", ">median", ">max", ">budget", ">clock before", ">after", "memory"
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


def hosts_view(picture: Picture) -> RenderableType:
    """Every host: online, guard, what it is busy with."""
    table = _table("host", "updater", "driver", "guard", ">VMs", ">epoch", "busy with")
    for name, inventory in sorted(picture.hosts.items()):
        online = picture.online.get(name, False)
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


def attention_view(picture: Picture) -> RenderableType | None:
    """VMs that need a person: what their host says of them, such as who paused them; None: there are none."""
    table = _table("VM", "host", "state", "what is wrong")
    for name, inventory in sorted(picture.hosts.items()):
        for vm in inventory.vms:
            if vm.state_detail:
                table.add_row(vm.vm, name, vm.state, Text(vm.state_detail))
    return table if table.row_count else None


def documents_view(picture: Picture) -> RenderableType:
    """Open scheduled events of every set."""
    table = _table("set", ">incarnation", "event", "type", "status", "NotBefore", "resources")
    for name, document in sorted(picture.documents.items()):
        for event in document.events:
            table.add_row(
                set_name(name),
                str(document.incarnation),
                event.event_id,
                event.event_type,
                _status(event.status),
                f"{event.not_before:%H:%M:%S}Z" if event.status == "scheduled" else "",
                ", ".join(event.resources),
            )
    return table


def history_view(rollouts: Sequence[m.RolloutState]) -> RenderableType:
    """Rollouts, newest first."""
    table = _table("rollout", "update", "status", ">waves", "sets", "started", ">took", "by", "reason")
    for each in rollouts:
        took = show_duration((each.ended_at - each.created_at).total_seconds()) if each.ended_at else ""
        table.add_row(
            each.rollout,
            each.update or f"freeze {show_duration(each.hold_s)}",
            _status(each.status),
            f"{sum(wave.status == 'completed' for wave in each.waves)}/{len(each.waves)}",
            ", ".join(set_name(name) for name in each.sets),
            f"{each.created_at:%Y-%m-%d %H:%M:%S}Z",
            took,
            each.requested_by,
            each.reason,
        )
    return table


def updates_view(picture: Picture) -> RenderableType:
    """Updates by name with the hosts that define them, then refused files."""
    found: dict[tuple[str, str, str, str, str, float], list[str]] = {}
    for host, inventory in sorted(picture.hosts.items()):
        for each in inventory.updates:
            found.setdefault(
                (each.update, each.version, each.impact, each.scope, each.vmm, each.expected_s), []
            ).append(host)
    table = _table("update", "version", "impact", "scope", "new VMM", ">expected", "hosts")
    for (name, version, impact, scope, vmm, expected_s), hosts in sorted(found.items()):
        shown = {"beside": "beside the old", "instead": "instead of the old"}.get(vmm, "")
        table.add_row(name, version, impact, scope, shown, show_duration(expected_s), ", ".join(hosts))
    refused = [
        (host, bad) for host, inventory in sorted(picture.hosts.items()) for bad in inventory.refused_updates
    ]
    if not refused:
        return table
    broken = _table("host", "file", ">line", "why", title="Refused files (the others stay usable)")
    for host, bad in refused:
        broken.add_row(host, bad.file, str(bad.line or ""), Text(bad.reason, style="red"))
    return Group(table, broken)

"""Which updates this host has: those that succeeded here, and what their own commands report. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

import msgspec

from caesura.contract.messages import InstalledUpdate
from caesura.lifecycle.proof import SUCCEEDING
from caesura_host_updater.inventory.updates import Catalogue
from caesura_host_updater.operation.state import Operation


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """What an operation did for one update, on the host or, with ``vm``, for one VM.

    ``succeeded`` false: it was begun and did not succeed, so it is unknown whether it is installed.
    """

    update: str
    version: str
    vm: str = ""
    succeeded: bool
    at: datetime


def marks_of(op: Operation, at: datetime) -> tuple[Mark, ...]:
    """What to remember of an operation that ended."""
    # The new VMM of a swap or replace may be installed while a guest still runs in the old one; a kernel may be loaded and not run.
    whole = op.method not in SUCCEEDING or op.end == "completed"
    return tuple(
        Mark(
            update=op.update,
            version=op.update_version,
            vm=run.key,
            succeeded=run.outcome == "succeeded" and whole,
            at=at,
        )
        for run in op.runs
        if run.outcome not in (None, "not_run")
    )


def remembered(known: Iterable[Mark], new: Iterable[Mark]) -> tuple[Mark, ...]:
    """The marks after these: the latest mark of an update (and VM) counts, and one that did not succeed removes it."""
    latest = {(each.update, each.vm): each for each in (*known, *new)}
    return tuple(each for each in latest.values() if each.succeeded)


def installed(
    catalogue: Catalogue,
    marks: Iterable[Mark],
    answers: Mapping[str, bool],
    vms: Collection[str],
) -> tuple[InstalledUpdate, ...]:
    """What of the catalogue the host has, in the version that the catalogue has.

    Args:
        answers: of updates that have an ``installed`` command, as last asked, by name. For scope host it decides alone; for scope
            vm it can only deny, since it is asked of the host and not of each VM.
        vms: names of the host's VMs.
    """
    done: dict[tuple[str, str], dict[str, datetime]] = {}
    for mark in marks:
        done.setdefault((mark.update, mark.version), {})[mark.vm] = mark.at
    found = []
    for update in catalogue.updates.values():
        # Without a version it is unknown whether the file is still what was applied: it is never taken for installed.
        have = done.get((update.name, update.version), {}) if update.version else {}
        if update.installed and not answers.get(update.name, False):
            continue
        if update.scope == "host":
            if update.installed or "" in have:
                found.append(InstalledUpdate(update=update.name, version=update.version, at=have.get("")))
            continue
        updated = [vm for vm in vms if vm in have]
        if updated:
            found.append(
                InstalledUpdate(
                    update=update.name,
                    version=update.version,
                    vms=() if len(updated) == len(vms) else tuple(updated),
                    at=max(have[vm] for vm in updated),
                )
            )
    return tuple(found)

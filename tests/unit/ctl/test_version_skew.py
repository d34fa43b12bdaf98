"""`caesura status` names hosts and coordinators of different versions."""

from __future__ import annotations

import msgspec

from caesura.contract import messages as m
from caesura.lifecycle.command_compatibility import COMMANDS
from caesura_ctl.version_skew import not_together

_WELL = m.HostInventory(host="h1", driver="process", epoch=1, vms=(), guard="ready", commands=COMMANDS)


def test_a_host_that_is_well_is_not_named() -> None:
    later = msgspec.structs.replace(_WELL, commands=(*COMMANDS, "caesura.operation.of-a-later-version.v1"))
    assert not_together({"h1": _WELL, "h2": later}) == []


def test_a_host_of_an_older_version_and_one_that_refuses_the_coordinator_are_named_with_what_to_do() -> None:
    older = msgspec.structs.replace(_WELL, commands=())
    refusing = msgspec.structs.replace(
        _WELL, refused_epoch="coordinator c is of an older version: upgrade it"
    )
    lines = not_together({"h2": refusing, "h1": older, "h3": _WELL})
    assert len(lines) == 2
    assert lines[0].startswith("h1 is of an older version and does not read caesura.operation.start.v1")
    assert "docs/operate/upgrade.md" in lines[0]
    assert lines[1] == "h2 does not obey the coordinator: coordinator c is of an older version: upgrade it"

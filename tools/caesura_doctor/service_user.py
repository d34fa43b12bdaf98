"""Whether the doctor is run as the user of host updater and pause guard: what another one may do says nothing about them."""

from __future__ import annotations

import pwd
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning
from caesura_vmcontrol.guard_socket import SOCKET_NAME


def own_command() -> str:
    """How this program is run by another user, whose PATH may not have it."""
    return shlex.quote(str(Path(shutil.which(sys.argv[0]) or sys.argv[0]).absolute()))


def check_user(state_dir: str, uid: int) -> Iterator[Diagnosis]:
    """``uid``: whom the doctor is run as."""
    service = _service_uid(Path(state_dir))
    if service is None:
        return
    if service == uid:
        yield ok("user", f"run as {_name(uid)}, as host updater and pause guard are")
        return
    as_user = "" if service == 0 else f"-u {shlex.quote(_name(service))} "
    yield warning(
        "user",
        f"run as {_name(uid)}, and host updater and pause guard as {_name(service)}: what they may do is not tried",
        f"sudo {as_user}{own_command()} doctor",
    )


def _service_uid(state_dir: Path) -> int | None:
    """Whose the guard's socket is, or where there is none, or it may not be seen, the folder, which systemd gives to the unit's user."""
    for place in (state_dir / SOCKET_NAME, state_dir):
        try:
            return place.stat().st_uid
        except OSError:
            continue
    return None


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"  # as sudo has it

"""Whose folder it is, and how root becomes that user: what a service wrote is carried out with that service's rights, not with root's.

An arrival is run by root. What it reads (programs, users, paths of logs and sockets) was written by the host updater's user, who could
otherwise have root do anything at the next boot. Files are read, not NSS: an initramfs has no network.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH116, PTH123

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass

from caesura_vmcontrol.kvm_device import DEVICE

_GROUP_MAY = stat.S_IRGRP | stat.S_IWGRP


@dataclass(frozen=True)
class ServiceUser:
    """A user with its primary group and the others."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def user_to_become(folder: str) -> ServiceUser | None:
    """The owner of a service's folder, where this is root and that is not; None: it stays as it is. Raises OSError."""
    owner = os.stat(folder)
    if os.geteuid() != 0 or owner.st_uid == 0:
        return None
    found = user_of(owner.st_uid, owner.st_gid, _text("/etc/passwd"), _text("/etc/group"))
    with suppress(OSError):
        kvm = os.stat(DEVICE)  # a unit gives this group to its service, whatever /etc/group says
        if kvm.st_mode & _GROUP_MAY == _GROUP_MAY and kvm.st_gid != 0:
            return ServiceUser(found.uid, found.gid, tuple(sorted({*found.groups, kvm.st_gid})))
    return found


def user_of(uid: int, gid: int, passwd: str, group: str) -> ServiceUser:
    """The user, by /etc/passwd and /etc/group. Pure. ``gid``: where /etc/passwd does not have it."""
    name = ""
    for words in (line.split(":") for line in passwd.splitlines()):
        if len(words) > 3 and words[2] == str(uid) and words[3].isdigit():
            name, gid = words[0], int(words[3])
            break
    groups = {gid}
    for words in (line.split(":") for line in group.splitlines()):
        if name and len(words) > 3 and words[2].isdigit() and name in words[3].split(","):
            groups.add(int(words[2]))
    return ServiceUser(uid, gid, tuple(sorted(groups)))


def become(user: ServiceUser) -> None:
    """For good, all threads. Raises OSError."""
    os.setgroups(user.groups)
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)


def _text(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""

"""Who may run the guest: one folder for one operation on one VM, decided by whoever makes the next symlink.

The folder holds symlinks ``1``, ``2``, ``3``...; ``symlink(2)`` is atomic and exclusive and its target is the text,
so two processes that want to decide see one and the same decision, at any moment, though either is killed anywhere.
The highest number stands. Nothing is fsynced: a host that crashes loses the VMs anyway.

The texts, and what each promises:

``old``
    The old process keeps the guest. Final: every new one is killed before the old one is told to go on.
``new:PID:TICKS``
    This process may be told ``cont`` from now on: it was seen to have loaded the state and to stand still.
``file:SIZE:SHA256``
    The device state is in the state file; no process has it. The old process never runs the guest again.
``gone``
    Nobody can run the guest any more, and nobody will try. Final.

After ``new`` somebody who *knows* that this process never ran the guest (see ``guest.never_ran``) may go on with the
next number: ``old`` (swap) or ``file`` (replace). After ``file`` anybody may claim ``file`` again: what was started
before and is not claimed has lost then, and can be killed safely.

The folder is made before the guard is armed and removed after it was disarmed. Where there is no folder, nothing is
decided any more.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH115, PTH208, PTH211

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from typing import Literal, NamedTuple

_NEW = re.compile(r"new:([1-9][0-9]{0,9}):([0-9]{1,19})")
_FILE = re.compile(r"file:([1-9][0-9]{0,18}):([0-9a-f]{64})")
_TEXT_BYTES = 1000  # a symlink's target may have 4095; a reason is one or two lines
_SHORT_BYTES = 59  # the longest target that ext4 keeps in the inode, without a block of its own
_FULL = (errno.ENOSPC, errno.EDQUOT)


class BadClaim(ValueError):
    """A claim that nobody of ours has written."""


class Owner(NamedTuple):
    """A claim, read."""

    kind: Literal["old", "new", "file", "gone"]
    pid: int = 0
    start_ticks: int = 0
    size_bytes: int = 0
    sha256: str = ""

    @property
    def text(self) -> str:
        """The claim as it is written."""
        if self.kind == "new":
            return f"new:{self.pid}:{self.start_ticks}"
        if self.kind == "file":
            return f"file:{self.size_bytes}:{self.sha256}"
        return self.kind


def parse_owner(text: str) -> Owner:
    """Read a claim. Raises BadClaim."""
    if text in ("old", "gone"):
        return Owner("old" if text == "old" else "gone")
    if match := _NEW.fullmatch(text):
        return Owner("new", pid=int(match[1]), start_ticks=int(match[2]))
    if match := _FILE.fullmatch(text):
        return Owner("file", size_bytes=int(match[1]), sha256=match[2])
    raise BadClaim(f"{text[:100]!r} is no claim")


def current(folder: str) -> tuple[int, Owner | None]:
    """The claim that stands, with its number; ``(0, None)`` where there is none.

    Raises:
        BadClaim: what stands there was not written by us.
        OSError: the folder cannot be read.
    """
    try:
        number = max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0)
        return (number, parse_owner(os.readlink(f"{folder}/{number}"))) if number else (0, None)
    except FileNotFoundError:
        return 0, None


def claim(folder: str, number: int, text: str) -> str:
    """Try to make claim ``number``; the text that stands at this number now, ours or somebody else's.

    ``number`` is one more than the number that was read with ``current``.

    Raises:
        BadClaim: ``text`` is none.
        OSError: the disk is full, and the same was never claimed before; ``old``, ``gone`` and ``new`` are short
            enough to need no block of it.
        FileNotFoundError: there is no folder: the operation is over.
    """
    parse_owner(text)
    with suppress(FileExistsError):
        try:
            os.symlink(text, f"{folder}/{number}")
        except OSError as error:
            if error.errno not in _FULL:
                raise
            _claim_again(folder, number, text, error)
    return os.readlink(f"{folder}/{number}")


def _claim_again(folder: str, number: int, text: str, full: OSError) -> None:
    """On a full disk: the same text was claimed before, and another name of it needs no room."""
    for name in os.listdir(folder):
        if name.isdigit() and os.readlink(f"{folder}/{name}") == text:
            os.link(f"{folder}/{name}", f"{folder}/{number}", follow_symlinks=False)
            return
    raise full


def note_failure(folder: str, why: str) -> None:
    """Write down why a new process could not take the guest, for the next try and for the report.

    Never fails: on a full disk the note is short, or there is none.
    """
    text = " ".join(why.replace("\0", " ").split()) or "no reason"
    number = len(failures(folder)) + 1
    for limit in (_TEXT_BYTES, _SHORT_BYTES):
        cut = text.encode()[:limit].decode(errors="ignore")
        with suppress(OSError):
            while True:
                try:
                    os.symlink(cut, f"{folder}/failure-{number}")
                except FileExistsError:
                    number += 1
                else:
                    return


def failures(folder: str) -> list[str]:
    """What was noted, oldest first."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith("failure-")]
        return [os.readlink(f"{folder}/{name}") for name in sorted(names, key=lambda name: int(name[8:]))]
    except FileNotFoundError:
        return []

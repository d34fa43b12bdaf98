"""Who may run the guest: one folder for one operation on one VM, decided by the process that makes the next symlink.

The folder holds symlinks ``1``, ``2``, ``3``...; ``symlink(2)`` is atomic and exclusive and its target is the text,
so two processes that want to decide see the same decision at any moment, wherever either of them is killed.
The highest number is valid. Nothing is fsynced: a host that crashes loses the VMs anyway. Only the claims of an operation
over a change of the host's kernel outlive their boot: they are durable before what they allow, and name boots.

The texts, and what each promises:

``old``
    The old process keeps the guest. Final: every new process is killed before the old one gets ``cont``.
``new:PID:TICKS``, ``new:PID:TICKS:BOOT8``
    This process may get ``cont`` from now on: it was seen to have loaded the state and to be paused. BOOT8: the first eight hex
    digits of the id of its boot. In another boot it ran the guest and ended with its kernel: the next claim is ``gone``.
``file:SIZE:SHA256``
    The device state is in the state file; no process has it. The old process never runs the guest again.
``left:PID:TICKS:BOOT8``
    This pause guard is about to leave the kernel of this boot for another; the state is in the file of the last ``file`` claim. While
    it lives nobody starts a process for the guest; afterwards, and in another boot, ``file`` is claimed again.
``gone``
    No process can run the guest any more, and none will try. Final.

After ``new``, a process that *knows* that the claimed one never ran the guest (see ``qmp_commands.end_unless_it_ran``) may make
the next claim: ``old`` (swap) or ``file`` (replace). After ``file`` any process may claim ``file`` again: a process that
was started before and is not claimed has then lost, and can be killed safely, but only by the one that made that very claim. Who finds
that another process made it, with the same text, knows nothing of the processes that were started: they may have been started after it.

Beside the claims there are notes of how far the operation came, which QEMU's states do not show:

``begun``
    The guest's process is about to be stopped and asked to migrate. Without it, a guest that is paused or was migrated
    away was paused or migrated by somebody else.
``accepted``, ``refused``
    QEMU's answer to our migration. With neither, a migration may be ours or somebody else's: it is ours if something
    of it arrived, see ``qemu_swap.is_ours`` and ``qemu_replace.is_ours``.
``ran``
    The claimed new process ran the guest. If the guest is paused after that, somebody else paused it.
``arrived-BOOT8``
    In this boot the guest's memory was examined and is what it was when the former kernel was left; see ``caesura_pause_guard.arrival``.

The folder is made before the guard is armed and removed after it was disarmed. Without a folder there is nothing left
to decide.
"""

# light imports on purpose: no pathlib here.
# ruff: noqa: PTH108, PTH112, PTH115, PTH208, PTH211

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import suppress
from typing import Literal, NamedTuple

from caesura_vmcontrol.durable_files import sync_folder

_NEW = re.compile(r"(new|left):([1-9][0-9]{0,9}):([0-9]{1,19})(?::([0-9a-f]{8}))?")
_FILE = re.compile(r"file:([1-9][0-9]{0,18}):([0-9a-f]{64})")
_TEXT_BYTES = 1000  # a symlink's target may have 4095; a reason is one or two lines
_SHORT_BYTES = 59  # the longest target that ext4 keeps in the inode, without a block of its own
_KEPT = 50  # notes of failed tries: enough for a report, and the folder does not grow without bound
_IN_TURN = 2  # command lines that are tried in turn
_DIGITS = re.compile(r"[0-9]+")  # pids and addresses differ from try to try
_FIRST_WAIT_S = 0.25
STUCK_AFTER = 6
"""This many tries with the same outcome are not bad luck: from then on the wait between tries grows."""
LONGEST_WAIT_S = 5.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


Note = Literal["begun", "accepted", "refused", "ran"]


class BadClaim(ValueError):
    """A claim that Caesura did not write."""


class Owner(NamedTuple):
    """A claim, read."""

    kind: Literal["old", "new", "file", "left", "gone"]
    pid: int = 0
    start_ticks: int = 0
    size_bytes: int = 0
    sha256: str = ""
    boot8: str = ""
    """``new`` and ``left``: of the boot in which ``pid`` and ``start_ticks`` name a process; empty: of an operation of one boot."""

    @property
    def text(self) -> str:
        """The claim as it is written."""
        if self.kind in ("new", "left"):
            return f"{self.kind}:{self.pid}:{self.start_ticks}" + (f":{self.boot8}" if self.boot8 else "")
        if self.kind == "file":
            return f"file:{self.size_bytes}:{self.sha256}"
        return self.kind


def parse_owner(text: str) -> Owner:
    """Read a claim. Raises BadClaim."""
    if text in ("old", "gone"):
        return Owner("old" if text == "old" else "gone")
    if (match := _NEW.fullmatch(text)) and (match[1] == "new" or match[4]):
        kind: Literal["new", "left"] = "new" if match[1] == "new" else "left"
        return Owner(kind, pid=int(match[2]), start_ticks=int(match[3]), boot8=match[4] or "")
    if match := _FILE.fullmatch(text):
        return Owner("file", size_bytes=int(match[1]), sha256=match[2])
    raise BadClaim(f"{text[:100]!r} is not a claim")


def current(folder: str) -> tuple[int, Owner | None]:
    """The valid claim, with its number; ``(0, None)`` where there is none.

    Raises:
        BadClaim: the claim was not written by us.
        OSError: the folder cannot be read.
    """
    try:
        number = max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0)
        return (number, parse_owner(os.readlink(f"{folder}/{number}"))) if number else (0, None)
    except FileNotFoundError:
        return 0, None


def untouched(folder: str) -> bool:
    """Whether nothing was begun and nothing decided: whatever state the guest is in, we did not bring it there."""
    return os.path.isdir(folder) and not noted(folder, "begun") and not first_kind(folder)


def first_kind(folder: str) -> str:
    """The kind of the first claim; empty where there is none."""
    with suppress(FileNotFoundError):
        return parse_owner(os.readlink(f"{folder}/1")).kind
    return ""


def last_file(folder: str, number: int) -> Owner | None:
    """The state file as it was last claimed before ``number``. Raises OSError, BadClaim."""
    for earlier in range(number - 1, 0, -1):
        owner = parse_owner(os.readlink(f"{folder}/{earlier}"))
        if owner.kind == "file":
            return owner
    return None


def admit(folder: str, boot8: str) -> None:
    """Record that in this boot the guest may be loaded from its files. Raises OSError."""
    with suppress(FileExistsError):
        os.symlink("arrived", f"{folder}/arrived-{boot8}")


def admitted(folder: str, boot8: str) -> bool:
    """Whether that was recorded."""
    return os.path.lexists(f"{folder}/arrived-{boot8}")


def claim(folder: str, number: int, text: str, *, durable: bool = False) -> str:
    """Try to make claim ``number``; returns the text that this number now has, ours or another process's.

    ``number`` is one more than the number that was read with ``current``. ``durable``: it outlives the kernel when this returns.

    Raises:
        BadClaim: ``text`` is not a claim.
        OSError: the disk is full, and the same text was never claimed before; ``old``, ``gone`` and ``new`` are short
            enough to need no block.
        FileNotFoundError: the folder does not exist: the operation is over.
    """
    claim_first(folder, number, text, durable=durable)
    return os.readlink(f"{folder}/{number}")


def claim_first(folder: str, number: int, text: str, *, durable: bool = False) -> bool:
    """As ``claim``; whether this very call made it. Two processes may claim the same text: the state file again.

    Raises:
        BadClaim, OSError: as ``claim``.
    """
    parse_owner(text)
    try:
        os.symlink(text, f"{folder}/{number}")
        made = True
    except FileExistsError:
        made = False
    except OSError as error:
        if error.errno not in _FULL:
            raise
        made = _claim_again(folder, number, text, error)
    if durable:
        sync_folder(folder)
    return made


def _claim_again(folder: str, number: int, text: str, full: OSError) -> bool:
    """On a full disk: the same text was claimed before, and another name for it needs no space."""
    for name in os.listdir(folder):
        if name.isdigit() and os.readlink(f"{folder}/{name}") == text:
            try:
                os.link(f"{folder}/{name}", f"{folder}/{number}", follow_symlinks=False)
            except FileExistsError:
                return False
            return True
    raise full


def note(folder: str, what: Note) -> None:
    """Record how far the operation came.

    Raises:
        OSError: it cannot be written. Without ``begun`` nothing may be begun.
    """
    with suppress(FileExistsError):
        os.symlink(what, f"{folder}/{what}")


def noted(folder: str, what: Note) -> bool:
    """Whether that was recorded."""
    return os.path.lexists(f"{folder}/{what}")


def note_failure(folder: str, why: str) -> None:
    """Record why a new process could not take the guest, for the next try and for the report.

    Never fails: on a full disk the note is short, or missing. Only the last ``_KEPT`` are kept.
    """
    text = " ".join(why.replace("\0", " ").split()) or "no reason"
    numbers = _failure_numbers(folder)
    number = (numbers[-1] if numbers else 0) + 1
    for oldest in numbers[: -_KEPT + 1]:
        with suppress(OSError):
            os.unlink(f"{folder}/failure-{oldest}")
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
    """The last notes, oldest first."""
    try:
        return [os.readlink(f"{folder}/failure-{number}") for number in _failure_numbers(folder)]
    except FileNotFoundError:
        return []


def tries(folder: str) -> int:
    """How many tries have failed, including those whose notes were dropped."""
    numbers = _failure_numbers(folder)
    return numbers[-1] if numbers else 0


def tried_at(folder: str) -> list[float]:
    """When the last tries failed, s on the CLOCK_REALTIME of then."""
    found = []
    for number in _failure_numbers(folder):
        with suppress(OSError):
            found.append(os.lstat(f"{folder}/failure-{number}").st_mtime)
    return found


def retry_in_s(folder: str) -> float:
    """Seconds until another try is due: none for the first tries, then more and more. Every process that tries keeps to it."""
    number = tries(folder)
    if number < STUCK_AFTER:
        return 0.0
    wait_s = min(LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (number - STUCK_AFTER))
    try:
        since_s = time.time() - os.lstat(f"{folder}/failure-{number}").st_mtime
    except FileNotFoundError:
        return 0.0
    # Setting the wall clock must not postpone a try.
    return wait_s - since_s if 0 <= since_s < wait_s else 0.0


def stuck(folder: str) -> str:
    """The reason that the last tries have in common; empty: fewer than ``STUCK_AFTER`` tries, or they differ.

    Two command lines are tried in turn, so two reasons may alternate.
    """
    last = failures(folder)[-STUCK_AFTER:]
    if len(last) < STUCK_AFTER or len({_DIGITS.sub("", text) for text in last}) > _IN_TURN:
        return ""
    return last[-1]


def _failure_numbers(folder: str) -> list[int]:
    with suppress(FileNotFoundError):
        return sorted(int(name[8:]) for name in os.listdir(folder) if name.startswith("failure-"))
    return []

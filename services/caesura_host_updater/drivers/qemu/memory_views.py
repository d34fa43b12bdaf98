"""The guest's RAM as two QEMU processes have it mapped, compared on sampled pages inside a swap's pause.

Reading the RAM file twice would show nothing that could be otherwise. What may be wrong in a swap is that the new process has
other memory mapped than the old one (another file of the same name, a private mapping, another offset), so each page is
read through the mapping of each process (``/proc/PID/mem``, proc(5)). All that takes long is done before the pause: finding
the mappings, opening, and choosing the pages.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from contextlib import suppress
from typing import NamedTuple

from caesura_host_updater.drivers.sampling import PAGE_BYTES, sampled_offsets

_MAPPING = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)", re.ASCII
)
_DELETED = " (deleted)"


class NoView(Exception):
    """The memory of a process cannot be looked at; the text says why."""


class OtherMemory(NoView):
    """The two processes do not have the same file mapped as the guest's RAM: the new one must not run the guest."""


class Compared(NamedTuple):
    """What came of it. ``equal`` None: nothing was shown, and ``note`` says why."""

    equal: bool | None
    note: str


class Mapping(NamedTuple):
    """One shared mapping of the RAM file: ``file_offset`` and ``length`` in bytes, at ``address`` in the process.

    ``identity``: device and inode as the kernel prints them, to be compared with those of another process only.
    """

    file_offset: int
    length: int
    address: int
    identity: str


def ram_mappings(maps: str, file: str, device: int, inode: int) -> list[Mapping]:
    """The shared mappings of a file in the text of ``/proc/PID/maps``: by device and inode, or by the name it was opened under.

    By name since some file systems (overlayfs) give another device than ``stat`` does.
    """
    found = []
    for line in maps.splitlines():
        match = _MAPPING.fullmatch(line)
        if match is None or not match[3].endswith("s"):
            continue
        begin, end = int(match[1], 16), int(match[2], 16)
        same = (os.makedev(int(match[5], 16), int(match[6], 16)), int(match[7])) == (device, inode)
        if same or match[8].removesuffix(_DELETED) == file:
            identity = f"{match[5]}:{match[6]} {match[7]}"
            found.append(Mapping(int(match[4], 16), end - begin, begin, identity))
    return found


class View:
    """One process's mapping of the RAM file, open for reading."""

    def __init__(self, handle: int, mappings: list[Mapping]) -> None:
        self._handle = handle
        self._mappings = mappings
        self.identities = {mapping.identity for mapping in mappings}
        """The files that are mapped, as the kernel prints them: one, if all is well."""

    @classmethod
    def of(cls, pid: int, file: str) -> View:
        """Open it.

        Raises:
            OtherMemory: the process has no shared mapping of the file.
            NoView: not permitted, or the process or the file is gone.
        """
        try:
            there = os.stat(file)  # noqa: PTH116 - runs in a thread, for a path that another process has
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as text:  # noqa: PTH123
                mappings = ram_mappings(text.read(), os.path.realpath(file), there.st_dev, there.st_ino)
            if not mappings:
                raise OtherMemory(f"process {pid} has no shared mapping of {file}")
            return cls(os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC), mappings)
        except PermissionError as error:
            why = "not permitted (the host updater must run as QEMU's user, or with CAP_SYS_PTRACE; see kernel.yama.ptrace_scope)"
            raise NoView(f"reading the memory of process {pid} is {why}") from error
        except OSError as error:
            raise NoView(f"the memory of process {pid} cannot be read: {error.strerror or error}") from error

    def page(self, offset: int) -> bytes:
        """The page at this offset of the RAM file. Raises NoView, OSError."""
        for mapping in self._mappings:
            within = offset - mapping.file_offset
            if 0 <= within <= mapping.length - PAGE_BYTES:
                return os.pread(self._handle, PAGE_BYTES, mapping.address + within)
        raise NoView(f"offset {offset} of the RAM file is not mapped")

    def close(self) -> None:
        """Once."""
        with suppress(OSError):
            os.close(self._handle)


class Views:
    """Both processes' views and the chosen pages; make one with ``open_views``. ``compare`` or ``close`` ends it."""

    def __init__(self, old: View, new: View, offsets: tuple[int, ...]) -> None:
        self.offsets = offsets
        self._old = old
        self._new = new
        self._taken = False
        self._one = threading.Lock()

    def _take(self) -> bool:
        """Whether this is the first to end it: a comparison that was given up may begin after ``close``."""
        with self._one:
            taken, self._taken = self._taken, True
        return not taken

    def compare(self) -> Compared:
        """Read every chosen page in both processes. Blocks; for a thread, while the guest is paused."""
        if not self._take():
            return Compared(None, "the comparison came too late")
        try:
            for offset in self.offsets:
                old, new = self._old.page(offset), self._new.page(offset)
                if len(old) != PAGE_BYTES or len(new) != PAGE_BYTES:
                    return Compared(None, f"the page at {offset} could not be read whole")
                if old != new:
                    return Compared(
                        False, f"the page at {offset} of the RAM differs between the old and the new process"
                    )
        except (NoView, OSError) as error:
            return Compared(None, f"the sampled pages could not be read: {error}")
        finally:
            self._close()
        return Compared(True, f"{len(self.offsets)} pages in the old and in the new process")

    def close(self) -> None:
        """They are not needed: the pause never came."""
        if self._take():
            self._close()

    def _close(self) -> None:
        self._old.close()
        self._new.close()


def open_views(old_pid: int, new_pid: int, file: str, size: int, seed: str) -> Views:
    """Everything but the reading. Blocks; for a thread, before the pause.

    A page that falls into a hole of the file is replaced by the next one that holds data: reading a hole through a mapping
    would give it memory, and it says little.

    Raises:
        OtherMemory: the swap must not be done.
        NoView: a process's memory cannot be read; nothing can be shown.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NoView(f"its RAM file cannot be opened: {error.strerror or error}") from error
    try:
        offsets = tuple(sorted({_with_data(handle, offset) for offset in sampled_offsets(seed, size)} - {-1}))
    except OSError as error:
        raise NoView(f"its RAM file cannot be searched for data: {error.strerror or error}") from error
    finally:
        os.close(handle)
    if not offsets:
        raise NoView("its RAM file holds no data")
    views = [View.of(old_pid, file)]
    try:
        views.append(View.of(new_pid, file))
        _check_identities(*views, file)
    except BaseException:
        for view in views:
            view.close()
        raise
    return Views(*views, offsets)


def _check_identities(old: View, new: View, file: str) -> None:
    """Both have one file mapped, the same one. Raises OtherMemory."""
    if old.identities != new.identities or len(new.identities) != 1:
        before, after = (", ".join(sorted(view.identities)) for view in (old, new))
        raise OtherMemory(f"the old process has {before} mapped as {file}, the new one {after}")


def _with_data(handle: int, offset: int) -> int:
    """The first page at or after the offset that holds data, -1 if there is none. Raises OSError."""
    try:
        return os.lseek(handle, offset, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        raise

"""The guest's RAM as two QEMU processes have it mapped, compared on sampled pages inside a swap's pause.

Reading the RAM file twice would show nothing that could be otherwise. What may be wrong in a swap is that the new process has
other memory mapped than the old one (another file of the same name, a private mapping, another offset), so each page is
read through the mapping of each process (process_vm_readv(2): one call for all pages, a fifth of the time of as many reads of
``/proc/PID/mem``). It runs in threads, every wait bounded; all that takes long is done before the pause: choosing the pages, finding the mappings, a first reading.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import re
import threading
from concurrent.futures import Executor
from contextlib import suppress
from typing import NamedTuple

from caesura_host_updater.drivers.port import SwapFailed
from caesura_host_updater.drivers.qemu.commandline import GuestRam
from caesura_host_updater.drivers.sampling import PAGE_BYTES, SAMPLE_PAGES, sampled_offsets
from caesura_vmcontrol.qemu_plans import SwapPlan

_MAPPING = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)", re.ASCII
)
_DELETED = " (deleted)"
_DRAWS = 4  # times so many pages are drawn until enough of them are different ones that hold data

_VIEWS_S = 2.0  # s: to find and open both processes' mappings of the RAM, before the pause: 3 ms is usual


class NoView(Exception):
    """The memory of a process cannot be looked at; the text says why."""


class OtherMemory(NoView):
    """The two processes do not have the same file mapped as the guest's RAM: the new one must not run the guest."""


class NotPermitted(NoView):
    """The kernel does not let us read the memory of a process, though it tells its mappings."""


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


class _Piece(ctypes.Structure):
    """``struct iovec`` of process_vm_readv(2)."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_LIBC = ctypes.CDLL(None, use_errno=True)
_READ = _LIBC.process_vm_readv
_READ.restype = ctypes.c_ssize_t
_READ.argtypes = [
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
]
_MEMCMP = _LIBC.memcmp
_MEMCMP.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class View:
    """Pages of the RAM file as one process has them mapped. Make one with ``of``."""

    def __init__(self, pid: int, mappings: list[Mapping], offsets: tuple[int, ...]) -> None:
        self.pid = pid
        self.identities = {mapping.identity for mapping in mappings}
        """The files that are mapped, as the kernel prints them: one, if all is well."""
        self._count = len(offsets)
        self._pages = ctypes.create_string_buffer(self._count * PAGE_BYTES)
        self._here = _Piece(ctypes.addressof(self._pages), self._count * PAGE_BYTES)
        self._there = (_Piece * self._count)(
            *(_Piece(_address(mappings, offset), PAGE_BYTES) for offset in offsets)
        )

    @classmethod
    def of(cls, pid: int, file: str, offsets: tuple[int, ...]) -> View:
        """Find the mappings.

        Raises:
            OtherMemory: the process has no shared mapping of the file.
            NoView: its mappings are not shown, or the process or the file is gone.
        """
        try:
            there = os.stat(file)  # noqa: PTH116 - runs in a thread, for a path that another process has
            with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as text:  # noqa: PTH123
                mappings = ram_mappings(text.read(), os.path.realpath(file), there.st_dev, there.st_ino)
        except OSError as error:
            raise NoView(
                f"the mappings of process {pid} cannot be read: {error.strerror or error}"
            ) from error
        if not mappings:
            raise OtherMemory(f"process {pid} has no shared mapping of {file}")
        return cls(pid, mappings, offsets)

    def read(self) -> memoryview:
        """All pages as they are now, in one system call. Raises NoView, NotPermitted."""
        done = _READ(self.pid, ctypes.byref(self._here), 1, self._there, self._count, 0)
        if done == self._here.length:
            return memoryview(self._pages).cast("B")
        if done >= 0:
            raise NoView(f"process {self.pid} has page {done // PAGE_BYTES} of the sample not mapped")
        number = ctypes.get_errno()
        if number in (errno.EPERM, errno.EACCES):
            raise NotPermitted(
                f"reading the memory of process {self.pid} is not permitted (kernel.yama.ptrace_scope, or another user's)"
            )
        raise NoView(f"the memory of process {self.pid} cannot be read: {os.strerror(number)}")


class FileView:
    """The same pages read from the file that both processes have mapped: where a process's memory may not be read."""

    def __init__(self, file: str, offsets: tuple[int, ...]) -> None:
        self._file = file
        self._offsets = offsets

    def read(self) -> memoryview:
        """All pages as they are now. Raises NoView."""
        pages = bytearray(len(self._offsets) * PAGE_BYTES)
        try:
            handle = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for number, offset in enumerate(self._offsets):
                    place = memoryview(pages)[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
                    if os.preadv(handle, [place], offset) != PAGE_BYTES:
                        raise NoView(f"the RAM file ends before {offset + PAGE_BYTES} bytes")
            finally:
                os.close(handle)
        except OSError as error:
            raise NoView(f"its RAM file cannot be read: {error.strerror or error}") from error
        return memoryview(pages)


def _equal(one: memoryview, other: memoryview) -> bool:
    """By memcmp(3): Python compares memoryviews element by element, which takes 2 ms for half a megabyte."""
    if len(one) != len(other):
        return False
    here, there = ((ctypes.c_char * len(each)).from_buffer(each) for each in (one, other))
    difference: int = _MEMCMP(here, there, len(one))
    return difference == 0


def _address(mappings: list[Mapping], offset: int) -> int:
    for mapping in mappings:
        within = offset - mapping.file_offset
        if 0 <= within <= mapping.length - PAGE_BYTES:
            return mapping.address + within
    raise NoView(f"offset {offset} of the RAM file is not mapped")


class Views:
    """Both processes' views of the chosen pages; make one with ``open_views``. ``how``: what is compared, for people."""

    def __init__(
        self,
        old: View | FileView,
        new: View | FileView,
        offsets: tuple[int, ...],
        how: str = "in the old and in the new process",
    ) -> None:
        self.offsets = offsets
        self._old = old
        self._new = new
        self._how = how

    def compare(self) -> Compared:
        """Read every chosen page in both processes. May wait for a disk; for a thread, while the guest is paused."""
        try:
            old, new = self._old.read(), self._new.read()
        except NoView as error:
            return Compared(None, f"the sampled pages could not be read: {error}")
        if _equal(old, new):
            return Compared(True, f"{len(self.offsets)} pages {self._how}")
        pages = [slice(start, start + PAGE_BYTES) for start in range(0, len(old), PAGE_BYTES)]
        where = next(self.offsets[number] for number, page in enumerate(pages) if old[page] != new[page])
        return Compared(False, f"the page at {where} of the RAM differs between the old and the new process")


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
        offsets = _offsets_with_data(handle, seed, size)
    except OSError as error:
        raise NoView(f"its RAM file cannot be searched for data: {error.strerror or error}") from error
    finally:
        os.close(handle)
    if not offsets:
        raise NoView("its RAM file holds no data")
    old, new = View.of(old_pid, file, offsets), View.of(new_pid, file, offsets)
    _check_identities(old, new, file)
    try:
        # What is not permitted, or not in memory, shows here, while the guest runs.
        old.read()
        new.read()
    except NotPermitted as error:
        again = FileView(file, offsets)
        return Views(again, again, offsets, f"of the file that both processes have mapped; {error}")
    return Views(old, new, offsets)


def _check_identities(old: View, new: View, file: str) -> None:
    """Both have one file mapped, the same one. Raises OtherMemory."""
    if old.identities != new.identities or len(new.identities) != 1:
        before, after = (", ".join(sorted(view.identities)) for view in (old, new))
        raise OtherMemory(f"the old process has {before} mapped as {file}, the new one {after}")


def _offsets_with_data(handle: int, seed: str, size: int) -> tuple[int, ...]:
    """Raises OSError."""
    found: dict[int, None] = {}
    for number in range(_DRAWS):
        # The first draw is the one that a digest of the file takes too.
        for offset in sampled_offsets(f"{seed}/{number}" if number else seed, size):
            found[_with_data(handle, offset)] = None
        found.pop(-1, None)
        if len(found) >= SAMPLE_PAGES:
            break
    return tuple(sorted(list(found)[:SAMPLE_PAGES]))


def _with_data(handle: int, offset: int) -> int:
    """The first page at or after the offset that holds data, -1 if there is none. Raises OSError."""
    try:
        return os.lseek(handle, offset, os.SEEK_DATA) // PAGE_BYTES * PAGE_BYTES
    except OSError as error:
        if error.errno == errno.ENXIO:
            return -1
        raise


async def find_views(memory: GuestRam | str, plan: SwapPlan, seed: str, threads: Executor) -> Views | str:
    """What is compared inside the pause, opened before it; or why nothing can be.

    Args:
        memory: the guest's RAM; a text says why there is none that can be compared.
        seed: which pages are compared follows from it.

    Raises:
        SwapFailed: the new process has other memory.
    """
    if isinstance(memory, str):
        return memory
    opening = asyncio.get_running_loop().run_in_executor(
        threads, open_views, plan.old.pid, plan.new.pid, memory.file, memory.size, seed
    )
    done, _ = await asyncio.wait({opening}, timeout=_VIEWS_S)
    if not done:
        opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        return f"the mappings of its RAM were not found within {_VIEWS_S:g} s"
    try:
        return opening.result()
    except OtherMemory as error:
        raise SwapFailed(plan.vm, f"the new process has other memory than the guest: {error}") from error
    except NoView as error:
        return str(error)


async def compare(views: Views | str) -> Compared:
    """The result of comparing the pages; ``views``: a text says why nothing can be compared."""
    if isinstance(views, str):
        return Compared(None, views)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Compared] = loop.create_future()

    def report(found: Compared) -> None:
        if not done.done():
            done.set_result(found)

    def work() -> None:
        found = views.compare()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(report, found)

    # A thread of its own inherits the priority of this one, which is boosted; one of the pool would wait for a time slice.
    threading.Thread(target=work, name="compare", daemon=True).start()
    return await done

"""Sampled pages: which they are, what a digest of them finds, and two processes' views of one memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caesura_host_updater.drivers.qemu import memory_comparison
from caesura_host_updater.drivers.qemu.memory_comparison import (
    NoView,
    OtherMemory,
    View,
    Views,
    open_views,
    ram_mappings,
)
from caesura_host_updater.drivers.sampling import (
    PAGE_BYTES,
    SAMPLE_PAGES,
    sampled_digest_of,
    sampled_offsets,
)

PAGES = 1000
SIZE = PAGES * PAGE_BYTES


@given(st.text(max_size=20), st.integers(0, 5000))
def test_offsets_are_whole_pages_of_the_memory_each_once_and_the_same_again(seed: str, pages: int) -> None:
    found = sampled_offsets(seed, pages * PAGE_BYTES + 17)
    assert found == sampled_offsets(seed, pages * PAGE_BYTES + 17)
    assert len(set(found)) == len(found) == min(pages, SAMPLE_PAGES)
    assert list(found) == sorted(found)
    assert all(each % PAGE_BYTES == 0 and 0 <= each < pages * PAGE_BYTES for each in found)


def test_another_operation_looks_at_other_pages_and_all_pages_have_their_turn() -> None:
    assert sampled_offsets("op-1/a", SIZE) != sampled_offsets("op-2/a", SIZE)
    seen = {offset for number in range(100) for offset in sampled_offsets(f"op-{number}", SIZE)}
    assert len(seen) == PAGES, "a page that is never looked at could be lost for good"


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """A memory file whose pages all differ."""
    path = tmp_path / "ram"
    path.write_bytes(b"".join(number.to_bytes(2, "little") * (PAGE_BYTES // 2) for number in range(PAGES)))
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_sampled_digest_finds_a_changed_byte_in_its_pages_and_no_other(ram: Path) -> None:
    before = sampled_digest_of(ram, "op/a")
    assert sampled_digest_of(ram, "op/a") == before
    chosen = sampled_offsets("op/a", SIZE)
    other = next(offset for offset in range(0, SIZE, PAGE_BYTES) if offset not in chosen)
    overwrite(ram, other, b"\xff")
    assert sampled_digest_of(ram, "op/a") == before
    overwrite(ram, chosen[-1] + PAGE_BYTES - 1, b"\xff")
    assert sampled_digest_of(ram, "op/a") != before


def test_a_file_without_pages_or_without_its_end_is_an_error_and_no_digest(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"x")
    with pytest.raises(ValueError, match="no whole page"):
        sampled_digest_of(tmp_path / "empty", "s")
    with pytest.raises(OSError, match="No such file"):
        sampled_digest_of(tmp_path / "none", "s")


def test_holes_are_read_without_getting_memory(tmp_path: Path) -> None:
    """On a full tmpfs a mapping of a hole is a SIGBUS."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(SIZE)
    sampled_digest_of(path, "s")
    assert path.stat().st_blocks == 0


# -- two processes ------------------------------------------------------------------------------------------

_MAPS = """\
7f0000000000-7f0000400000 rw-s 00000000 00:1a 77                         /run/shm/ram
7f0000800000-7f0000900000 rw-s 00400000 00:1a 77                         /run/shm/ram
7f0001000000-7f0001400000 rw-p 00000000 00:1a 77                         /run/shm/ram
7f0002000000-7f0002400000 rw-s 00000000 00:31 12                         /over lay/ram (deleted)
7f0003000000-7f0003400000 rw-s 00000000 00:00 9                          /dev/zero (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
"""


def test_shared_mappings_are_found_by_inode_or_name_and_private_ones_are_not() -> None:
    found = ram_mappings(_MAPS, "/elsewhere", 0x1A, 77)
    assert [(each.file_offset, each.length, each.address) for each in found] == [
        (0, 0x400000, 0x7F0000000000),
        (0x400000, 0x100000, 0x7F0000800000),
    ]
    assert [each.address for each in ram_mappings(_MAPS, "/over lay/ram", 5, 5)] == [0x7F0002000000]
    assert ram_mappings(_MAPS, "/over/none", 5, 5) == []


_HOLD = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    flags = mmap.MAP_SHARED if sys.argv[2] == "shared" else mmap.MAP_PRIVATE
    held = mmap.mmap(file.fileno(), 0, flags=flags)
print("mapped", flush=True)
sys.stdin.read()
"""

Hold = Callable[[Path, str], int]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that has a file mapped; its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start(path: Path, how: str = "shared") -> int:
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(path), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        return process.pid

    yield start
    for process in started:
        process.communicate()


def test_two_processes_that_map_one_memory_show_the_same_pages(ram: Path, hold: Hold) -> None:
    views = open_views(hold(ram, "shared"), hold(ram, "shared"), str(ram), SIZE, "op/a")
    assert views.offsets == sampled_offsets("op/a", SIZE)
    compared = views.compare()
    assert compared.equal is True
    assert f"{SAMPLE_PAGES} pages" in compared.note
    overwrite(ram, views.offsets[3], b"new")
    assert views.compare().equal is True, "what is compared is what is there at the time"


@pytest.mark.parametrize("how", ["renamed over", "unlinked", "renamed away"])
def test_another_file_of_the_same_name_is_found_before_the_pause(how: str, ram: Path, hold: Hold) -> None:
    """What a swap must never do: the new process maps a RAM file that somebody has made again under the old name."""
    old = hold(ram, "shared")
    data = ram.read_bytes()
    if how == "unlinked":
        ram.unlink()
    elif how == "renamed away":
        ram.rename(ram.with_name("away"))
    copy = ram.with_name("copy")
    copy.write_bytes(data)
    copy.rename(ram)
    new = hold(ram, "shared")
    with pytest.raises(OtherMemory):
        open_views(old, new, str(ram), SIZE, "op/a")
    with pytest.raises(OtherMemory):
        open_views(new, old, str(ram), SIZE, "op/a")


def test_a_page_that_differs_is_found_and_named(ram: Path, hold: Hold) -> None:
    """Two views of two files, as a kernel or a QEMU that maps wrongly would give."""
    other = ram.with_name("other")
    other.write_bytes(ram.read_bytes())
    pages = sampled_offsets("op/a", SIZE)
    overwrite(other, pages[len(pages) // 2] + 7, b"\x55")
    one = View.of(hold(ram, "shared"), str(ram), pages)
    views = Views(one, View.of(hold(other, "shared"), str(other), pages), pages)
    compared = views.compare()
    assert compared.equal is False
    assert f"page at {pages[len(pages) // 2]} of the RAM differs" in compared.note


def test_a_page_in_a_hole_is_replaced_by_one_that_holds_data(tmp_path: Path, hold: Hold) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(SIZE)
    overwrite(path, 600 * PAGE_BYTES, b"data")
    before = path.stat().st_blocks
    views = open_views(hold(path, "shared"), hold(path, "shared"), str(path), SIZE, "op/a")
    assert views.offsets == (600 * PAGE_BYTES,)
    assert views.compare().equal is True
    assert path.stat().st_blocks == before
    empty = tmp_path / "empty"
    with empty.open("wb") as file:
        file.truncate(SIZE)
    with pytest.raises(NoView, match="holds no data"):
        open_views(1, 1, str(empty), SIZE, "op/a")


def test_a_process_that_has_the_memory_to_itself_has_no_view(ram: Path, hold: Hold) -> None:
    shared, private = hold(ram, "shared"), hold(ram, "private")
    with pytest.raises(OtherMemory, match="no shared mapping"):
        open_views(shared, private, str(ram), SIZE, "op/a")
    with pytest.raises(NoView, match="cannot be opened"):
        open_views(shared, shared, str(ram.with_name("gone")), SIZE, "op/a")


def test_a_process_that_is_gone_has_no_view(ram: Path) -> None:
    with pytest.raises(NoView, match="cannot be read"):
        View.of(2**22 + 1, str(ram), (0,))


def test_where_memory_may_not_be_read_the_file_that_both_have_mapped_is(
    ram: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Yama a process that is no child of ours tells its mappings, and that is all."""

    def refused(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(memory_comparison, "_READ", refused)
    old, new = hold(ram, "shared"), hold(ram, "shared")
    compared = open_views(old, new, str(ram), SIZE, "op/a").compare()
    assert compared.equal is True
    assert "of the file that both processes have mapped; reading the memory of process" in compared.note
    views = open_views(old, new, str(ram), SIZE, "op/a")
    ram.unlink()
    assert views.compare().equal is None
    ram.write_bytes(bytes(SIZE))
    with pytest.raises(OtherMemory):
        open_views(old, hold(ram, "shared"), str(ram), SIZE, "op/a")


def test_pages_that_went_away_show_nothing(ram: Path, hold: Hold) -> None:
    pid = hold(ram, "shared")
    views = open_views(pid, pid, str(ram), SIZE, "op/a")
    with ram.open("r+b") as file:
        file.truncate(views.offsets[-1])
    compared = views.compare()
    assert compared.equal is None
    assert "not mapped" in compared.note
    with pytest.raises(NoView, match="is not mapped"):
        View.of(pid, str(ram), (SIZE,))


def test_page_size_is_the_kernels() -> None:
    assert mmap.PAGESIZE % PAGE_BYTES == 0

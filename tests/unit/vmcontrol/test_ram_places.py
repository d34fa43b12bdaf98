"""Where guests' RAM outlives a kernel, and what names it in every boot."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from caesura_vmcontrol import file_system_ids, ram_places
from caesura_vmcontrol.file_system_ids import same_file_system, superblock_uuid
from caesura_vmcontrol.mounts import Mount
from caesura_vmcontrol.ram_places import RamIdentity, carve_out_error, find_error, identify, mount_dax_error

ID = bytes(range(16))


def mount(kind: str = "ext4", *options: str) -> Mount:
    """A mount with these options."""
    return Mount("/dev/pmem0", "/carve-out", kind, ("rw", *options))


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("option", ["dax=always", "dax"])
def test_dax_in_every_way_that_kernels_say_it(kind: str, option: str) -> None:
    assert mount_dax_error(mount(kind, option), has_dax=True) == ""


@pytest.mark.parametrize(
    ("there", "has_dax", "words"),
    [
        (None, True, "ext4 or xfs"),
        (mount("tmpfs", "dax=always"), True, "is tmpfs"),
        (mount("ext4", "dax=inode"), True, "not mounted with dax=always"),
        (mount("ext4", "dax=never"), True, "not mounted with dax=always"),
        (mount("ext4"), True, "not mounted with dax=always"),
        (mount("ext4", "dax=always"), False, "has no DAX"),
    ],
)
def test_memory_that_would_end_with_the_kernel(there: Mount | None, has_dax: bool, words: str) -> None:
    assert words in mount_dax_error(there, has_dax=has_dax)


def test_a_folder_that_is_no_mount_point(tmp_path: Path) -> None:
    assert "nothing is mounted" in carve_out_error(str(tmp_path))


def test_a_file_system_of_this_host_has_no_dax() -> None:
    assert carve_out_error("/proc") != ""


def test_superblocks() -> None:
    ext4 = bytes(1024 + 0x38) + b"\x53\xef" + bytes(0x68 - 0x38 - 2) + ID + bytes(100)
    assert superblock_uuid(ext4) == ID
    assert superblock_uuid(b"XFSB" + bytes(28) + ID + bytes(2000)) == ID
    assert superblock_uuid(bytes(2048)) is None
    assert superblock_uuid(b"") is None


@pytest.mark.parametrize(("number", "at"), [(0x8008662C, 8), (0x80705864, 64), (0x80111500, 1)])
def test_a_file_system_is_asked_in_each_way_that_one_answers(
    number: int, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4, XFS, and any of a newer kernel; the numbers hold the sizes of the arguments, which the kernel writes to."""

    def ioctl(handle: int, asked: int, argument: bytearray, _: bool) -> int:
        assert os.fstat(handle)
        assert len(argument) >= asked >> 16 & 0x3FFF
        if asked != number:
            raise OSError(errno.ENOTTY, "")
        argument[at : at + 16] = ID
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert identify(_file(tmp_path)).fs_id == "00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_a_kernel_that_is_too_old_to_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superblock says the same, so that two kernels agree; else it is the file system's own id, which is never a UUID."""

    def ioctl(*_: object) -> int:
        raise OSError(errno.ENOTTY, "")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(file_system_ids, "_read", lambda _: iter([ID]))
    assert identify(_file(tmp_path)).fs_id == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    monkeypatch.setattr(file_system_ids, "_read", lambda _: iter([]))
    assert identify(_file(tmp_path)).fs_id.startswith("fsid:")


def _file(folder: Path) -> str:
    path = folder / "a.ram"
    path.touch()
    return str(path)


def test_every_file_of_one_file_system_has_its_id(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
        ids.add(identify(str(tmp_path / name)).fs_id)
    assert len(ids) == 1
    assert ids != {""}


def test_a_ram_file_is_found_again_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ram = tmp_path / "a.ram"
    assert "is gone" in find_error(str(ram), RamIdentity("id", 1, 1))
    ram.write_bytes(bytes(5))
    there = identify(str(ram))
    assert find_error(str(ram), there) == ""
    ram.write_bytes(bytes(6))
    assert "6 bytes" in find_error(str(ram), there)
    ram.write_bytes(bytes(5))
    monkeypatch.setattr(ram_places, "file_system_id", lambda _: "another")
    assert "another file system" in find_error(str(ram), there)


EXT4 = "8b644839-3086-4f2e-8e6e-bac60d1f8f55"
EXT4_BY_STATFS = "fsid:7bc0993dfff20a05"  # as a kernel said it of that file system


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (EXT4, EXT4, True),
        (EXT4_BY_STATFS, EXT4_BY_STATFS, True),
        (EXT4, EXT4_BY_STATFS, True),
        (EXT4_BY_STATFS, EXT4, True),
        (EXT4, EXT4[:-1] + "6", False),
        (EXT4_BY_STATFS, "fsid:7bc0993dfff20a06", False),
        (EXT4, "fsid:7bc0993dfff20a06", False),
        (EXT4_BY_STATFS, "garbled", False),
    ],
)
def test_one_file_system_as_an_old_and_a_new_kernel_name_it(one: str, other: str, same: bool) -> None:
    """The updater is not root and asked a kernel before 6.0; the arrival is root, or under a newer one: no guest is lost for that."""
    assert same_file_system(one, other) == same


def test_a_guest_of_an_old_kernel_is_found_by_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path)
    there = identify(path)
    monkeypatch.setattr(ram_places, "file_system_id", lambda _: EXT4)
    assert find_error(path, RamIdentity(EXT4_BY_STATFS, there.inode, there.size)) == ""

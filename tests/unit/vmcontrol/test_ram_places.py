"""Where guests' RAM outlives a kernel, and what names it in every boot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caesura_vmcontrol import ram_places
from caesura_vmcontrol.file_system_ids import file_system_id, superblock_uuid
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


def test_the_file_system_and_its_superblock_say_the_same(tmp_path: Path) -> None:
    """The kernel that is left may be asked, and the one that arrives may be too old for it, so that root reads the device."""
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        said = file_system_id(handle)
        device = os.fstat(handle).st_dev
    finally:
        os.close(handle)
    try:
        uevent = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/uevent").read_text()
        name = dict(line.split("=") for line in uevent.splitlines())["DEVNAME"]
        with Path("/dev", name).open("rb") as file:
            found = superblock_uuid(file.read(2048))
    except OSError as error:
        pytest.skip(f"the device of {tmp_path} cannot be read here: {error}")
    if found is None:
        pytest.skip(f"{tmp_path} is neither on ext4 nor on XFS")
    assert said.replace("-", "") == found.hex()


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

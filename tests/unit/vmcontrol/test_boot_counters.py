"""Boots since a kernel was left are counted on a full disk, too."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from caesura_vmcontrol import boot_counters
from caesura_vmcontrol.boot_counters import BootCounter, raise_counter, read


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """With a counter of nine boots: the next one is longer."""
    boot_counters._write(str(tmp_path), BootCounter("op", 9, "a-boot"))
    return str(tmp_path)


def fails_with(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(boot_counters, "write_durably", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("boot", ["b", "a-boot-with-a-longer-name"])
def test_on_a_full_disk(folder: str, boot: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(number, monkeypatch)
    assert raise_counter(folder, boot) == BootCounter("op", 10, boot)
    assert read(folder) == BootCounter("op", 10, boot)
    assert raise_counter(folder, boot) == BootCounter("op", 10, boot), "once for each boot"


def test_a_disk_that_cannot_be_written_is_not_passed_over(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails_with(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match="refused"):
        raise_counter(folder, "b")
    assert read(folder) == BootCounter("op", 9, "a-boot")


def test_one_that_was_torn_is_none(folder: str) -> None:
    path = Path(folder) / "boot-counter.json"
    path.write_bytes(path.read_bytes()[:-3])
    assert raise_counter(folder, "b") is None

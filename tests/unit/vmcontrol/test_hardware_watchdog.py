"""The hardware watchdog of the host, with a file in its place."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from caesura_vmcontrol.hardware_watchdog import HardwareWatchdog


@pytest.fixture
def set_to(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seconds that it was set to."""
    said: list[int] = []

    def ioctl(handle: int, number: int, argument: bytes) -> bytes:
        assert os.fstat(handle)
        assert number == 0xC0045706
        said.append(struct.unpack("i", argument)[0])
        return argument

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return said


def test_it_is_armed_until_it_is_disarmed_in_an_orderly_way(tmp_path: Path, set_to: list[int]) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    one = HardwareWatchdog(str(device), str(tmp_path / "nowayout"), str(tmp_path / "stop"))
    assert one.arm(60) == ""
    assert set_to == [60]
    assert device.read_bytes() == b"", "closed without this it resets the host"
    one.disarm()
    one.disarm()
    assert device.read_bytes() == b"V"


def test_one_that_refuses_the_time_is_not_left_armed(tmp_path: Path) -> None:
    """A file is no watchdog: the kernel itself refuses."""
    device = tmp_path / "watchdog"
    device.touch()
    assert str(device) in HardwareWatchdog(
        str(device), str(tmp_path / "nowayout"), str(tmp_path / "stop")
    ).arm(60)
    assert device.read_bytes() == b"V"


def test_one_that_its_driver_stops_when_the_kernel_is_left_is_named(
    tmp_path: Path, set_to: list[int]
) -> None:
    """It is armed all the same: not every driver does, and the kernel does not say which."""
    device, stop = tmp_path / "watchdog", tmp_path / "stop_on_reboot"
    device.touch()
    stop.write_text("-1\n")
    one = HardwareWatchdog(str(device), str(tmp_path / "nowayout"), str(stop))
    assert "watchdog.stop_on_reboot=0 is not on its command line" in one.arm(60)
    assert set_to == [60]
    one.disarm()
    stop.write_text("0\n")
    assert one.arm(60) == ""
    one.disarm()


def test_a_host_without_one(tmp_path: Path) -> None:
    one = HardwareWatchdog(str(tmp_path / "none"), str(tmp_path / "nowayout"), str(tmp_path / "stop"))
    assert "No such file" in one.arm(60)
    one.disarm()
    assert one.disarm_former() == ""


def test_what_the_former_kernel_armed_is_disarmed(tmp_path: Path) -> None:
    device = tmp_path / "watchdog"
    device.touch()
    assert (
        HardwareWatchdog(str(device), str(tmp_path / "nowayout"), str(tmp_path / "stop")).disarm_former()
        == ""
    )
    assert device.read_bytes() == b"V"


def test_one_that_can_never_be_disarmed_is_not_armed(tmp_path: Path, set_to: list[int]) -> None:
    """It would reset the host after a jump that failed, and after one that did not."""
    device, no_way_out = tmp_path / "watchdog", tmp_path / "nowayout"
    device.touch()
    no_way_out.write_text("1\n")
    one = HardwareWatchdog(str(device), str(no_way_out), str(tmp_path / "stop"))
    assert "nowayout" in one.arm(60)
    assert set_to == []
    no_way_out.write_text("0\n")
    assert one.arm(60) == ""
    one.disarm()

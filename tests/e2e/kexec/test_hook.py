"""The initramfs hook, the unit and ``caesura host`` on a Debian host in emulation, with a stand-in for updater and guard.

What is asserted comes from outside: the beats of the guests on their serial lines, read with this machine's clock. Nothing here
depends on how long a boot takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from caesura_testing.kexec_host import (
    CONSOLE,
    FIRST,
    SECOND,
    SHELL,
    KexecHost,
    beats,
    longest_silence,
    running,
)
from caesura_testing.kexec_image import CARVE_OUT, Image, NoImage, build, missing

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

_GUEST_LINES = (FIRST, SECOND)
_LEAVE = "/opt/rig/standin save && umount /var/lib/caesura/carve-out && mount -o remount,ro / ; kexec -e"
_HOST_LATE = "sed -i s/^EARLY=.*/EARLY=no/ /etc/caesura/initramfs.conf"


@pytest.fixture(scope="module")
def image() -> Image:
    if why := missing():
        pytest.skip(why)
    try:
        return build(uv=os.environ.get("UV", "uv"))
    except NoImage as error:
        pytest.fail(str(error))


@pytest.fixture
def started(image: Image, tmp_path: Path) -> Iterator[Callable[[], KexecHost]]:
    """Hosts with two guests that beat."""
    with ExitStack() as stack:

        def start() -> KexecHost:
            host = KexecHost("host-1", image, tmp_path / "h")
            stack.enter_context(running(host))
            host.wait_shell()
            host.run("caesura host prepare-kexec --apply")
            host.run("cp /opt/rig/standin /opt/caesura/bin/caesura-pause-guard")
            host.run("/opt/rig/standin start a /dev/ttyS2; /opt/rig/standin start b /dev/ttyS3")
            for line in _GUEST_LINES:
                host.wait_for(line, r"memory \d+ bad=0")
            return host

        yield start


def _went_on(host: KexecHost, since: float, *, what: str) -> None:
    """Both guests beat again, without a gap in their numbers, in the same boot, with their memory as it was."""
    now = time.monotonic()
    for line in _GUEST_LINES:
        assert host.wait_for(line, r"memory \d+ bad=\d", since=now).text.endswith("bad=0")
        found = beats(host.lines(line))
        before, after = longest_silence(found)
        assert before.at < since + 60 < after.at + 60, "the longest silence is this pause"
        numbers = [beat.number for beat in found]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), (
            "a beat is missing, or came twice"
        )
        assert len({beat.boot for beat in found}) == 1
        assert 0 < after.up_s - before.up_s < 0.5 * (after.at - before.at) + 1, (
            "the guest's clock ran in the pause"
        )
        print(
            f"\n{what}: guest on line {line}: beat {before.number} -> {after.number}, silence {after.at - before.at:.1f} s,"
            f" its monotonic clock +{after.up_s - before.up_s:.2f} s"
        )


def test_the_initramfs_continues_guests_and_back_to_the_old_kernel(
    started: Callable[[], KexecHost], image: Image
) -> None:
    host = started()
    boot = host.run("cat /proc/sys/kernel/random/boot_id").strip()
    for release in (image.new, image.old):
        host.run(f"caesura host load-kernel {release}")
        left = host.begin(_LEAVE)
        for name in ("a", "b"):
            host.wait_for(CONSOLE, f"standin: {name} continued by initramfs in {release}", since=left)
        assert host.wait_shell(since=left) != boot
        assert host.run("uname -r").strip() == release
        assert "dax=always" in host.run("grep carve-out /proc/mounts")
        _went_on(host, left, what=f"to {release} by the initramfs")
    # Systemd took the host over with the guests in it: nothing is left to be done, and the host is checked once more.
    host.run("caesura host prepare-kexec --check")


def test_a_kexec_that_is_refused_leaves_everything_as_it_is(
    started: Callable[[], KexecHost], image: Image
) -> None:
    host = started()
    host.run("caesura host load-kernel --unload")
    refused = host.run(
        "/opt/rig/standin save && kexec -e; /opt/rig/standin --arrive --state-dir x --by nobody"
    )
    assert "Nothing has been loaded" in refused
    _went_on(host, 0, what="kexec refused, this boot")


def test_a_panic_boots_the_old_kernel_whose_initramfs_continues_the_guests(
    started: Callable[[], KexecHost], image: Image
) -> None:
    host = started()
    # An init that does not exist, and a hook that may not run: the kernel panics with the guests still in their state files.
    host.run(
        f"caesura host load-kernel {image.new} --append caesura.arrive=no --append rdinit=/does-not-exist --append init=/no --append root=/dev/none"
    )
    left = host.begin(_LEAVE)
    panic = host.wait_for(CONSOLE, "Kernel panic", since=left)
    host.wait_for(CONSOLE, f"standin: b continued by initramfs in {image.old}", since=panic.at)
    host.wait_shell(since=panic.at)
    _went_on(host, left, what="panic of the new kernel, reset")


def test_user_space_that_is_broken_does_not_keep_guests_paused(
    started: Callable[[], KexecHost], image: Image
) -> None:
    host = started()
    host.run(f"caesura host load-kernel {image.new} --append init=/bin/false")
    left = host.begin(_LEAVE)
    host.wait_for(CONSOLE, f"standin: b continued by initramfs in {image.new}", since=left)
    for line in _GUEST_LINES:
        assert host.wait_for(line, r"beat", since=left + 1)


def test_the_unit_continues_guests_where_the_hook_did_not(
    started: Callable[[], KexecHost], image: Image
) -> None:
    host = started()
    host.run(f"{_HOST_LATE} && update-initramfs -u -k {image.new}")
    host.run(f"caesura host load-kernel {image.new}")
    left = host.begin(_LEAVE)
    host.wait_for(CONSOLE, f"standin: b continued by unit in {image.new}", since=left)
    host.wait_shell(since=left)
    _went_on(host, left, what=f"to {image.new} by the unit")


def test_a_boot_without_the_carve_out_says_so(image: Image, tmp_path: Path) -> None:
    host = KexecHost("host-1", image, tmp_path / "h")
    with running(host, carve_out=False):
        host.wait_for(CONSOLE, "caesura: this kernel has no carve-out")
        host.wait_for(SHELL, "^@@ready")
        said = host.run(f"caesura host prepare-kexec --check --memmap '{CARVE_OUT}'", check=False)
    assert f"missing: memmap={CARVE_OUT}" in said
    assert "reboot once with the carve-out" in said

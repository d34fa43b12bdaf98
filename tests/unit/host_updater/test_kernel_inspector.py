"""Whether another kernel can be started under a host's guests: each obstacle by name."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

import msgspec
import pytest

from caesura.contract.messages import KernelFigure
from caesura.lifecycle.loaded_kernel import LoadedKernel, carve_outs
from caesura_host_updater.inventory.kernel_options import KernelOptions
from caesura_host_updater.kernel.figures import FILE, add_figure, newest_of_each, read_figures
from caesura_host_updater.kernel.inspector import KernelInspector
from caesura_host_updater.kernel.preflight import (
    KernelFacts,
    figure_error,
    loaded_error,
    obstacles,
)
from caesura_vmcontrol.mounts import mount_of, mounts_in

OLD, NEW = "6.1.0-8-amd64", "6.1.0-9-amd64"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LINE = "root=/dev/vda memmap=4G!4G ro quiet"
MOUNTS = """\
/dev/vda / ext4 rw,relatime 0 0
tmpfs /run tmpfs rw,nosuid 0 0
/dev/pmem0 /var/lib/caesura/carve-out ext4 rw,relatime,dax=always 0 0
/dev/vdb /srv/a\\040b xfs rw 0 0
"""
OPTIONS = KernelOptions(kexec=True)


def loaded(**changes: str) -> LoadedKernel:
    """The new kernel, loaded in this boot."""
    record = LoadedKernel(
        boot_id="boot-1",
        release=NEW,
        kernel=f"/boot/vmlinuz-{NEW}",
        initrd=f"/boot/initrd.img-{NEW}",
        command_line=f"{LINE} panic=5",
        hook_version="1",
    )
    return msgspec.structs.replace(record, **changes)


def facts(**changes: object) -> KernelFacts:
    """A host on which nothing is in the way."""
    found = KernelFacts(
        boot_id="boot-1",
        release=OLD,
        command_line=LINE,
        kexec_loaded="1",
        loaded=loaded(),
        mounts=mounts_in(MOUNTS),
        carve_out_error="",
        state_dir="/var/lib/caesura/host-updater",
        guard_capabilities=1 << 22,
        services=(),
    )
    return msgspec.structs.replace(found, **changes)


def test_nothing_is_in_the_way() -> None:
    assert list(obstacles(facts())) == []
    assert loaded_error(facts(), OPTIONS, NEW) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"command_line": "root=/dev/vda"}, "keeps no carve-out"),
        ({"command_line": "root=/dev/vda memmap=4G$4G"}, "keeps no carve-out"),
        (
            {"carve_out_error": "nothing is mounted there"},
            "nothing is mounted there; `caesura host prepare-kexec --check`",
        ),
        ({"state_dir": "/run/caesura"}, "does not outlive a kernel"),
        ({"guard_capabilities": None}, "cannot be seen"),
        ({"guard_capabilities": 0x1FF}, "CAP_SYS_BOOT"),
        ({"services": ("caesura-coordinator", "mosquitto")}, "caesura-coordinator, mosquitto on this host"),
        ({"broker_here": "10.0.0.1"}, "the broker 10.0.0.1 is on this host"),
        ({"rtc_is_local": True}, "the RTC is in local time"),
    ],
)
def test_each_obstacle_is_named(changes: dict[str, object], words: str) -> None:
    (problem,) = obstacles(facts(**changes))
    assert words in problem


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kexec_loaded": "0"}, "no kernel is loaded"),
        ({"kexec_loaded": ""}, "missing"),
        ({"loaded": None}, "nothing says which"),
        ({"loaded": loaded(boot_id="boot-0")}, "nothing says which"),
        ({"loaded": loaded(release=OLD)}, f"kernel {OLD} is loaded"),
        ({"loaded": loaded(command_line="root=/dev/vda")}, "lacks memmap=4G!4G"),
        ({"loaded": loaded(command_line="memmap=2G!4G")}, "lacks memmap=4G!4G"),
        ({"loaded": loaded(hook_version="")}, "has not the hook"),
    ],
)
def test_a_kernel_that_is_not_the_updates_is_not_started(changes: dict[str, object], words: str) -> None:
    assert words in loaded_error(facts(**changes), OPTIONS, NEW)


def test_a_unit_that_resumes_guests_needs_no_hook() -> None:
    found = facts(loaded=loaded(hook_version=""))
    assert loaded_error(found, KernelOptions(kexec=True, early=False), NEW) == ""


def test_several_regions_in_order() -> None:
    assert carve_outs("memmap=2G!8G,1G!4G memmap=1G!20G memmap=4K$5G") == ["2G!8G", "1G!4G", "1G!20G"]


def test_the_longest_mount_holds_a_path() -> None:
    mounts = mounts_in(MOUNTS)
    places = [getattr(mount_of(mounts, path), "place", None) for path in ("/srv/a b/c", "/srv/a", "/run")]
    assert places == ["/srv/a b", "/", "/run"]
    assert mount_of((), "/") is None


def figure(seconds: float, to: str = NEW, days: int = 0) -> KernelFigure:
    """Measured so many days after the first."""
    return KernelFigure(to=to, former=OLD, seconds=seconds, at=NOW + timedelta(days=days))


def test_the_newest_figure_decides() -> None:
    assert "nothing was measured" in figure_error([], NEW, 30.0)
    assert "nothing was measured" in figure_error([figure(9.0, to=OLD)], NEW, 30.0)
    assert figure_error([figure(20.0)], NEW, 30.0) == ""
    assert "20.1 s" in figure_error([figure(9.0), figure(20.1, days=1)], NEW, 30.0)
    assert figure_error([figure(20.1), figure(9.0, days=1)], NEW, 30.0) == ""


def test_figures_are_kept_one_for_each_kernel(tmp_path: Path) -> None:
    assert read_figures(tmp_path) == ()
    for each in (figure(9.0), figure(11.0, days=1), figure(8.0, to=OLD, days=2)):
        add_figure(tmp_path, each)
    assert [(each.to, each.seconds) for each in read_figures(tmp_path)] == [(NEW, 11.0), (OLD, 8.0)]
    many = [figure(1.0, to=f"6.1.0-{number}", days=number) for number in range(40)]
    assert [each.to for each in newest_of_each(many)] == [f"6.1.0-{number}" for number in range(8, 40)]


def test_a_figure_of_a_host_whose_clock_was_ahead_is_replaced(tmp_path: Path) -> None:
    """Otherwise it would be the newest one for years, and every plan be made with it."""
    for each in (figure(9.0, days=5000), figure(25.0)):
        add_figure(tmp_path, each)
    assert [each.seconds for each in read_figures(tmp_path)] == [25.0]


@pytest.mark.parametrize("content", [b"", b"{", b'[{"to": 5}]'])
def test_figures_that_cannot_be_read_plan_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert read_figures(tmp_path) == ()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The files of a host on which nothing is in the way; the guard is process 7."""
    for name, text in {
        "proc/sys/kernel/random/boot_id": "boot-1\n",
        "proc/sys/kernel/osrelease": f"{OLD}\n",
        "proc/cmdline": f"{LINE}\n",
        "proc/self/mounts": MOUNTS,
        "proc/7/status": "Name:\tpython3\nCapEff:\t0000000000400000\n",
        "proc/7/cmdline": "/usr/bin/python3\0/opt/caesura/bin/caesura-pause-guard\0--state-dir\0",
        "proc/8/cmdline": "/usr/bin/vi\0notes.txt\0/etc/mosquitto\0",
        "sys/kernel/kexec_loaded": "1\n",
        "run/caesura/kexec-loaded.json": msgspec.json.encode(loaded()).decode(),
    }.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


@pytest.fixture
def readiness(root: Path, tmp_path: Path) -> Callable[..., KernelInspector]:
    """Reads those files; the state folder is on the disk in the made-up mounts."""

    def make(**changes: object) -> KernelInspector:
        options = cast("KernelOptions", changes.pop("options", OPTIONS))
        values: dict[str, object] = {
            "guard_pid": lambda: 7,
            "broker_hosts": ["192.0.2.1"],
            "changed": lambda: None,
            "root": root,
            "carve_out_error": lambda _: "",
        }
        return KernelInspector(options, tmp_path, **(values | changes))  # type: ignore[arg-type]

    return make


async def test_a_host_is_looked_at(readiness: Callable[..., KernelInspector], tmp_path: Path) -> None:
    said: list[int] = []
    one = readiness(changed=lambda: said.append(1))
    assert "nothing was measured" in await one.error(NEW, 30.0)
    await one.measured(figure(9.0))
    assert await one.error(NEW, 30.0) == ""
    assert one.record is not None
    assert (one.record.release, one.record.problems) == (OLD, ())
    assert one.record.figures == read_figures(tmp_path)
    assert said == [1]
    await one.look()
    assert said == [1], "nothing has changed"


@pytest.mark.parametrize(
    ("measured_early", "wanted_early", "counts"),
    [(True, True, True), (False, True, True), (False, False, True), (True, False, False)],
)
async def test_a_figure_of_the_shorter_way_says_nothing_of_the_longer_one(
    readiness: Callable[..., KernelInspector], *, measured_early: bool, wanted_early: bool, counts: bool
) -> None:
    """``early`` was changed in the host file since."""
    one = readiness(options=KernelOptions(kexec=True, early=wanted_early))
    await one.measured(msgspec.structs.replace(figure(9.0), early=measured_early))
    assert ("nothing was measured" not in await one.error(NEW, 30.0)) is counts
    assert one.record is not None
    assert bool(one.record.figures) is counts


async def test_programs_of_the_fleet_on_the_host_are_seen(
    readiness: Callable[..., KernelInspector], root: Path
) -> None:
    (root / "proc/8/cmdline").write_bytes(b"/usr/bin/python3\0/opt/caesura/bin/caesura-metrics-exporter\0")
    one = readiness(guard_pid=lambda: 0, broker_hosts=["127.0.0.1"])
    await one.look()
    assert one.record is not None
    guard, programs = one.record.problems
    assert "cannot be seen" in guard
    assert programs.startswith("caesura-metrics-exporter on this host")


async def test_guests_that_are_not_ours_are_seen(
    readiness: Callable[..., KernelInspector], root: Path
) -> None:
    """Started by hand, or by libvirt: they are saved by nobody, and would end as by a power cut."""
    for pid, comm, environ in (
        (20, "qemu-system-x86", "PATH=/bin\0CAESURA_QEMU=h/a/start\0"),
        (21, "qemu-system-x86", "PATH=/bin\0"),
        (22, "vi", ""),
    ):
        (root / f"proc/{pid}").mkdir()
        (root / f"proc/{pid}/comm").write_text(f"{comm}\n")
        (root / f"proc/{pid}/environ").write_text(environ)
    one = readiness()
    await one.look()
    assert one.record is not None
    (problem,) = one.record.problems
    assert problem.startswith("qemu-system-x86 (pid 21) is not a VM of this host updater")
    assert "(pid 21)" in await one.error(NEW, 30.0)


@pytest.mark.parametrize(("mode", "problems"), [("UTC", 0), ("LOCAL", 1)])
async def test_an_rtc_in_local_time_is_seen(
    readiness: Callable[..., KernelInspector], root: Path, mode: str, problems: int
) -> None:
    (root / "etc").mkdir()
    (root / "etc/adjtime").write_text(f"0.0 0 0.0\n0\n{mode}\n")
    one = readiness()
    await one.look()
    assert one.record is not None
    assert len(one.record.problems) == problems


async def test_a_guest_that_is_being_started_is_ours_when_its_environment_is_there(
    readiness: Callable[..., KernelInspector], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In execve the process has QEMU's name already, and an empty environment."""
    (root / "proc/20").mkdir()
    (root / "proc/20/comm").write_text("qemu-system-x86\n")
    environ = root / "proc/20/environ"
    environ.touch()
    monkeypatch.setattr(
        "caesura_host_updater.kernel.inspector.time.sleep",
        lambda _: environ.write_text("CAESURA_QEMU=h/a/start\0"),
    )
    one = readiness()
    await one.look()
    assert one.record is not None
    assert one.record.problems == ()


async def test_a_broker_on_the_host_itself_is_seen(readiness: Callable[..., KernelInspector]) -> None:
    one = readiness(broker_hosts=["127.0.0.1"])
    await one.look()
    assert one.record is not None
    assert [each.split(":")[0] for each in one.record.problems] == [
        "the broker 127.0.0.1 is on this host, and would be away in the pause of its VMs"
    ]


async def test_a_host_whose_files_cannot_be_read_is_not_ready(
    readiness: Callable[..., KernelInspector], root: Path
) -> None:
    (root / "proc/cmdline").unlink()
    one = readiness()
    assert "cannot be looked at" in await one.error(NEW, 30.0)
    await one.look()
    assert one.record is not None
    assert "cannot be looked at" in one.record.problems[0]


async def test_a_kernel_that_does_not_answer_is_named(
    readiness: Callable[..., KernelInspector], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A time limit has no words of its own."""
    monkeypatch.setattr("caesura_host_updater.kernel.inspector._READ_S", 0.0)
    assert "its files do not answer" in await readiness().error(NEW, 30.0)


async def test_without_the_operators_word_nothing_is_said_or_started(tmp_path: Path) -> None:
    one = KernelInspector(
        KernelOptions(), tmp_path, guard_pid=lambda: 7, broker_hosts=[""], changed=lambda: None
    )
    await one.look()
    assert one.record is None
    assert "kexec = true" in await one.error(NEW, 30.0)


async def test_a_cluster_with_one_node_on_the_host_has_others(
    readiness: Callable[..., KernelInspector],
) -> None:
    one = readiness(broker_hosts=["127.0.0.1", "192.0.2.1"])
    await one.look()
    assert one.record is not None
    assert one.record.problems == ()

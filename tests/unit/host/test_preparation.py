"""``caesura host prepare-kexec`` and ``load-kernel`` on hosts that are folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from caesura.lifecycle.loaded_kernel import CARVE_OUT, LoadedKernel, carve_outs
from caesura_host.hook_files import HOOK_VERSION, installed_texts
from caesura_host.host_files import HostError, HostFolder
from caesura_host.kernel_command_line import BadCarveOut, next_command_line, parse_carve_out
from caesura_host.kernel_loading import load_kernel
from caesura_host.preparation import GRUB, SETTINGS, Step, WantedPreparation, settings_of, steps, with_block
from caesura_vmcontrol.intent import Intent, IntentFile
from caesura_vmcontrol.kernel_change import KernelChange

_UUID = "d522221c-b208-43de-9967-f974ae0ee917"
_FSTAB = "/dev/vda / ext4 defaults 0 1\n"
_LINE = "BOOT_IMAGE=/boot/vmlinuz-a root=/dev/vda ro quiet"
_TOOLS = frozenset(("kexec", "update-initramfs", "lsinitramfs", "mkfs.ext4", "blkid"))


def _wanted(**others: str | int | bool) -> WantedPreparation:
    fields: dict[str, str | int | bool] = {
        "memmap": "4G!8G",
        "uuid": _UUID,
        "carve_out": "/var/lib/caesura/carve-out",
        "state_dir": "/var/lib/caesura/host-updater",
        "guard": "/opt/caesura/bin/caesura-pause-guard",
        "early": True,
        "panic_s": 5,
        "crash_release": "",
        "crash_mib": 256,
        "hook_version": HOOK_VERSION,
    }
    return msgspec.convert({**fields, **others}, WantedPreparation)


class _Host:
    """A folder, and programs that do what the real ones do to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []
        self.uuid = ""
        self.tools = _TOOLS
        for path, text in {
            "proc/cmdline": f"{_LINE}\n",
            "proc/mounts": "/dev/vda / ext4 rw 0 0\n",
            "proc/sys/kernel/random/boot_id": "boot-1\n",
            "sys/kernel/kexec_loaded": "0\n",
            "etc/fstab": _FSTAB,
            "etc/default/grub": "GRUB_TIMEOUT=0\n",
            "boot/initrd.img-6.1.0-1-amd64": "",
            "boot/vmlinuz-6.1.0-1-amd64": "",
        }.items():
            self.put(path, text)
        self.folder = HostFolder(root, self.run)

    def put(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def text(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def run(self, argv: Sequence[str]) -> str:
        self.ran.append(" ".join(argv))
        match argv[0]:
            case "lsinitramfs":
                return Path(argv[1]).read_text()
            case "update-initramfs":
                version = (
                    settings_of(self.text(SETTINGS))["HOOK_VERSION"]
                    if (self.root / SETTINGS[1:]).exists()
                    else ""
                )
                self.put(
                    "boot/initrd.img-6.1.0-1-amd64",
                    f"etc\netc/caesura/hook-version-{version}\n" if version else "etc\n",
                )
            case "blkid":
                return f"{self.uuid}\n"
            case "mkfs.ext4":
                self.uuid = argv[argv.index("-U") + 1]
            case "mount":
                self.put("proc/mounts", f"/dev/pmem0 {argv[-1]} ext4 rw,{argv[4]} 0 0\n")
            case "kexec" if argv[1] == "-s":
                self.put("sys/kernel/kexec_loaded", "1\n")
        return ""

    def boot(self, more: str) -> None:
        self.put("proc/cmdline", f"{_LINE} {more}\n")
        self.put("dev/pmem0", "")

    def steps(self, wanted: WantedPreparation) -> list[Step]:
        facts = self.folder.facts(wanted.carve_out)
        return steps(wanted, msgspec.structs.replace(facts, tools=self.tools), installed_texts())

    def apply(self, wanted: WantedPreparation) -> list[str]:
        """Apply, with the host's programs all there; the names of what is missing afterwards."""
        self.folder.apply(wanted, self.steps(wanted), lambda _: None)
        return [step.name for step in self.steps(wanted) if not step.done]

    def tree(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.root)): path.read_text()
            for path in self.root.rglob("*")
            if path.is_file()
        }


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Host:
    def which(name: str, **_: object) -> str:
        return f"/usr/sbin/{name}"

    monkeypatch.setattr("shutil.which", which)  # the host has the programs
    return _Host(tmp_path)


def test_two_runs_with_a_reboot_between_them_prepare_a_host(host: _Host) -> None:
    wanted = _wanted()
    assert host.apply(wanted) == ["command-line", "file-system", "mount"]
    assert "update-grub" in host.ran
    assert 'memmap=4G!8G panic=5 watchdog.stop_on_reboot=0"' in host.text(GRUB)
    reboot = next(step for step in host.steps(wanted) if step.name == "file-system").remedy
    assert reboot.startswith("reboot once")
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    assert host.apply(wanted) == []
    before, host.ran = host.tree(), []
    assert host.apply(wanted) == []
    assert host.tree() == before, "a third run changes nothing"
    assert not [each for each in host.ran if each.startswith(("mkfs", "update-", "mount"))]


def test_undo_leaves_what_somebody_else_wrote(host: _Host) -> None:
    before = host.tree()
    wanted = _wanted()
    host.apply(wanted)
    hook = "etc/initramfs-tools/hooks/caesura"
    host.put(hook, host.text(hook) + "# a line of the operator's\n")
    host.put("etc/fstab", host.text("etc/fstab") + "tmpfs /tmp tmpfs defaults 0 0\n")
    left = host.folder.undo(host.steps(wanted), lambda _: None)
    assert left == [f"/{hook} is not as it was written, and stays"]
    assert host.text("etc/fstab") == f"{_FSTAB}tmpfs /tmp tmpfs defaults 0 0\n"
    new = host.tree().keys() - before.keys()
    assert new == {hook}


def test_a_host_with_dracut_is_prepared_for_an_arrival_by_the_unit(host: _Host) -> None:
    """systemd in its initramfs would end the guests' QEMU with the initramfs."""
    host.tools = frozenset(("kexec", "dracut", "mkfs.ext4", "blkid"))
    early = next(step for step in host.steps(_wanted()) if step.name == "packages")
    assert not early.done
    assert "prepare-kexec --late --apply, and early = false" in early.remedy
    before = host.tree().keys()
    wanted = _wanted(early=False)
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    assert host.apply(wanted) == []
    assert not [each for each in host.ran if each.startswith("update-initramfs")]
    assert not [path for path in host.tree() if "initramfs-tools" in path]
    crash = next(
        step for step in host.steps(_wanted(early=False, crash_release="6.1")) if step.name == "initramfs"
    )
    assert "leave --crash-kernel out" in crash.remedy
    assert host.folder.undo(host.steps(wanted), lambda _: None) == []
    assert not [each for each in host.ran if each.startswith("update-initramfs")]
    assert host.tree().keys() - before == {"dev/pmem0"}


def test_a_kernel_with_an_initramfs_of_dracut_is_loaded_where_the_unit_continues_the_guests(
    host: _Host,
) -> None:
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")

    def run(argv: Sequence[str]) -> str:
        if argv[0] == "lsinitramfs":
            raise HostError("lsinitramfs is not installed")
        return host.run(argv)

    with pytest.raises(HostError, match="lsinitramfs"):
        load_kernel("6.1.0-1-amd64", root=host.root, run=run)
    assert load_kernel("6.1.0-1-amd64", expect_hook=False, root=host.root, run=run).hook_version == ""


@pytest.mark.parametrize("what", ["a change of the kernel", "garbled", "memory"])
def test_undo_takes_nothing_from_guests_that_need_it(host: _Host, what: str) -> None:
    wanted = _wanted()
    state_dir = host.root / wanted.state_dir.lstrip("/")
    state_dir.mkdir(parents=True)
    host.folder.check_idle(wanted.state_dir, wanted.carve_out)
    if what == "a change of the kernel":
        change = KernelChange("6.1", wanted.carve_out)
        IntentFile(str(state_dir)).store(Intent("op-1", "boot", 0.0, 1.0, (), kernel_change=change))
    elif what == "garbled":
        (state_dir / "guard-intent.json").write_text("{")
    else:
        host.put(f"{wanted.carve_out.lstrip('/')}/ram/caesura-host-1/a.ram", "")
    why = {"a change of the kernel": "operation op-1", "garbled": "cannot be read", "memory": "a.ram"}[what]
    with pytest.raises(HostError, match=why):
        host.folder.check_idle(wanted.state_dir, wanted.carve_out)


def test_without_grub_the_operator_is_told_the_words(host: _Host) -> None:
    (host.root / "etc/default/grub").unlink()
    host.apply(_wanted(crash_release="6.1.0-1-amd64"))
    step = next(
        step for step in host.steps(_wanted(crash_release="6.1.0-1-amd64")) if step.name == "command-line"
    )
    assert (
        "missing: memmap=4G!8G panic=5 watchdog.stop_on_reboot=0 crashkernel=256M: add them to the boot loader's command line"
        in step.remedy
    )
    assert not (host.root / GRUB[1:]).exists()


def test_a_file_system_of_something_else_is_not_overwritten(host: _Host) -> None:
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    host.uuid = "other"
    assert host.apply(_wanted()) == ["file-system", "mount"]
    assert not [each for each in host.ran if each.startswith("mkfs")]
    step = next(step for step in host.steps(_wanted()) if step.name == "file-system")
    assert "a file system other of something else" in step.remedy


def test_a_mount_without_dax_is_named(host: _Host) -> None:
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    host.uuid = _UUID
    host.put("proc/mounts", "/dev/pmem0 /var/lib/caesura/carve-out ext4 rw 0 0\n")
    step = next(step for step in host.steps(_wanted()) if step.name == "mount")
    assert not step.done
    assert "without DAX" in step.remedy


@pytest.mark.parametrize(("value", "done"), [("0", True), ("1", False)])
def test_a_kernel_that_loads_no_other_one_is_named(host: _Host, value: str, *, done: bool) -> None:
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    host.put("proc/sys/kernel/kexec_load_disabled", f"{value}\n")
    step = next(step for step in host.steps(_wanted()) if step.name == "loadable")
    assert step.done is done
    assert ("kexec_load_disabled" in step.remedy) is not done


def test_lines_of_ours_are_replaced_in_their_place() -> None:
    first = with_block(
        "a\n", "# begin of caesura host prepare-kexec\nold\n# end of caesura host prepare-kexec\n"
    )
    again = with_block(
        f"{first}b\n", "# begin of caesura host prepare-kexec\nnew\n# end of caesura host prepare-kexec\n"
    )
    assert again == "a\n# begin of caesura host prepare-kexec\nnew\n# end of caesura host prepare-kexec\nb\n"
    assert with_block(again, "") == "a\nb\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4G", "is not SIZE!START"),
        ("4G$8G", "is not SIZE!START"),
        ("0!8G", "above 0"),
        ("4G!1K", "multiples of 2 MiB"),
    ],
)
def test_a_bad_carve_out_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadCarveOut, match=why):
        parse_carve_out(text)


def test_carve_outs_of_a_command_line() -> None:
    assert parse_carve_out("192M!0x40000000") == (192 << 20, 1 << 30)
    assert carve_outs("quiet memmap=1G!2G,1G!8G memmap=64K$0x1000 memmap=2G!16G") == [
        "1G!2G",
        "1G!8G",
        "2G!16G",
    ]


def test_the_next_kernel_is_given_what_this_one_has() -> None:
    line = "BOOT_IMAGE=/vmlinuz root=/dev/vda ro initrd=\\x memmap=4G!8G panic=5 watchdog.stop_on_reboot=0 caesura.arrive=crash-kernel"
    assert next_command_line(line) == "root=/dev/vda ro memmap=4G!8G panic=5 watchdog.stop_on_reboot=0"


def test_a_kernel_is_loaded_and_written_down(host: _Host) -> None:
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    host.put("boot/initrd.img-6.1.0-1-amd64", f"etc/caesura/hook-version-{HOOK_VERSION}\n")
    loaded = load_kernel("6.1.0-1-amd64", more=("quiet",), root=host.root, run=host.run)
    assert loaded == msgspec.json.decode(host.text("run/caesura/kexec-loaded.json"), type=LoadedKernel)
    assert (
        loaded.command_line == "root=/dev/vda ro quiet memmap=4G!8G panic=5 watchdog.stop_on_reboot=0 quiet"
    )
    assert (loaded.boot_id, loaded.hook_version) == ("boot-1", HOOK_VERSION)


@pytest.mark.parametrize(
    ("release", "command_line", "names", "why"),
    [
        ("6.1.0-2-amd64", "memmap=4G!8G", "", "vmlinuz-6.1.0-2-amd64 is missing"),
        ("6.1.0-1-amd64", "memmap=4G!8G", "etc", "has no hook, not version"),
        ("6.1.0-1-amd64", "memmap=4G!8G", "etc/caesura/hook-version-0", "has the hook of version 0, not"),
        ("6.1.0-1-amd64", "panic=5", f"etc/caesura/hook-version-{HOOK_VERSION}", "has no carve-out"),
    ],
)
def test_a_kernel_that_would_lose_guests_is_not_loaded(
    release: str, command_line: str, names: str, why: str, host: _Host
) -> None:
    host.boot(command_line)
    host.put("boot/initrd.img-6.1.0-1-amd64", f"{names}\n")
    with pytest.raises(HostError, match=why):
        load_kernel(release, root=host.root, run=host.run)
    assert not [each for each in host.ran if each.startswith("kexec")]


def test_a_load_that_did_not_happen_is_noticed(host: _Host) -> None:
    host.boot("memmap=4G!8G")
    host.put("boot/initrd.img-6.1.0-1-amd64", f"etc/caesura/hook-version-{HOOK_VERSION}\n")

    def run(argv: Sequence[str]) -> str:
        return host.run(argv) if argv[0] == "lsinitramfs" else ""

    with pytest.raises(HostError, match="no kernel is loaded"):
        load_kernel("6.1.0-1-amd64", root=host.root, run=run)


def test_no_record_of_another_kernel_is_left(host: _Host) -> None:
    """Killed after kexec and before it was written down, it would say that the former one is loaded."""
    host.boot("memmap=4G!8G")
    host.put("boot/initrd.img-6.1.0-1-amd64", f"etc/caesura/hook-version-{HOOK_VERSION}\n")
    load_kernel("6.1.0-1-amd64", root=host.root, run=host.run)

    def run(argv: Sequence[str]) -> str:
        if argv[0] == "kexec":
            raise KeyboardInterrupt
        return host.run(argv)

    with pytest.raises(KeyboardInterrupt):
        load_kernel("6.1.0-1-amd64", root=host.root, run=run)
    assert not (host.root / "run/caesura/kexec-loaded.json").exists()


def test_root_follows_nothing_that_the_host_updater_put_in_its_folder(host: _Host) -> None:
    """The units make /run/caesura for that user."""
    host.boot("memmap=4G!8G")
    host.put("boot/initrd.img-6.1.0-1-amd64", f"etc/caesura/hook-version-{HOOK_VERSION}\n")
    host.put("etc/shadow", "secret")
    (host.root / "run/caesura").mkdir(parents=True)
    (host.root / "run/caesura/kexec-loaded.new").symlink_to(host.root / "etc/shadow")
    loaded = load_kernel("6.1.0-1-amd64", root=host.root, run=host.run)
    assert host.text("etc/shadow") == "secret"
    assert loaded == msgspec.json.decode(host.text("run/caesura/kexec-loaded.json"), type=LoadedKernel)
    assert (host.root / "run/caesura/kexec-loaded.json").stat().st_mode & 0o777 == 0o644


def test_root_gives_away_nothing_that_a_link_in_the_carve_out_names(
    host: _Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The carve-out belongs to the host updater's user from the first time on; what is made there again may be a link by then."""
    wanted = _wanted()
    host.boot("memmap=4G!8G panic=5 watchdog.stop_on_reboot=0")
    host.apply(wanted)
    (host.root / wanted.state_dir.lstrip("/")).mkdir(parents=True, exist_ok=True)
    folder = host.root / wanted.carve_out.lstrip("/") / "ram"
    folder.rmdir()
    folder.symlink_to(host.root / "etc")
    followed = []
    monkeypatch.setattr(
        os, "chown", lambda path, *_, follow_symlinks=True: followed.append(path) if follow_symlinks else None
    )
    host.apply(wanted)
    assert followed == []


def test_where_signatures_are_not_had_the_other_call_is_tried(host: _Host) -> None:
    host.boot("memmap=4G!8G")
    host.put("boot/initrd.img-6.1.0-1-amd64", f"etc/caesura/hook-version-{HOOK_VERSION}\n")
    refused = []

    def run(argv: Sequence[str]) -> str:
        if argv[0] == "kexec" and argv[1] == "-s":
            refused.append(argv)
            raise HostError("kexec_file_load failed: Required key not available")
        if argv[0] == "kexec":
            host.put("sys/kernel/kexec_loaded", "1\n")
        return host.run(argv)

    load_kernel("6.1.0-1-amd64", root=host.root, run=run)
    assert len(refused) == 1


@pytest.mark.parametrize("place", ["caesura-arrive.service", "caesura-pause-guard.service.d/kexec.conf"])
def test_who_decides_about_guests_waits_for_the_mount_of_their_memory(place: str) -> None:
    """It is nofail, so no target waits for it; as systemd-escape --path names it."""
    text = installed_texts()[f"/etc/systemd/system/{place}"]
    unit = CARVE_OUT.strip("/").replace("-", "\\x2d").replace("/", "-") + ".mount"
    words = [word for line in text.splitlines() if line.startswith("After=") for word in line[6:].split()]
    assert unit in words

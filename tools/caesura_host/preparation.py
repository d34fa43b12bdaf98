"""What a host needs before its kernel can be replaced under running guests: facts in, a list of steps out. Pure.

A step is a file that holds exactly our text, a block of our lines in somebody else's file, or a command. What another
program or person wrote is never changed: our file is removed only while it is as we wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from caesura.lifecycle.loaded_kernel import carve_outs
from caesura_host.kernel_command_line import parameter

GRUB = "/etc/default/grub.d/caesura.cfg"
FSTAB = "/etc/fstab"
SETTINGS = "/etc/caesura/initramfs.conf"
HOOKS = "/etc/initramfs-tools/"
"""Of the hook and its script."""
WATCHDOG_STAYS = "watchdog.stop_on_reboot=0"
"""Without it most drivers stop a hardware watchdog when the kernel is left (``watchdog_stop_on_reboot`` of Linux), and a next kernel that hangs is not reset."""
_BEGIN = "# begin of caesura host prepare-kexec"
_END = "# end of caesura host prepare-kexec"


class WantedPreparation(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator wants.

    Args:
        memmap: the carve-out, ``SIZE!START``.
        uuid: of the file system in it.
        carve_out: where it is mounted.
        state_dir: of the host updater.
        guard: the guard's program.
        early: whether the initramfs continues the guests; else the unit does.
        panic_s: after a panic the machine is reset after this many seconds.
        crash_release: the kernel that a crash boots before the unit has continued the guests; empty: none.
        crash_mib: memory kept for that kernel.
        hook_version: of the hook that belongs to this program.
    """

    memmap: str
    uuid: str
    carve_out: str
    state_dir: str
    guard: str
    early: bool
    panic_s: int
    crash_release: str
    crash_mib: int
    hook_version: str


class PreparationFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was found on the host.

    Args:
        command_line: of the running kernel.
        files: text of each file that a step may be about; those that do not exist are missing.
        has_grub: whether GRUB's configuration is made from /etc/default/grub.
        tools: the names of programs that exist.
        initramfs_hooks: kernel release to the version of the hook in its initramfs; empty: none.
        device_uuid: UUID of the file system on the carve-out's device; empty: none; None: no such device.
        mount_options: of the carve-out's mount; None: not mounted.
        has_user: whether the user of the host updater exists.
        kexec_disabled: whether this kernel loads no other one any more (``kernel.kexec_load_disabled``).
    """

    command_line: str
    files: Mapping[str, str]
    has_grub: bool
    tools: frozenset[str]
    initramfs_hooks: Mapping[str, str]
    device_uuid: str | None
    mount_options: str | None
    has_user: bool = True
    kexec_disabled: bool = False


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a prepared host has.

    Args:
        name: a code for automation.
        about: what it is, for people.
        done: whether the host has it.
        remedy: what to do when it has not.
        kind: ``file``: our own file; ``block``: our lines in a file; ``command``: a program run by ``--apply``;
            ``manual``: something that only the operator can do.
        path: of the file.
        text: of the file or block.
        argv: of the program.
    """

    name: str
    about: str
    done: bool
    remedy: str = "caesura host prepare-kexec --apply"
    kind: Literal["file", "block", "command", "manual"] = "manual"
    path: str = ""
    text: str = ""
    argv: tuple[str, ...] = ()


def steps(wanted: WantedPreparation, facts: PreparationFacts, own_files: Mapping[str, str]) -> list[Step]:
    """What the host needs, in the order in which it is made.

    Args:
        own_files: place to text of what is the same on every host.
    """
    found = [_packages(wanted, facts), _loadable(facts)]
    settings = settings_text(wanted)
    files = {SETTINGS: settings, **own_files}
    if without_hook(wanted, facts):
        files = {path: text for path, text in files.items() if not path.startswith(HOOKS)}
    found += [_file(path, text, facts) for path, text in files.items()]
    if facts.has_grub:
        found.append(_file(GRUB, grub_text(wanted), facts))
    lines = fstab_lines(wanted)
    found.append(
        Step(
            name="fstab",
            about=f"{FSTAB} mounts the carve-out with dax=always",
            done=block_of(facts.files.get(FSTAB, "")) == lines,
            kind="block",
            path=FSTAB,
            text=lines,
        )
    )
    found += [_boot(wanted, facts), _file_system(wanted, facts), _mount(facts), *_initramfs(wanted, facts)]
    return found


def without_hook(wanted: WantedPreparation, facts: PreparationFacts) -> bool:
    """Whether the initramfs is made by dracut, and has nothing to do with the guests: a unit continues them.

    systemd in such an initramfs ends every process before it goes to the root file system, a guest's QEMU among them.
    """
    return not wanted.early and "dracut" in facts.tools and "update-initramfs" not in facts.tools


def _packages(wanted: WantedPreparation, facts: PreparationFacts) -> Step:
    needed = {"kexec": "kexec-tools", "mkfs.ext4": "e2fsprogs"}
    if not without_hook(wanted, facts):
        needed |= {"update-initramfs": "initramfs-tools", "lsinitramfs": "initramfs-tools-core"}
    missing = sorted({package for tool, package in needed.items() if tool not in facts.tools})
    remedy = f"apt-get install --no-install-recommends {' '.join(missing)}" if missing else ""
    if "initramfs-tools" in missing and "dracut" in facts.tools:
        remedy += (
            " (it replaces dracut); or keep dracut and let a unit continue the guests: prepare-kexec --late --apply, and"
            " early = false in [kernel]"
        )
    return Step(
        name="packages",
        about="programs that load a kernel, make an initramfs and a file system",
        done=not missing,
        remedy=remedy,
    )


def _loadable(facts: PreparationFacts) -> Step:
    return Step(
        name="loadable",
        about="the running kernel lets another one be loaded",
        done=not facts.kexec_disabled,
        remedy="kernel.kexec_load_disabled is 1 until the next boot: take it out of /etc/sysctl.conf and /etc/sysctl.d, then reboot once"
        if facts.kexec_disabled
        else "",
    )


def _file(path: str, text: str, facts: PreparationFacts) -> Step:
    return Step(
        name=f"file:{path}",
        about=f"{path} is the one of this version",
        done=facts.files.get(path) == text,
        kind="file",
        path=path,
        text=text,
    )


def _boot(wanted: WantedPreparation, facts: PreparationFacts) -> Step:
    words = boot_words(wanted)
    missing = [word for word in words if not _has(facts.command_line, word)]
    if facts.has_grub:
        remedy = (
            "caesura host prepare-kexec --apply, then reboot once"
            if GRUB not in facts.files
            else "update-grub, then reboot once"
        )
    else:
        remedy = "add them to the boot loader's command line, for every kernel, then reboot once"
    return Step(
        name="command-line",
        about="the running kernel has " + " ".join(words),
        done=not missing,
        remedy=f"missing: {' '.join(missing)}: {remedy}" if missing else "",
    )


def _has(command_line: str, word: str) -> bool:
    name, _, value = word.partition("=")
    if name == "memmap":
        return value in carve_outs(command_line)
    if word == WATCHDOG_STAYS:
        return parameter(command_line, name) == value
    return parameter(command_line, name) is not None


def _file_system(wanted: WantedPreparation, facts: PreparationFacts) -> Step:
    made = facts.device_uuid == wanted.uuid
    remedy = "caesura host prepare-kexec --apply"
    if facts.device_uuid is None:
        remedy = "reboot once with the carve-out on the command line, then caesura host prepare-kexec --apply"
    elif facts.device_uuid and not made:
        remedy = (
            f"the carve-out has a file system {facts.device_uuid} of something else: is it in use?"
            f" If not: wipefs -a /dev/pmem0, then caesura host prepare-kexec --apply"
        )
    can = facts.device_uuid == ""
    return Step(
        name="file-system",
        about=f"the carve-out has the ext4 file system {wanted.uuid}",
        done=made,
        remedy="" if made else remedy,
        kind="command" if can else "manual",
        # Blocks as large as pages, or there is no DAX; without inline data, which DAX has not.
        argv=("mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-U", wanted.uuid, "/dev/pmem0")
        if can
        else (),
    )


def _mount(facts: PreparationFacts) -> Step:
    options = (facts.mount_options or "").split(",")
    done = "dax=always" in options
    if facts.mount_options is None:
        remedy = "caesura host prepare-kexec --apply, when there is the file system"
    else:
        remedy = "it is mounted without DAX: umount it, and mount it again; see dmesg if DAX is refused"
    return Step(
        name="mount",
        about="the carve-out is mounted with dax=always",
        done=done,
        remedy="" if done else remedy,
    )


def _initramfs(wanted: WantedPreparation, facts: PreparationFacts) -> list[Step]:
    if without_hook(wanted, facts):
        return [
            Step(
                name="initramfs",
                about="the initramfs (dracut) needs no hook: caesura-arrive.service continues the guests",
                done=not wanted.crash_release,
                remedy="leave --crash-kernel out: only the hook of initramfs-tools loads one"
                if wanted.crash_release
                else "",
            )
        ]
    stale = sorted(
        release for release, version in facts.initramfs_hooks.items() if version != wanted.hook_version
    )
    return [
        Step(
            name="initramfs",
            about=f"the initramfs of each kernel has the hook of version {wanted.hook_version}",
            done=bool(facts.initramfs_hooks) and not stale,
            remedy=_initramfs_remedy(facts, stale),
            kind="command" if stale else "manual",
            argv=("update-initramfs", "-u", "-k", "all") if stale else (),
        )
    ]


def _initramfs_remedy(facts: PreparationFacts, stale: list[str]) -> str:
    if not facts.initramfs_hooks:
        return (
            "no /boot/initrd.img-RELEASE was found, or lsinitramfs is missing: the hook needs initramfs-tools"
        )
    return f"update-initramfs -u -k {stale[0] if len(stale) == 1 else 'all'}" if stale else ""


def boot_words(wanted: WantedPreparation) -> list[str]:
    """What every kernel of the host is given."""
    words = [f"memmap={wanted.memmap}", f"panic={wanted.panic_s}", WATCHDOG_STAYS]
    return [*words, f"crashkernel={wanted.crash_mib}M"] if wanted.crash_release else words


def grub_text(wanted: WantedPreparation) -> str:
    """GRUB's variables are a shell file, sourced after /etc/default/grub."""
    return f'# Made by caesura host prepare-kexec; update-grub reads it.\nGRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX {" ".join(boot_words(wanted))}"\n'


def fstab_lines(wanted: WantedPreparation) -> str:
    """Our lines in /etc/fstab. ``nofail``: a kernel without the carve-out boots all the same, and nothing waits for this mount
    but our units; a busy boot finds the device after many seconds.
    """
    options = "dax=always,nofail,x-systemd.device-timeout=60"
    return f"{_BEGIN}\nUUID={wanted.uuid} {wanted.carve_out} ext4 {options} 0 0\n{_END}\n"


def settings_text(wanted: WantedPreparation) -> str:
    """What the hook and its script read: a shell file."""
    return (
        "# Made by caesura host prepare-kexec; read by the initramfs hook. After a change: update-initramfs -u -k all\n"
        f"HOOK_VERSION={wanted.hook_version}\n"
        f"CARVE_OUT={wanted.carve_out}\n"
        f"CARVE_OUT_UUID={wanted.uuid}\n"
        f"STATE_DIR={wanted.state_dir}\n"
        f"GUARD={wanted.guard}\n"
        f"EARLY={'yes' if wanted.early else 'no'}\n"
        f"CRASH_RELEASE={wanted.crash_release}\n"
    )


def settings_of(text: str) -> dict[str, str]:
    """The variables of ``settings_text``."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def block_of(text: str) -> str:
    """Our lines in a file, with both markers; empty: there are none."""
    begin = text.find(_BEGIN)
    end = text.find(_END, begin)
    if begin < 0 or end < 0:
        return ""
    return text[begin : end + len(_END)] + "\n"


def with_block(text: str, block: str) -> str:
    """The file with our lines in the place of those that it has, or at its end; an empty block removes them."""
    if old := block_of(text):
        return text.replace(old, block, 1) if old in text else text.replace(old.rstrip("\n"), block, 1)
    if not block:
        return text
    return text + ("" if not text or text.endswith("\n") else "\n") + block

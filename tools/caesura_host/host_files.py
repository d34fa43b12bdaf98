"""The shell around ``preparation``: reads the facts from a host, and makes and undoes the steps.

Everything is below ``root``, which tests replace; commands run on the host as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from caesura.runtime.errors import CaesuraError
from caesura_host.hook_files import EXECUTABLE, installed_texts
from caesura_host.preparation import (
    FSTAB,
    GRUB,
    HOOKS,
    SETTINGS,
    PreparationFacts,
    Step,
    WantedPreparation,
    block_of,
    settings_of,
    with_block,
)
from caesura_vmcontrol.intent import IntentFile, UnreadableIntent
from caesura_vmcontrol.mounts import mount_of, mounts_in

DEVICE = "/dev/pmem0"
_TOOLS = ("kexec", "update-initramfs", "lsinitramfs", "dracut", "mkfs.ext4", "blkid")
_HOOK_NAME = "etc/caesura/hook-version-"
_COMMAND_S = 600.0

Run = Callable[[Sequence[str]], str]


class HostError(CaesuraError):
    """Something on this host is not as it must be; the text says what to do."""


def run_program(argv: Sequence[str]) -> str:
    """Its standard output.

    Raises:
        HostError: it is not installed, or failed; with its last words.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    program = shutil.which(argv[0], path=path)
    if program is None:
        raise HostError(f"{argv[0]} is not installed")
    try:
        done = subprocess.run(
            (program, *argv[1:]),
            check=True,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            env={**os.environ, "PATH": path},
        )
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise HostError(
            f"{' '.join(argv)} failed with {error.returncode}: {said[-1] if said else 'without a word'}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(f"{' '.join(argv)} failed: {error}") from error
    return done.stdout


def hook_version(initrd: Path, run: Run = run_program) -> str:
    """The version of the hook in an initramfs; empty: it has none.

    Raises:
        HostError: the file cannot be read.
    """
    for line in run(("lsinitramfs", str(initrd))).splitlines():
        if line.startswith(_HOOK_NAME):
            return line.removeprefix(_HOOK_NAME)
    return ""


class HostFolder:
    """A host's file system.

    Args:
        root: where it begins; not ``/`` in tests.
        run: runs a program.
    """

    def __init__(self, root: Path = Path("/"), run: Run = run_program) -> None:
        self._root = root
        self._run = run
        self._hook_versions: dict[tuple[str, int, int], str] = {}
        """By path, size and instant of the last change: listing an initramfs takes a second, and the facts are read thrice."""

    def _place(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def _text(self, path: str) -> str | None:
        try:
            return self._place(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise HostError(f"{path} cannot be read: {error}") from error

    def settings(self) -> dict[str, str]:
        """What the host was prepared with; empty: it was not."""
        return settings_of(self._text(SETTINGS) or "")

    def new_uuid(self) -> str:
        """The one that the host was prepared with, else another one."""
        return self.settings().get("CARVE_OUT_UUID") or str(uuid.uuid4())

    def facts(self, carve_out: str) -> PreparationFacts:
        """What was found.

        Raises:
            HostError: a file cannot be read, or an initramfs cannot be listed.
        """
        paths = (FSTAB, GRUB, SETTINGS, *installed_texts())
        files = {path: text for path in paths if (text := self._text(path)) is not None}
        search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        tools = frozenset(name for name in _TOOLS if shutil.which(name, path=search))
        hooks = {}
        if "lsinitramfs" in tools:
            for image in sorted(self._place("/boot").glob("initrd.img-*")):
                if not image.is_symlink():
                    hooks[image.name.removeprefix("initrd.img-")] = self._hook_version(image)
        return PreparationFacts(
            command_line=(self._text("/proc/cmdline") or "").strip(),
            files=files,
            has_grub=self._place("/etc/default/grub").exists(),
            tools=tools,
            initramfs_hooks=hooks,
            device_uuid=self._device_uuid(),
            mount_options=self._mount_options(carve_out),
            kexec_disabled=(self._text("/proc/sys/kernel/kexec_load_disabled") or "").strip() == "1",
        )

    def _hook_version(self, image: Path) -> str:
        found = image.stat()
        key = (str(image), found.st_size, found.st_mtime_ns)
        if key not in self._hook_versions:
            self._hook_versions[key] = hook_version(image, self._run)
        return self._hook_versions[key]

    def _device_uuid(self) -> str | None:
        if not self._place(DEVICE).exists():
            return None
        try:
            return self._run(("blkid", "-p", "-o", "value", "-s", "UUID", DEVICE)).strip()
        except HostError:
            return ""  # blkid fails where there is nothing; what it does not know, mkfs.ext4 would overwrite: --apply asks

    def _mount_options(self, carve_out: str) -> str | None:
        mount = mount_of(mounts_in(self._text("/proc/mounts") or ""), carve_out)
        return ",".join(mount.options) if mount is not None and mount.place == carve_out else None

    def apply(self, wanted: WantedPreparation, found: Sequence[Step], say: Callable[[str], None]) -> None:
        """Make what is not done and can be made.

        Raises:
            HostError: a file or a command failed; what was made before stays, and the next run continues.
        """
        changed = []
        for step in found:
            if step.done:
                continue
            match step.kind:
                case "file" | "block":
                    self._write(step)
                    changed.append(step.path)
                    say(f"wrote {step.path}")
                case "command" if step.name != "initramfs":
                    say(" ".join(step.argv))
                    self._run(step.argv)
                case _:
                    pass
        self._mount(wanted, say)
        if GRUB in changed:
            say("update-grub")
            self._run(("update-grub",))
        if any(path.startswith("/etc/systemd/") for path in changed):
            self._systemd(say)
        hooked = any(step.path.startswith(HOOKS) for step in found)
        if (hooked and any(path == SETTINGS or path.startswith(HOOKS) for path in changed)) or any(
            not step.done and step.name == "initramfs" and step.argv for step in found
        ):
            say("update-initramfs -u -k all")
            self._run(("update-initramfs", "-u", "-k", "all"))

    def _mount(self, wanted: WantedPreparation, say: Callable[[str], None]) -> None:
        place = self._place(wanted.carve_out)
        place.mkdir(parents=True, exist_ok=True)
        if self._device_uuid() == wanted.uuid and self._mount_options(wanted.carve_out) is None:
            say(f"mount {wanted.carve_out}")
            self._run(("mount", "-t", "ext4", "-o", "dax=always", DEVICE, wanted.carve_out))
        if self._mount_options(wanted.carve_out) is None:
            return
        owner = self._place(wanted.state_dir)
        for name in ("ram", "operations"):
            folder = place / name
            folder.mkdir(mode=0o700, exist_ok=True)
            if owner.exists():
                found = owner.stat()
                # From the second time on that user may have put something in their place.
                os.chown(folder, found.st_uid, found.st_gid, follow_symlinks=False)
                os.chown(place, found.st_uid, found.st_gid, follow_symlinks=False)

    def _systemd(self, say: Callable[[str], None]) -> None:
        say("systemctl enable caesura-arrive.service")
        self._run(("systemctl", "enable", "--quiet", "caesura-arrive.service"))
        if self._place("/run/systemd/system").exists():
            self._run(("systemctl", "daemon-reload"))

    def _write(self, step: Step) -> None:
        path = self._place(step.path)
        text = step.text if step.kind == "file" else with_block(self._text(step.path) or "", step.text)
        temporary = path.with_name(
            f".{path.name}.caesura-new"
        )  # hidden: initramfs-tools runs every other file in its folders
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = (
                path.stat().st_mode & 0o7777 if path.exists() else 0o755 if step.path in EXECUTABLE else 0o644
            )
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(mode)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise HostError(f"{step.path} cannot be written: {error.strerror}. Run it as root") from error

    def check_idle(self, state_dir: str, carve_out: str) -> None:
        """Whether the host needs none of what was prepared just now.

        Raises:
            HostError: its kernel is being changed, or a guest waits in its files, or runs, with its memory in the carve-out.
        """
        try:
            intent = IntentFile(str(self._place(state_dir))).read()
        except (OSError, UnreadableIntent) as error:
            raise HostError(
                f"what the pause guard holds cannot be read, so nothing is removed: {error}"
            ) from error
        if intent is not None and intent.kernel_change is not None:
            raise HostError(
                f"the kernel is being changed (operation {intent.operation}), and needs this to continue its guests: wait until it has ended"
            )
        there = sorted(str(path) for path in self._place(carve_out).glob("ram/*/*.ram"))
        if there:
            raise HostError(
                f"guests have their memory in the carve-out ({', '.join(there)}): set [kernel] kexec = false, and start them again first"
            )

    def undo(self, found: Sequence[Step], say: Callable[[str], None]) -> list[str]:
        """Remove our files and lines. The carve-out's file system stays: its content is the operator's.

        Returns:
            sentences about what was left, since it is not as it was written.

        Raises:
            HostError: a file or a command failed.
        """
        left = []
        removed = []
        for step in found:
            text = self._text(step.path) if step.kind in ("file", "block") else None
            if text is None:
                continue
            if step.kind == "block":
                if block_of(text):
                    self._write(
                        Step(
                            name=step.name,
                            about="",
                            done=False,
                            kind="file",
                            path=step.path,
                            text=with_block(text, ""),
                        )
                    )
                    removed.append(step.path)
                    say(f"removed our lines from {step.path}")
            elif text == step.text:
                if step.path.endswith("/caesura-arrive.service"):
                    self._run(("systemctl", "disable", "--quiet", "caesura-arrive.service"))
                try:
                    self._place(step.path).unlink()
                except OSError as error:
                    raise HostError(
                        f"{step.path} cannot be removed: {error.strerror}. Run it as root"
                    ) from error
                removed.append(step.path)
                say(f"removed {step.path}")
            else:
                left.append(f"{step.path} is not as it was written, and stays")
        if GRUB in removed:
            self._run(("update-grub",))
        if (
            any(path.startswith("/etc/systemd/") for path in removed)
            and self._place("/run/systemd/system").exists()
        ):
            self._run(("systemctl", "daemon-reload"))
        if any(path.startswith(HOOKS) for path in removed):
            say("update-initramfs -u -k all")
            self._run(("update-initramfs", "-u", "-k", "all"))
        return left

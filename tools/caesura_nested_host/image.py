"""The image of a host whose kernel can be replaced: Debian 12 with systemd, QEMU, two kernels and Caesura from the wheel.

Built as root (debootstrap), once: the system is kept in the cache folder, keyed by its packages; what changes with the checkout
(Caesura, the initramfs hook, the initramfs of both kernels) is built on top of a copy. It is run without root.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from caesura.runtime.errors import CaesuraError
from caesura_guest_image.cpio import FOLDER, file_entry, link_entry, pack

ROOT = Path(__file__).parents[2]
INSIDE = Path(__file__).parent / "inside"
_UNITS = "deploy/systemd"
_SUITE = "bookworm"
_PACKAGES = (
    *(
        "systemd",
        "systemd-sysv",
        "udev",
        "dbus",
        "kmod",
        "python3",
        "busybox-static",
        "initramfs-tools",
        "kexec-tools",
    ),
    *("ndctl", "iproute2", "util-linux", "procps", "e2fsprogs", "sudo", "zstd", "dracut-core"),
)
_MACHINE = ("qemu-system-x86", "linux-image-amd64")
_IMAGE = re.compile(r"^linux-image-(\d+(?:\.\d+)*-\d+)-amd64$")
_PAUSE = 3600.0  # s: for one program of the build; a mirror may be slow
CARVE_OUT = "256M!1G"
# The hosts' boot waits for these only; the rest would be some hundred modules to unpack in emulation.
_DRIVERS = frozenset(("nvdimm", "dax", "virtio", "block", "net", "char", "rtc", "acpi"))
"""Of the kernels: udev loads what it finds a device for, and that is work for nothing here."""
_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "i6300esb")
"""In the initramfs. The last is the watchdog's driver, which the hook adds where it finds one: not in a folder that the image is made in."""


class NoImage(CaesuraError):
    """The image cannot be built here; the text says why."""


class Image(msgspec.Struct, frozen=True):
    """What a host is run from.

    Args:
        disk: its root file system, ext4 in a raw file; never written to.
        boot: folder with ``vmlinuz-RELEASE`` and ``initrd.img-RELEASE``.
        old: the release that it boots.
        new: the release that it goes to.
    """

    disk: str
    boot: str
    old: str
    new: str


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)


def cache_folder() -> Path:
    """Outside the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "caesura" / "kexec-host"


def missing() -> str:
    """Why the image cannot be had here; empty: it can."""
    if not (ROOT / _UNITS / "caesura-host-updater.service").exists():
        return "the host's image is built from a checkout of Caesura: run this in one"
    if shutil.which("qemu-system-x86_64") is None:
        return "qemu-system-x86_64 is not installed (on Debian: apt-get install qemu-system-x86)"
    if shutil.which("gcc") is None:
        return "gcc is not installed (on Debian: apt-get install gcc)"
    if list(cache_folder().glob("system-*/complete")):
        return ""
    if os.geteuid() != 0:
        return "root is needed to build the host's image once (debootstrap)"
    if not shutil.which("debootstrap", path=_path()):
        return "debootstrap is not installed (on Debian: apt-get install debootstrap)"
    return "" if _kernels() else "apt offers no two kernels (linux-image-*-amd64) of Debian 12"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _run(*argv: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, "PATH": _path(), **(env or {})},
        capture_output=True,
        text=True,
        timeout=_PAUSE,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-12:]
        raise NoImage(f"{' '.join(argv)} failed with {done.returncode}:\n" + "\n".join(last))
    return done.stdout


def _kernels() -> list[str]:
    """Releases of 6.1 that apt offers, oldest first."""
    try:
        names = _run("apt-cache", "pkgnames", "linux-image-6.1").split()
    except (NoImage, OSError):
        return []
    found = [match[1] for name in names if (match := _IMAGE.match(name))]
    return sorted(found, key=lambda text: [int(part) for part in re.split(r"[.-]", text)])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mirror() -> str:
    """The first one that this machine's apt uses for the suite."""
    for line in _run("apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)").splitlines():
        site, _, release = line.partition(" ")
        if release.split("/")[0] == _SUITE:
            return site
    raise NoImage(f"this machine's apt has no source for {_SUITE}")


def _system(say: Callable[[str], None]) -> Path:
    """The installed Debian, as a tree that is not changed any more."""
    known = sorted(cache_folder().glob("system-*/complete"))
    key = hashlib.sha256(repr((_SUITE, _PACKAGES, _MACHINE, 1)).encode()).hexdigest()[:12]
    made = cache_folder() / f"system-{key}"
    if made / "complete" in known:
        return made
    tree = made / "tree"
    if made.exists():
        shutil.rmtree(made)
    made.mkdir(parents=True)
    begun = time.monotonic()
    say("installing Debian with two kernels for the host, once: some minutes")
    _run("debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", _SUITE, str(tree), _mirror())
    (tree / "etc/initramfs-tools/conf.d").mkdir(exist_ok=True)
    # No initramfs is made now: both are made with the hook.
    (tree / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
    (tree / "usr/sbin/policy-rc.d").chmod(0o755)
    (tree / "etc/initramfs-tools/update-initramfs.conf").write_text(
        "update_initramfs=no\nbackup_initramfs=no\n"
    )
    env = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    # The newest, and the one before it that apt has.
    _run("chroot", str(tree), "apt-get", "update", "-qq", env=env)
    offered = _run("chroot", str(tree), "apt-cache", "pkgnames", "linux-image-6.1", env=env).split()
    found = sorted(
        (match[1] for name in offered if (match := _IMAGE.match(name))),
        key=lambda text: [int(part) for part in re.split(r"[.-]", text)],
    )
    if len(found) < 2:
        raise NoImage(f"apt offers {len(found)} kernels of Debian 12, and two are needed")
    packages = ("qemu-system-x86", *(f"linux-image-{each}-amd64" for each in found[-2:]))
    _run(
        "chroot", str(tree), "apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages, env=env
    )
    _slim(tree)
    (made / "complete").write_text(f"{time.monotonic() - begun:.0f} s\n")
    say(f"system built in {time.monotonic() - begun:.0f} s")
    return made


def _slim(tree: Path) -> None:
    for name in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(tree / name, ignore_errors=True)
    (tree / "usr/sbin/policy-rc.d").unlink()
    for kernel in (tree / "lib/modules").iterdir():
        for name in (
            "sound",
            "drivers/gpu",
            "drivers/media",
            "drivers/net/wireless",
            "drivers/infiniband",
            "drivers/net/ethernet",
        ):
            shutil.rmtree(kernel / "kernel" / name, ignore_errors=True)
        _run("chroot", str(tree), "depmod", kernel.name)


def _few_modules(tree: Path) -> None:
    for kernel in (tree / "lib/modules").iterdir():
        for folder in (kernel / "kernel/drivers").iterdir():
            if folder.name == "watchdog":
                for module in folder.iterdir():
                    if module.name.split(".")[0] not in (*_MODULES, "watchdog"):
                        module.unlink()
            elif folder.name not in _DRIVERS:
                shutil.rmtree(folder)
        for folder in (kernel / "kernel/net").iterdir():
            if folder.name != "core":  # which virtio_net needs
                shutil.rmtree(folder)
        for name in ("sound", "arch/x86/kvm"):
            shutil.rmtree(kernel / "kernel" / name, ignore_errors=True)
        _run("chroot", str(tree), "depmod", kernel.name)


def _guest(folder: Path) -> Path:
    """The smallest guest, see ``inside/guest.c``."""
    made = folder / "guest.elf"
    _run(
        *("gcc", "-m32", "-O2", "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-fno-stack-protector"),
        *("-Wl,--build-id=none,--no-warn-rwx-segments", "-T", str(INSIDE / "guest.ld")),
        *("-o", str(made), str(INSIDE / "guest.c")),
    )
    return made


def _local_changes(tree: Path) -> None:
    """What makes it a host of the rig: a shell on its second serial line, and a fast boot."""
    _few_modules(tree)
    units = tree / "etc/systemd/system"
    (tree / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 0\n")
    (tree / "etc/hostname").write_text("host\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost host\n")
    (tree / "etc/machine-id").write_text("")
    (tree / "etc/initramfs-tools/update-initramfs.conf").write_text(
        "update_initramfs=all\nbackup_initramfs=no\n"
    )
    (tree / "etc/initramfs-tools/conf.d/rig").write_text(
        "MODULES=list\nCOMPRESS=lz4\n" if (tree / "usr/bin/lz4").exists() else "MODULES=list\n"
    )
    with (tree / "etc/initramfs-tools/modules").open("a") as file:
        file.write("\n".join(_MODULES) + "\n")
    for source in INSIDE.iterdir():
        match source.suffix:
            case ".service" | ".network":
                target = (
                    units / source.name
                    if source.suffix == ".service"
                    else tree / "etc/systemd/network" / source.name
                )
            case ".hook":
                target = tree / "etc/initramfs-tools/scripts/init-premount" / source.stem
            case ".rules":
                target = tree / "etc/udev/rules.d" / source.name
            case _:
                target = tree / "opt/rig" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if source.suffix in ("", ".hook", ".sh") else 0o644)
    # On the disk it is found torn after each change of the kernel, and put aside.
    (tree / "etc/systemd/journald.conf.d").mkdir(exist_ok=True)
    (tree / "etc/systemd/journald.conf.d/rig.conf").write_text("[Journal]\nStorage=volatile\n")
    (units / "sysinit.target.wants").mkdir(exist_ok=True)
    (units / "sysinit.target.wants/rig-shell.service").symlink_to("../rig-shell.service")
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/systemd-networkd.service").symlink_to(
        "/lib/systemd/system/systemd-networkd.service"
    )
    for unit in ("systemd-timesyncd", "getty@tty1", "e2scrub_reap", "systemd-pstore"):
        for wants in units.glob(f"*.wants/{unit}.service"):
            wants.unlink()
    for unit in (
        *("serial-getty@ttyS0.service", "getty.target", "kexec.service", "kexec-load.service"),
        *(
            "apt-daily.timer",
            "apt-daily-upgrade.timer",
            "dpkg-db-backup.timer",
            "e2scrub_all.timer",
            "fstrim.timer",
        ),
        *("systemd-networkd-wait-online.service", "e2scrub_reap.service", "systemd-update-utmp.service"),
    ):
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")


def _caesura(folder: Path, uv: str) -> None:
    """``/opt/caesura`` as a venv of the image's own Python."""
    dist = folder / "dist"
    _run(uv, "build", "--quiet", "--wheel", "--out-dir", str(dist), cwd=ROOT)
    (wheel,) = dist.glob("*.whl")
    locked = folder / "requirements.txt"
    locked.write_text(
        _run(
            *(uv, "export", "--quiet", "--locked", "--no-default-groups", "--no-emit-project"),
            *("--format", "requirements-txt"),
            cwd=ROOT,
        )
    )
    venv = folder / "caesura"
    site = venv / "lib/python3.11/site-packages"
    _run(
        *(uv, "pip", "install", "--quiet", "--python-version", "3.11", "--only-binary", ":all:"),
        *("--target", str(site), "-r", str(locked), str(wheel)),
        cwd=ROOT,
    )
    shutil.rmtree(site / "bin", ignore_errors=True)
    (venv / "bin").mkdir()
    (venv / "bin/python3").symlink_to("/usr/bin/python3")
    (venv / "pyvenv.cfg").write_text(
        "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11.2\n"
    )
    scripts = next(site.glob("caesura-*.dist-info/entry_points.txt")).read_text()
    for name, module, function in re.findall(
        r"^([\w-]+) = ([\w.]+):(\w+)$", scripts.split("[console_scripts]")[1].split("[")[0], re.MULTILINE
    ):
        script = venv / "bin" / name
        script.write_text(
            f"#!/opt/caesura/bin/python3\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
        )
        script.chmod(0o755)


def build(*, uv: str, say: Callable[[str], None] = _to_stderr) -> Image:
    """The image of this checkout. Blocking, minutes where the system was not built before.

    Args:
        uv: the command that builds the wheel and its venv.
        say: gets a line for each part that takes long.

    Raises:
        NoImage: it cannot be built here.
    """
    cache = cache_folder()
    with _locked(cache / "lock"):
        for left in cache.glob("making-*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        system = _system(say)
        begun = time.monotonic()
        making = cache / f"making-{os.getpid()}"
        try:
            _caesura(making, uv)
            key = _digest(system.name, making / "caesura", INSIDE)
            made = cache / f"image-{key}"
            if not (made / "image.json").exists():
                shutil.rmtree(made, ignore_errors=True)
                made.mkdir()
                _make(system / "tree", making, made)
                for other in sorted(cache.glob("image-*"), key=lambda path: path.stat().st_mtime)[:-3]:
                    shutil.rmtree(other, ignore_errors=True)
            os.utime(made)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        found = json.loads((made / "image.json").read_text())
        say(f"image {key} in {time.monotonic() - begun:.0f} s")
    return Image(str(made / "root.img"), str(made / "boot"), found["old"], found["new"])


def _digest(name: str, *folders: Path) -> str:
    found = hashlib.sha256(f"{name} {CARVE_OUT} {Path(__file__).read_text()}".encode())
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if (
                path.is_file()
                and not path.is_symlink()
                and path.suffix != ".pyc"
                and not path.parent.name.endswith(".dist-info")
            ):
                found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _make(system: Path, making: Path, made: Path) -> None:
    tree = making / "tree"
    # Hard links: what follows writes to /etc and /opt, and makes new files elsewhere.
    _run("cp", "-al", str(system), str(tree))
    for name in ("etc", "opt"):
        shutil.rmtree(tree / name)
        _run("cp", "-a", str(system / name), str(tree / name))
    _local_changes(tree)
    _run("cp", "-a", str(making / "caesura"), str(tree / "opt/caesura"))
    _run("chroot", str(tree), "python3", "-m", "compileall", "-q", "-x", "rehearse|demo", "/opt/caesura/lib")
    _run(
        "install",
        "-m",
        "644",
        str(ROOT / _UNITS / "caesura.sysusers"),
        str(tree / "usr/lib/sysusers.d/caesura.conf"),
    )
    _run("chroot", str(tree), "systemd-sysusers")
    units = tree / "etc/systemd/system"
    for name in ("caesura-host-updater", "caesura-pause-guard"):
        shutil.copyfile(ROOT / _UNITS / f"{name}.service", units / f"{name}.service")
        (units / f"{name}.service.d").mkdir()
        shutil.copyfile(ROOT / _UNITS / f"qemu/{name}.conf", units / f"{name}.service.d/qemu.conf")
        # Emulated on a busy machine a service takes minutes to start, and is not dead for a silence of seconds.
        (units / f"{name}.service.d/rig.conf").write_text(
            "[Service]\nTimeoutStartSec=1800\nWatchdogSec=600\n"
        )
    (units / "multi-user.target.wants/caesura-pause-guard.service").symlink_to(
        "../caesura-pause-guard.service"
    )
    (tree / "etc/caesura/updates.d").mkdir(parents=True)
    # The update's command, which loads the kernel.
    (tree / "etc/sudoers.d/caesura").write_text(
        "caesura-host ALL=(root) NOPASSWD: /opt/caesura/bin/caesura host load-kernel *\n"
    )
    shutil.copyfile(_guest(making), tree / "opt/rig/guest.elf")
    guest = {
        "bin/busybox": file_entry((tree / "bin/busybox").read_bytes(), executable=True),
        "bin/sh": link_entry("busybox"),
        "init": file_entry((INSIDE / "guest-init").read_bytes(), executable=True),
        **dict.fromkeys(("dev", "proc", "sys", "tmp"), FOLDER),
    }
    (tree / "opt/rig/guest.cpio").write_bytes(pack(guest))
    releases = sorted(
        (path.name for path in (tree / "lib/modules").iterdir()),
        key=lambda text: [int(part) for part in re.findall(r"\d+", text)],
    )
    old, new = releases[-2:]
    for release in releases:
        _run("chroot", str(tree), "update-initramfs", "-c", "-k", release)
    _prepare(tree)
    _late_initramfs(tree, old, new)
    _dracut_initramfs(tree, new)
    boot = made / "boot"
    boot.mkdir()
    for release in (old, new):
        for name in (f"vmlinuz-{release}", f"initrd.img-{release}"):
            shutil.copyfile(tree / "boot" / name, boot / name)
    part = made / "root.part"
    with part.open("wb") as file:
        file.truncate(1600 << 20)
    _run("mke2fs", "-q", "-t", "ext4", "-E", "lazy_itable_init=1", "-d", str(tree), str(part))
    part.rename(made / "root.img")
    (made / "image.json").write_text(json.dumps({"old": old, "new": new}))


def _late_initramfs(tree: Path, old: str, new: str) -> None:
    """``/boot/late-NEW``: an initramfs that leaves the guests to the unit, and loads the old kernel for a crash until then."""
    settings, initrd = tree / "etc/caesura/initramfs.conf", tree / f"boot/initrd.img-{new}"
    early, kept = settings.read_text(), initrd.read_bytes()
    settings.write_text(
        early.replace("EARLY=yes", "EARLY=no").replace("CRASH_RELEASE=", f"CRASH_RELEASE={old}")
    )
    _run("chroot", str(tree), "update-initramfs", "-u", "-k", new)
    initrd.rename(tree / f"boot/late-{new}")
    settings.write_text(early)
    initrd.write_bytes(kept)


def _dracut_initramfs(tree: Path, new: str) -> None:
    """``/boot/dracut-NEW``: one by dracut, with systemd in it, which knows nothing of guests."""
    argv = (
        "dracut",
        "--quiet",
        "--force",
        "--no-hostonly",
        "--kver",
        new,
        "--add-drivers",
        " ".join(_MODULES),
    )
    _run("chroot", str(tree), *argv, f"/boot/dracut-{new}")


def _prepare(tree: Path) -> None:
    """As an operator does it; what is left (the file system in the carve-out) is made when the host runs."""
    argv = (
        "chroot",
        str(tree),
        "/opt/caesura/bin/caesura",
        "host",
        "prepare-kexec",
        "--memmap",
        CARVE_OUT,
        "--apply",
    )
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=_PAUSE,
        check=False,
        env={**os.environ, "PATH": _path(), "LC_ALL": "C.UTF-8"},
    )
    if done.returncode not in (0, 1) or "Traceback" in done.stderr or "caesura: wrote" not in done.stderr:
        raise NoImage(f"prepare-kexec in the image ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    # Written again on the host, when there is the file system: until then its boot would wait for it in vain.
    fstab = tree / "etc/fstab"
    fstab.write_text(fstab.read_text().split("# begin of caesura", 1)[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Build it, and print where it is."""
    parser = argparse.ArgumentParser(prog="python -m caesura_nested_host.image", description=__doc__)
    parser.add_argument(
        "--missing", action="store_true", help="print why it cannot be built here, and fail then"
    )
    parser.add_argument(
        "--json", action="store_true", help="a failure is a JSON document, too: the last line of stderr"
    )
    parser.add_argument("--uv", default=os.environ.get("UV", "uv"))
    arguments = parser.parse_args(argv)
    why = missing()
    if arguments.missing:
        if why:
            click.echo(why)
        return 1 if why else 0
    if not why:
        try:
            click.echo(msgspec.json.encode(build(uv=arguments.uv)))
        except NoImage as error:
            why = str(error)
        else:
            return 0
    click.echo(json.dumps({"reason": why}) if arguments.json else f"nested host: {why}", err=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""Which accelerator guests can really use: KVM is believed only when a kernel was seen to boot with it.

An open /dev/kvm says little: where the machine is itself a guest, KVM may create VMs that then hang or run into
refused registers. So a kernel is booted without any initramfs; it has come all the way when it panics because it
finds no root file system. The answer is kept in a file until the machine boots again or QEMU changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from caesura.runtime.threads import in_thread

_DEVICE = "/dev/kvm"
_BOOT = Path("/boot")
_ARRIVED = b"Kernel panic - not syncing"
_SILENCE_S = 5.0
"""s: a kernel that says nothing for so long hangs; a booting one prints a line every few milliseconds."""
_WHOLE_S = 30.0
_TURN_S = 0.1
"""s: how often the thread of a trial sees whether anybody still waits for it."""
_KERNEL_WORDS = "console=ttyS0,115200 earlyprintk=serial,ttyS0,115200 panic=-1"


class Accelerator(msgspec.Struct, frozen=True):
    """``name`` as for QEMU's ``-accel``; ``reason`` says how it is known, for people."""

    name: Literal["kvm", "tcg"]
    reason: str


class _Kept(msgspec.Struct, frozen=True):
    key: str
    found: Accelerator


async def find_accelerator(
    binary: str, *, cpu: str = "host", kernel: str = "", cache: Path | None = None
) -> Accelerator:
    """KVM if guests boot with it, else TCG and why. Takes some seconds the first time; never raises.

    Args:
        cpu: the CPU model to try: one may work where another does not.
        kernel: the kernel to boot; empty: the newest readable one in /boot.
        cache: file that keeps the answer.
    """
    unusable = device_fault(_DEVICE)
    if unusable:
        return Accelerator("tcg", unusable)
    try:
        async with asyncio.timeout(_WHOLE_S):
            kernel = kernel or await in_thread("trial boot", lambda: newest_kernel(_BOOT))
            if not kernel:
                why = f'there is no readable kernel in {_BOOT} to try KVM with; set accel = "kvm" if you know that it works'
                return Accelerator("tcg", why)
            key = await in_thread("trial boot", lambda: _key(binary, cpu, kernel))
            kept = await in_thread("trial boot", lambda: _read(cache))
    except TimeoutError:
        return Accelerator(
            "tcg", f"the disk with QEMU, the kernel or {cache} has not answered for {_WHOLE_S:g} s"
        )
    if kept is not None and kept.key == key:
        return kept.found
    why = await try_boot(probe_command(binary, "kvm", cpu, kernel))
    found = (
        Accelerator("tcg", f"KVM is there but a kernel does not boot with it ({cpu}): {why}")
        if why
        else Accelerator("kvm", f"a kernel booted with it ({cpu})")
    )
    if cache is not None:
        with suppress(
            OSError
        ):  # the next start tries again, also where the disk does not answer (TimeoutError is one)
            async with asyncio.timeout(_WHOLE_S):
                await in_thread("trial boot", lambda: _write(cache, _Kept(key, found)))
    return found


def device_fault(device: str) -> str:
    """Why KVM's device cannot even be opened; empty if it can."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} cannot be opened: {error.strerror}"
    return ""


def probe_command(binary: str, accelerator: str, cpu: str, kernel: str) -> list[str]:
    """The command line of the trial."""
    return [
        *(binary, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35"),
        *("-m", "128", "-accel", accelerator, "-cpu", cpu, "-serial", "stdio"),
        *("-kernel", kernel, "-append", _KERNEL_WORDS),
    ]


def newest_kernel(folder: Path) -> str:
    """A kernel that this user may read; empty if there is none."""
    found = [path for path in folder.glob("vmlinuz*") if path.is_file() and os.access(path, os.R_OK)]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else ""


async def try_boot(argv: Sequence[str], *, silence_s: float = _SILENCE_S, whole_s: float = _WHOLE_S) -> str:
    """Empty if the kernel came all the way, else what was seen instead.

    In a thread, for executing a program may wait for a disk; that thread ends the program when nobody waits any more.
    """
    stop, seen = threading.Event(), bytearray()
    try:
        async with asyncio.timeout(whole_s):
            return await in_thread("trial boot", lambda: _boot(argv, seen, silence_s, stop))
    except TimeoutError:
        return _with_last_line(f"not through after {whole_s:g} s", seen)
    finally:
        stop.set()


def _boot(argv: Sequence[str], seen: bytearray, silence_s: float, stop: threading.Event) -> str:
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
    except OSError as error:
        return f"{argv[0]} cannot be started: {error.strerror or error}"
    with process:
        try:
            why = _watch(process, seen, silence_s, stop)
        finally:
            process.kill()
    return _with_last_line(why, seen) if why else ""


def _watch(process: subprocess.Popen[bytes], seen: bytearray, silence_s: float, stop: threading.Event) -> str:
    output = process.stdout
    if output is None:
        return "no output"
    heard = time.monotonic()
    while not stop.is_set():
        if select.select([output], [], [], _TURN_S)[0]:
            data = output.read(65536)
            heard = time.monotonic()
            seen += data
            if _ARRIVED in seen:
                return ""
            if not data:
                return f"QEMU ended with exit code {process.wait()}"
        elif time.monotonic() >= heard + silence_s:
            return f"silent for {silence_s:g} s"
    return "given up"


def _with_last_line(why: str, seen: bytearray) -> str:
    lines = [line.strip() for line in seen.decode(errors="replace").splitlines() if line.strip()]
    return f"{why} (last line: {lines[-1][:160] if lines else 'none'})"


def _key(binary: str, cpu: str, kernel: str) -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    facts = [boot_id, cpu]
    for name in (shutil.which(binary) or binary, kernel):
        with suppress(OSError):
            found = Path(name).stat()
            facts.append(f"{Path(name).resolve()} {found.st_size} {found.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _read(cache: Path | None) -> _Kept | None:
    if cache is None:
        return None
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError):
        return None


def _write(cache: Path, kept: _Kept) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    new = cache.with_name(f"{cache.name}.{os.getpid()}.new")
    new.write_bytes(msgspec.json.encode(kept))
    new.replace(cache)

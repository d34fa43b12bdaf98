"""Loads the next kernel with kexec(8), and writes down what was loaded: the kernel cannot be asked for that later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from caesura.lifecycle.loaded_kernel import RECORD, LoadedKernel, carve_outs
from caesura_host.hook_files import HOOK_VERSION
from caesura_host.host_files import HostError, Run, hook_version, run_program
from caesura_host.kernel_command_line import next_command_line


def load_kernel(
    release: str,
    *,
    more: Sequence[str] = (),
    expect_hook: bool = True,
    root: Path = Path("/"),
    run: Run = run_program,
) -> LoadedKernel:
    """Load it, and write the record.

    Args:
        release: such as ``6.1.0-50-amd64``.
        more: words for its command line, after those of the running kernel.
        expect_hook: whether its initramfs must have the hook; not where the unit continues the guests.

    Raises:
        HostError: there is no such kernel, its initramfs has not this version's hook, or kexec refused.
    """
    kernel, initrd = f"/boot/vmlinuz-{release}", f"/boot/initrd.img-{release}"
    for path in (kernel, initrd):
        if not (root / path[1:]).is_file():
            raise HostError(f"{path} is missing: install the kernel {release}")
    try:
        found = hook_version(root / initrd[1:], run)
    except HostError:
        if expect_hook:
            raise
        found = ""  # made by dracut, and nothing is looked for in it
    if expect_hook and found != HOOK_VERSION:
        raise HostError(
            f"{initrd} has {f'the hook of version {found}' if found else 'no hook'}, not version {HOOK_VERSION}:"
            f" caesura host prepare-kexec --apply, then update-initramfs -u -k {release}"
        )
    command_line = " ".join(
        (next_command_line((root / "proc/cmdline").read_text(encoding="ascii").strip()), *more)
    )
    if not carve_outs(command_line):
        raise HostError(
            "the running kernel has no carve-out (memmap=SIZE!START): see caesura host prepare-kexec --check"
        )
    # Killed midway, a record of the kernel that was loaded before would be one of this kernel.
    (root / RECORD[1:]).unlink(missing_ok=True)
    words = ("-l", kernel, f"--initrd={initrd}", f"--command-line={command_line}")
    try:
        run(("kexec", "-s", *words))
    except HostError as refused:
        try:
            run(("kexec", "-c", *words))  # an unsigned kernel, where the machine is not locked down
        except HostError as error:
            raise HostError(f"{refused}; and without a signature: {error}") from error
    loaded = (root / "sys/kernel/kexec_loaded").read_text(encoding="ascii").strip()
    if loaded != "1":
        raise HostError(f"kexec ended well, and no kernel is loaded (/sys/kernel/kexec_loaded is {loaded})")
    record = LoadedKernel(
        boot_id=(root / "proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        release=release,
        kernel=kernel,
        initrd=initrd,
        command_line=command_line,
        hook_version=found,
    )
    _write(root / RECORD[1:], msgspec.json.encode(record))
    return record


def unload_kernel(*, root: Path = Path("/"), run: Run = run_program) -> None:
    """Forget the loaded kernel.

    Raises:
        HostError: kexec refused.
    """
    run(("kexec", "-u"))
    (root / RECORD[1:]).unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        # The folder is the host updater's: what it put there is removed, never followed.
        temporary.unlink(missing_ok=True)
        handle = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
        )
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # the host updater reads it, as a user of its own
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        raise HostError(
            f"the kernel is loaded, and {path} cannot be written: {error.strerror}. Run it as root"
        ) from error

"""The host's updates: ``updates.d/*.toml``, one update a file. The command line never leaves the host.

A file that cannot be used is refused by name and line; the others stay usable. The parser is pure.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from caesura.contract.messages import (
    Impact,
    KernelRelease,
    KernelUpdate,
    Method,
    RefusedUpdate,
    Scope,
    UpdateRecord,
    VmmChange,
)
from caesura.contract.names import InvalidName, check_name
from caesura.lifecycle.budget import SHUTDOWN_S
from caesura.runtime.toml_lines import key_lines, line_of, syntax_error_at
from caesura.runtime.validation_errors import describe_error
from caesura_host_updater.files import read_regular

_AT = re.compile(r"at `\$\.([A-Za-z0-9_]+)")  # msgspec: where the value is wrong
_FIELD = re.compile(r"field `([A-Za-z0-9_]+)`")  # msgspec: an unknown or missing key


class UpdateFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One update as the operator wrote it. ``_s``: seconds."""

    name: str
    version: Annotated[str, Meta(max_length=64)] = ""
    impact: Impact
    scope: Scope
    argv: Annotated[tuple[str, ...], Meta(min_length=1)]
    expected_s: Annotated[float, Meta(ge=0)]
    timeout_s: Annotated[float, Meta(gt=0)]
    description: Annotated[str, Meta(max_length=4096)] = ""
    environ: dict[str, str] = {}
    working_directory: str = "/"
    output: Literal["report", "host"] = "report"
    """Where the end of a failed run's output goes: into the report to coordinator and operators, or into the log of
    this host's updater only."""
    vmm: VmmChange = ""
    """``beside``: it puts a new VMM on the host while guests run, and each VM is swapped to it afterwards.
    ``instead``: it replaces the VMM's own files, so no VMM runs during the update (method replace)."""
    vmm_binary: str = ""
    """The new VMM; empty: the binary that the host file names, as the update left it."""
    shutdown_s: Annotated[float, Meta(gt=0, le=3600)] = SHUTDOWN_S
    """Impact reboot: how long a VM may take to shut down; one that takes longer fails the update before it runs."""
    kill_after_timeout: bool = False
    """Impact reboot: a VM that takes longer is killed instead; what it had not written to its disks is lost."""
    kernel: KernelUpdate = ""
    """``kexec``: while guests run, ``argv`` loads another kernel for the host; it is started with their memory in RAM (method kexec)."""
    kernel_release: KernelRelease = ""
    """Kernel kexec: the kernel that ``argv`` loads, as ``uname -r`` names it."""
    installed: tuple[str, ...] = ()
    """A command whose exit code 0 means that the update is installed; empty: what succeeded here is remembered."""

    @property
    def method(self) -> Method:
        """The only method by which it can be applied."""
        if self.impact != "pause":
            return "live" if self.impact == "none" else "reboot"
        if self.kernel:
            return "kexec"
        by_vmm: dict[VmmChange, Method] = {"": "freeze", "beside": "swap", "instead": "replace"}
        return by_vmm[self.vmm]

    def record(self) -> UpdateRecord:
        """What is published on the bus: everything but the command line."""
        return UpdateRecord(
            update=self.name,
            version=self.version,
            impact=self.impact,
            scope=self.scope,
            expected_s=self.expected_s,
            timeout_s=self.timeout_s,
            description=self.description,
            vmm=self.vmm,
            shutdown_s=self.shutdown_s,
            kill_after_timeout=self.kill_after_timeout,
            kernel=self.kernel,
            kernel_release=self.kernel_release,
        )


class Catalogue(msgspec.Struct, frozen=True):
    """The updates that can be used, by name, and the files that cannot."""

    updates: dict[str, UpdateFile] = {}
    refused: tuple[RefusedUpdate, ...] = ()


def parse_update(file: str, text: str, *, find: Callable[[str], str | None]) -> UpdateFile | RefusedUpdate:
    """Read one file. Pure: ``find`` tells where a program is, as ``shutil.which`` does."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return _refusal(file, "", str(error), line=syntax_error_at(text, error)[0])
    try:
        update = msgspec.convert(table, UpdateFile, strict=True)
        check_name("update", update.name)
    except msgspec.ValidationError as error:
        return _refusal(file, text, describe_error(error, UpdateFile))
    except InvalidName as error:
        return _refusal(file, text, str(error), key="name")
    program = update.argv[0]
    if not program or find(program) is None:
        return _refusal(file, text, f"program {program!r} is not on PATH, or not executable", key="argv")
    if update.installed and (not update.installed[0] or find(update.installed[0]) is None):
        why = f"program {update.installed[0]!r} is not on PATH, or not executable"
        return _refusal(file, text, why, key="installed")
    if update.expected_s > update.timeout_s:
        return _refusal(
            file,
            text,
            f"expected_s {update.expected_s:g} is above timeout_s {update.timeout_s:g}",
            key="expected_s",
        )
    if any(name.startswith("CAESURA_") or not name or "=" in name for name in update.environ):
        return _refusal(file, text, "environ may not set CAESURA_* or an empty name", key="environ")
    if misused := _misused(update):
        return _refusal(file, text, misused[1], key=misused[0])
    if not update.working_directory.startswith("/"):
        return _refusal(file, text, "working_directory must be absolute", key="working_directory")
    return update


def _misused(update: UpdateFile) -> tuple[str, str] | None:
    """A key that does not fit the others, and why; None: all do."""
    if update.vmm and update.impact != "pause":
        return "vmm", f"vmm = {update.vmm!r} needs impact = 'pause'"
    if update.kill_after_timeout and update.impact != "reboot":
        return "kill_after_timeout", "kill_after_timeout needs impact = 'reboot': nothing else shuts VMs down"
    if update.vmm == "beside" and update.scope != "vm":
        return "scope", "vmm = 'beside' needs scope = 'vm': each VM is swapped by itself"
    if update.vmm_binary and not update.vmm and not update.kernel:
        return (
            "vmm_binary",
            "vmm_binary says nothing without vmm = 'beside' or 'instead', or kernel = 'kexec'",
        )
    if update.kernel and (update.impact, update.scope) != ("pause", "host"):
        return "kernel", "kernel = 'kexec' needs impact = 'pause' and scope = 'host'"
    if update.kernel and update.vmm:
        return (
            "vmm",
            "with kernel = 'kexec' every VM gets a new VMM process: leave vmm out (vmm_binary may name it)",
        )
    if update.kernel and not update.kernel_release:
        return "kernel", "kernel = 'kexec' needs kernel_release, what `uname -r` says when it runs"
    if update.kernel_release and not update.kernel:
        return "kernel_release", "kernel_release says nothing without kernel = 'kexec'"
    if update.vmm_binary and not update.vmm_binary.startswith("/"):
        return "vmm_binary", "vmm_binary must be an absolute path"
    return None


def catalogue(files: Iterable[tuple[str, str]], *, find: Callable[[str], str | None]) -> Catalogue:
    """Read all files, in order of their names. Pure. The second file with the same update name is refused."""
    updates: dict[str, UpdateFile] = {}
    refused: list[RefusedUpdate] = []
    home: dict[str, str] = {}
    for file, text in sorted(files):
        parsed = parse_update(file, text, find=find)
        if isinstance(parsed, RefusedUpdate):
            refused.append(parsed)
        elif parsed.name in updates:
            refused.append(
                _refusal(file, text, f"{parsed.name!r} is defined in {home[parsed.name]} too", key="name")
            )
        else:
            updates[parsed.name] = parsed
            home[parsed.name] = file
    return Catalogue(updates, tuple(refused))


def read_updates(folder: str) -> Catalogue:
    """Read ``*.toml`` of a folder from disk; a folder that does not exist holds no updates.

    Blocking, for as long as the folder's file system takes: see ``catalogue_reader``.
    """
    files: list[tuple[str, str]] = []
    unreadable: list[RefusedUpdate] = []
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.name.endswith(".toml"))
    except FileNotFoundError:
        return Catalogue()
    except OSError as error:
        return Catalogue(
            {}, (RefusedUpdate(file=folder, reason=f"cannot be read: {error.strerror or error}"),)
        )
    for path in paths:
        try:
            files.append((path.name, read_regular(path)))
        except (OSError, ValueError) as error:
            unreadable.append(RefusedUpdate(file=path.name, reason=f"cannot be read: {error}"))
    found = catalogue(files, find=shutil.which)
    return Catalogue(found.updates, (*found.refused, *unreadable))


def _refusal(file: str, text: str, reason: str, *, key: str = "", line: int = 0) -> RefusedUpdate:
    if not key:
        named = _AT.search(reason) or _FIELD.search(reason)
        key = named[1] if named else ""
    at = line or (line_of(key_lines(text), (key,)) if key else 0)
    return RefusedUpdate(file=file, line=at, reason=reason)

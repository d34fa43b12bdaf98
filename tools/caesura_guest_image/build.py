"""Builds the guest: two layers, so that a change of our own code costs a second instead of a download.

CACHE/debs            packages as fetched
CACHE/base-DIGEST     kernel, and `base.cpio.gz`: BusyBox, modules, guest agent, Python (and the tree from which it was packed)
CACHE/guest-DIGEST    vmlinuz, initrd (base.cpio.gz and the agent's archive, one after the other), manifest.json

A folder appears under its name only when it is complete (rename), and one build runs at a time (flock).
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from caesura.runtime.cleanup import undisturbed
from caesura_guest_image import agent, contents
from caesura_guest_image.cpio import ArchiveEntry, pack
from caesura_guest_image.packages import KERNEL, PACKAGES, GuestError, Progress, fetch, unpack

INSIDE = Path(__file__).parent / "inside"
_KEPT = 3
_KEPT_S = 7 * 86400
"""s: a VM that runs an older guest needs its files again for a swap."""


class BuiltImage(msgspec.Struct, frozen=True, kw_only=True):
    """A guest that is ready to boot."""

    folder: str
    kernel: str
    initrd: str
    kernel_version: str
    kernel_bytes: int
    initrd_bytes: int
    unpacked_bytes: int
    """The share of the guest's RAM that the initramfs takes."""
    packages: tuple[str, ...]
    seconds: float
    cached: bool


def default_cache() -> Path:
    """$XDG_CACHE_HOME/caesura/guest."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "caesura" / "guest"


def built_already(cache: Path) -> BuiltImage | None:
    """The guest for the installed code if the cache has it; nothing is made. Raises GuestError: a part of it is not installed."""
    return _cached(cache / f"guest-{_digest_of(_builder_digest())[:16]}")


def read_manifest(folder: Path) -> BuiltImage:
    """The guest in a folder of ``caesura guest build --output``, which may have been made on another machine.

    Raises:
        GuestError: there is none.
    """
    try:
        found = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=BuiltImage)
    except (OSError, msgspec.DecodeError) as error:
        raise GuestError(f"{folder} has no guest: {error}") from error
    there = msgspec.structs.replace(
        found, folder=str(folder), kernel=str(folder / "vmlinuz"), initrd=str(folder / "initrd")
    )
    for file in (there.kernel, there.initrd):
        if not os.access(file, os.R_OK):
            raise GuestError(f"{folder} has no guest: {file} cannot be read")
    return there


def _cached(target: Path) -> BuiltImage | None:
    try:
        return msgspec.json.decode((target / "manifest.json").read_bytes(), type=BuiltImage)
    except (OSError, msgspec.DecodeError):
        return None


def build(cache: Path, progress: Progress, *, force: bool = False) -> BuiltImage:
    """The guest for the installed code, from the cache if available.

    Raises:
        GuestError: a prerequisite is missing.
    """
    begun = time.monotonic()
    machine = os.uname()
    if (machine.sysname, machine.machine) != ("Linux", "x86_64"):
        raise GuestError(f"guests are built on x86-64 Linux, this is {machine.sysname} on {machine.machine}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(cache / "lock", progress):
            return _build(cache, progress, begun, force=force)
    except OSError as error:
        raise GuestError(f"cannot build in {cache}: {error}") from error


def _build(cache: Path, progress: Progress, begun: float, *, force: bool) -> BuiltImage:
    builder = _builder_digest()
    base = cache / f"base-{builder[:16]}"
    target = cache / f"guest-{_digest_of(builder)[:16]}"
    if force:
        shutil.rmtree(base, ignore_errors=True)
    elif target.is_dir():
        os.utime(target)
        found = msgspec.json.decode((target / "manifest.json").read_bytes(), type=BuiltImage)
        return msgspec.structs.replace(found, cached=True, seconds=round(time.monotonic() - begun, 3))
    if not base.is_dir():
        _make_base(cache, base, progress)
    os.utime(base)
    progress("adding the agent and the workloads")
    with new_folder(cache) as folder:
        stage = folder / "stage"
        _stage_agent(stage, base / "tree", progress)
        entries = contents.tree_entries(stage)
        shutil.rmtree(stage)
        initrd = (base / "base.cpio.gz").read_bytes() + _packed(entries)
        (folder / "initrd").write_bytes(initrd)
        os.link(base / "vmlinuz", folder / "vmlinuz")
        facts = msgspec.json.decode((base / "facts.json").read_bytes(), type=_BaseFacts)
        guest = BuiltImage(
            folder=str(target),
            kernel=str(target / "vmlinuz"),
            initrd=str(target / "initrd"),
            kernel_version=facts.kernel_version,
            kernel_bytes=(folder / "vmlinuz").stat().st_size,
            initrd_bytes=len(initrd),
            unpacked_bytes=facts.unpacked_bytes + _size(entries),
            packages=facts.packages,
            seconds=round(time.monotonic() - begun, 3),
            cached=False,
        )
        (folder / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(guest)))
        if target.is_dir():  # --force
            target.rename(folder / "old")
        folder.rename(target)
        shutil.rmtree(target / "old", ignore_errors=True)
    _prune(cache, keep={base.name, target.name})
    return guest


class _BaseFacts(msgspec.Struct, frozen=True):
    kernel_version: str
    unpacked_bytes: int
    packages: tuple[str, ...]


def _make_base(cache: Path, base: Path, progress: Progress) -> None:
    files = fetch(cache / "debs", progress)
    progress("unpacking")
    with new_folder(cache) as folder:
        unpacked, tree = folder / "unpacked", folder / "tree"
        unpack(files, unpacked)
        contents.copy_python(unpacked, tree)
        contents.copy_programs(unpacked, tree)
        contents.copy_libraries(unpacked, tree)
        progress("compiling Python's library for the guest")
        _compile(tree, tree / "usr/lib/python3.11", keep=True)
        entries = {
            name: entry
            for name, entry in contents.tree_entries(tree).items()
            if not name.endswith(".py") or "/lib/python3.11/" not in name
        }
        entries |= contents.system_entries(unpacked, INSIDE)
        (folder / "base.cpio.gz").write_bytes(_packed(entries))
        kernels = list((unpacked / "boot").glob("vmlinuz-*"))
        if len(kernels) != 1:
            raise GuestError(f"the kernel package holds {len(kernels)} kernels")
        kernels[0].rename(folder / "vmlinuz")
        facts = _BaseFacts(
            kernels[0].name.removeprefix("vmlinuz-"), _size(entries), tuple(file.stem for file in files)
        )
        (folder / "facts.json").write_bytes(msgspec.json.encode(facts))
        shutil.rmtree(unpacked)
        folder.rename(base)


def _stage_agent(stage: Path, python: Path, progress: Progress) -> None:
    agent.install(stage, progress)
    workloads = stage / "usr/lib/caesura/caesura_guest"
    workloads.mkdir(parents=True)
    for path in INSIDE.glob("*.py"):
        shutil.copyfile(path, workloads / path.name)
    _compile(python, stage, keep=False)


def _compile(python: Path, tree: Path, *, keep: bool) -> None:
    """Replace (or accompany) sources by byte code: importing a source costs a second under TCG."""
    environment = {"PYTHONHOME": str(python / "usr"), "PYTHONDONTWRITEBYTECODE": "1"}
    # -b: x.pyc beside x.py, which Python imports without the source; unchecked: it looks for no source either.
    # Optimised twice: no docstrings, which are unused there but take RAM.
    words = ["-m", "compileall", "-b", "-q", "-o", "2", "-s", str(tree), "-p", "/"]
    words.append("--invalidation-mode=unchecked-hash")
    done = subprocess.run(
        [*contents.loader(python), *words, str(tree)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        raise GuestError(
            f"the guest's Python could not compile: {(done.stdout + done.stderr).strip()[-400:]}"
        )
    if not keep:
        for path in tree.rglob("*.py"):
            path.unlink()


def _builder_digest() -> str:
    found = hashlib.sha256(" ".join((KERNEL, *PACKAGES)).encode())
    own = sorted(
        path for path in Path(__file__).parent.rglob("*") if path.is_file() and path.suffix != ".pyc"
    )
    for path in own:
        if path.name not in {"command.py", "second.py"}:
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _digest_of(builder: str) -> str:
    """Of everything that is in a guest."""
    return hashlib.sha256(f"{builder} {agent.digest()}".encode()).hexdigest()


def _packed(entries: dict[str, ArchiveEntry]) -> bytes:
    # Compressed, since archive and files are in the guest's RAM at the same time: 0.3 s under TCG for 20 MB less.
    data = gzip.compress(pack(entries), compresslevel=9, mtime=0)
    return data + bytes(-len(data) % 4)  # the next archive begins at a multiple of 4


def _size(entries: dict[str, ArchiveEntry]) -> int:
    # In whole pages, as in the kernel.
    return sum(-(-len(entry.data) // 4096) * 4096 for entry in entries.values())


@contextmanager
def one_at_a_time(path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock file; report it when waiting for another build."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another build is running, waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def new_folder(cache: Path) -> Iterator[Path]:
    """A folder that is removed afterwards, unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        with undisturbed():  # a second Ctrl-C is deferred
            shutil.rmtree(folder, ignore_errors=True)


def _prune(cache: Path, keep: set[str]) -> None:
    for kind in ("base-*", "guest-*"):
        found = sorted(cache.glob(kind), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in found[_KEPT:]:
            if path.name not in keep and time.time() - path.stat().st_mtime > _KEPT_S:
                shutil.rmtree(path, ignore_errors=True)
    for path in cache.glob("making-*"):  # left by a killed build, since we hold the lock
        shutil.rmtree(path, ignore_errors=True)

"""The VM agent and its imports, copied from this installation into the guest's tree."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from caesura_guest_image.packages import GuestError, Progress

GUEST_PYTHON = (3, 11)
OWN = ("caesura", "caesura_vm_agent")
DEPENDENCIES = {"msgspec": "msgspec", "structlog": "structlog", "aiomqtt": "aiomqtt", "paho": "paho-mqtt"}
"""Maps an import name to its distribution. Other dependencies of Caesura are only imported by an agent that serves /metrics."""

SITE = "usr/lib/python3/dist-packages"
_LEFT_OUT = frozenset({"__pycache__", "testing", "py.typed", "generated.py", "examples.py"})


def package_folder(name: str) -> Path:
    """The folder of an installed package, editable installs included.

    Raises:
        GuestError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise GuestError(f"the package {name}, which the guest needs, is not installed")
    return Path(spec.submodule_search_locations[0])


def own_files() -> list[tuple[str, Path]]:
    """(name in site-packages, path) of Caesura's own files that go into the guest."""
    found = []
    for package in OWN:
        folder = package_folder(package)
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if not _LEFT_OUT & set(inside.parts):
                found.append((f"{package}/{inside}", path))
    return found


def digest() -> str:
    """A digest of everything that ``install`` would copy."""
    found = hashlib.sha256()
    for name, path in own_files():
        data = path.read_bytes()
        found.update(f"{name} {len(data)} ".encode() + data)
    for distribution in sorted(DEPENDENCIES.values()):
        found.update(f"{distribution} {_version(distribution)} ".encode())
    found.update(repr(sys.version_info[:2]).encode())
    return found.hexdigest()


def install(stage: Path, progress: Progress) -> None:
    """Copy everything below ``stage``/SITE.

    Raises:
        GuestError: a dependency with compiled parts is built for another Python and cannot be fetched.
    """
    site = stage / SITE
    for name, path in own_files():
        target = site / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    version = _version("caesura")
    metadata = site / f"caesura-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: caesura\nVersion: {version}\n")
    if sys.version_info[:2] == GUEST_PYTHON:
        for package in DEPENDENCIES:
            _copy_package(package, site)
    else:
        _fetch_for_guest(site, progress)


def _copy_package(package: str, site: Path) -> None:
    shutil.copytree(
        package_folder(package),
        site / package,
        ignore=lambda _folder, names: {"__pycache__", "py.typed"} & set(names),
    )


def _fetch_for_guest(site: Path, progress: Progress) -> None:
    wanted = [f"{each}=={_version(each)}" for each in DEPENDENCIES.values()]
    python = ".".join(map(str, GUEST_PYTHON))
    progress(f"fetching {', '.join(wanted)} for the guest's Python {python}")
    common = ["install", "--quiet", "--no-deps", "--target", str(site), "--python-version", python]
    tried = []
    if importlib.util.find_spec("pip") is not None:
        tried.append(
            [sys.executable, "-m", "pip", *common, "--only-binary=:all:", "--platform=manylinux2014_x86_64"]
        )
    uv = shutil.which("uv")
    if uv is not None:
        tried.append(
            [uv, "pip", *common, "--only-binary", ":all:", "--python-platform", "x86_64-manylinux2014"]
        )
    said = "neither pip nor uv is installed"
    for argv in tried:
        done = subprocess.run([*argv, *wanted], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    here = ".".join(map(str, sys.version_info[:2]))
    raise GuestError(
        f"the guest runs Python {python} and this is {here}: compiled wheels for it could not be fetched ({said}). "
        f"Install pip or uv with network, or run this command with Python {python}"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise GuestError(f"{distribution}, which the guest needs, is not installed") from error

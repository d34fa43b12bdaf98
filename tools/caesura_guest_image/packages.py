"""The Debian packages that the guest is made of, fetched with apt and unpacked with dpkg-deb. No root needed.

The guest is Debian 12 on every machine: if the machine's own apt does not offer these packages, separate package lists
are kept beside the cache (``apt-get update`` into a private folder).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from caesura.runtime.errors import CaesuraError

SUITE = "bookworm"
KERNEL = "linux-image-cloud-amd64"
PACKAGES = (
    "busybox-static",
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "qemu-guest-agent",
    # Libraries of the above; `contents.py` takes only the files that are needed.
    *("libc6", "libglib2.0-0", "libnuma1", "libudev1", "liburing2", "libpcre2-8-0", "libssl3", "zlib1g"),
    *("libexpat1", "libffi8", "libbz2-1.0", "liblzma5", "libuuid1", "libgcc-s1"),
)
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_URI = re.compile(r"^'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) (?P<hash>\S*)$")
_LISTS_S = 300
_FETCH_S = 900

Progress = Callable[[str], None]


class GuestError(CaesuraError):
    """The guest cannot be built here; the text says what is missing."""


class Package(msgspec.Struct, frozen=True):
    """One package and its download."""

    file: str
    size: int
    hash: str


def fetch(folder: Path, progress: Progress) -> list[Path]:
    """All packages of the guest as files in ``folder``.

    Raises:
        GuestError: no apt, no network, or no such packages.
    """
    need_tools()
    options = _system_or_private(folder.parent, progress)
    kernel = kernel_package(run_tool("apt-cache", *options, "show", "--no-all-versions", KERNEL))
    return download([kernel, *PACKAGES], options, folder, progress)


def download(names: Sequence[str], options: Sequence[str], folder: Path, progress: Progress) -> list[Path]:
    """The packages (``name`` or ``name/release``) as files in ``folder``; existing ones are not fetched.

    Raises:
        GuestError: no network, or no such packages.
    """
    wanted = parse_uris(run_tool("apt-get", *options, "download", "--print-uris", *names))
    unknown = [name for name in names if name.partition("/")[0] not in wanted]
    if unknown:
        raise GuestError(f"apt does not offer {', '.join(unknown)}")
    packages = {name: wanted[name.partition("/")[0]] for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name, package in packages.items() if not _is_there(folder / package.file, package)]
    if missing:
        size = sum(packages[name].size for name in missing) / 1e6
        progress(f"fetching {len(missing)} Debian packages, {size:.0f} MB")
        sandbox = ("-o", "APT::Sandbox::User=root")  # as root apt would warn that _apt cannot write here
        run_tool("apt-get", *options, *sandbox, "-q", "download", *missing, cwd=folder)
    return [folder / package.file for package in packages.values()]


def need_tools() -> None:
    """Raises GuestError if packages cannot be fetched or unpacked."""
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise GuestError(
                f"{tool} is not installed: this is made of Debian packages. Run it on a Debian or Ubuntu machine "
                "with --output DIR and copy DIR here"
            )


def unpack(files: Sequence[Path], root: Path) -> None:
    """Unpack the packages' files below ``root``; none of them is run."""
    for file in files:
        run_tool("dpkg-deb", "-x", str(file), str(root))


def kernel_package(shown: str) -> str:
    """The package that the metapackage's description depends on.

    Raises:
        GuestError: it does not name one.
    """
    found = re.search(r"^Depends:.*?\b(linux-image-\S+-cloud-amd64)\b", shown, re.MULTILINE)
    if not found:
        raise GuestError(f"the package {KERNEL} depends on no kernel")
    return found[1]


def parse_uris(text: str) -> dict[str, Package]:
    """The output of ``apt-get --print-uris`` by package name; its order is arbitrary."""
    found = (_URI.match(line) for line in text.splitlines())
    return {
        each["file"].partition("_")[0]: Package(each["file"], int(each["size"]), each["hash"])
        for each in found
        if each
    }


def _is_there(path: Path, package: Package) -> bool:
    # apt checked the hash when it fetched the file, and uses another name until then.
    return path.is_file() and path.stat().st_size == package.size


def _system_or_private(cache: Path, progress: Progress) -> list[str]:
    try:
        shown = run_tool(
            "apt-cache", "show", "--no-all-versions", KERNEL, "python3.11-minimal", "qemu-guest-agent"
        )
        if shown.count("\nVersion:") >= 3 and kernel_package(shown):
            return []
    except GuestError:
        pass  # another release, or a machine without package lists
    return private_lists(
        cache / "apt", SUITE, [(SUITE, "debian"), (f"{SUITE}-security", "debian-security")], progress
    )


def private_lists(
    folder: Path, name: str, suites: Sequence[tuple[str, str]], progress: Progress
) -> list[str]:
    """apt options for separate package lists: (suite, archive) pairs, kept in ``folder``.

    Raises:
        GuestError: the keys of the archive or the network are missing.
    """
    if not _KEYRING.is_file():
        raise GuestError(
            f"this machine's apt has no Debian 12 packages and {_KEYRING} is not there to check them with: "
            "install debian-archive-keyring"
        )
    home = folder / name
    for each in ("lists/partial", "cache/archives/partial"):
        (home / each).mkdir(parents=True, exist_ok=True)
    sources = home / "sources.list"
    sources.write_text(
        "".join(
            f"deb [arch=amd64 signed-by={_KEYRING}] http://deb.debian.org/{archive} {suite} main\n"
            for suite, archive in suites
        )
    )
    settings = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State::lists": home / "lists",
        "Dir::Cache": home / "cache",
        "APT::Architecture": "amd64",
        "APT::Default-Release": "",
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    progress(f"fetching the package lists of Debian {name}")
    run_tool("apt-get", *options, "-q", "update", "--error-on=any", timeout_s=_LISTS_S)
    return options


def run_tool(*argv: str, cwd: Path | None = None, timeout_s: float = _FETCH_S) -> str:
    """The output of a tool. Raises GuestError with the tool's own message."""
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise GuestError(f"{argv[0]} took longer than {timeout_s:g} s: is the network there?") from error
    if done.returncode != 0:
        said = [
            line for line in done.stderr.splitlines() if line.startswith("E:")
        ] or done.stderr.splitlines()
        raise GuestError(f"{argv[0]} failed: {'; '.join(said[-3:]) or f'exit code {done.returncode}'}")
    return done.stdout

"""The command group ``caesura guest``."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
import msgspec
from rich.console import Console

from caesura.runtime.errors import CaesuraError
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_guest_image.build import BuiltImage, build, default_cache
from caesura_guest_image.packages import GuestError, Progress
from caesura_guest_image.second import fetch_second

_EPILOG = """\b
examples:
  caesura guest build
  caesura guest build --output ./guest
  caesura guest build --json | jq -r .initrd

\b
exit codes:
  0  the guest is built
  1  it cannot be built here; the text says what is missing
  2  bad usage
  130  interrupted; nothing incomplete is left"""


_QEMU_EPILOG = """\b
examples:
  caesura guest qemu
  caesura guest qemu --json | jq -r .binary

\b
exit codes:
  0  it is available and runs
  1  it is not available here; the text says why
  2  bad usage
  130  interrupted"""

T = TypeVar("T")


_GROUP_EPILOG = """\b
examples:
  caesura guest build
  caesura guest qemu

\b
exit codes:
  0  done
  1  it is not available here; the text says why
  2  bad usage
  130  interrupted"""


@click.group(epilog=_GROUP_EPILOG)
def guest() -> None:
    """A small real guest for experiments: Debian kernel, BusyBox, Python, QEMU guest agent, Caesura's agent."""


@guest.command("build", epilog=_EPILOG)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also copy kernel, initrd and manifest into this folder.",
)
@click.option("--force", is_flag=True, help="Build again, with the newest packages, even if it is cached.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def build_guest(*, output: Path | None, force: bool, as_json: bool) -> None:
    """Make a guest from Debian 12 packages, without root: some 40 MB to fetch, seconds when cached.

    Kept in $XDG_CACHE_HOME/caesura/guest (~/.cache/caesura/guest).
    """

    def work(progress: Progress) -> BuiltImage:
        made = build(default_cache(), progress, force=force)
        return made if output is None else _copy_to(made, output)

    made = _with_progress(work, as_json=as_json)
    if as_json:
        print_json(made)
    else:
        _show(made)


@guest.command("qemu", epilog=_QEMU_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print path and version as JSON.")
def second_qemu(*, as_json: bool) -> None:
    """Fetch a second QEMU version (Debian 12 backports) in addition to the installed one, to try swaps between versions.

    It is unpacked in $XDG_CACHE_HOME/caesura/guest, not installed.
    """
    found = _with_progress(lambda progress: fetch_second(default_cache(), progress), as_json=as_json)
    if as_json:
        print_json(found)
    else:
        click.echo(f"QEMU {found.version}  {found.binary}")


def _with_progress(work: Callable[[Progress], T], *, as_json: bool) -> T:
    """Run a long task, show its progress, and end cleanly on Ctrl-C, SIGTERM and our own errors."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=True, highlight=False)
    try:
        with console.status("looking into the cache") as status:

            def progress(what: str) -> None:
                status.update(what)
                if not console.is_terminal:
                    console.print(f"{what} ...")

            return work(progress)
    except KeyboardInterrupt:
        sys.exit(130)
    except CaesuraError as error:
        fail(error, as_json=as_json)
        raise  # fail() does not return


def _copy_to(made: BuiltImage, output: Path) -> BuiltImage:
    try:
        output.mkdir(parents=True, exist_ok=True)
        copied = msgspec.structs.replace(
            made, folder=str(output), kernel=str(output / "vmlinuz"), initrd=str(output / "initrd")
        )
        for name in ("vmlinuz", "initrd"):
            shutil.copyfile(Path(made.folder) / name, output / f"{name}.new")
            (output / f"{name}.new").replace(output / name)
        (output / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(copied)))
    except OSError as error:
        raise GuestError(f"cannot copy the guest to {output}: {error}") from error
    return copied


def _show(made: BuiltImage) -> None:
    how = "from the cache" if made.cached else f"built in {made.seconds:.1f} s"
    click.echo(f"kernel   {made.kernel}  ({made.kernel_bytes / 1e6:.1f} MB, {made.kernel_version})")
    click.echo(f"initrd   {made.initrd}  ({made.initrd_bytes / 1e6:.1f} MB, {how})")
    click.echo("boot it: qemu-system-x86_64 -accel tcg -m 256 -nographic -kernel KERNEL -initrd INITRD \\")
    click.echo('           -append "console=ttyS0 quiet rdinit=/init panic=-1 caesura.ip=none"')

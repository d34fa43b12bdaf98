"""The command group ``caesura host``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from caesura.lifecycle.kernel_figures import RESERVE
from caesura.lifecycle.loaded_kernel import CARVE_OUT, LoadedKernel, carve_outs
from caesura.runtime.errors import CaesuraError
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_host.hook_files import HOOK_VERSION, installed_texts
from caesura_host.host_files import HostError, HostFolder
from caesura_host.kernel_command_line import BadCarveOut, parse_carve_out
from caesura_host.kernel_loading import load_kernel, unload_kernel
from caesura_host.preparation import SETTINGS, Step, WantedPreparation, steps
from caesura_host.rehearsal import guests_here, leave, refuse_guests
from caesura_host_updater.kernel.figures import read_figures

_PREPARE_EPILOG = """\b
examples:
  caesura host prepare-kexec --memmap 64G!64G
  sudo caesura host prepare-kexec --memmap 64G!64G --apply
  caesura host prepare-kexec --check
  sudo caesura host prepare-kexec --undo

\b
exit codes:
  0  the host is prepared, or what was asked for is done
  1  something is missing; each line says what to do
  2  bad usage"""

_LOAD_EPILOG = """\b
examples:
  sudo caesura host load-kernel 6.1.0-50-amd64
  sudo caesura host load-kernel --unload

\b
exit codes:
  0  it is loaded
  1  it is not; the text says what to do
  2  bad usage"""

_REHEARSE_EPILOG = """\b
examples:
  sudo caesura host rehearse-kexec 6.1.0-50-amd64
  sudo caesura host rehearse-kexec 6.1.0-50-amd64 --yes
  caesura host kernel-figures

\b
The host changes its kernel at once, and every program on it ends; connections to it break. Log in again some seconds later:
`caesura host kernel-figures` has the result once the host updater runs.

\b
exit codes:
  1  the kernel was not changed; the text says what to do
  2  bad usage"""

_FIGURES_EPILOG = """\b
examples:
  caesura host kernel-figures
  caesura host kernel-figures --json

\b
exit codes:
  0  there are some
  1  there are none, or they cannot be read
  2  bad usage"""

_GROUP_EPILOG = """\b
examples:
  caesura host prepare-kexec --check
  sudo caesura host load-kernel 6.1.0-50-amd64
  sudo caesura host rehearse-kexec 6.1.0-50-amd64
  caesura host kernel-figures

\b
exit codes:
  0  done
  1  not done; the text says what to do
  2  bad usage"""


@click.group(epilog=_GROUP_EPILOG)
def host() -> None:
    """Commands for the host that they are run on: replace its kernel while the guests' memory stays."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    prepared: bool
    steps: list[Step]
    left: list[str] = []


def _guarded(work: Callable[[], int], *, as_json: bool) -> None:
    try:
        sys.exit(work())
    except KeyboardInterrupt:
        sys.exit(130)
    except CaesuraError as error:
        fail(error, as_json=as_json)


@host.command("prepare-kexec", epilog=_PREPARE_EPILOG)
@click.option(
    "--check", "mode", flag_value="check", default="check", help="Say what is missing (the default)."
)
@click.option("--apply", "mode", flag_value="apply", help="Make what is missing; needs root.")
@click.option("--undo", "mode", flag_value="undo", help="Remove what --apply made; needs root.")
@click.option(
    "--memmap",
    metavar="SIZE!START",
    help="The memory that is kept for guests. Left out: that of the running kernel.",
)
@click.option(
    "--carve-out",
    default=CARVE_OUT,
    show_default=True,
    help="Where its file system is mounted.",
)
@click.option(
    "--state-dir",
    default="/var/lib/caesura/host-updater",
    show_default=True,
    help="The host updater's folder.",
)
@click.option(
    "--guard", default="/opt/caesura/bin/caesura-pause-guard", show_default=True, help="The guard's program."
)
@click.option(
    "--early/--late",
    default=True,
    help="The initramfs continues the guests (default), or the unit, some seconds later.",
)
@click.option(
    "--panic",
    "panic_s",
    type=click.IntRange(1, 300),
    default=5,
    show_default=True,
    metavar="S",
    help="Reset after a panic.",
)
@click.option(
    "--crash-kernel",
    "crash_release",
    default="",
    metavar="RELEASE",
    help="With --late: what a crash of the new kernel boots.",
)
@click.option(
    "--crash-memory",
    "crash_mib",
    type=click.IntRange(64),
    default=256,
    show_default=True,
    metavar="MIB",
    help="Kept for that kernel.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the steps as one JSON document.")
def prepare_kexec(
    *,
    mode: str,
    memmap: str | None,
    carve_out: str,
    state_dir: str,
    guard: str,
    early: bool,
    panic_s: int,
    crash_release: str,
    crash_mib: int,
    as_json: bool,
) -> None:
    """Prepare this host for a change of its kernel under running guests.

    Keeps memory for guests (memmap=), makes a file system with DAX in it, and installs the initramfs hook, the unit and the
    drop-ins. Says what is missing, and what to do.
    """

    def work() -> int:
        found = HostFolder()
        before = found.facts(carve_out)
        known = found.settings()
        regions = carve_outs(before.command_line)
        region = memmap or (regions[0] if regions else "")
        if not region:
            raise HostError(
                "this kernel keeps no memory for guests: name it, such as --memmap 64G!64G (see /proc/iomem)"
            )
        try:
            parse_carve_out(region)
        except BadCarveOut as error:
            raise click.UsageError(str(error)) from error
        wanted = WantedPreparation(
            memmap=region,
            uuid=found.new_uuid(),
            carve_out=carve_out,
            state_dir=state_dir,
            guard=guard,
            early=early if mode == "apply" or not known else known.get("EARLY") != "no",
            panic_s=panic_s,
            crash_release=crash_release if mode == "apply" or not known else known.get("CRASH_RELEASE", ""),
            crash_mib=crash_mib,
            hook_version=HOOK_VERSION,
        )

        def now() -> list[Step]:
            return steps(wanted, found.facts(carve_out), installed_texts())

        def say(text: str) -> None:
            click.echo(f"caesura: {text}", err=True)

        left: list[str] = []
        if mode != "check" and os.geteuid() != 0:
            raise HostError(f"--{mode} needs root: sudo caesura host prepare-kexec --{mode}")
        if mode == "apply":
            found.apply(wanted, now(), say)
        elif mode == "undo":
            found.check_idle(known.get("STATE_DIR", state_dir), known.get("CARVE_OUT", carve_out))
            left = found.undo(now(), say)
        made = now()
        prepared = all(step.done for step in made)
        if as_json:
            print_json(_Answer(prepared=prepared, steps=made, left=left))
        elif mode == "undo":
            for text in left:
                click.echo(text)
            click.echo(
                f"removed, but for the file system in the carve-out and memmap= until the next boot; {SETTINGS} is gone"
            )
        else:
            for step in made:
                click.echo(f"{'ok     ' if step.done else 'MISSING'}  {step.about}")
                if not step.done:
                    click.echo(f"         {step.remedy}")
        return 0 if prepared or mode == "undo" else 1

    _guarded(work, as_json=as_json)


@host.command("load-kernel", epilog=_LOAD_EPILOG)
@click.argument("release", required=False)
@click.option("--unload", is_flag=True, help="Forget the kernel that is loaded.")
@click.option(
    "--late", is_flag=True, help="Its initramfs need not have the hook: the unit continues the guests."
)
@click.option("--append", "more", multiple=True, metavar="WORD", help="A word more for its command line.")
@click.option("--json", "as_json", is_flag=True, help="Print what was loaded as JSON.")
def load(*, release: str | None, unload: bool, late: bool, more: tuple[str, ...], as_json: bool) -> None:
    """Load the kernel that the host leaves for, with the command line of the running one. Nothing is paused by this."""
    if unload == (release is not None):
        raise click.UsageError("name a RELEASE, or --unload")

    def work() -> int:
        if os.geteuid() != 0:
            raise HostError("a kernel is loaded by root: sudo caesura host load-kernel")
        if release is None:
            unload_kernel()
            return 0
        _show(load_kernel(release, more=more, expect_hook=not late), as_json=as_json)
        return 0

    _guarded(work, as_json=as_json)


def _show(loaded: LoadedKernel, *, as_json: bool) -> None:
    if as_json:
        print_json(loaded)
    else:
        click.echo(f"loaded {loaded.release}: {loaded.command_line}")


@host.command("rehearse-kexec", epilog=_REHEARSE_EPILOG)
@click.argument("release")
@click.option(
    "--late", is_flag=True, help="Its initramfs need not have the hook: the unit continues the guests."
)
@click.option("--append", "more", multiple=True, metavar="WORD", help="A word more for its command line.")
@click.option(
    "--watchdog",
    "watchdog_s",
    type=click.IntRange(0, 3600),
    default=60,
    show_default=True,
    metavar="S",
    help="A hardware watchdog resets a host that hangs; 0: none.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print what goes wrong as JSON; needs --yes.")
def rehearse(
    *, release: str, late: bool, more: tuple[str, ...], watchdog_s: int, yes: bool, as_json: bool
) -> None:
    """Change this host's kernel to RELEASE now, while it holds no guest, to measure how long that takes.

    Refused while a guest runs here. An update with `kernel = "kexec"` is planned only for a kernel that was measured.
    """
    if as_json and not yes:
        raise click.UsageError("--json asks nothing: add --yes")

    def work() -> int:
        if os.geteuid() != 0:
            raise HostError("a kernel is changed by root: sudo caesura host rehearse-kexec")
        settings = _prepared_settings()
        refuse_guests(guests_here())
        if not yes:
            click.confirm(
                f"This host changes its kernel from {os.uname().release} to {release} now, and every program on it ends. Continue?",
                abort=True,
                err=True,
            )

        def last_look() -> None:
            refuse_guests(guests_here())  # one may have come since, and the next moment is the last
            click.echo(
                f"caesura: leaving {os.uname().release} for {release}; `caesura host kernel-figures` has the result",
                err=True,
            )

        loaded = load_kernel(release, more=more, expect_hook=not late)
        try:
            leave(
                loaded,
                state_dir=settings["STATE_DIR"],
                carve_out=settings["CARVE_OUT"],
                watchdog_s=watchdog_s,
                before_leaving=last_look,
            )
        finally:
            unload_kernel()
        return 1

    _guarded(work, as_json=as_json)


def _prepared_settings() -> dict[str, str]:
    """What the host was prepared with. Raises HostError: it is not prepared."""
    found = HostFolder()
    settings = found.settings()
    if not {"STATE_DIR", "CARVE_OUT"} <= settings.keys():
        raise HostError(
            "this host is not prepared for a change of its kernel: caesura host prepare-kexec --check"
        )
    return settings


@host.command("kernel-figures", epilog=_FIGURES_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print them as one JSON document.")
def kernel_figures(*, as_json: bool) -> None:
    """How long changes of this host's kernel took: rehearsals and updates, the newest of each kernel."""

    def work() -> int:
        figures = read_figures(Path(_prepared_settings()["STATE_DIR"]))
        if as_json:
            print_json(figures)
        elif not figures:
            raise HostError(
                "no change of this host's kernel was measured: sudo caesura host rehearse-kexec RELEASE. After one, the host"
                " updater must run once; and only root and its user can read the figures"
            )
        else:
            for each in figures:
                kind = "rehearsal" if each.rehearsal else "update"
                click.echo(
                    f"{each.to}  {each.seconds:.1f} s from {each.former}, {kind} of {each.at:%Y-%m-%d %H:%M} UTC;"
                    f" needs a pause budget of {each.seconds * RESERVE:.0f} s"
                )
        return 0 if figures else 1

    _guarded(work, as_json=as_json)

"""The command ``caesura doctor``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import click
import msgspec

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.logs import configure_logging
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_demo.workspace import CleanUp, Interrupted
from caesura_doctor.broker_checks import BEAT_S, check_broker
from caesura_doctor.figures import Figures, findings_of, table_of
from caesura_doctor.host_checks import check_host, host_file
from caesura_doctor.host_settings import ENV_FILE, PREFIX, host_settings, password_error
from caesura_doctor.measure_checks import look_for_needs
from caesura_doctor.measurement import AcceleratorChoice, MeasurementFailed, choose_accelerator, measure
from caesura_doctor.service_user import check_user, own_command
from caesura_host_updater.drivers.diagnosis import Diagnosis, ok, warning, wrong
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.settings import HostUpdaterSettings

_EPILOG = f"""\b
examples:
  sudo caesura doctor
  sudo -u caesura-host caesura doctor
  caesura doctor --env-file deploy/systemd/env/host-updater.env --no-broker
  caesura doctor --json
  caesura doctor --measure
  caesura doctor --measure --runs 20 --json > figures.json

\b
The settings are those of the host updater: its variables ({PREFIX}...), or {ENV_FILE}.
Run as the host updater's user, it sees what that user may do; run as root, it reads the broker's password. Do both.

\b
--measure looks at nothing of that. It boots a small guest (`caesura guest build`) in a QEMU of its own, with KVM where that
works, and pauses it by turns with the methods freeze, swap and replace. A pause is from the request until the guest is
confirmed to run, with no update in between: what the method adds to an update's own time.

\b
exit codes:
  0  nothing is wrong
  1  something is; each line says what to do
  2  bad usage
  130  interrupted; nothing of the guest is left"""

_MARKS = {"ok": "ok     ", "warning": "WARNING", "wrong": "WRONG  "}


_LEAST_MIB, _MOST_MIB, _MOST_RUNS = 128, 65536, 1000
_MEASURE_OPTIONS = ("runs", "memory_mib", "guest", "qemu", "accel")
_OTHER_OPTIONS = ("env_file", "broker")


class _DoctorAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    healthy: bool
    findings: list[Diagnosis]
    figures: Figures | None = None


class _Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``--measure``."""

    runs: int
    memory_mib: int
    guest: Path | None
    qemu: str
    accel: AcceleratorChoice


@click.command("doctor", epilog=_EPILOG)
@click.option("--env-file", metavar="FILE", help="The host updater's settings as NAME=value lines.")
@click.option(
    "--broker/--no-broker",
    default=True,
    help="Also connect to the broker, and publish about a VM that nobody has.",
)
@click.option("--measure", "measures", is_flag=True, help="Boot a small guest here, and measure its pauses.")
@click.option(
    "--runs",
    type=click.IntRange(1, _MOST_RUNS),
    default=5,
    show_default=True,
    help="With --measure: pauses of each method.",
)
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(_LEAST_MIB, _MOST_MIB),
    default=256,
    show_default=True,
    metavar="MIB",
    help="With --measure: the guest's memory.",
)
@click.option(
    "--guest",
    type=click.Path(path_type=Path, file_okay=False),
    help="With --measure: a folder of `caesura guest build --output`. Else the guest that was built here.",
)
@click.option(
    "--qemu", default="qemu-system-x86_64", show_default=True, help="With --measure: the QEMU to measure."
)
@click.option(
    "--accel",
    type=click.Choice(get_args(AcceleratorChoice)),
    default="auto",
    show_default=True,
    help="With --measure; auto: KVM if a kernel boots with it, else emulation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON document.")
@click.pass_context
def doctor(
    context: click.Context,
    *,
    env_file: str | None,
    broker: bool,
    measures: bool,
    runs: int,
    memory_mib: int,
    guest: Path | None,
    qemu: str,
    accel: AcceleratorChoice,
    as_json: bool,
) -> None:
    """Say what is wrong or missing on this host, each with its remedy. Nothing is changed, and nothing of the host is paused."""
    _refuse_useless(context, _OTHER_OPTIONS if measures else _MEASURE_OPTIONS, measures=measures)
    configure_logging("doctor", level="critical")  # what the bus would log is a finding
    say = _quiet if as_json else _print
    figures = None
    try:
        if measures:
            wanted = _Measurement(runs=runs, memory_mib=memory_mib, guest=guest, qemu=qemu, accel=accel)
            findings, figures = _measured(wanted, say)
        else:
            findings = _findings(env_file, os.environ, broker=broker, say=say)
    except (KeyboardInterrupt, Interrupted):
        sys.exit(130)
    except CaesuraError as error:
        fail(error, as_json=as_json)
    healthy = not any(each.level == "wrong" for each in findings)
    if as_json:
        print_json(_DoctorAnswer(healthy=healthy, findings=findings, figures=figures))
    else:
        for line in table_of(figures) if figures is not None else ():
            click.echo(line)
        count = sum(each.level == "wrong" for each in findings)
        warnings = sum(each.level == "warning" for each in findings)
        click.echo(f"{count} wrong, {warnings} warnings, {len(findings)} looked at")
    sys.exit(0 if healthy else 1)


def _refuse_useless(context: click.Context, names: tuple[str, ...], *, measures: bool) -> None:
    """Raises UsageError: an option was given that does nothing here."""
    given = click.core.ParameterSource.COMMANDLINE
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is given:
            how = "does nothing with --measure" if measures else "is for --measure"
            raise click.UsageError(f"{option.opts[0]} {how}")


def _print(finding: Diagnosis) -> None:
    click.echo(f"{_MARKS[finding.level]}  {finding.about}")
    if finding.remedy:
        click.echo(f"         {finding.remedy}")


def _quiet(_: Diagnosis) -> None:
    """Everything is printed at the end."""


Say = Callable[[Diagnosis], None]
"""Called with each finding as it comes: some take seconds."""


def _findings(env_file: str | None, environ: Mapping[str, str], *, broker: bool, say: Say) -> list[Diagnosis]:
    found: list[Diagnosis] = []

    def add(finding: Diagnosis) -> None:
        found.append(finding)
        say(finding)

    try:
        settings = host_settings(env_file, environ)
    except ConfigError as error:
        add(
            wrong(
                "settings",
                str(error),
                f"mend it: caesura-host-updater --help has each variable; systemd reads {ENV_FILE}",
            )
        )
        return found
    for finding in check_user(settings.state_dir, os.geteuid()):
        add(finding)
    host, of_file = host_file(settings)
    for finding in of_file:
        add(finding)
    if host is None:
        return found
    for finding in check_host(settings, host, environ):
        add(finding)
    if broker and (why := password_error(settings, env_file, environ)):
        add(warning("broker.password", why, f"sudo {own_command()} doctor, which asks it"))
    elif broker:
        asyncio.run(_broker(settings, host, add))
    return found


def _measured(wanted: _Measurement, say: Say) -> tuple[list[Diagnosis], Figures | None]:
    found: list[Diagnosis] = []

    def add(finding: Diagnosis) -> None:
        found.append(finding)
        say(finding)

    host = look_for_needs(wanted.qemu, wanted.memory_mib, wanted.guest, add)
    if host is None:
        return found, None
    figures: list[Figures] = []

    async def run() -> int:
        if wanted.accel == "auto":
            _tell("looking whether a kernel boots with KVM")
        accelerator = await choose_accelerator(wanted.accel, host)
        if accelerator.name == "kvm":
            add(ok("measure.accelerator", f"kvm: {accelerator.reason}"))
        else:
            add(
                warning(
                    "measure.accelerator",
                    f"the guest is emulated (TCG): {accelerator.reason}",
                    "read the figures as ratios; with KVM all of them are smaller",
                )
            )
        figures.append(
            await measure(host, accelerator, memory_mib=wanted.memory_mib, runs=wanted.runs, say=_tell)
        )
        return 0

    try:
        asyncio.run(CleanUp(_tell).run(run))
    except MeasurementFailed as error:
        add(wrong("measure.pause", str(error), "measure again; `--accel tcg` does without KVM"))
        return found, None
    for finding in findings_of(figures[0]):
        add(finding)
    return found, figures[0]


def _tell(what: str) -> None:
    click.echo(f"caesura: {what}", err=True)


async def _broker(settings: HostUpdaterSettings, host: HostFile, add: Say) -> None:
    click.echo(f"caesura: asking the broker, up to {BEAT_S + 10:g} s", err=True)
    async for finding in check_broker(settings, host):
        add(finding)

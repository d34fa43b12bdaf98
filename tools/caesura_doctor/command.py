"""The command ``caesura doctor``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping

import click
import msgspec

from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.logs import configure_logging
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_doctor.broker_checks import BEAT_S, check_broker
from caesura_doctor.host_checks import check_host, host_file
from caesura_doctor.host_settings import ENV_FILE, PREFIX, host_settings
from caesura_host_updater.drivers.diagnosis import Diagnosis, warning, wrong
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.settings import HostUpdaterSettings

_EPILOG = f"""\b
examples:
  sudo caesura doctor
  sudo -u caesura-host caesura doctor
  caesura doctor --env-file deploy/systemd/env/host-updater.env --no-broker
  caesura doctor --json

\b
The settings are those of the host updater: its variables ({PREFIX}...), or {ENV_FILE}.
Run as the host updater's user, it sees what that user may do.

\b
exit codes:
  0  nothing is wrong
  1  something is; each line says what to do
  2  bad usage"""

_MARKS = {"ok": "ok     ", "warning": "WARNING", "wrong": "WRONG  "}


class _DoctorAnswer(msgspec.Struct, frozen=True, kw_only=True):
    healthy: bool
    findings: list[Diagnosis]


@click.command("doctor", epilog=_EPILOG)
@click.option("--env-file", metavar="FILE", help="The host updater's settings as NAME=value lines.")
@click.option(
    "--broker/--no-broker",
    default=True,
    help="Also connect to the broker, and publish about a VM that nobody has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON document.")
def doctor(*, env_file: str | None, broker: bool, as_json: bool) -> None:
    """Say what is wrong or missing on this host, each with its remedy. Nothing is changed, and nothing is paused."""
    configure_logging("doctor", level="critical")  # what the bus would log is a finding
    try:
        findings = _findings(env_file, os.environ, broker=broker, say=_quiet if as_json else _print)
    except KeyboardInterrupt:
        sys.exit(130)
    except CaesuraError as error:
        fail(error, as_json=as_json)
    healthy = not any(each.level == "wrong" for each in findings)
    if as_json:
        print_json(_DoctorAnswer(healthy=healthy, findings=findings))
    else:
        count = sum(each.level == "wrong" for each in findings)
        warnings = sum(each.level == "warning" for each in findings)
        click.echo(f"{count} wrong, {warnings} warnings, {len(findings)} looked at")
    sys.exit(0 if healthy else 1)


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
    if os.geteuid() == 0:
        add(
            warning(
                "user",
                "run as root: what the host updater's own user may do is not tried",
                "sudo -u caesura-host caesura doctor",
            )
        )
    host, of_file = host_file(settings)
    for finding in of_file:
        add(finding)
    if host is None:
        return found
    for finding in check_host(settings, host, environ):
        add(finding)
    if broker:
        asyncio.run(_broker(settings, host, add))
    return found


async def _broker(settings: HostUpdaterSettings, host: HostFile, add: Say) -> None:
    click.echo(f"caesura: asking the broker, up to {BEAT_S + 10:g} s", err=True)
    async for finding in check_broker(settings, host):
        add(finding)

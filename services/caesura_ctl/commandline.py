"""What all commands of ``caesura`` share: the broker option, JSON output, exit codes, selection and policy."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console

from caesura.contract import messages as m
from caesura.runtime.command import leaves
from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import configure_logging
from caesura.runtime.settings import read_settings
from caesura_ctl.durations import DURATION
from caesura_ctl.settings import CtlSettings

EXIT_CODES = """exit codes:
  0  done, or the rollout completed
  1  the rollout halted, was aborted, or a rule did not hold
  2  bad usage or configuration
  3  refused: the plan or the request cannot be carried out
  4  the broker cannot be reached
  5  the coordinator does not answer
  130  interrupted (a rollout that was started goes on)"""

F = TypeVar("F", bound=Callable[..., Any])


class Refused(CaesuraError):
    """The coordinator said no."""

    exit_code = 3


class NotCompleted(CaesuraError):
    """The rollout that was followed did not end well."""

    exit_code = 1


class Context(msgspec.Struct):
    """What the group hands to every command."""

    settings: CtlSettings
    json: bool
    console: Console


def settings_for(broker: str | None) -> CtlSettings:
    """Settings from the environment, the broker option on top.

    Raises:
        SettingsError: the environment is not valid.
    """
    environ = dict(os.environ)
    if broker:
        environ["CAESURA_CTL_BROKER_URL"] = broker
    return read_settings(CtlSettings, "CAESURA_CTL_", environ)


def common(command: F) -> F:
    """The options that every command takes, before or after the command's own."""
    command = click.option(
        "--json", "as_json", is_flag=True, help="Print JSON for scripts instead of tables."
    )(command)
    return click.option(
        "--broker",
        metavar="URL",
        help="mqtt://host:port, mqtts://host:port or unix:///path (also CAESURA_CTL_BROKER_URL).",
    )(command)


def selection(command: F) -> F:
    """Which sets, hosts or VMs a request is about."""
    for option in (
        click.option("--vm", "vms", multiple=True, metavar="NAME", help="A VM; may be given several times."),
        click.option(
            "--host", "hosts", multiple=True, metavar="NAME", help="A host; may be given several times."
        ),
        click.option(
            "--set",
            "sets",
            multiple=True,
            metavar="NAME",
            help="An availability set; may be given several times.",
        ),
    ):
        command = option(command)
    return command


def policy(command: F) -> F:
    """How careful a rollout is."""
    for option in (
        click.option("--allow-reboot", is_flag=True, help="Allow updates that lose guest memory."),
        click.option(
            "--domain-key",
            type=click.Choice(["update_domain", "fault_domain"]),
            default="update_domain",
            show_default=True,
            help="Which groups of a set go one after another.",
        ),
        click.option(
            "--on-unsynced",
            type=click.Choice(["halt", "proceed"]),
            default="halt",
            show_default=True,
            help="When a guest clock cannot be put right.",
        ),
        click.option(
            "--on-not-ready",
            type=click.Choice(["halt", "proceed"]),
            default="halt",
            show_default=True,
            help="When a prepare hook fails or an agent is silent.",
        ),
        click.option(
            "--verify-timeout",
            type=DURATION,
            default=60.0,
            show_default="1m",
            help="How long a wave may take to be healthy again.",
        ),
        click.option(
            "--clock-bound",
            type=DURATION,
            default=0.1,
            show_default="0.1s",
            help="How far a guest clock may be off after its sync.",
        ),
        click.option(
            "--soak", type=DURATION, default=0.0, show_default="0s", help="Quiet time after each wave."
        ),
        click.option(
            "--budget",
            type=DURATION,
            default=30.0,
            show_default="30s",
            help="The most a VM may be paused; 30s at most.",
        ),
        click.option(
            "--notice",
            type=DURATION,
            default=900.0,
            show_default="15m",
            help="Warning time before a wave, unless approved.",
        ),
    ):
        command = option(command)
    return command


def policy_from(options: dict[str, Any]) -> m.Policy:
    """The policy that the options of ``policy`` describe."""
    return m.Policy(
        notice_s=options["notice"],
        budget_s=options["budget"],
        soak_s=options["soak"],
        clock_bound_s=options["clock_bound"],
        verify_timeout_s=options["verify_timeout"],
        on_not_ready=options["on_not_ready"],
        on_unsynced=options["on_unsynced"],
        domain_key=options["domain_key"],
        allow_reboot=options["allow_reboot"],
    )


def run(body: Callable[[Context], Coroutine[Any, Any, None]], broker: str | None, *, as_json: bool) -> None:
    """Run one command; every error of our own becomes one line and its exit code."""
    try:
        settings = settings_for(broker)
        configure_logging("ctl", style="auto", level="error")
        context = Context(settings, as_json, wide_console())
        asyncio.run(body(context))
    except KeyboardInterrupt:
        sys.exit(130)
    except CaesuraError as error:
        fail(error, as_json=as_json)
    except BaseExceptionGroup as group:
        known = [each for each in leaves(group) if isinstance(each, CaesuraError)]
        if len(known) < len(leaves(group)):
            raise
        fail(known[0], as_json=as_json)


def wide_console() -> Console:
    """Standard output; in a pipe or a log, wide enough that tables are not broken up."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)


def fail(error: CaesuraError, *, as_json: bool) -> None:
    """Say what went wrong on standard error, and exit with the error's code."""
    from caesura.runtime.settings import SettingsError  # noqa: PLC0415 - only here

    code = 2 if isinstance(error, SettingsError) else error.exit_code
    if as_json:
        click.echo(
            msgspec.json.encode({"error": type(error).__name__, "reason": str(error), "exit_code": code}),
            err=True,
        )
    else:
        click.echo(f"caesura: {error}", err=True)
    sys.exit(code)


def print_json(value: object) -> None:
    """One JSON document on one line."""
    click.echo(msgspec.json.encode(value).decode())


def epilog(*examples: str) -> str:
    """Examples and exit codes, for the end of a command's help."""
    lines = "\n".join(f"  {each}" for each in examples)
    return f"\b\nexamples:\n{lines}\n\n\b\n{EXIT_CODES}"

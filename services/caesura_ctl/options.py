"""Shared by all commands of ``caesura``: the broker option, JSON output, exit codes, selection and policy."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

import click
import msgspec
from rich.console import Console

from caesura.contract import messages as m
from caesura.runtime.command import leaves
from caesura.runtime.errors import CaesuraError
from caesura.runtime.interrupt import EXIT_INTERRUPTED
from caesura.runtime.logs import configure_logging
from caesura.runtime.settings import read_settings
from caesura_ctl.completion import complete
from caesura_ctl.console import VisibleConsole, visible, visible_json
from caesura_ctl.durations import BUDGET, DURATION, SOME_TIME
from caesura_ctl.errors import EXIT_CODES, RequestInterrupted, fail, fail_json
from caesura_ctl.name_params import NAME, SET_NAME
from caesura_ctl.settings import CtlSettings
from caesura_ctl.signals import EXIT_TERMINATED
from caesura_ctl.terminable import Terminable
from caesura_vmcontrol.freezer_control import FreezerChoice

F = TypeVar("F", bound=Callable[..., Any])


class Context(msgspec.Struct):
    """The context that the group passes to every command."""

    settings: CtlSettings
    json: bool
    console: Console


def settings_for(broker: str | None) -> CtlSettings:
    """Settings from the environment, overridden by the broker option.

    Raises:
        SettingsError: the environment is not valid.
    """
    environ = dict(os.environ)
    if broker:
        environ["CAESURA_CTL_BROKER_URL"] = broker
    return read_settings(CtlSettings, "CAESURA_CTL_", environ)


def common(command: F) -> F:
    """The options of every command, before or after the command's own."""
    command = click.option(
        "--json", "as_json", is_flag=True, help="Print JSON for scripts instead of tables."
    )(command)
    return click.option(
        "--broker",
        metavar="URL",
        help="mqtt://host:port, mqtts://host:port or unix:///path; of a cluster mqtts://a:8883,b:8883 (also CAESURA_CTL_BROKER_URL).",
    )(command)


def freezer_option(what: str) -> Callable[[F], F]:
    """The option of commands that pause processes of their own.

    Args:
        what: what it chooses, as a sentence without its end.
    """
    return click.option(
        "--freezer",
        type=click.Choice(get_args(FreezerChoice)),
        default="auto",
        show_default=True,
        help=f"{what}; auto: the best that works here.",
    )


def selection(command: F) -> F:
    """The options that select sets, hosts or VMs."""
    for option in (
        click.option(
            "--vm",
            "vms",
            shell_complete=complete("vm"),
            type=NAME,
            multiple=True,
            metavar="NAME",
            help="A VM; may be given several times.",
        ),
        click.option(
            "--host",
            "hosts",
            shell_complete=complete("host"),
            type=NAME,
            multiple=True,
            metavar="NAME",
            help="A host; may be given several times.",
        ),
        click.option(
            "--set",
            "sets",
            shell_complete=complete("set"),
            type=SET_NAME,
            multiple=True,
            metavar="NAME",
            help="An availability set; may be given several times.",
        ),
    ):
        command = option(command)
    return command


def policy(command: F) -> F:
    """The options of a rollout's policy."""
    for option in (
        click.option(
            "--source",
            type=click.Choice(["platform", "user"]),
            default="platform",
            show_default=True,
            help="EventSource that workloads see; they approve what a user ordered at once, so the notice is short then.",
        ),
        click.option("--allow-reboot", is_flag=True, help="Allow updates that lose guest memory."),
        click.option(
            "--domain-key",
            type=click.Choice(["update_domain", "fault_domain"]),
            default="update_domain",
            show_default=True,
            help="Which groups of a set are updated one after another.",
        ),
        click.option(
            "--on-unproven",
            type=click.Choice(["halt", "proceed"]),
            default=None,
            show_default="halt for swap and replace, proceed for freeze",
            help="If neither a digest nor a canary shows that a guest's memory is unchanged; with halt, the plan refuses VMs "
            "for which no proof is possible.",
        ),
        click.option(
            "--on-unsynced",
            type=click.Choice(["halt", "proceed"]),
            default="halt",
            show_default=True,
            help="If a guest clock cannot be corrected.",
        ),
        click.option(
            "--on-not-ready",
            type=click.Choice(["halt", "proceed"]),
            default="halt",
            show_default=True,
            help="If a prepare hook fails or an agent is silent.",
        ),
        click.option(
            "--verify-timeout",
            type=SOME_TIME,
            default=60.0,
            show_default="1m",
            help="How long a wave may take to become healthy again.",
        ),
        click.option(
            "--clock-bound",
            type=SOME_TIME,
            default=0.1,
            show_default="0.1s",
            help="How far a guest clock may be off after its sync.",
        ),
        click.option(
            "--soak", type=DURATION, default=0.0, show_default="0s", help="Quiet time after each wave."
        ),
        click.option(
            "--budget",
            type=BUDGET,
            default=30.0,
            show_default="30s",
            help="The longest that a VM may be paused; at most 30s.",
        ),
        click.option(
            "--notice",
            type=SOME_TIME,
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
        on_unproven=options["on_unproven"],
        domain_key=options["domain_key"],
        allow_reboot=options["allow_reboot"],
        event_source="User" if options["source"] == "user" else "Platform",
    )


def run(body: Callable[[Context], Coroutine[Any, Any, None]], broker: str | None, *, as_json: bool) -> None:
    """Run one command; every Caesura error becomes one line and its exit code."""
    terminable = Terminable()
    try:
        settings = settings_for(broker)
        configure_logging("ctl", style="auto", level="error")
        context = Context(settings, as_json, wide_console())
        terminable.run(body(context))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except asyncio.CancelledError:
        sys.exit(EXIT_TERMINATED)
    except RequestInterrupted as error:
        if terminable.terminated:
            error.exit_code = EXIT_TERMINATED
        fail(error, as_json=as_json)
    except CaesuraError as error:
        fail(error, as_json=as_json)
    except BaseExceptionGroup as group:
        known = [each for each in leaves(group) if isinstance(each, CaesuraError)]
        if len(known) < len(leaves(group)):
            raise
        fail(known[0], as_json=as_json)


def wide_console() -> Console:
    """Standard output; in a pipe or a log, as wide as ``COLUMNS`` says, else wide enough that tables are not wrapped."""
    console = VisibleConsole(highlight=False, markup=False, emoji=False)
    return (
        console
        if console.is_terminal or os.environ.get("COLUMNS", "").isdecimal()
        else VisibleConsole(highlight=False, markup=False, emoji=False, width=140)
    )


def note(text: str, *, as_json: bool) -> None:
    """A notice on standard error: it is not part of the answer."""
    line = visible_json(msgspec.json.encode({"note": text})) if as_json else f"caesura: {visible(text)}"
    click.echo(line, err=True)


class Commands(click.Group):
    """A group whose usage errors are JSON with ``--json``, like every other failure."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As in click."""
        # Searched in the raw words: a command line that cannot be parsed has no options.
        as_json = "--json" in itertools.takewhile(lambda word: word != "--", args)
        with _usage_errors(as_json=as_json):
            context = super().make_context(info_name, args, parent, **extra)
        context.meta[_AS_JSON] = as_json
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """As in click."""
        with _usage_errors(as_json=ctx.meta.get(_AS_JSON, False)):
            return super().invoke(ctx)


_AS_JSON = "caesura_ctl.as_json"


@contextmanager
def _usage_errors(*, as_json: bool) -> Iterator[None]:
    try:
        yield
    except click.ClickException as error:
        if not as_json:
            raise
        # One name for all kinds: click's own names change between versions.
        kind = click.UsageError if isinstance(error, click.UsageError) else type(error)
        fail_json(kind.__name__, error.format_message(), error.exit_code)


def print_json(value: object) -> None:
    """One JSON document on one line."""
    click.echo(visible_json(msgspec.json.encode(value)))


def epilog(*examples: str) -> str:
    """Examples and exit codes, for the end of a command's help."""
    lines = "\n".join(f"  {each}" for each in examples)
    return f"\b\nexamples:\n{lines}\n\n\b\n{EXIT_CODES}"

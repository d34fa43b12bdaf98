"""How much of the fleet a request may touch: its options, and the confirmation when nothing was selected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from caesura.contract import messages as m
from caesura_ctl.completion import Kind, complete
from caesura_ctl.name_params import NAME, SET_NAME

F = TypeVar("F", bound=Callable[..., Any])


class CanaryParam(click.ParamType[str]):
    """A click parameter: the name of a host, or a number of hosts."""

    name = "canary"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name or the number; a host whose name is a number cannot be named here."""
        text = str(value)
        if text.isascii() and text.isdigit():
            if not 0 < int(text) <= m.EPOCH_MOST:
                self.fail(f"{text} hosts cannot be a canary: at least 1", param, ctx)
            return str(int(text))
        return NAME.convert(text, param, ctx)


def _exclude(kind: Kind, of: click.ParamType[str], what: str) -> Callable[[F], F]:
    return click.option(
        f"--exclude-{kind}",
        f"exclude_{kind}s",
        type=of,
        multiple=True,
        metavar="NAME",
        shell_complete=complete(kind),
        help=f"{what}; may be given several times.",
    )


def limits(command: F) -> F:
    """The options for how much at once, which hosts first, and what to leave out."""
    for option in (
        _exclude("vm", NAME, "Leave this VM out, and its host if the update pauses whole hosts"),
        _exclude("set", SET_NAME, "Leave this set out, and its hosts likewise"),
        _exclude("host", NAME, "Leave this host out"),
        click.option(
            "--canary",
            type=CanaryParam(),
            metavar="HOST|N",
            shell_complete=complete("host"),
            help="This host, or this many hosts, first and alone; the others follow after their soak.",
        ),
        click.option(
            "--max-hosts",
            type=click.IntRange(1),
            metavar="N",
            show_default="a tenth of the hosts, at least 1, where VMs are in no set; else the sets' domains",
            help="The most hosts of one wave.",
        ),
    ):
        command = option(command)
    return command


def again(command: F) -> F:
    """The option that repeats an installed update."""
    return click.option("--again", is_flag=True, help="Apply the update even where it is already installed.")(
        command
    )


def limits_from(options: dict[str, Any]) -> m.Limits:
    """The limits that the options of ``limits`` describe."""
    canary = options["canary"] or ""
    counted = canary.isdigit()
    return m.Limits(
        max_hosts=options["max_hosts"] or 0,
        canary_host="" if counted else canary,
        canary_count=int(canary) if counted else 0,
        exclude_hosts=options["exclude_hosts"],
        exclude_sets=options["exclude_sets"],
        exclude_vms=options["exclude_vms"],
        again=options.get("again", False),
    )


def everything(command: F) -> F:
    """The option that confirms the whole fleet."""
    return click.option(
        "--all", "all_hosts", is_flag=True, help="The whole fleet; required if nothing is selected."
    )(command)


def confirm(verb: str, options: dict[str, Any], *, as_json: bool, what: str = "") -> None:
    """Confirm a request without a selection: ask on a terminal, else require ``--all``.

    Args:
        verb: the action on hosts and VMs; ``what``: the update's name.

    Raises:
        click.UsageError: nothing was selected and there is no terminal, or ``--all`` comes with a selection.
        click.Abort: the operator declined.
    """
    selected = bool(options["sets"] or options["hosts"] or options["vms"])
    if options["all_hosts"]:
        if selected:
            raise click.UsageError("--all is the whole fleet: leave out --set, --host and --vm, or --all")
        return
    if selected:
        return
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError(f"say where to {verb}: --set, --host or --vm, or --all for the whole fleet")
    click.confirm(
        f"Nothing was selected: {f'{verb} {what}'.strip()} on ALL hosts of the fleet?",
        abort=True,
        err=True,
    )

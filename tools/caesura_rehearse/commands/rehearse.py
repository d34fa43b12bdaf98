"""The command ``caesura rehearse``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec

from caesura.runtime.command import leaves
from caesura.runtime.errors import CaesuraError, ConfigError
from caesura.runtime.interrupt import EXIT_INTERRUPTED
from caesura.runtime.logs import configure_logging
from caesura.runtime.visible import visible
from caesura_ctl.durations import DURATION, Duration
from caesura_ctl.errors import fail
from caesura_ctl.name_params import NAME
from caesura_ctl.options import Commands, freezer_option, print_json
from caesura_rehearse.commands.order import ORDER_COMMANDS
from caesura_rehearse.commands.record import record
from caesura_rehearse.commands.scenarios import scenarios
from caesura_rehearse.results.expectations import WORDS, parse_expectation
from caesura_rehearse.simulation.faults import WORDS as FAULT_WORDS
from caesura_rehearse.simulation.faults import parse_fault
from caesura_rehearse.simulation.members import MOST_VMS, UPDATE_DOMAINS
from caesura_rehearse.simulation.orders import MAX_PAUSE_S
from caesura_rehearse.simulation.placeholders import WORDS as WORDS_IN_ARGUMENTS
from caesura_rehearse.simulation.speed import MOST_SPEED

_PAUSE = Duration(most_s=MAX_PAUSE_S)

_EPILOG = """\b
examples:
  caesura rehearse --freeze 9s --notice 15s -- python3 app.py --port 8080
  caesura rehearse --freeze 3s --notice 5s --expect approved --expect survived --junit out.xml -- ./serve
  caesura rehearse --terminate --notice 30s --expect 'drained-within 20s' -- ./worker
  caesura rehearse --freeze 5s --notice 10s --pid 4711
  caesura rehearse --freeze 5s --notice 10s --compose-service web --address gateway:8101
  caesura rehearse record http://169.254.169.254 events.jsonl
  caesura rehearse --replay events.jsonl --expect approved -- ./serve
  caesura rehearse --scenario host-update --speed 60 --expect approved -- ./serve
  caesura rehearse --scenario ./ours.toml --vms 3 --set web -- ./serve --port {port} --name {vm}
  caesura rehearse -- ./serve         # then, as often as needed:
  caesura rehearse freeze --for 5s --notice 10s --wait

\b
exit codes:
  0  what was ordered came about, and each --expect held
  1  it did not, or the program failed
  2  bad usage: also a program that cannot be started
  4  the broker of --broker cannot be reached
  130  interrupted; everything was resumed and ended
  143  the same by SIGTERM"""


class Rehearsals(Commands):
    """The group: words after ``--`` are the program, a word before it is an order for a rehearsal that runs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As in click."""
        if "--" in args:
            at = args.index("--")
            args, program = args[:at], args[at + 1 :]
            if not program:
                raise click.UsageError("there is no program after --", ctx)
            ctx.meta[_PROGRAM] = tuple(program)
        return super().parse_args(ctx, _joined(args))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As in click."""
        if args and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(f"put the program after two dashes: -- {' '.join(args)}", ctx)
        return super().resolve_command(ctx, args)


_PROGRAM = "caesura_rehearse.program"


def _joined(args: list[str]) -> list[str]:
    """``--expect drained-within 10s`` with its second word in the same argument, as it would be in quotes."""
    found: list[str] = []
    for word in args:
        if found[-1:] == ["drained-within"]:
            found[-1] = f"drained-within {word}"
        else:
            found.append(word)
    return found


class WordsParam(click.ParamType[Any]):
    """A click parameter with words of its own.

    Args:
        name: what it is, for the help.
        parse: reads it; a ConfigError fails the command line.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What the words mean."""
        try:
            return self._parse(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.group(cls=Rehearsals, invoke_without_command=True, epilog=_EPILOG)
@click.option(
    "--freeze",
    type=_PAUSE,
    metavar="DURATION",
    help="Order a Freeze that pauses the program for so long; at most 27s. 0s: announced only.",
)
@click.option(
    "--reboot", is_flag=True, help="Order a Reboot: SIGTERM, later SIGKILL, and the program is started again."
)
@click.option(
    "--redeploy", is_flag=True, help="Order a Redeploy: the same under another name, with 10m of notice."
)
@click.option("--preempt", is_flag=True, help="Order a Preempt (spot eviction): SIGTERM, later SIGKILL.")
@click.option(
    "--terminate", is_flag=True, help="Order a Terminate (scale set delete): SIGTERM, later SIGKILL."
)
@click.option(
    "--replay",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Serve a recording of `caesura rehearse record` instead, with its timing.",
)
@click.option(
    "--pause-at-start",
    type=_PAUSE,
    metavar="DURATION",
    help="With --replay: pause the program for so long when an event becomes Started. Without: documents only.",
)
@click.option(
    "--notice",
    type=DURATION,
    show_default="the real one's minimum: 15m for Freeze and Reboot, 10m Redeploy, 5m Terminate, 30s Preempt",
    help="Time from the announcement to NotBefore; the program's approval ends it earlier. 0s: no notice, as on a hardware failure.",
)
@click.option(
    "--scenario",
    metavar="NAME|FILE",
    help="Play a scenario instead of one event: one that comes with the package (caesura rehearse scenarios), or a TOML file.",
)
@click.option(
    "--speed",
    type=click.FloatRange(1, MOST_SPEED),
    default=1.0,
    show_default=True,
    help="Shorten notices, checks and the time between steps so many times, to 2s at least. Pauses last as long as ever; NotBefore is "
    "when it happens.",
)
@click.option(
    "--source",
    type=click.Choice(["platform", "user"]),
    default="platform",
    show_default=True,
    help="EventSource.",
)
@click.option(
    "--expect",
    "expectations",
    type=WordsParam("expectation", parse_expectation),
    multiple=True,
    metavar="WHAT",
    help=f"What must hold: {WORDS}. May be given several times.",
)
@click.option(
    "--pid",
    type=click.IntRange(min=2),
    help="Pause this process, and all below it, instead of starting a program.",
)
@click.option("--cgroup", type=click.Path(path_type=Path), help="Pause this cgroup.")
@click.option(
    "--container", metavar="NAME", help="Pause this container of Docker or Podman, which runs already."
)
@click.option(
    "--compose-service",
    metavar="[PROJECT/]SERVICE",
    help="Pause the container of this Compose service; without PROJECT that of the present folder, or the only one.",
)
@click.option(
    "--engine",
    metavar="SOCKET",
    envvar="DOCKER_HOST",
    help="The container engine's socket. [default: the usual ones of Docker and Podman]",
)
@click.option(
    "--vms",
    type=click.IntRange(1, MOST_VMS),
    metavar="N",
    help=f"VMs of the set, SET-1 to SET-N in update domains 0 to {UPDATE_DOMAINS - 1} in turn; each runs the program. Placeholders in its arguments: "
    f"{WORDS_IN_ARGUMENTS}.",
)
@click.option(
    "--vm",
    type=NAME,
    show_default="SET-1",
    help="The VM's name, in Resources and as compute.name.",
)
@click.option("--set", "set_name", type=NAME, default="app", show_default=True, help="Its availability set.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    show_default="free ones",
    help="What {port} and CAESURA_PORT are for the first VM; the next ones have the ports after it.",
)
@click.option(
    "--proxy",
    is_flag=True,
    help="Set http_proxy for the program, so that requests to http://169.254.169.254 arrive.",
)
@click.option(
    "--netns",
    is_flag=True,
    help="Run the program in a network of its own in which 169.254.169.254:80 answers; no root needed. With a container: let it answer "
    "in the container's (root).",
)
@click.option(
    "--publish",
    type=click.IntRange(1, 65535),
    multiple=True,
    metavar="PORT",
    help="With --netns: lead this port of 127.0.0.1 to the same port of the program.",
)
@click.option(
    "--address",
    metavar="ADDRESS[:PORT]",
    help="Serve the metadata here, on port 80 if none is given; loopback gets the address if nothing has it (root). With a container "
    "also gateway[:PORT]: this machine's address in its network.",
)
@click.option(
    "--fault",
    "faults",
    type=WordsParam("fault", parse_fault),
    multiple=True,
    metavar="WHAT",
    help=f"What requests for the document meet: {FAULT_WORDS}. May be given several times, one after the other.",
)
@click.option(
    "--broker",
    metavar="URL",
    help="Publish what is said on the bus at this MQTT broker, too, for consumers under test; user, password and TLS as for caesura "
    "(CAESURA_CTL_BROKER_USERNAME, ..._PASSWORD_FILE, ..._CA_FILE).",
)
@click.option(
    "--control",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write address and token of the control API here.",
)
@click.option(
    "--grace",
    type=DURATION,
    default=10.0,
    show_default="10s",
    help="Time between SIGTERM and SIGKILL where an event ends the program.",
)
@click.option(
    "--settle",
    type=DURATION,
    default=3.0,
    show_default="3s",
    help="How long the program runs on after its event is over; then it is ended.",
)
@freezer_option("How the program is paused")
@click.option(
    "--junit",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the verdicts to this file as JUnit XML.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the report as JSON; the program's standard output goes to standard error.",
)
@click.pass_context
def rehearse(context: click.Context, /, *, as_json: bool, junit: Path | None, **options: Any) -> None:
    """Order a maintenance event for your program, and see what it makes of it.

    Starts the program given after two dashes, announces the event over the API of Azure's Scheduled Events as in production
    (CAESURA_METADATA_URL has the address), pauses or ends the program at NotBefore or as soon as it approves, and reports what it
    saw and when. No root, no broker, no configuration. Nothing is left behind.
    """
    if context.invoked_subcommand is not None:
        return
    configure_logging("rehearse", level="error")
    try:
        from caesura_rehearse.commands.run_options import run_options  # noqa: PLC0415 - half a second that --help does not need

        wanted = run_options(context, context.meta.get(_PROGRAM, ()), options, as_json=as_json)
        sys.exit(asyncio.run(_run(wanted, as_json=as_json, junit_file=junit)))
    except KeyboardInterrupt:  # before it handled signals itself: nothing was started
        sys.exit(EXIT_INTERRUPTED)
    except CaesuraError as error:
        fail(error, as_json=as_json)
    except BaseExceptionGroup as group:
        known = [each for each in leaves(group) if isinstance(each, CaesuraError)]
        if not known:
            raise
        fail(known[0], as_json=as_json)


async def _run(options: Any, *, as_json: bool, junit_file: Path | None) -> int:
    from caesura_rehearse.commands.run import Rehearse  # noqa: PLC0415 - as above
    from caesura_rehearse.results.report import junit, text_lines  # noqa: PLC0415 - as above

    report = await Rehearse(options, _say).run()
    if junit_file is not None:
        junit_file.write_bytes(junit(report))  # noqa: ASYNC240 - nothing else wants the loop
    if as_json:
        print_json(msgspec.to_builtins(report))
    else:
        for line in text_lines(report):
            _say(line)
    return 0 if report.held else 1


def _say(text: str) -> None:
    click.echo(visible(text), err=True)


for each in (*ORDER_COMMANDS, record, scenarios):
    rehearse.add_command(each)

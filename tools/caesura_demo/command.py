"""The command ``caesura demo``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from caesura.lifecycle.budget import usable_s
from caesura.runtime.command import leaves
from caesura.runtime.errors import CaesuraError
from caesura.runtime.logs import configure_logging
from caesura_ctl.durations import BUDGET, DURATION, SOME_TIME, show_duration
from caesura_ctl.errors import fail
from caesura_ctl.options import freezer_option, wide_console
from caesura_demo.guests import MOST_VMS
from caesura_demo.kernel_demo import KernelDemo
from caesura_demo.run import Demo, Options

_ONLY_WITH = {"memory_mib": "qemu", "accel": "qemu", "freezer": "process"}
"""Maps an option to the only driver that uses it."""

_NOT_WITH_KEXEC = ("vms", "memory_mib", "accel", "update_s", "budget_s")

_UPDATE_STARTS_S = 0.5
"""s: for the process of an update to start while all hosts of a domain start theirs; it counts as the update's time."""

_DIGEST_PART = 2 / 3
"""The share of a budget after which a host does not read the memory again, which the check of unchanged memory needs."""

_EPILOG = """\b
examples:
  caesura demo
  caesura demo --vms 3                # on a small machine
  caesura demo --keep                 # then open the URLs; Ctrl-C ends it
  caesura demo --driver qemu          # real guests: freeze all for a host patch, then swap their QEMU
  caesura demo --driver qemu --method replace --vms 3
  caesura demo --driver qemu --method kexec   # another kernel under running guests; in a checkout, root once
  caesura demo --update-takes 9s --budget 20s
  caesura demo --json | jq .checks

\b
exit codes:
  0  every rule held
  1  a rule did not hold, or something failed
  2  bad usage
  130  interrupted; everything was stopped, and nothing stays paused"""


@click.command(epilog=_EPILOG)
@click.option(
    "--driver",
    type=click.Choice(["process", "qemu"]),
    default="process",
    show_default=True,
    help="What a VM is: a group of processes, or a real guest in QEMU.",
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(["freeze", "swap", "replace", "kexec"]),
    multiple=True,
    help="With --driver qemu, one rollout by each of these methods in turn; default: freeze, then swap. kexec, alone: a host in emulation, "
    "whose kernel is replaced under two guests.",
)
@click.option(
    "--vms",
    type=click.IntRange(1, MOST_VMS),
    show_default="25, with --driver qemu 9",
    help="Number of VMs, on up to six hosts.",
)
@click.option(
    "--memory",
    "memory_mib",
    type=click.IntRange(112, 65536),
    default=160,
    show_default=True,
    help="RAM of each guest in MiB, with --driver qemu.",
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="With --driver qemu; auto: KVM if a guest actually boots with it, else TCG.",
)
@click.option("--keep", is_flag=True, help="Leave everything running afterwards, until Ctrl-C.")
@click.option(
    "--broker-kind",
    "broker",
    type=click.Choice(["auto", "mosquitto", "embedded"]),
    default="auto",
    show_default=True,
    help="auto: Mosquitto if it is installed, else the embedded amqtt.",
)
@freezer_option("How VMs (process groups) are frozen")
@click.option(
    "--update-takes",
    "update_s",
    type=DURATION,
    default=2.0,
    show_default="2s",
    help="How long each host's update takes.",
)
@click.option(
    "--notice",
    "notice_s",
    type=SOME_TIME,
    default=8.0,
    show_default="8s",
    help="Notice before a wave; workloads approve earlier.",
)
@click.option(
    "--budget",
    "budget_s",
    type=BUDGET,
    default=10.0,
    show_default="10s",
    help="The longest that a VM may be paused; at most 30s.",
)
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="Keep files and logs in this new folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end instead of tables.")
def demo(*, as_json: bool, methods: tuple[Any, ...], **options: Any) -> None:
    """Freeze a real fleet on this machine: 6 hosts, a rollout over three update domains.

    By default 25 VMs that are process groups, really frozen and resumed; their guest clocks are simulated,
    since a frozen process still sees host time pass. Under a minute. With --driver qemu 9 real guests with
    clocks of their own; some three minutes without KVM. With --method kexec one host in emulation, whose kernel is
    replaced while its guests are paused: some three minutes, once its image is there. Nothing is left behind.
    """
    _check_driver(options["driver"])
    if options["driver"] == "process" and methods not in {(), ("freeze",)}:
        raise click.UsageError(
            "--method swap, replace and kexec need --driver qemu: a process cannot be handed over"
        )
    if "kexec" in methods:
        _check_kexec(methods)
    elif set(methods) != {"swap"}:  # swap applies its update while the guests run
        _check_times(options["update_s"], options["budget_s"])
    configure_logging("demo", level="error")
    console = wide_console()
    kernel = "kexec" in methods
    chosen = Options(
        json=as_json, methods=("freeze", "swap") if kernel or not methods else methods, **options
    )
    try:
        sys.exit(asyncio.run(_run(chosen, console, kernel=kernel)))
    except CaesuraError as error:
        fail(error, as_json=as_json)
    except BaseExceptionGroup as group:
        known = [each for each in leaves(group) if isinstance(each, CaesuraError)]
        if not known:
            raise
        fail(known[0], as_json=as_json)


async def _run(options: Options, console: Console, *, kernel: bool) -> int:
    run = KernelDemo(options, console) if kernel else Demo(options, console)
    return await run.until_signal()


def _check_kexec(methods: tuple[str, ...]) -> None:
    """Raises click.UsageError: it is not alone, or an option would be ignored."""
    if set(methods) != {"kexec"}:
        raise click.UsageError("--method kexec goes alone: its host is another one")
    context = click.get_current_context()
    for option in context.command.params:
        if (
            option.name in _NOT_WITH_KEXEC
            and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(f"{option.opts[0]} does nothing with --method kexec")


def _check_driver(driver: str) -> None:
    """Options must not be ignored silently."""
    context = click.get_current_context()
    for option in context.command.params:
        wanted = _ONLY_WITH.get(option.name or "", driver)
        if (
            wanted != driver
            and context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        ):
            raise click.UsageError(f"{option.opts[0]} needs --driver {wanted}")


def _check_times(update_s: float, budget_s: float) -> None:
    """The checks of the coordinator and the hosts, before a whole fleet is started."""
    most_s = min(usable_s(budget_s), budget_s * _DIGEST_PART) - _UPDATE_STARTS_S
    if most_s <= 0:
        raise click.UsageError(f"--budget {show_duration(budget_s)} leaves no time for an update")
    if update_s > most_s:
        raise click.UsageError(
            f"--update-takes {show_duration(update_s)}: at most {show_duration(most_s)} with --budget "
            f"{show_duration(budget_s)}; the rest of the pause is for its start, the check of the memory and the resume"
        )

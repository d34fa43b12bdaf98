"""The command group ``caesura``."""

from __future__ import annotations

import click

from caesura_ctl import act, look
from caesura_ctl.acl import acl
from caesura_ctl.commandline import EXIT_CODES, Commands
from caesura_ctl.demo.command import demo
from caesura_ctl.guest.command import guest

_EPILOG = f"""\b
examples:
  caesura demo
  caesura status
  caesura plan qemu-security --set web
  caesura roll qemu-security --set web --notice 2m
  caesura freeze --vm web-1 --for 9s --notice 15s
  caesura tail --type caesura.vm.resumed.v1

\b
shell completion:
  eval "$(_CAESURA_COMPLETE=bash_source caesura)"    # zsh_source, fish_source

\b
{EXIT_CODES}"""


@click.group(
    cls=Commands,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="caesura", prog_name="caesura")
def caesura() -> None:
    """Memory-preserving maintenance for your own VMs.

    Warn the workload, freeze the VM, update the host, resume inside a pause budget, set the clock right;
    one update domain of an availability set at a time.
    """


for each in (
    demo,
    act.plan,
    act.roll,
    look.status,
    look.watch,
    act.abort,
    act.resume,
    act.freeze,
    look.history,
    look.tail,
    look.updates,
    guest,
    acl,
):
    caesura.add_command(each)

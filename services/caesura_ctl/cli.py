"""The command group ``caesura``."""

from __future__ import annotations

from importlib.metadata import entry_points

import click

from caesura_ctl.commands import inspect, rollouts
from caesura_ctl.commands.acl import acl
from caesura_ctl.errors import EXIT_CODES
from caesura_ctl.options import Commands

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


PLUGINS = "caesura.commands"
"""Entry points of this group are commands of ``caesura``: the name of each, and a click command."""


class WithPlugins(Commands):
    """The group, with the commands of installed packages, each imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As in click."""
        return sorted({*super().list_commands(ctx), *entry_points(group=PLUGINS).names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """As in click.

        Raises:
            ClickException: the package that provides it cannot be imported.
        """
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        for point in entry_points(group=PLUGINS, name=cmd_name):
            try:
                command: click.Command = point.load()
            except (ImportError, AttributeError) as error:
                package = point.dist.name if point.dist is not None else point.value
                raise click.ClickException(
                    f"the command {cmd_name} of {package} cannot be loaded: {error}. Install {package} again, or remove it"
                ) from error
            return command
        return None


@click.group(
    cls=WithPlugins,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="caesura", prog_name="caesura")
def caesura() -> None:
    """Memory-preserving maintenance for your own VMs.

    Warn the workload, freeze the VM, update the host, resume within a pause budget, correct the clock;
    one update domain of an availability set at a time.
    """


for each in (
    rollouts.plan,
    rollouts.roll,
    inspect.status,
    inspect.watch,
    rollouts.abort,
    rollouts.resume,
    rollouts.freeze,
    inspect.history,
    inspect.tail,
    inspect.updates,
    acl,
):
    caesura.add_command(each)

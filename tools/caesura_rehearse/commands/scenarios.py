"""``caesura rehearse scenarios``: those that come with the package, and the schema of one's own."""

from __future__ import annotations

import click

from caesura.runtime.errors import CaesuraError
from caesura.runtime.visible import visible
from caesura_ctl.errors import fail
from caesura_ctl.options import print_json
from caesura_rehearse.scenarios.file_format import schema_text
from caesura_rehearse.scenarios.reader import read_scenario, shipped_file, shipped_names

_EPILOG = """\b
examples:
  caesura rehearse scenarios
  caesura rehearse scenarios show host-update >ours.toml
  caesura rehearse scenarios check ours.toml
  caesura rehearse scenarios schema >scenario.schema.json"""


@click.group(invoke_without_command=True, epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def scenarios(context: click.Context, /, *, as_json: bool) -> None:
    """List the scenarios that come with the package, for --scenario."""
    if context.invoked_subcommand is not None:
        return
    found = [(name, read_scenario(name)) for name in shipped_names()]
    if as_json:
        print_json(
            {
                "scenarios": [
                    {"name": name, "title": each.title, "vms": [member.vm for member in each.members]}
                    for name, each in found
                ]
            }
        )
        return
    widest = max(len(name) for name, _ in found)
    for name, each in found:
        click.echo(f"{name:<{widest}}  {each.title}")


@scenarios.command()
@click.argument("name")
def show(name: str) -> None:
    """Print the file of a scenario, to begin one of your own from."""
    try:
        text = shipped_file(name).read_text(encoding="utf-8")
    except CaesuraError as error:
        fail(error, as_json=False)
    click.echo(text, nl=False)


@scenarios.command()
@click.argument("scenario")
def check(scenario: str) -> None:
    """Check a scenario, by name or file, without playing it."""
    try:
        found = read_scenario(scenario)
    except CaesuraError as error:
        fail(error, as_json=False)
    vms = ", ".join(each.vm for each in found.members) or "those of the command line"
    click.echo(visible(f"{scenario}: {found.title}: {len(found.steps)} steps; VMs: {vms}"))


@scenarios.command()
def schema() -> None:
    """Print the JSON schema of scenario files, for editors."""
    click.echo(schema_text(), nl=False)

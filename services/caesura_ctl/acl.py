"""The command ``caesura acl``: access rules for the broker, made from the topic table."""

from __future__ import annotations

import click

from caesura.contract.access import Principal, access_rules
from caesura.contract.names import is_name

_PARTIES = {"coordinator": 0, "exporter": 0, "host": 1, "metadata": 1, "ctl": 1, "vm": 2}
"""Party to how many names follow it; a VM's second one is its set, which may be left out."""

_EPILOG = """\b
examples:
  caesura acl coordinator exporter metadata:fleet host:host-1 vm:web-1:web ctl:ops > acl
  caesura acl --users vm:web-1:web host:host-1

\b
exit codes:
  0  done
  2  a word that names no party"""


class _PrincipalParam(click.ParamType[Principal]):
    name = "party[:name[:set]]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Principal:
        if isinstance(value, Principal):
            return value
        party, *names = str(value).split(":")
        most = _PARTIES.get(party)
        if most is None:
            self.fail(f"{party!r} is none of {', '.join(_PARTIES)}", param, ctx)
        if len(names) > most or (most > 0 and not names) or not all(is_name(name) for name in names):
            example = {0: party, 1: f"{party}:NAME", 2: f"{party}:NAME[:SET]"}[most]
            self.fail(f"{value!r} should look like {example}, names of A-Z a-z 0-9 _ -", param, ctx)
        return Principal(party, *names)  # type: ignore[arg-type]  # one of _PARTIES, checked above


@click.command(epilog=_EPILOG)
@click.argument("principals", nargs=-1, required=True, type=_PrincipalParam())
@click.option("--users", is_flag=True, help="Print only the user names, one a line, for mosquitto_passwd.")
def acl(principals: tuple[Principal, ...], *, users: bool) -> None:
    """Print the broker's access rules (Mosquitto acl_file) for the users of a fleet.

    Each PRINCIPAL is coordinator, exporter, host:NAME, vm:NAME[:SET], metadata:NAME or ctl:NAME; its user
    name at the broker is party_name. Whoever is not named may do nothing.
    """
    if users:
        for each in principals:
            click.echo(each.username)
    else:
        click.echo(access_rules(principals), nl=False)

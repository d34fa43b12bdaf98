"""The command ``caesura acl``: access rules for the broker, made from the topic table."""

from __future__ import annotations

import click

from caesura.contract.access import Principal, access_rules
from caesura.contract.names import is_name, own_set
from caesura_ctl.names import read_set

_PARTIES = {
    "coordinator": (0, 1),
    "exporter": (0, 1),
    "host": (1, 1),
    "metadata": (1, 1),
    "ctl": (1, 1),
    "vm": (1, 2),
}
"""Party to how many names follow it, at least and at most; a VM's second one is its set."""

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
        if party not in _PARTIES:
            self.fail(f"{party!r} is none of {', '.join(_PARTIES)}", param, ctx)
        least, most = _PARTIES[party]
        names[1:] = map(read_set, names[1:])
        if not least <= len(names) <= most or not all(is_name(name) for name in names):
            example = f"{party}[:NAME]" if least == 0 else f"{party}:NAME" + ("[:SET]" if most == 2 else "")
            self.fail(f"{value!r} should look like {example}, names of A-Z a-z 0-9 _ -", param, ctx)
        if party == "vm" and len(names) == 1:
            names.append(own_set(names[0]))
        return Principal(party, *names)  # type: ignore[arg-type]  # one of _PARTIES, checked above


@click.command(epilog=_EPILOG)
@click.argument("principals", nargs=-1, required=True, type=_PrincipalParam())
@click.option("--users", is_flag=True, help="Print only the user names, one a line, for mosquitto_passwd.")
def acl(principals: tuple[Principal, ...], *, users: bool) -> None:
    """Print the broker's access rules (Mosquitto acl_file) for the users of a fleet.

    Each PRINCIPAL is coordinator, exporter, host:NAME, vm:NAME[:SET], metadata:NAME or ctl:NAME; its user
    name at the broker is party_name. A standby coordinator or a second exporter has a name, too:
    coordinator:standby. Whoever is not named may do nothing.
    """
    if users:
        for each in principals:
            click.echo(each.username)
    else:
        click.echo(access_rules(principals), nl=False)

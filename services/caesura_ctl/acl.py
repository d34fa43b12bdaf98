"""The command ``caesura acl``: access rules for the broker, made from the topic table."""

from __future__ import annotations

import click

from caesura.contract.access import Principal, access_rules
from caesura.contract.names import is_name, own_set
from caesura_ctl.names import read_set

_FORMS = {
    "coordinator": "coordinator[:NAME]",
    "exporter": "exporter[:NAME]",
    "host": "host:NAME[:VM,VM...]",
    "metadata": "metadata:NAME[:VM,VM...]",
    "ctl": "ctl:NAME",
    "vm": "vm:NAME[:SET[:HOST]]",
}
"""Party to how it is written; a list of VMs is what a host has, or what a publisher serves."""

_EPILOG = """\b
examples:
  caesura acl coordinator exporter metadata:fleet host:host-1 vm:web-1:web ctl:ops > acl
  caesura acl host:host-1:web-1,web-2 metadata:host-1:web-1,web-2 vm:web-1:web:host-1
  caesura acl --users vm:web-1:web host:host-1

\b
exit codes:
  0  done
  2  a word that names no party"""


class _PrincipalParam(click.ParamType[Principal]):
    name = "party[:name[:...]]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Principal:
        if isinstance(value, Principal):
            return value
        party, *words = str(value).split(":")
        if party not in _FORMS:
            self.fail(f"{party!r} is none of {', '.join(_FORMS)}", param, ctx)
        made = _principal(party, words)
        if made is None:
            self.fail(
                f"{value!r} should look like {_FORMS[party]}, names of A-Z a-z 0-9 _ -",
                param,
                ctx,
            )
        return made


def _principal(party: str, words: list[str]) -> Principal | None:
    """What the words after the party say; None where they say nothing that makes sense."""
    name, set_name, host = (*words, "", "", "")[:3]
    vms: tuple[str, ...] = ()
    match party, len(words):
        case (("coordinator" | "exporter"), 0):
            return Principal(party)
        case (("coordinator" | "exporter" | "ctl"), 1):
            pass
        case (("host" | "metadata"), 1 | 2):
            vms, set_name = tuple(set_name.split(",")) if len(words) == 2 else (), ""
        case "vm", 1 | 2 | 3:
            set_name = read_set(set_name) if len(words) > 1 else own_set(name)
        case _:
            return None
    names = [name, *vms, *([set_name] if party == "vm" else []), *([host] if len(words) == 3 else [])]
    if not all(is_name(each) for each in names):
        return None
    return Principal(party, name, set_name, host, vms)


@click.command(epilog=_EPILOG)
@click.argument("principals", nargs=-1, required=True, type=_PrincipalParam())
@click.option("--users", is_flag=True, help="Print only the user names, one a line, for mosquitto_passwd.")
def acl(principals: tuple[Principal, ...], *, users: bool) -> None:
    """Print the broker's access rules (Mosquitto acl_file) for the users of a fleet.

    Each PRINCIPAL is coordinator, exporter, host:NAME[:VM,VM...], vm:NAME[:SET[:HOST]], metadata:NAME[:VM,VM...]
    or ctl:NAME; its user name at the broker is party_name. A standby coordinator or a second exporter has a name,
    too: coordinator:standby. VMs bind a host or a publisher to them, a HOST binds a VM to it: it then gets clock
    answers from no other. Whoever is not named may do nothing.
    """
    if users:
        for each in principals:
            click.echo(each.username)
    else:
        click.echo(access_rules(principals), nl=False)

"""The command ``caesura acl``: access rules for the broker, made from the topic table."""

from __future__ import annotations

import click

from caesura.contract.access import Principal, VmPlacement, access_rules, nats_users, rabbitmq_definitions
from caesura.contract.names import is_name, own_set
from caesura_ctl.name_params import read_set

_FORMS = {
    "coordinator": "coordinator[:NAME]",
    "exporter": "exporter[:NAME]",
    "host": "host:NAME[:VM[=SET[/DOMAIN]],...]",
    "metadata": "metadata:NAME[:VM,VM...]",
    "ctl": "ctl:NAME",
    "vm": "vm:NAME[:SET[:HOST]]",
}
"""Maps a party to its notation; a list of VMs is what a host has, or what a publisher serves."""

_DOMAIN_MOST = 19
_ADVICE = {"host": "host:NAME:VM=SET/DOMAIN,...", "metadata": "metadata:NAME:VM,..."}
"""Maps a party to the notation that makes its topics finite."""

_EPILOG = """\b
examples:
  caesura acl coordinator exporter metadata:fleet host:host-1 vm:web-1:web ctl:ops > acl
  caesura acl host:host-1:web-1=web/0,db-1=db/0 metadata:host-1:web-1,db-1 vm:web-1:web:host-1
  caesura acl --users vm:web-1:web host:host-1
  caesura acl --format nats coordinator host:host-1 vm:web-1:web ctl:ops > users.conf

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
    """The principal from the words after the party; None if they are invalid."""
    name, set_name, host = (*words, "", "", "")[:3]
    vms: tuple[str, ...] = ()
    places: list[VmPlacement] = []
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
    if party == "host":
        read = [_place(each) for each in vms]
        if None in read:
            return None
        vms = tuple(each.vm for each in read if each)
        places = [each for each in read if each and each.set]
    names = [
        name,
        *vms,
        *(each.set for each in places),
        *([set_name] if party == "vm" else []),
        *([host] if len(words) == 3 else []),
    ]
    if not all(is_name(each) for each in names):
        return None
    return Principal(party, name, set_name, host, vms, tuple(places))


def _place(text: str) -> VmPlacement | None:
    """``VM``, ``VM=SET`` or ``VM=SET/DOMAIN``; an empty set if none is given. None: invalid."""
    vm, equals, where = text.partition("=")
    set_name, slash, domain = where.partition("/")
    if bool(equals) != bool(set_name) or bool(slash) != bool(domain):
        return None
    if not domain:
        return VmPlacement(vm, read_set(set_name) if set_name else "")
    if not (domain.isascii() and domain.isdecimal() and int(domain) <= _DOMAIN_MOST):
        return None
    return VmPlacement(vm, read_set(set_name), int(domain))


@click.command(epilog=_EPILOG)
@click.argument("principals", nargs=-1, required=True, type=_PrincipalParam())
@click.option("--users", is_flag=True, help="Print only the user names, one a line, for mosquitto_passwd.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mosquitto", "nats", "rabbitmq"]),
    default="mosquitto",
    show_default=True,
    help="An acl_file of Mosquitto, the users.conf of deploy/nats, or definitions of RabbitMQ.",
)
def acl(principals: tuple[Principal, ...], *, users: bool, form: str) -> None:
    """Print the broker's access rules for the users of a fleet.

    Each PRINCIPAL is coordinator, exporter, host:NAME[:VM[=SET[/DOMAIN]],...], vm:NAME[:SET[:HOST]],
    metadata:NAME[:VM,VM...] or ctl:NAME; its user name at the broker is party_name. A standby coordinator or a second
    exporter has a name, too: coordinator:standby. VMs restrict a host or a publisher to them, a HOST restricts a VM to it: it
    then gets clock answers from no other. With the SET of each VM (and its update DOMAIN) there is a limit to what a
    stolen password of the host can make the broker keep. A user who is not named may do nothing.
    """
    if users:
        for each in principals:
            click.echo(each.username)
        return
    rules = {"mosquitto": access_rules, "nats": nats_users, "rabbitmq": rabbitmq_definitions}
    click.echo(rules[form](principals), nl=False)
    endless = [each.username for each in principals if each.party in _ADVICE and not each.bounded]
    if endless:
        named = ", ".join(endless[:3]) + (f" and {len(endless) - 3} more" if len(endless) > 3 else "")
        parties = sorted({each.party for each in principals if each.username in endless})
        click.echo(
            f"note: {named} may write any number of topics, so a thief of the password can fill the broker: "
            f"where the VMs are known, write {' and '.join(_ADVICE[each] for each in parties)}",
            err=True,
        )

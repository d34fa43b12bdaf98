"""The broker's access rules, made from the topic table: least rights for every user, nothing by default.

One user per service instance, named ``<party>_<instance>`` (the coordinator and the exporter without an
instance). The rules are Mosquitto's ``acl_file`` format (mosquitto.conf(5)): literal users rather than the
``%u`` pattern, because a host and a VM of one name must not inherit each other's rights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from caesura.contract.messages import VMS_IN_PART, InventoryPart, ReportPart, VmResumed
from caesura.contract.topics import CHANNELS, PREFIX, Channel, Role, channel_of

_UPDATE_DOMAINS = range(20)


class VmPlacement(msgspec.Struct, frozen=True):
    """The set of a host's VM and the VM's update domain in it; a domain of None: any domain."""

    vm: str
    set: str
    update_domain: int | None = None


class Principal(msgspec.Struct, frozen=True):
    """A user at the broker: which party it is, its instance (host, VM, publisher or client name), its set.

    ``host`` of a VM: where it runs, if it never moves. ``vms`` of a host or a publisher: those that it has or serves. ``places``
    of a host: the sets and domains of its VMs, as far as they are known. Each narrows what the user may do; empty: any.
    """

    party: Role
    instance: str = ""
    set: str = ""
    host: str = ""
    vms: tuple[str, ...] = ()
    places: tuple[VmPlacement, ...] = ()

    @property
    def username(self) -> str:
        """The user name at the broker."""
        return f"{self.party}_{self.instance}" if self.instance else self.party

    @property
    def bounded(self) -> bool:
        """Whether the topics that it may write are finite in number, and with them what it can make a broker retain.

        The coordinator's are not: it names rollouts and sets.
        """
        return not any("+" in each for each in writable(self))


_OWN_PARAMETER: Mapping[Role, str] = {
    "host": "host",
    "vm": "vm",
    "ctl": "client",
    "metadata": "instance",
    "exporter": "instance",
}
_EXPORTER = "exporter"
"""The default name of an exporter's instance, which is not part of its user's name."""


def access_rules(principals: Iterable[Principal]) -> str:
    """The text of an ``acl_file`` for these users."""
    blocks = [
        "# Generated from the topic table (caesura.contract.access). A user who is not named here may do nothing."
    ]
    for principal in principals:
        lines = [f"user {principal.username}"]
        lines += [f"topic write {pattern}" for pattern in writable(principal)]
        lines += [f"topic read {pattern}" for pattern in readable(principal)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def nats_users(principals: Iterable[Principal]) -> str:
    """The users of a NATS server (``authorization { include ... }``), each with the subjects that its service publishes and subscribes to.

    NATS refuses a subscription that is wider than its rule, where Mosquitto grants it and filters what it delivers: so what may be read
    is what the services subscribe to. Passwords are variables of a second file, ``password_<user>``. Users may only
    speak MQTT: any of them could read all deliveries by NATS's own protocol, since ``$MQTT.sub`` has to be allowed for QoS 1.
    """
    lines = [
        "# Generated from the topic table (caesura.contract.access). A user who is not named here may do nothing.",
        'include "passwords.conf"',
        "users: [",
    ]
    for principal in principals:
        name = principal.username
        lines += [
            f'  {{ user: {_quoted(name)}, password: $password_{name}, allowed_connection_types: ["MQTT"], permissions: {{',
            f"    publish: {{ allow: [{_subjects(writable(principal))}] }}",
            f"    subscribe: {{ allow: [{_subjects(_subscribed(principal))}, {_quoted(_NATS_DELIVERIES)}] }}",
            "  } }",
        ]
    return "\n".join([*lines, "]"]) + "\n"


_NATS_DELIVERIES = "$MQTT.sub.>"
"""Where a NATS server delivers QoS 1 to its own MQTT connections; it refuses to subscribe an MQTT client to it."""


def rabbitmq_definitions(principals: Iterable[Principal]) -> str:
    """The permissions of users of a RabbitMQ server, as definitions to import; the users are added before, with their passwords.

    A client's subscriptions are a queue named after its client id. A user that may use a queue reads what is in it, so each may use those of
    the client ids of its own service only. A user without a rule here may do nothing.
    """
    permissions: list[dict[str, str]] = []
    topics: list[dict[str, str]] = []
    for principal in principals:
        user = {"user": principal.username, "vhost": "/"}
        queue = f"mqtt-subscription-{_client_ids(principal)}(-[0-9a-f]{{16}})?qos[01]"
        both = f"^({queue}|amq\\.topic)$"
        permissions.append({**user, "configure": f"^{queue}$", "write": both, "read": both})
        topics.append(
            {
                **user,
                "exchange": "amq.topic",
                "write": _keys(writable(principal)),
                "read": _keys(_subscribed(principal)),
            }
        )
    found = {"permissions": permissions, "topic_permissions": topics}
    return msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"


def _client_ids(principal: Principal) -> str:
    """A regular expression for the client ids of this user's service, without the code that a cluster's have (``options_from``)."""
    name = principal.instance
    match principal.party:
        case "ctl":
            return f"ctl-{name}-[0-9a-f]{{8}}"
        case "host":
            return f"caesura-(host-{name}|doctor-{name}-[0-9a-f]{{8}})"
        case "exporter":
            return f"caesura-metrics-{name or _EXPORTER}"
        case "coordinator":
            return name or "coordinator"
        case _:
            return f"caesura-{principal.party}-{name}"


def _keys(filters: Iterable[str]) -> str:
    """A regular expression for routing keys, and for binding keys, in which a wildcard is a level like any other."""
    keys = (each.replace("/", "\\.").replace("+", "[^.#]+") for each in filters)
    return f"^({'|'.join(keys)})$"


def _subscribed(principal: Principal) -> list[str]:
    """The filters that the service of this user subscribes to."""
    if principal.party == "exporter":
        return [PREFIX, f"{PREFIX}/#"]
    if principal.party == "vm":
        resumed = channel_of(VmResumed)
        others = [each for each in readable(principal) if not each.endswith("/resumed")]
        host = {"host": principal.host} if principal.host else {}
        return [*others, resumed.filter(vm=principal.instance, **host)]
    if principal.party != "host":
        return readable(principal)
    own = [channel for channel in CHANNELS if channel.writer == "host" and "host" in channel.readers]
    others = [each for each in readable(principal) if not each.startswith(f"{PREFIX}/host/")]
    return [*others, *(channel.filter(host=principal.instance) for channel in own)]


def _subjects(filters: Iterable[str]) -> str:
    return ", ".join(_quoted(each.replace("/", ".").replace("+", "*").replace("#", ">")) for each in filters)


def _quoted(text: str) -> str:
    return f'"{text}"'


def writable(principal: Principal) -> list[str]:
    """The topic filters that this user may write: its own rows of the topic table, with its own name filled in.

    No subtree: a broker keeps whatever is retained on topics that nobody reads, and the number of such topics is unbounded.
    """
    own = {}
    if principal.party in _OWN_PARAMETER:
        own[_OWN_PARAMETER[principal.party]] = principal.instance or _EXPORTER
    return [
        filled
        for channel in CHANNELS
        if channel.writer == principal.party and not channel.deprecated
        for filled in _for_each_vm(channel, principal, own)
    ]


def _for_each_vm(channel: Channel, principal: Principal, own: Mapping[str, str]) -> list[str]:
    """The channel's filter, or one for each VM that the principal is bound to; for the parts of an inventory or a report, as many as these VMs may need."""
    known = {name: own[name] for name in channel.parameters if name in own}
    if channel.message in {InventoryPart, ReportPart} and principal.party == "host" and principal.vms:
        parts = range(1, -(-len(principal.vms) // VMS_IN_PART) + 1)
        return [channel.filter(**known, part=part) for part in parts]
    if "vm" not in channel.parameters or not principal.vms:
        return [channel.filter(**known)]
    places = {each.vm: each for each in principal.places}
    found = []
    for vm in principal.vms:
        place = places.get(vm)
        if place is None or "ud" not in channel.parameters:
            found.append(channel.filter(**known, vm=vm))
            continue
        domains = _UPDATE_DOMAINS if place.update_domain is None else (place.update_domain,)
        found += [channel.filter(**known, vm=vm, set=place.set, ud=domain) for domain in domains]
    return found


def readable(principal: Principal) -> list[str]:
    """The topic filters that this user may read: its own instance and set where the topic names one."""
    known = {}
    if principal.instance and principal.party in _OWN_PARAMETER:
        known[_OWN_PARAMETER[principal.party]] = principal.instance
    if principal.party == "vm":
        known |= {name: value for name, value in (("set", principal.set), ("host", principal.host)) if value}
    found = []
    for channel in CHANNELS:
        if principal.party in channel.readers:
            # A host and a client read topics of others; only commands and answers are addressed to them by name.
            mine = known if channel.writer in {"coordinator", "host"} and principal.party != "ctl" else {}
            if principal.party == "ctl" and "client" in channel.parameters:
                mine = known
            found += _for_each_vm(channel, principal, mine)
    return found

"""The fleet of ``docker-compose.yml``: its members, its files, and who may read which secret. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

import msgspec
import tomli_w

from caesura.contract.access import Principal, VmPlacement, access_rules
from caesura.contract.names import own_set
from caesura_demo.layout import Broker, DemoVm, Layout, host_file, listeners_file, update_file

FIRST_METADATA_PORT = 18101
_HOSTS = 3
_PUBLISHER = "metadata-of-host-{}"
"""Names of the container that serves every VM's metadata, one on the network of each host, where its workloads poll."""

UPDATES: Mapping[str, float] = {"hypervisor-patch": 2.0, "firmware-load": 6.0}
"""Maps an update to the seconds that it takes. The second is longer than Prometheus' scrape interval of 5 s, so that a
pause is also visible while it lasts."""

BROKER_UID = 1883
"""User id of mosquitto in the image eclipse-mosquitto (its Dockerfile)."""
GRAFANA_UID = 472
"""User id of grafana in the image grafana/grafana (its Dockerfile)."""
OPERATOR_UID = 10005

HEALTH_USER = "health"
"""User of the broker's own health check: it may log in, but has no access rule, so it may do nothing else."""
GRAFANA_SECRET = "grafana-admin"  # noqa: S105 - the name of a file
STORE_SECRET = "store"  # noqa: S105 - the same
STORE_GID = 10007
"""Group of those that read the password of the PostgreSQL of the profile ``ha``."""


class User(msgspec.Struct, frozen=True):
    """A user at the broker and the user id of the container that reads its password."""

    principal: Principal
    uid: int

    @property
    def name(self) -> str:
        """The user name at the broker, and the name of the password's file."""
        return self.principal.username


def compose_layout() -> Layout:
    """Three hosts with ten VMs: sets ``web`` and ``db`` over three update domains each, and one VM in no set.

    Every host holds one domain of each set, not the same one of both: a domain is not a host. So in every rollout
    only one host may be paused at a time.
    """
    vms: list[DemoVm] = []

    def add(name: str, host: int, **where: Any) -> None:
        port = FIRST_METADATA_PORT + len(vms)
        publisher = _PUBLISHER.format(host + 1)
        vms.append(DemoVm(name=name, host=f"host-{host + 1}", port=port, metadata_host=publisher, **where))

    for host in range(_HOSTS):
        for copy in range(2):
            add(f"web-{host * 2 + copy + 1}", host, set="web", update_domain=host, fault_domain=copy)
        add(f"db-{host + 1}", host, set="db", update_domain=(host + 1) % _HOSTS, fault_domain=host)
    add("batch-1", _HOSTS - 1)
    return Layout(vms=tuple(vms))


def users(layout: Layout) -> tuple[User, ...]:
    """All users at the broker. An agent runs as a process of its host, so its host's user id reads its password."""
    uid_of = {host: 10011 + number for number, host in enumerate(layout.hosts)}
    return (
        User(Principal("coordinator"), 10001),
        User(Principal("coordinator", "2"), 10006),
        User(Principal("metadata", "fleet", vms=tuple(vm.name for vm in layout.vms)), 10002),
        User(Principal("exporter"), 10003),
        User(Principal("ctl", "rollout"), 10004),
        User(Principal("ctl", "ops"), OPERATOR_UID),
        User(Principal("exporter", "consumer"), OPERATOR_UID),
        *(User(_host_user(layout, host), uid) for host, uid in uid_of.items()),
        *(User(Principal("vm", vm.name, vm.set or own_set(vm.name)), uid_of[vm.host]) for vm in layout.vms),
    )


def _host_user(layout: Layout, host: str) -> Principal:
    """A host that may only publish about its own VMs, each in its set and domain."""
    places = tuple(
        VmPlacement(vm.name, vm.set or own_set(vm.name), vm.update_domain)
        for vm in layout.vms
        if vm.host == host
    )
    return Principal("host", host, vms=tuple(each.vm for each in places), places=places)


def secret_readers(layout: Layout) -> dict[str, int]:
    """Maps the name of each secret's file to the user id that may read it."""
    return {user.name: user.uid for user in users(layout)} | {
        HEALTH_USER: BROKER_UID,
        GRAFANA_SECRET: GRAFANA_UID,
        STORE_SECRET: STORE_GID,
    }


def config_files(layout: Layout, *, secrets: str, state: str) -> dict[str, str]:
    """Maps the path below the configuration's folder to the content, for every file that is not a secret.

    Args:
        secrets: the folder with the passwords, as the containers see it.
        state: the folder where a host keeps its state, as its container sees it.
    """
    broker = Broker("mqtt://broker:1883", "5", secrets)
    files = {"broker/acl": access_rules(user.principal for user in users(layout))}
    for host in layout.hosts:
        # sigstop: a container has no writable part of the cgroup tree, and signals to processes of the
        # same user need no privilege.
        table = host_file(layout, host, broker=broker, folder=state, freezer="sigstop", run_id="compose")
        files[f"{host}.toml"] = tomli_w.dumps(table)
    files["listeners.toml"] = tomli_w.dumps(listeners_file(layout))
    for name, seconds in UPDATES.items():
        update = update_file(folder=state, seconds=seconds) | {"name": name}
        files[posixpath.join("updates.d", f"{name}.toml")] = tomli_w.dumps(update)
    return files

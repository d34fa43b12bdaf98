"""The one topic table. Code, docs, the broker's access rules and the AsyncAPI file come from it.

The first segment after the version names the writer, so one write rule per service is enough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Literal

import msgspec

from caesura.contract import messages as m
from caesura.contract.envelope import Message
from caesura.runtime.errors import CaesuraError

PREFIX = "caesura/v1"

Role = Literal["coordinator", "host", "vm", "metadata", "ctl", "exporter"]
"""Who writes or reads: the coordinator, a host updater, a VM agent, a metadata publisher, an operator's client, the exporter."""


class TopicError(CaesuraError):
    """A topic that is not in the table, or a parameter that is not valid in one."""


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the topic table."""

    address: str
    """Template; ``{host}`` and the other parameters are one topic level each."""
    message: type[Message]
    writer: Role
    readers: tuple[Role, ...]
    retain: bool = False
    qos: Literal[0, 1] = 1
    deprecated: bool = False
    """Read from writers that have not been upgraded; this version does not write it, and its access rules let nobody write it."""
    summary: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the template's parameters, in order."""
        return _names(self.address)

    def topic(self, **parameters: str | int) -> str:
        """The concrete topic.

        Raises:
            TopicError: a parameter is missing, unknown, or not one clean topic level.
        """
        return _filled(self.address, tuple(parameters.items()))

    def filter(self, **parameters: str | int) -> str:
        """A subscription filter: given parameters are filled in, the others become ``+``."""
        return self.address.format(**{name: parameters.get(name, "+") for name in self.parameters})

    def match(self, topic: str) -> Mapping[str, str] | None:
        """The parameters in ``topic``, or None if it does not belong to this channel."""
        found = _pattern(self.address).fullmatch(topic)
        return found.groupdict() if found else None


_LEVEL = re.compile(r"[A-Za-z0-9_-]{1,64}")


@cache
def _names(address: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\{(\w+)\}", address))


@lru_cache(maxsize=8_192)
def _filled(address: str, parameters: tuple[tuple[str, str | int], ...]) -> str:
    # Cached, since the same few topics recur: checking their levels took longer than encoding their messages.
    names = _names(address)
    if {name for name, _ in parameters} != set(names):
        raise TopicError(f"{address} takes {names}, was given {tuple(name for name, _ in parameters)}")
    for name, value in parameters:
        if not _LEVEL.fullmatch(str(value)):
            raise TopicError(f"{name}={value!r} is not valid in a topic level of {address}")
    return address.format(**dict(parameters))


@cache
def _pattern(address: str) -> re.Pattern[str]:
    # Compiled once for each row: compiling took most of the time of reading a message.
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[A-Za-z0-9_-]{1,64})", address))


CHANNELS: tuple[Channel, ...] = (
    # -- fleet: written by the coordinator --
    Channel(
        address=f"{PREFIX}/fleet/coordinator",
        message=m.CoordinatorPresence,
        writer="coordinator",
        readers=("coordinator", "host", "ctl", "exporter"),
        retain=True,
        summary="Which coordinator leads, and with which epoch; last will says offline.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/rollout/{{rollout}}",
        message=m.RolloutState,
        writer="coordinator",
        readers=("ctl", "exporter", "coordinator"),
        retain=True,
        summary="A rollout: its update, policy and progress.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/rollout/{{rollout}}/wave/{{wave}}",
        message=m.WaveChanged,
        writer="coordinator",
        readers=("ctl", "exporter"),
        summary="A wave changed its state.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/set/{{set}}/document",
        message=m.SetDocument,
        writer="coordinator",
        readers=("vm", "metadata", "ctl", "exporter", "coordinator"),
        retain=True,
        summary="The set's open scheduled events and their incarnation, in one message.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/set/{{set}}/event/{{status}}",
        message=m.EventChanged,
        writer="coordinator",
        readers=("ctl", "exporter"),
        summary="A scheduled event reached a status: scheduled, started, then completed, cancelled or failed.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/host/{{host}}/operation/start",
        message=m.StartOperation,
        writer="coordinator",
        readers=("host",),
        summary="Start an operation: these VMs, this method, the named update. Repeated until the host reports.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/host/{{host}}/operation/abort",
        message=m.AbortOperation,
        writer="coordinator",
        readers=("host",),
        summary="Abort an operation, or never start it. Repeated until the host reports.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/ctl/{{client}}/answer",
        message=m.RequestAnswered,
        writer="coordinator",
        readers=("ctl",),
        summary="The answer to an operator's request.",
    ),
    # -- host: written by that host's updater --
    Channel(
        address=f"{PREFIX}/host/{{host}}/presence",
        message=m.HostPresence,
        writer="host",
        readers=("host", "coordinator", "ctl", "exporter"),
        retain=True,
        summary="Whether the host updater is on the bus; last will says offline.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/inventory",
        message=m.HostInventory,
        writer="host",
        readers=("coordinator", "metadata", "ctl", "exporter"),
        retain=True,
        summary="The host's VMs, updates, accepted epoch and the operation under way.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/operation",
        message=m.OperationReported,
        writer="host",
        readers=("coordinator", "ctl", "exporter"),
        summary="Accepted, refused, or how the operation ended.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/set/{{set}}/ud/{{ud}}/vm/{{vm}}/frozen",
        message=m.VmFrozen,
        writer="host",
        readers=("ctl", "exporter"),
        summary="A VM is paused from now on, for at most the budget.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/set/{{set}}/ud/{{ud}}/vm/{{vm}}/resumed",
        message=m.VmResumed,
        writer="host",
        readers=("vm", "ctl", "exporter"),
        summary="A VM runs again, with its measured pause.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/set/{{set}}/ud/{{ud}}/vm/{{vm}}/clock-synced",
        message=m.VmClockSynced,
        writer="host",
        readers=("coordinator", "ctl", "exporter"),
        summary="The host's verdict on a VM's clock after a resume.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/clock-sync/{{vm}}",
        message=m.ClockSyncAnswered,
        writer="host",
        readers=("vm",),
        qos=0,
        summary="Answer of a clock-sync exchange: t2 and t3.",
    ),
    # -- vm: written by that VM's agent --
    Channel(
        address=f"{PREFIX}/vm/{{vm}}/presence",
        message=m.AgentPresence,
        writer="vm",
        readers=("host", "coordinator", "ctl", "exporter"),
        retain=True,
        summary="Whether the VM's agent is on the bus; last will says offline.",
    ),
    Channel(
        address=f"{PREFIX}/vm/{{vm}}/ready",
        message=m.VmReady,
        writer="vm",
        readers=("coordinator", "ctl", "exporter"),
        summary="Whether the guest may be paused, after its prepare hook.",
    ),
    Channel(
        address=f"{PREFIX}/vm/{{vm}}/clock-sync",
        message=m.ClockSyncRequested,
        writer="vm",
        readers=("host",),
        qos=0,
        summary="Request of a clock-sync exchange: t1.",
    ),
    Channel(
        address=f"{PREFIX}/vm/{{vm}}/clock-synced",
        message=m.AgentClockSynced,
        writer="vm",
        readers=("host", "ctl", "exporter"),
        summary="The agent measured its clock, stepped it, measured again.",
    ),
    Channel(
        address=f"{PREFIX}/vm/{{vm}}/hook",
        message=m.HookFinished,
        writer="vm",
        readers=("ctl", "exporter"),
        summary="A prepare or recover hook ended.",
    ),
    # -- metadata: written by that publisher --
    Channel(
        address=f"{PREFIX}/metadata/{{instance}}/presence",
        message=m.PublisherPresence,
        writer="metadata",
        readers=("ctl", "exporter"),
        retain=True,
        summary="Whether a metadata publisher is on the bus; last will says offline.",
    ),
    Channel(
        address=f"{PREFIX}/metadata/{{instance}}/approval",
        message=m.EventApproved,
        writer="metadata",
        readers=("coordinator", "exporter"),
        deprecated=True,
        summary="The same without the VM in the topic; written by publishers of earlier versions.",
    ),
    # -- ctl: written by an operator's client --
    Channel(
        address=f"{PREFIX}/ctl/{{client}}/start",
        message=m.RolloutRequested,
        writer="ctl",
        readers=("coordinator",),
        summary="Start or plan a rollout of a named update.",
    ),
    Channel(
        address=f"{PREFIX}/ctl/{{client}}/freeze",
        message=m.FreezeRequested,
        writer="ctl",
        readers=("coordinator",),
        summary="Freeze VMs on demand.",
    ),
    Channel(
        address=f"{PREFIX}/ctl/{{client}}/abort",
        message=m.AbortRequested,
        writer="ctl",
        readers=("coordinator",),
        summary="Abort a rollout.",
    ),
    Channel(
        address=f"{PREFIX}/ctl/{{client}}/resume",
        message=m.ResumeRequested,
        writer="ctl",
        readers=("coordinator",),
        summary="Resume a halted rollout.",
    ),
    # -- later rows: each golden payload is numbered by its row --
    Channel(
        address=f"{PREFIX}/fleet/vm/{{vm}}/owner",
        message=m.VmOwner,
        writer="coordinator",
        readers=("vm", "host", "metadata", "ctl", "exporter", "coordinator"),
        retain=True,
        summary="Which host the VM belongs to; only what this host says about the VM counts.",
    ),
    Channel(
        address=f"{PREFIX}/metadata/{{instance}}/vm/{{vm}}/approval",
        message=m.VmApproved,
        writer="metadata",
        readers=("coordinator", "exporter"),
        summary="A workload in the VM approved an event; repeated until the document shows it.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/vm/{{vm}}/status",
        message=m.VmStatus,
        writer="host",
        readers=("host", "ctl", "exporter"),
        retain=True,
        summary="The current state of a VM: running or paused, since when, by which operation, and its last pause.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/rollout/{{rollout}}/wave/{{wave}}/state",
        message=m.WaveState,
        writer="coordinator",
        readers=("ctl", "exporter"),
        retain=True,
        summary="The state of a wave: its VMs, hosts, events, and what it waits for.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/inventory/{{part}}",
        message=m.InventoryPart,
        writer="host",
        readers=("host", "coordinator", "metadata", "ctl", "exporter"),
        retain=True,
        summary="Some of the host's VMs, where they do not fit into its inventory.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/operation/{{part}}",
        message=m.ReportPart,
        writer="host",
        readers=("coordinator", "ctl", "exporter"),
        summary="The results of some of an operation's VMs, where they do not fit into the report.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/ctl/{{client}}/answer/{{part}}",
        message=m.PlanPart,
        writer="coordinator",
        readers=("ctl",),
        summary="A part of the plan in an answer, where it does not fit into one message.",
    ),
    Channel(
        address=f"{PREFIX}/host/{{host}}/vm/{{vm}}/details",
        message=m.VmDetails,
        writer="host",
        readers=("host", "metadata"),
        retain=True,
        summary="What the host file says of a VM for its workloads to read: size, image, addresses, tags, user data.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/coordinator/{{coordinator}}",
        message=m.CoordinatorStatus,
        writer="coordinator",
        readers=("ctl", "exporter"),
        retain=True,
        summary="A coordinator that shares its store with others: whether it leads or stands by, and what it waits for.",
    ),
    Channel(
        address=f"{PREFIX}/fleet/resync",
        message=m.FleetResyncRequested,
        writer="coordinator",
        readers=("coordinator", "host", "vm", "metadata", "ctl", "exporter"),
        summary="All writers publish their retained state again; only with brokers that do not keep it for everybody.",
    ),
    Channel(
        address=f"{PREFIX}/vm/{{vm}}/resync",
        message=m.AgentResyncRequested,
        writer="vm",
        readers=("coordinator",),
        summary="An agent asks for the state that it reads.",
    ),
    Channel(
        address=f"{PREFIX}/metadata/{{instance}}/resync",
        message=m.PublisherResyncRequested,
        writer="metadata",
        readers=("coordinator",),
        summary="A metadata publisher asks for the state that it reads.",
    ),
    Channel(
        address=f"{PREFIX}/ctl/{{client}}/resync",
        message=m.ClientResyncRequested,
        writer="ctl",
        readers=("coordinator",),
        summary="An operator's client asks for the state of the fleet.",
    ),
    Channel(
        address=f"{PREFIX}/exporter/{{instance}}/resync",
        message=m.ExporterResyncRequested,
        writer="exporter",
        readers=("coordinator",),
        summary="An exporter or a consumer asks for the state of the fleet.",
    ),
)


@cache
def channel_of(message: type[Message]) -> Channel:
    """The row of a message type. Raises TopicError for a type that is not in the table."""
    for channel in CHANNELS:
        if channel.message is message:
            return channel
    raise TopicError(f"{message.__name__} is not in the topic table")


def match_topic(topic: str) -> tuple[Channel, Mapping[str, str]] | None:
    """The row that a concrete topic belongs to, and its parameters; None where there is none."""
    for channel in CHANNELS:
        parameters = channel.match(topic)
        if parameters is not None:
            return channel, parameters
    return None


def may_be_retained(topic: str) -> bool:
    """Whether a broker may keep a message on this topic: where the table says so, and on topics outside the contract."""
    place = match_topic(topic)
    return place is None or place[0].retain

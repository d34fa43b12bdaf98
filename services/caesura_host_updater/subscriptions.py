"""What a host updater subscribes to on the bus."""

from __future__ import annotations

from caesura.contract.messages import (
    AbortOperation,
    AgentClockSynced,
    AgentPresence,
    ClockSyncRequested,
    CoordinatorPresence,
    HostPresence,
    InventoryPart,
    StartOperation,
    VmDetails,
    VmStatus,
)
from caesura.contract.topics import channel_of
from caesura_host_updater.inventory.host_config import HostFile
from caesura_host_updater.inventory.vm_spec import VmSpec


def filters(host: HostFile) -> list[str]:
    """Its topic filters: commands for this host, and the agents of its VMs."""
    wanted = [
        channel_of(CoordinatorPresence).filter(),
        channel_of(StartOperation).filter(host=host.host),
        channel_of(AbortOperation).filter(host=host.host),
        channel_of(VmStatus).filter(host=host.host),
        channel_of(VmDetails).filter(host=host.host),
        channel_of(InventoryPart).filter(host=host.host),
        channel_of(HostPresence).filter(host=host.host),
    ]
    for vm in host.vm:
        wanted += agent_filters(vm)
    return wanted


def agent_filters(vm: VmSpec) -> list[str]:
    """What an agent in this VM says, if there is one."""
    of_agents = (AgentPresence, AgentClockSynced, ClockSyncRequested)
    return [channel_of(message).filter(vm=vm.name) for message in of_agents] if vm.agent else []

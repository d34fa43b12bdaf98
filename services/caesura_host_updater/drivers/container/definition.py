"""What an operator says about containers in the host file, and what the engine's answers mean. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from caesura_host_updater.inventory.vm_spec import VmSpec

LABEL_SET = "caesura.set"
LABEL_DOMAIN = "caesura.update_domain"
LABEL_FAULT_DOMAIN = "caesura.fault_domain"
LABEL_VM = "caesura.vm"
LABEL_AGENT = "caesura.agent"
_PROJECT = "com.docker.compose.project"

AbsolutePath = Annotated[str, Meta(pattern=r"^/")]


class ContainerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[container]``: what holds for all containers of the host."""

    socket: AbsolutePath = "/var/run/docker.sock"
    """The engine's API; Podman's is /run/podman/podman.sock."""
    discover: bool = False
    """Containers with the label ``caesura.update_domain`` are VMs, too."""
    project: str = ""
    """Of those only the ones of this compose project; empty: of every one."""
    start: bool = True
    """Containers of the host file that do not run are started with the host updater."""


class ContainerDefinition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table ``[vm.container]``."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """The container's name, or its id."""


class ContainerVm(VmSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A VM that is a container."""

    agent: bool = False
    """A container has an agent only if it was put into it."""
    container: ContainerDefinition | None = None
    """None: the container is called as the VM is."""
    found: bool = False
    """Set for one that ``discover`` found: it is not started here. Not for the host file."""

    @property
    def container_name(self) -> str:
        """What the engine calls it."""
        return self.container.name if self.container is not None else self.name


class Inspected(msgspec.Struct, frozen=True, kw_only=True):
    """A container as its engine has it."""

    container: str
    running: bool
    paused: bool
    pid: int
    exit_code: int
    status: str


def inspected(answer: Any) -> Inspected:
    """Read ``GET /containers/{id}/json``. Raises ValueError: it is not what an engine says."""
    try:
        state = answer["State"]
        return Inspected(
            container=str(answer["Id"]),
            running=bool(state["Running"]),
            paused=bool(state["Paused"]),
            pid=int(state["Pid"]),
            exit_code=int(state.get("ExitCode", 0)),
            status=str(state.get("Status", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the container engine says something else than a container: {error!r}") from error


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The engine itself."""

    name: str = ""
    version: str = ""
    survives: bool = False
    """Whether containers outlive the engine: Docker's ``live-restore``; Podman has no daemon that they depend on."""


def engine_facts(version: Any, info: Any) -> EngineFacts:
    """Read ``GET /version`` and ``GET /info``; what is missing is left empty."""
    version = version if isinstance(version, dict) else {}
    info = info if isinstance(info, dict) else {}
    components = version.get("Components")
    names = [str(each.get("Name", "")) for each in components or () if isinstance(each, dict)]
    podman = any("podman" in name.lower() for name in names)
    return EngineFacts(
        name="Podman" if podman else "Docker",
        version=str(version.get("Version", "")),
        survives=podman or info.get("LiveRestoreEnabled") is True,
    )


NO_LIVE_RESTORE = "live-restore is off: an engine that is killed or restarted in a pause ends its containers; set it in daemon.json"


def vms_of(answer: Any, project: str, known: set[str]) -> tuple[tuple[ContainerVm, ...], Mapping[str, str]]:
    """The VMs among the containers of ``GET /containers/json``, and which were passed over, and why.

    Args:
        project: only containers of this compose project; empty: all.
        known: names of VMs and containers that the host file has.
    """
    found: dict[str, ContainerVm] = {}
    passed: dict[str, str] = {}
    for each in answer if isinstance(answer, list) else ():
        labels = each.get("Labels") or {}
        names = [str(name).removeprefix("/") for name in each.get("Names") or ()]
        name = names[0] if names else str(each.get("Id", ""))[:12]
        if LABEL_DOMAIN not in labels or (project and labels.get(_PROJECT) != project):
            continue
        vm = labels.get(LABEL_VM) or name
        if vm in known or name in known:
            continue
        try:
            spec = msgspec.convert(
                {
                    "name": vm,
                    "set": labels.get(LABEL_SET, ""),
                    "update_domain": int(labels[LABEL_DOMAIN]) if labels.get(LABEL_SET) else None,
                    "fault_domain": int(labels.get(LABEL_FAULT_DOMAIN, 0)),
                    "agent": labels.get(LABEL_AGENT, "false") == "true",
                    "container": {"name": name},
                    "found": True,
                },
                ContainerVm,
            )
        except (ValueError, msgspec.ValidationError) as error:
            passed[name] = f"its labels cannot be used: {error}"
            continue
        if vm in found:
            passed[name] = f"VM {vm} is container {found[vm].container_name} already"
            continue
        found[vm] = spec
    return tuple(found.values()), passed

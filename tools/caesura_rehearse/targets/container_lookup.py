"""Which container is meant, and how it reaches this machine: what an engine's answers say. Pure.

Sources: Docker Engine API (``ContainerList``, ``ContainerInspect``), which Podman speaks too; the labels of Compose
(``com.docker.compose.*``), which podman-compose sets too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from caesura.runtime.errors import ConfigError
from caesura_host_updater.drivers.container.definition import Inspected, inspected

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHOWN = 8
_LABEL = "com.docker.compose."


class NoContainer(ConfigError):
    """No container can be paused as it was asked for."""


class ListedContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A container of the engine's list. ``service``, ``project`` and ``folder`` are empty for one that Compose did not make."""

    name: str
    state: str
    service: str = ""
    project: str = ""
    folder: str = ""
    """Where the project's file is."""


class ContainerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a rehearsal must know of a container beside what a pause needs."""

    state: Inspected
    name: str
    removed_at_end: bool
    """``docker run --rm``: it cannot be started again."""
    network: str
    """Its network mode: ``host``, ``bridge``, ``none``, a name, ``container:ID``."""
    gateways: tuple[str, ...]
    """Addresses of this machine in its networks."""


def container_name(word: str) -> str:
    """A name or an id from the command line. Raises NoContainer: it cannot be one."""
    if not _NAME.fullmatch(word):
        raise NoContainer(f"{word!r} cannot be the name of a container")
    return word


def listed(answer: Any) -> tuple[ListedContainer, ...]:
    """Read ``GET /containers/json``; what is not a container is left out."""
    found = []
    for each in answer if isinstance(answer, list) else ():
        if not isinstance(each, dict):
            continue
        labels = each.get("Labels") or {}
        names = [str(name).removeprefix("/") for name in each.get("Names") or ()]
        found.append(
            ListedContainer(
                name=names[0] if names else str(each.get("Id", ""))[:12],
                state=str(each.get("State", "")),
                service=str(labels.get(f"{_LABEL}service", "")),
                project=str(labels.get(f"{_LABEL}project", "")),
                folder=str(labels.get(f"{_LABEL}project.working_dir", "")),
            )
        )
    return tuple(found)


def container_of_service(word: str, containers: Sequence[ListedContainer], folder: str) -> str:
    """The one running container of a Compose service.

    Args:
        word: ``SERVICE``, or ``PROJECT/SERVICE``.
        containers: all that the engine has, also those that do not run.
        folder: the present one: of several projects the one whose file is here is meant.

    Raises:
        NoContainer: there is none, or more than one.
    """
    project, _, service = word.rpartition("/")
    matching = [
        each for each in containers if each.service == service and (not project or each.project == project)
    ]
    if not matching:
        services = sorted({f"{each.project}/{each.service}" for each in containers if each.service})
        raise NoContainer(
            f"there is no container of a compose service {word}; {_known('there are', services)}"
        )
    running = [each for each in matching if each.state in ("running", "paused")]
    if not running:
        states = ", ".join(f"{each.name} is {each.state or 'not running'}" for each in matching[:_SHOWN])
        raise NoContainer(f"no container of the compose service {word} runs: {states}. Start it first")
    projects = {each.project for each in running}
    if len(projects) > 1:
        here = [each for each in running if each.folder == folder]
        if {each.project for each in here} == set():
            choices = ", ".join(f"{each}/{service}" for each in sorted(projects))
            raise NoContainer(f"several projects have a service {service}: name one of {choices}")
        running = here
    if len(running) > 1:
        names = ", ".join(sorted(each.name for each in running))
        raise NoContainer(
            f"the compose service {word} has several containers: name one with --container: {names}"
        )
    return running[0].name


def _known(words: str, names: Sequence[str]) -> str:
    if not names:
        return "there is none"
    shown = ", ".join(names[:_SHOWN])
    return f"{words} {shown}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def no_such_container(name: str, containers: Sequence[ListedContainer]) -> NoContainer:
    """That there is none of this name, with those that run."""
    running = sorted(each.name for each in containers if each.state == "running")
    return NoContainer(f"there is no container {name}; {_known('these run:', running)}")


def container_facts(answer: Any) -> ContainerFacts:
    """Read ``GET /containers/{id}/json``. Raises ValueError: it is not what an engine says."""
    state = inspected(answer)
    host = answer.get("HostConfig") or {}
    networks = (answer.get("NetworkSettings") or {}).get("Networks") or {}
    gateways = [str(each.get("Gateway") or "") for each in networks.values() if isinstance(each, dict)]
    return ContainerFacts(
        state=state,
        name=str(answer.get("Name", "")).removeprefix("/") or state.container[:12],
        removed_at_end=host.get("AutoRemove") is True,
        network=str(host.get("NetworkMode") or ""),
        gateways=tuple(dict.fromkeys(filter(None, gateways))),
    )


def why_not_paused(facts: ContainerFacts) -> str:
    """Why this container cannot be paused now, and what to do; empty: it can."""
    name, state = facts.name, facts.state
    if state.paused:
        return f"container {name} is paused already: resume it first (docker unpause {name})"
    if not state.running or not state.pid:
        ended = f" with exit code {state.exit_code}" if state.status == "exited" else ""
        return f"container {name} is not running ({state.status or 'stopped'}{ended}): start it first (docker start {name})"
    return ""


def ways_to_metadata(facts: ContainerFacts, url: str, address: str, *, inside: bool = False) -> str:
    """How the program in the container reaches the metadata API, for people.

    Args:
        url: where it is served.
        address: the option ``--address``, empty if it was not given.
        inside: whether 169.254.169.254 answers inside.
    """
    if inside:
        return "and http://169.254.169.254 inside the container, for every client"
    if facts.network == "host":
        return f"the container shares this machine's network: its program finds it at {url}"
    if facts.network == "none" or not facts.gateways:
        return "the container has no network that leads to this machine: --netns puts it at 169.254.169.254 inside (root)"
    if address:
        return f"the container finds it at {url}, if no firewall of this machine is in between"
    gateway = facts.gateways[0]
    return (
        f"the container's own network does not reach 127.0.0.1: --netns puts it at 169.254.169.254 inside (root), --address gateway:8101 at "
        f"http://{gateway}:8101 for the containers of its network"
    )

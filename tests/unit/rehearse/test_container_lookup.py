"""Which container is meant, and what is said where none can be."""

from __future__ import annotations

from typing import Any

import pytest

from caesura_rehearse.targets.container import engine_socket
from caesura_rehearse.targets.container_lookup import (
    ContainerFacts,
    ListedContainer,
    NoContainer,
    container_facts,
    container_name,
    container_of_service,
    listed,
    no_such_container,
    ways_to_metadata,
    why_not_paused,
)

WEB = ListedContainer(name="shop-web-1", state="running", service="web", project="shop", folder="/src/shop")
OTHER = ListedContainer(name="blog-web-1", state="running", service="web", project="blog", folder="/src/blog")
SECOND = ListedContainer(
    name="shop-web-2", state="running", service="web", project="shop", folder="/src/shop"
)
ENDED = ListedContainer(name="shop-job-1", state="exited", service="job", project="shop", folder="/src/shop")


def answer(**changes: Any) -> dict[str, Any]:
    """As of ``GET /containers/{id}/json``."""
    state = {"Running": True, "Paused": False, "Pid": 77, "ExitCode": 0, "Status": "running"}
    return {
        "Id": "0a" * 32,
        "Name": "/web",
        "State": state | changes,
        "HostConfig": {"NetworkMode": "shop_default", "AutoRemove": False},
        "NetworkSettings": {"Networks": {"shop_default": {"Gateway": "172.18.0.1"}, "none": {"Gateway": ""}}},
    }


def test_the_list_of_an_engine() -> None:
    labels = {
        "com.docker.compose.service": "web",
        "com.docker.compose.project": "shop",
        "com.docker.compose.project.working_dir": "/src/shop",
    }
    said = [
        {"Id": "0b" * 32, "Names": ["/shop-web-1"], "State": "running", "Labels": labels},
        {"Id": "0c" * 32},
        7,
    ]
    assert listed(said)[0] == WEB
    assert listed(said)[1].name == "0c0c0c0c0c0c"
    assert listed({"message": "no"}) == ()


@pytest.mark.parametrize(
    ("word", "containers", "folder", "found"),
    [
        ("web", (WEB, ENDED), "/", "shop-web-1"),
        ("shop/web", (WEB, OTHER), "/", "shop-web-1"),
        ("web", (WEB, OTHER), "/src/blog", "blog-web-1"),
    ],
)
def test_one_container_of_a_service(
    word: str, containers: tuple[ListedContainer, ...], folder: str, found: str
) -> None:
    assert container_of_service(word, containers, folder) == found


@pytest.mark.parametrize(
    ("word", "containers", "says"),
    [
        ("api", (WEB, ENDED), "no container of a compose service api; there are shop/job, shop/web"),
        ("api", (), "no container of a compose service api; there is none"),
        ("blog/web", (WEB,), "no container of a compose service blog/web; there are shop/web"),
        ("job", (ENDED,), "no container of the compose service job runs: shop-job-1 is exited"),
        ("web", (WEB, OTHER), "several projects have a service web: name one of blog/web, shop/web"),
        ("web", (WEB, SECOND), "has several containers: name one with --container: shop-web-1, shop-web-2"),
    ],
)
def test_none_or_several_are_refused_by_name(
    word: str, containers: tuple[ListedContainer, ...], says: str
) -> None:
    with pytest.raises(NoContainer, match=says):
        container_of_service(word, containers, "/")


def test_names() -> None:
    assert container_name("shop-web-1") == "shop-web-1"
    for bad in ("", "../info", "a b", "a?x=1"):
        with pytest.raises(NoContainer, match="cannot be the name"):
            container_name(bad)
    assert "these run: shop-web-1" in str(no_such_container("api", (WEB, ENDED)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"Paused": True}, "is paused already: resume it first (docker unpause web)"),
        (
            {"Running": False, "Pid": 0, "Status": "exited", "ExitCode": 3},
            "(exited with exit code 3): start it first",
        ),
        ({"Running": False, "Pid": 0, "Status": "created"}, "is not running (created)"),
    ],
)
def test_what_cannot_be_paused(changes: dict[str, Any], says: str) -> None:
    why = why_not_paused(container_facts(answer(**changes)))
    assert says in why
    assert bool(says) == bool(why)


def facts(network: str, *gateways: str) -> ContainerFacts:
    return ContainerFacts(
        state=container_facts(answer()).state,
        name="web",
        removed_at_end=False,
        network=network,
        gateways=gateways,
    )


def test_how_its_program_reaches_the_metadata() -> None:
    assert container_facts(answer()).gateways == ("172.18.0.1",)
    url = "http://127.0.0.1:4711"
    assert f"finds it at {url}" in ways_to_metadata(facts("host"), url, "")
    assert "--address gateway:8101 at http://172.18.0.1:8101" in ways_to_metadata(
        facts("b", "172.18.0.1"), url, ""
    )
    assert "no network that leads to this machine" in ways_to_metadata(facts("none"), url, "")
    there = "http://172.18.0.1:8101"
    assert f"finds it at {there}" in ways_to_metadata(facts("b", "172.18.0.1"), there, "172.18.0.1:8101")
    assert "169.254.169.254 inside" in ways_to_metadata(facts("b"), url, "", inside=True)


def test_sockets() -> None:
    assert engine_socket("unix:///run/x.sock", "") == "/run/x.sock"
    assert engine_socket("/run/x.sock", "") == "/run/x.sock"
    with pytest.raises(NoContainer, match="give the path of a unix socket"):
        engine_socket("tcp://10.0.0.1:2375", "")

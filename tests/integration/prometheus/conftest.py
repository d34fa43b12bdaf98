"""A fleet of two domains on a real Mosquitto, every service as a process, and a real Prometheus that scrapes them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import tomli_w
import yaml

from caesura.bus.local_broker import free_port
from caesura.contract import messages as m
from caesura_ctl.session import Session, connect, new_request_id
from caesura_ctl.settings import CtlSettings
from caesura_testing.broker import mosquitto, mosquitto_installed
from caesura_testing.prometheus import Prometheus, prometheus, prometheus_installed
from caesura_testing.sandbox import Sandbox, Vm

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy" / "prometheus"


_HURRIED = {
    "CaesuraEventWithoutEnd": ("> 600", "> 3"),
    "CaesuraEventNotStarted": ("> 600", "> 3"),
    "CaesuraHostUpdaterOffline": ("> 60", "> 4"),  # inventories come every second
    "CaesuraCoordinatorOffline": ("> 60", "> 23"),  # it speaks every 20 s, as everywhere
    **dict.fromkeys(
        (
            "CaesuraPauseOverran",
            "CaesuraTwoDomainsPaused",
            "CaesuraPauseGuardActed",
            "CaesuraGuestMemoryChanged",
            "CaesuraMessagesRefused",
        ),
        ("[15m]", "[5s]"),
    ),
}
"""Alert to what keeps it from firing, or from resolving, within seconds, and what stands there instead."""


def hurried(rule: dict[str, Any]) -> None:
    """Let an alert fire and resolve within seconds: its ``for``, and the times in its expression."""
    if "for" in rule:
        rule["for"] = "2s"
    slow, fast = _HURRIED.get(rule["alert"], ("", ""))
    assert slow in rule["expr"], rule
    rule["expr"] = rule["expr"].replace(slow, fast).replace("< 900", "< 5")


def scrape_config(targets: dict[str, list[str]], folder: Path, *, hurry: bool = False) -> str:
    """The project's own configuration with these addresses by service, one scrape and evaluation a second."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        (group,) = job["static_configs"]
        group["targets"] = targets[group["labels"]["service"]]
    rules = folder / "rules"
    rules.mkdir()
    for path in (DEPLOY / "rules").glob("*.yml"):
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
        for group in groups["groups"]:
            group["interval"] = "1s"
            for rule in group["rules"] if hurry else ():
                if "alert" in rule:
                    hurried(rule)
        (rules / path.name).write_text(yaml.safe_dump(groups), encoding="utf-8")
    config["rule_files"] = [str(rules / "*.yml")]
    return yaml.safe_dump(config)


class Scene:
    """The fleet, an operator's session, and the Prometheus."""

    def __init__(self, sandbox: Sandbox, session: Session, prometheus: Prometheus, metadata: str) -> None:
        self.sandbox = sandbox
        self.session = session
        self.prometheus = prometheus
        self._metadata = metadata
        """Unix socket on which web-1 reaches its metadata."""

    async def roll(self, update: str) -> m.RolloutState:
        """Start a rollout, approve its first event as a workload does, and wait for the end."""
        request = m.RolloutRequested(
            request=new_request_id(),
            update=update,
            policy=m.Policy(notice_s=4.0, budget_s=10.0, verify_timeout_s=15.0),
            limits=m.Limits(again=True),
        )
        answer = await self.session.ask(request)
        assert answer.accepted, answer.reason
        await self._approve()
        rollouts = self.session.fleet_view.rollouts

        def ended() -> bool:
            state = rollouts.get(answer.rollout)
            return state is not None and state.status in {"completed", "halted", "aborted"}

        await self.sandbox.until(ended, 40, f"the end of rollout {answer.rollout}")
        return rollouts[answer.rollout]

    async def begin(self, update: str, **policy: float) -> str:
        """Start a rollout that nobody approves; its name."""
        request = m.RolloutRequested(
            request=new_request_id(),
            update=update,
            policy=m.Policy(**{"notice_s": 1.0, "verify_timeout_s": 15.0, **policy}),  # type: ignore[arg-type]
            limits=m.Limits(again=True),
        )
        answer = await self.session.ask(request)
        assert answer.accepted, answer.reason
        return answer.rollout

    async def give_up(self, rollout: str) -> None:
        """Abort a rollout, and wait until it is."""
        answer = await self.session.ask(m.AbortRequested(request=new_request_id(), rollout=rollout))
        assert answer.accepted, answer.reason
        rollouts = self.session.fleet_view.rollouts
        await self.sandbox.until(lambda: rollouts[rollout].status == "aborted", 20, "the rollout is aborted")

    async def _approve(self) -> None:
        documents = self.session.fleet_view.documents
        await self.sandbox.until(
            lambda: "web" in documents and bool(documents["web"].events), 10, "a scheduled event of web"
        )
        (event,) = documents["web"].events
        connector = aiohttp.UnixConnector(self._metadata)
        async with aiohttp.ClientSession("http://metadata", connector=connector) as client:
            answer = await client.post(
                "/metadata/scheduledevents?api-version=2020-07-01",
                headers={"Metadata": "true"},
                json={"StartRequests": [{"EventId": event.event_id}]},
            )
            assert answer.status == 200, await answer.text()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with _scene(tmp_path) as made:
        yield made


@pytest.fixture
async def hurried_scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """With alerts that fire and resolve within seconds, and hosts that speak every second."""
    async with _scene(tmp_path, hurry=True, inventory_interval_s="1") as made:
        yield made


@asynccontextmanager
async def _scene(tmp_path: Path, *, hurry: bool = False, **of_hosts: str) -> AsyncIterator[Scene]:
    if not mosquitto_installed():
        pytest.skip("mosquitto is not installed (on Debian: apt-get install mosquitto)")
    if not prometheus_installed():
        pytest.skip("prometheus is not installed (on Debian: apt-get install prometheus)")
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(mosquitto(tmp_path))
        sandbox = await stack.enter_async_context(Sandbox(broker))
        session = await stack.enter_async_context(connect(CtlSettings(broker_url=broker.url, client="test")))
        names = ("coordinator", "host-1", "host-2", "metadata", "exporter")
        listen = {name: f"127.0.0.1:{free_port()}" for name in names}
        sandbox.update("patch", ["sleep", "3"], expected_s=3.0)
        sandbox.update("brief", ["sleep", "2"], expected_s=2.0)
        sandbox.update("broken", ["false"])
        sandbox.coordinator(health_listen=listen["coordinator"])
        for number in (0, 1):
            vm = Vm(name=f"web-{number + 1}", set="web", update_domain=number)
            sandbox.host(f"host-{number + 1}", vm, health_listen=listen[f"host-{number + 1}"], **of_hosts)
        metadata = f"{sandbox.folder}/web-1.metadata"
        listeners = sandbox.folder / "listeners.toml"
        listeners.write_text(tomli_w.dumps({"listener": [{"vm": "web-1", "listen": f"unix:{metadata}"}]}))
        sandbox.service(
            "metadata",
            "caesura_metadata_publisher",
            {"LISTENERS_FILE": str(listeners), "HEALTH_LISTEN": listen["metadata"]},
        )
        sandbox.service(
            "exporter", "caesura_metrics_exporter", {"LISTEN": listen["exporter"], "HEALTH_LISTEN": ""}
        )
        folder = tmp_path / "prometheus"
        folder.mkdir()
        targets = {
            "coordinator": [listen["coordinator"]],
            "host-updater": [listen["host-1"], listen["host-2"]],
            "metadata-publisher": [listen["metadata"]],
            "metrics-exporter": [listen["exporter"]],
        }
        running = await stack.enter_async_context(
            prometheus(folder, scrape_config(targets, folder, hurry=hurry))
        )
        await sandbox.start(*names)
        made = Scene(sandbox, session, running, metadata)
        # Not before Prometheus has seen the fleet at rest: two hosts with a guard, two agents, no rollout.
        await running.until('sum(caesura_agents{state="online"}) == 2', 30)
        await running.until('count(caesura_host_guard_state{state="ready"} == 1) == 2', 30)
        await running.until('count(up{job=~"caesura-.+"} == 1) == 5', 30)
        yield made

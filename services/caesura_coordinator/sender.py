"""Commands on their way to hosts: repeated until the hosts' answers change the state, and never sent before that state is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from caesura.bus.messaging import MessageClient
from caesura.bus.port import BusError, PublishRefused
from caesura.contract.codec import ContractError
from caesura.contract.messages import AbortOperation, StartOperation
from caesura.contract.topics import TopicError
from caesura.runtime.commits import DurableCommits
from caesura.runtime.logs import get_logger
from caesura.runtime.sampler import Sampler
from caesura_coordinator.authority import Authority
from caesura_coordinator.commands import command_for, due_operations
from caesura_coordinator.repository import RolloutRepository

_REPEAT_S = 2.0
"""s: between two sendings of a command that its host has not answered."""
_ANSWER_S = 2.0
"""s: for the broker to acknowledge one."""

_log = get_logger("caesura.coordinator")


class CommandSender:
    """Sends the commands that the rollouts of a repository require.

    Args:
        repository: the repository of the rollouts.
        post: where commands are sent.
        commits: those of the repository's store.
        authority: the coordinator and epoch of the commands; None: there is no authority, so nothing is sent.
    """

    def __init__(
        self,
        repository: RolloutRepository,
        post: MessageClient,
        commits: DurableCommits,
        authority: Callable[[], Authority | None],
    ) -> None:
        self._repository = repository
        self._post = post
        self._commits = commits
        self._authority = authority
        self._last_sent: dict[tuple[str, str], float] = {}
        self._asked: dict[tuple[str, str], tuple[object, int]] = {}
        """Maps an operation and its command to the rollout's stage that first required it, and the number of commits at that time."""
        self._sampler = Sampler()
        self.held = False
        """Whether a command waits until the state that requires it is on disk."""

    async def send(self) -> bool:
        """Send what is due; false: that changed in the meantime, and this must be called again."""
        loop = asyncio.get_running_loop()
        open_keys = set()
        self.held = False
        if (authority := self._authority()) is None:
            return True
        for rollout in self._repository.active:
            for due in due_operations(rollout, authority):
                if self._repository.rollouts.get(rollout.id) is not rollout or self._authority() != authority:
                    # Sending takes time, and an answer or an abort arrived: what is due may have changed.
                    return False
                key = (due.operation.operation, due.what)
                open_keys.add(key)
                if not self._is_on_disk(key, rollout.stage):
                    self.held = True
                    continue
                if loop.time() - self._last_sent.get(key, -_REPEAT_S) < _REPEAT_S:
                    continue
                command = command_for(rollout, due, authority)
                if not await self.try_send(command):
                    return True  # no broker for the others either: they wait for the next round
                self._last_sent[key] = loop.time()
        self._last_sent = {key: at for key, at in self._last_sent.items() if key in open_keys}
        self._asked = {key: asked for key, asked in self._asked.items() if key in open_keys}
        return True

    def _is_on_disk(self, key: tuple[str, str], stage: object) -> bool:
        """Whether a state that requires this is on disk: the first one in the current stage."""
        known = self._asked.get(key)
        if known is None or known[0] != stage:
            known = self._asked[key] = stage, self._commits.committed
        return known[1] <= self._commits.on_disk

    async def try_send(self, command: StartOperation | AbortOperation) -> bool:
        """Whether the bus accepted it, or never will: in both cases the next one is tried."""
        try:
            await self._post.send(command, timeout_s=_ANSWER_S, host=command.host)
        except PublishRefused as error:
            if self._sampler.due(error.topic) is not None:
                _log.error("coordinator.refused", topic=error.topic, why=str(error))
        except BusError as error:
            _log.debug("coordinator.not_sent", type=command.TYPE, why=str(error))
            return False
        except (ContractError, TopicError) as error:
            _log.error("coordinator.unsendable", type=command.TYPE, why=str(error), host=command.host)
        return True

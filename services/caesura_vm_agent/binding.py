"""Which host the agent obeys: the one that its VM belongs to. Pure."""

from __future__ import annotations


class HostBinding:
    """The VM's host: as configured, else as the coordinator has it on record, else any host that sends messages.

    Args:
        configured: the host's name, empty where it may change.
    """

    def __init__(self, configured: str) -> None:
        self._configured = configured
        self._recorded: str | None = None
        self.ignored = 0
        """Messages of hosts that the VM does not belong to."""

    def record(self, host: str | None) -> None:
        """The coordinator reports whose the VM is: a host's, nobody's (empty), or that it has no record (None)."""
        self._recorded = host

    @property
    def host(self) -> str | None:
        """The host that the VM belongs to; empty: to no host; None: not known yet."""
        return self._configured or self._recorded

    def accepts(self, host: str) -> bool:
        """Whether this host's messages are accepted; a message that is not is counted."""
        mine = self.host
        if mine is None or host == mine:
            return True
        self.ignored += 1
        return False

"""What host and guest showed about the memory of paused VMs, in the exact wording. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from caesura.contract import messages as m
from caesura.lifecycle.proof import (
    BROKEN_WORDS,
    NONE,
    WORDS,
    broken_codes,
    held_codes,
    in_words,
    is_proof,
    ordered,
)
from caesura_ctl.fleet_view import Pause

Clocks = dict[tuple[str, str], m.VmClockSynced]


class Shown:
    """One pause: what its host and its guest showed."""

    def __init__(self, pause: Pause, clocks: Clocks) -> None:
        verdict = clocks.get((pause.operation, pause.vm))
        sides = (pause.memory, verdict.memory if verdict is not None else None)
        self.vm = pause.vm
        self.held = ordered(code for side in sides for code in held_codes(side))
        self.broken = ordered(code for side in sides for code in broken_codes(side))

    @property
    def proven(self) -> bool:
        """Whether memory was shown to be unchanged, with no finding to the contrary."""
        return is_proof(self.held) and not self.broken


def counted(pauses: Iterable[Shown], *, brief: bool = False) -> str:
    """``digest equal 3/3, not rebooted 2/3``; broken ones come first, in capitals; ``nothing shown`` if nothing was shown.

    Args:
        brief: without the count if it covers all of them.
    """
    found = list(pauses)
    broken = Counter(code for each in found for code in each.broken)
    held = Counter(code for each in found for code in _stated(each.held))

    def share(count: int) -> str:
        return "" if brief and count == len(found) else f" {count}/{len(found)}"

    parts = [f"{BROKEN_WORDS[code].upper()}{share(broken[code])}" for code in ordered(broken)]
    parts += [f"{WORDS[code]}{share(held[code])}" for code in ordered(held)]
    return ", ".join(parts) or NONE


def _stated(held: Sequence[m.ProofCode]) -> tuple[m.ProofCode, ...]:
    """Without the sampled pages if all pages were compared, which includes them."""
    return tuple(code for code in held if code != "sampled_digest_equal" or "digest_equal" not in held)


def planned(vms: Sequence[m.PlannedVm]) -> str:
    """What a plan promises for these VMs, a line for each kind; names the VMs if the kinds differ.

    VMs without a clock to correct are named, too: they lack the proof that a clock verdict includes.
    """
    kinds: dict[tuple[m.ProofCode, ...], list[str]] = {}
    for vm in vms:
        kinds.setdefault(_stated(ordered(vm.proofs)), []).append(vm.vm)
    lines = [f"{in_words(codes)}: {', '.join(names)}" for codes, names in kinds.items()]
    if len(kinds) == 1:
        lines = [in_words(next(iter(kinds)))]
    clockless = [vm.vm for vm in vms if vm.clock == "none"]
    if clockless:
        lines.append(f"no agent, so no clock to correct: {', '.join(clockless)}")
    return "\n".join(lines)

"""Which keys and values a new row need not compute, because another row has computed them or is about to. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.engine.sequence import Sequence
from server.engine.slots import Key, SlotPool, common

WORTH = 16  # tokens: fewer are computed faster than they are waited for or copied


@dataclass(frozen=True, slots=True)
class Share:
    """``count`` tokens of the row's prompt are in ``slot``. ``behind``: better wait for what this row computes next."""

    slot: int | None = None
    count: int = 0
    behind: Sequence | None = None


def key_of(seq: Sequence) -> Key:
    """Rows with other keys share nothing: tenants do not see one another's timing, deltas change what tokens become."""
    return seq.tenant, seq.digest


def share(seq: Sequence, running: Iterable[Sequence], pool: SlotPool) -> Share:
    """What a waiting row can have of rows that run, and of those that left their slots."""
    most = _most(seq)
    key, prompt = key_of(seq), seq.tokens(0, most)
    if most < WORTH or seq.source:
        return Share()
    slot, count = pool.best(key, prompt) or (None, 0)
    leader, promised = None, 0
    for other in running:
        if key_of(other) != key or other.slot is None:
            continue
        alike = common(other.tokens(0, min(most, other.length)), prompt)
        if min(alike, other.computed) > count:
            slot, count = other.slot, min(alike, other.computed)
        if alike > promised:
            leader, promised = other, alike
    left = seq.length - count
    # waiting pays if at least half of what is left to compute comes for nothing
    if leader is not None and leader.computed < promised and promised - count >= max(WORTH, left / 2):
        return Share(behind=leader)
    return Share(slot, count) if count >= WORTH else Share()


def waits(seq: Sequence) -> bool:
    """Is the row that this one waits for still on its way there? Cheap: asked for each waiting row at each step."""
    leader = seq.behind
    if leader is None or leader.slot is None:
        return False
    return leader.computed < min(len(leader.prompt), _most(seq))


def _most(seq: Sequence) -> int:
    """Tokens that the row may take from others: the last is computed anew, and all that logits are wanted of."""
    most = seq.length - 1
    if seq.sampling.prompt_logprobs is not None:
        most = min(most, seq.sampling.prompt_logprobs_from - 1)
    return max(0, most)

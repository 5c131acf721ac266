"""What rows share of each other's keys and values: checked against a model of the slots' memory."""

from __future__ import annotations

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.plan import Plan
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.sharing import WORTH
from server.engine.slots import common
from server.types import DeltaRef, SamplingParams
from tests.unit.engine.scheduling import make

_ids = count()
STEM = list(range(100, 160))


def row(
    prompt: list[int], max_tokens: int = 4, tenant: str = "a", digest: str = "", **sampling: int
) -> Sequence:
    delta = DeltaRef(digest, "file") if digest else None
    return Sequence(next(_ids), tenant, prompt, SamplingParams(max_tokens=max_tokens, **sampling), delta)


class Memory:
    """Runs plans on a model of the slots: every cell remembers the tenant, the delta and all tokens up to its own."""

    def __init__(self, scheduler: Scheduler, prefixes: dict[str, int] | None = None) -> None:
        self.scheduler = scheduler
        self.prefixes = prefixes or {}
        self.cells: dict[int, list[object]] = {}
        self.computed = 0

    def step(self) -> Plan:
        plan = self.scheduler.next(lambda seq: self.prefixes.get(seq.digest, 0))
        for seq in plan.admitted:
            assert seq.slot is not None
            if seq.copied_from is None:
                self.cells[seq.slot] = [(seq.digest, "prefix")] * seq.prefix
            elif seq.copied_from != seq.slot:
                self.cells[seq.slot] = self.cells[seq.copied_from][: seq.prefix + seq.computed]
        for slot in plan.emptied:
            self.cells.pop(slot)
        for planned in plan.rows:
            seq = planned.seq
            assert seq.slot is not None
            cells = self.cells[seq.slot]
            assert cells[: seq.prefix + planned.start] == self.true(seq, planned.start)
            del cells[seq.prefix + planned.start :]
            cells += self.true(seq, planned.start + planned.count)[seq.prefix + planned.start :]
            self.computed += planned.count
            seq.advance(planned.count, 7 if planned.samples else None)
            if not seq.remaining and (planned.samples or not seq.uncomputed):
                self.scheduler.finish(seq)
        self.scheduler.check_integrity()
        return plan

    def true(self, seq: Sequence, upto: int) -> list[object]:
        tokens = seq.tokens(0, upto)
        before: list[object] = [(seq.digest, "prefix")] * seq.prefix
        return before + [(seq.tenant, seq.digest, tuple(tokens[: i + 1])) for i in range(upto)]

    def run(self, *rows: Sequence) -> None:
        for seq in rows:
            self.scheduler.add(seq)
        for _ in range(1000):
            if not self.scheduler.rows_running and not self.scheduler.rows_waiting:
                return
            self.step()
        raise AssertionError("rows never end")


def test_a_conversation_goes_on_where_it_was() -> None:
    memory = Memory(make(prefill_tokens=64))
    first = row(STEM[:20])
    memory.run(first)
    computed = memory.computed
    second = row([*first.prompt, *first.output, 1, 2, 3])
    memory.run(second)
    assert second.cached == second.prompt.index(7) + len(first.output) - 1
    assert second.copied_from == 0  # in place: nothing is copied
    assert memory.computed - computed == len(second.prompt) - second.cached + len(second.output) - 1


def test_rows_with_one_prompt_compute_it_once() -> None:
    memory = Memory(make(prefill_tokens=16))
    memory.run(*(row(STEM[:50]) for _ in range(4)))
    assert memory.computed == 50 + 3 + 3 * (1 + 3)


def test_choices_behind_one_prompt_compute_it_once() -> None:
    memory = Memory(make(prefill_tokens=64))
    rows = [
        row([*STEM[:40], n, n + 1], max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=40)
        for n in range(6)
    ]
    memory.run(*rows)
    assert [seq.cached for seq in rows] == [0] + [
        39
    ] * 5  # the last of the prompt predicts the first of the choice
    assert memory.computed == 42 + 5 * 3
    assert memory.scheduler.cache.hit == 39 * 5


def test_nothing_is_shared_between_tenants_or_deltas_or_for_logprobs_of_the_whole_prompt() -> None:
    memory = Memory(make(prefill_tokens=64), {"d": 3})
    rows = [
        row(STEM[:40]),
        row(STEM[:40], tenant="b"),
        row(STEM[:40], digest="d"),
        row(STEM[:40], prompt_logprobs=0),
    ]
    memory.run(*rows)
    assert [seq.cached for seq in rows] == [0, 0, 0, 0]


def test_what_an_unsound_row_computed_is_not_used() -> None:
    scheduler = make(prefill_tokens=64)
    seq = row(STEM[:40])
    scheduler.add(seq)
    scheduler.next(lambda _: 0)
    seq.advance(40, 7)
    scheduler.finish(seq, sound=False)
    memory = Memory(scheduler)
    again = row(STEM[:40])
    memory.run(again)
    assert again.cached == 0


def test_a_row_whose_leader_is_cancelled_goes_on_alone() -> None:
    memory = Memory(make(prefill_tokens=8))
    leader, follower = row(STEM), row(STEM)
    memory.scheduler.add(leader)
    memory.scheduler.add(follower)
    memory.step()
    assert follower.behind is leader
    memory.scheduler.cancel(leader.id)
    memory.run()
    assert not follower.remaining
    assert follower.cached == 0  # eight tokens are not worth it


def test_what_is_kept_stays_within_the_memory_for_keys_and_values() -> None:
    memory = Memory(make(kv_tokens=130))
    for n in range(4):
        memory.run(row([n, *STEM[:50]], max_tokens=2))
        kept = sum(len(cells) for cells in memory.cells.values())
        assert kept <= 130
    last = row([3, *STEM[:50], 9])
    memory.run(last)
    assert last.cached == 51


@given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_common_counts_the_tokens_alike(a: list[int], b: list[int]) -> None:
    alike = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common(a, b) == alike


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_row_ever_reads_what_is_not_its_own(data: st.DataObject) -> None:
    memory = Memory(
        make(
            max_rows=data.draw(st.integers(1, 4)),
            prefill_tokens=data.draw(st.sampled_from([4, 16, 64])),
            kv_tokens=data.draw(st.sampled_from([64, 130, 256])),
        ),
        {"p": 3},
    )
    alive: list[Sequence] = []
    cancelled: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["add", "add", "step", "step", "cancel"])):
            case "add":
                prompt = STEM[: data.draw(st.integers(1, 45))] + data.draw(
                    st.lists(st.integers(0, 1), max_size=8)
                )
                seq = row(
                    prompt,
                    data.draw(st.integers(0, 40)),
                    data.draw(st.sampled_from("ab")),
                    data.draw(st.sampled_from(["", "p"])),
                )
                memory.scheduler.add(seq)
                alive.append(seq)
            case "step":
                memory.step()
            case "cancel" if alive:
                seq = data.draw(st.sampled_from(alive))
                cancelled.add(seq.id)
                memory.scheduler.cancel(seq.id)
    memory.run()
    assert all(seq.cached == 0 or seq.cached >= WORTH for seq in alive)
    assert all(seq.remaining == 0 or seq.id in cancelled for seq in alive)

"""Pages: the books against a model that copies everything, the memory against slots, rows against rows in slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltas.backbones import describe
from server.engine.kv import KV, SlotKV
from server.engine.paged import PAGE, PagedKV
from server.engine.pages import OutOfPages, Pages
from tests import deltas_of_every_kind as every
from tests.oracle.rows import Row, generate, make_runner, place, same
from tests.unit.backbones import tiny

SIZE, SLOTS, CAPACITY = 4, 4, 40
SPEC = describe(tiny.CONFIGS["qwen3"](), "test")

Operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SLOTS - 1), st.integers(0, CAPACITY), st.integers(1, 9)),
        st.tuples(
            st.just("copy"), st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1), st.integers(1, CAPACITY)
        ),
        st.tuples(st.just("empty"), st.integers(0, SLOTS - 1), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(Operations)
def test_books_against_a_model(operations: list[tuple[str, int, int, int]]) -> None:
    """What a slot reads is what was written to it, whoever shares pages with it; the books add up; nothing leaks."""
    count = SLOTS * CAPACITY // SIZE
    pages = Pages(count, SIZE, SLOTS)
    memory = [[-1] * SIZE for _ in range(count)]
    model: list[list[int]] = [[] for _ in range(SLOTS)]
    for stamp, (what, slot, b, c) in enumerate(operations):
        if what == "write":
            start, end = min(b, len(model[slot])), min(CAPACITY, min(b, len(model[slot])) + c)
            pages.cut(slot, end)
            for old, new in pages.own(slot, start, end):
                memory[new] = list(memory[old])
            model[slot] = model[slot][:start] + [stamp] * (end - start)
            for i in range(start, end):
                memory[pages.of[slot][i // SIZE]][i % SIZE] = stamp
        elif what == "copy" and b != slot:
            length = min(c, len(model[slot]))
            pages.cut(b, 0)
            rest = pages.share(slot, b, length)
            if rest is not None:
                memory[rest[1]] = list(memory[rest[0]])
            model[b] = model[slot][:length]
        elif what == "empty":
            pages.cut(slot, 0)
            model[slot] = []
        assert [*pages.problems()] == []
        for held, tokens in zip(pages.of, model, strict=True):
            assert len(held) == -(-len(tokens) // SIZE)
            assert [memory[held[i // SIZE]][i % SIZE] for i in range(len(tokens))] == tokens
    for slot in range(SLOTS):
        pages.cut(slot, 0)
    assert pages.free == count


def test_full_pages_are_shared_and_a_shared_page_is_never_written() -> None:
    pages = Pages(8, SIZE, 3)
    pages.own(0, 0, 10)
    assert pages.share(0, 1, 9) == (pages.of[0][2], pages.of[1][2])
    assert pages.of[1][:2] == pages.of[0][:2]
    assert pages.free == 8 - 4
    assert pages.own(1, 6, 7) == [(pages.of[0][1], pages.of[1][1])]
    assert pages.of[1][1] != pages.of[0][1]


def test_more_than_there_is() -> None:
    pages = Pages(2, SIZE, 2)
    pages.own(0, 0, 8)
    with pytest.raises(OutOfPages, match="all 2 pages"):
        pages.own(1, 0, 1)
    with pytest.raises(ValueError, match="slot 0 holds pages"):
        pages.share(1, 0, 0)


@settings(max_examples=40, deadline=None)
@given(Operations)
def test_the_memory_against_slots(operations: list[tuple[str, int, int, int]]) -> None:
    """The same calls leave the same keys and values in slots and in pages."""
    capacity = 3 * PAGE
    where = torch.device("cpu")
    slots = SlotKV(SPEC, SLOTS, capacity, torch.float32, where)
    paged = PagedKV(SPEC, SLOTS, capacity, SLOTS * capacity, torch.float32, where)
    both: list[KV] = [slots, paged]
    held = [0] * SLOTS
    generator = torch.Generator().manual_seed(len(operations))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for what, slot, b, c in operations:
        if what == "write":
            start, count = min(7 * b, held[slot], capacity - 1), 5 * c
            count = min(count, capacity - start)
            before = 5 if start == 0 and count > 5 else 0  # tokens that a prefix has put there
            prefix = random(SPEC.layers, 2, SPEC.kv_heads, before, SPEC.head_dim)
            k, v = (random(count - before, SPEC.kv_heads, SPEC.head_dim) for _ in range(2))
            positions = torch.arange(start + before, start + count)
            for kv in both:
                if before:
                    kv.put_prefix(slot, prefix)
                kv.note(slot, start, start + count)
                kv.commit()
                kv.write(1, k, v, torch.full_like(positions, slot), positions, None)
            held[slot] = start + count
        elif what == "copy" and b != slot and held[slot]:
            held[b] = min(6 * c, held[slot])
            for kv in both:
                kv.empty(b)
                kv.copy(slot, b, held[b])
                kv.commit()
        elif what == "empty":
            held[slot] = 0
            for kv in both:
                kv.empty(slot)
        for one, length in enumerate(held):
            if length:
                mine, theirs = (kv.read_prefix(one, length)[1] for kv in both)
                assert torch.equal(mine, theirs)
                row = paged.row(1, one, length // 3, length)
                assert torch.equal(torch.stack(row), theirs[:, :, length // 3 :])


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2"])
def test_rows_in_pages_are_rows_in_slots(name: str, tmp_path: Path) -> None:
    """Mixed kinds, prefixes and prompts among them, in chunks and token by token: the same logits, to rounding."""
    folder = tiny.save(name, tmp_path)
    found = []
    for paged in (False, True):
        runner = make_runner(folder, torch.float32, capacity=tiny.POSITIONS, paged=paged)
        deltas = {kind: place(runner, every.make(runner.backbone.spec, kind, 5)) for kind in KINDS}
        rows = [Row(list(range(3, 3 + length)), deltas.get(kind), kind) for kind, length in ROWS]
        generate(runner, rows, 4, chunk=23)
        found.append(rows)
    for mine, wanted in zip(*found, strict=True):
        assert mine.tokens == wanted.tokens, mine.name
        assert all(same(a, b) < 1e-5 for a, b in zip(mine.logits, wanted.logits, strict=True)), mine.name


KINDS = ("lora", "prefix", "prompt", "bottleneck")
ROWS = [("", 40), ("lora", 3), ("prefix", 37), ("prompt", 1), ("bottleneck", 20)]

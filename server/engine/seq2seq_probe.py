"""The probe of an encoder-decoder's deltas: what ``probe.py`` means, with the probe's tokens as source and as answer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Plan, Segment
from server.engine.probe import AnyProbe, Given, Idle, Watch
from server.engine.seq2seq import Seq2SeqRunner


class Seq2SeqProbe(AnyProbe[Seq2SeqRunner]):
    """Compares the decoder's logits; both plans are watched. Its passes use the scratch slot."""

    @property
    def _capacity(self) -> int:
        return min(self.runner.capacity, self.runner.source_capacity)

    def _virtual(self, delta: PackedDelta) -> int:
        return max(self.runner.before(delta), self.runner.in_source(delta))

    def _watch(self, delta: PackedDelta, given: Given, *, closely: bool) -> Watch:
        del delta, given
        return Watch(Idle(), closely)

    def _forward(self, given: Given, delta: PackedDelta | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
        def see(plan: Plan | None) -> Plan | None:
            return plan if watch is None else replace(watch, plan=plan or Idle())

        runner, ids = self.runner, given.ids.tolist()
        held = runner.hold(runner.scratch_slot, ids, delta)
        encoded = runner.encode([held], see)
        runner.hooks.decoder_plan = see(runner.ops.plan([Segment(0, len(ids), delta)], len(ids)))
        logits = runner.backbone.logits(runner.decode(ids, [held], [0], [len(ids)]))
        runner.hooks.decoder_plan = None
        return encoded, logits

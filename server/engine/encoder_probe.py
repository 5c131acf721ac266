"""The probe of an encoder's deltas: what ``probe.py`` means, by the passes that encoder rows take."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from deltas.bank import PackedDelta
from deltas.batch import Plan
from server.engine.encoder import EncoderRow, EncoderRunner
from server.engine.probe import AnyProbe, Given, Idle, Watch


class EncoderProbe(AnyProbe[EncoderRunner]):
    """Compares the language-model head's logits, where the backbone has that head, else the last hidden states.

    A third of the tokens are of the second type, so that a change of that type's embedding shows.
    """

    @property
    def _capacity(self) -> int:
        return self.runner.backbone.spec.max_positions

    def _virtual(self, delta: PackedDelta) -> int:
        return EncoderRow([], delta).shift

    def _watch(self, delta: PackedDelta, given: Given, *, closely: bool) -> Watch:
        del delta, given
        return Watch(Idle(), closely)

    def _forward(self, given: Given, delta: PackedDelta | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
        def see(plan: Plan | None) -> Plan | None:
            return plan if watch is None else replace(watch, plan=plan or Idle())

        ids = given.ids.tolist()
        table = self.runner.backbone.spec.sites.get("embed.types")
        typed = table is not None and table.in_features > 1
        types = [int(n % 3 == 2 and typed) for n in range(len(ids))]
        row = EncoderRow(ids, delta, types, given.positions.tolist())
        hidden = self.runner.run([row], see)[0]
        own = hidden[-len(ids) :]
        logits = self.runner.logits(own, delta, see)
        return hidden, own if logits is None else logits

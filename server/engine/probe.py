"""The probe: a new delta's first forward pass, beside the same pass without it, before anybody may name the delta.

A few fixed pseudo-random tokens in the scratch slot, logits at every position. It finds what no check of files can:
numbers that are finite in the file and not in the output, and deltas that would silently do nothing. It runs between
two steps and touches no row's memory, so rows that are running do not see it.

What "changes nothing" means, where a small change may be lost in rounding:

1. Every step leaves the output as it is by its own numbers (``deltas/inert.py``): *nothing*. Passes cannot tell, since
   a step that computes a module anew moves last bits even where it changes nothing.
2. Some logit differs, in however small a bit: *changes*. Both passes have the same shapes and take the same kernels,
   so without a delta the bits would be the same.
3. No logit differs, but the output of some site does, right behind the delta's steps: *rounding*. The delta acts, and
   is so small that this probe's logits round it away; with other tokens they may not.
4. No site's output differs either: *nothing*. Its steps ran and left every bit of every token as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog
import torch
from torch import Tensor, nn

from deltas import heads
from deltas.bank import Applied, PackedDelta, Placed
from deltas.batch import Hooked, Plan, Segment
from deltas.groups import SiteGroup, places
from deltas.hooks import Hooks, bias_of, weight_of
from deltas.inert import inert
from deltas.ops import Ops
from deltas.patches import EmbeddingLowRank, EmbeddingRows, Override
from deltas.sites import SiteKind
from server.engine.backbone import Backbone
from server.engine.kv import Attention
from server.engine.runner import Runner
from server.types import ProbeResult

log = structlog.get_logger(__name__)

TOKENS = 16
CHOSEN = 8  # of them, at most, for their being tokens that the delta trained
SEED = 1803
_NAMED = 4  # sites in a message


@dataclass(eq=False)
class Watch:
    """A plan that notes which groups asked for it and, if ``closely``, what its steps did there."""

    plan: Plan
    closely: bool
    asked: set[int] = field(default_factory=set)
    changed: set[int] = field(default_factory=set)
    broken: list[int] = field(default_factory=list)  # whose outputs are not finite, in forward order

    def active(self, group: int) -> bool:
        self.asked.add(group)
        return self.plan.active(group)

    def feed(self, group: int, x: Tensor, columns: int, /) -> Tensor:
        """Watched closely, all that a delta does is to be seen in :meth:`apply`."""
        return x if self.closely else self.plan.feed(group, x, columns)

    def apply(self, group: int, x: Tensor, y: Tensor, hooked: Hooked) -> None:
        if not self.closely:
            self.plan.apply(group, x, y, hooked)
            return
        before = y.clone()
        self.plan.apply(group, x, y, hooked)
        if not torch.equal(before, y):
            self.changed.add(group)
        if not bool(torch.isfinite(y).all()):
            self.broken.append(group)


@dataclass(frozen=True)
class Given:
    """Token ids and positions, both ``[n]`` and on the device; ``usual`` where no delta asked for its own."""

    ids: Tensor
    positions: Tensor
    usual: bool


class Runs(Protocol):
    """What a probe needs of a runner beside its passes."""

    backbone: Backbone
    ops: Ops
    hooks: Hooks
    groups: list[SiteGroup]


RunnerT = TypeVar("RunnerT", bound=Runs)


@dataclass(eq=False)
class AnyProbe(ABC, Generic[RunnerT]):
    """Tries deltas on the runner's backbone. The step loop owns it, as it owns the runner."""

    runner: RunnerT
    _modules: dict[str, nn.Module] = field(init=False)
    _names: dict[tuple[int, int, int], str] = field(init=False)  # group, first column, columns -> site
    _kept: dict[int, Tensor] = field(default_factory=dict)  # the backbone's logits for so many usual tokens

    def __post_init__(self) -> None:
        self._modules = dict(self.runner.backbone.model.named_modules())
        found = places(self.runner.backbone.spec)
        self._names = {(p.group.index, p.out0, p.site.out_features): name for name, p in found.items()}

    @torch.inference_mode()
    def run(self, delta: PackedDelta) -> ProbeResult:
        """What the delta, which is on the device, does to the backbone's output. Never raises for a delta's sake."""
        try:
            return self._judge(delta)
        except Exception as error:
            # a step with this delta in it would end the engine and every row that runs: refuse it here instead
            log.exception("probe failed")
            return ProbeResult("failed", f"the forward pass fails with it: {type(error).__name__}: {error}")
        finally:
            self.runner.hooks.plan = self.runner.hooks.decoder_plan = None

    def _judge(self, delta: PackedDelta) -> ProbeResult:
        length, capacity = self._virtual(delta), self._capacity
        if length >= capacity:
            return ProbeResult("failed", f"{length} virtual tokens leave no room in rows of {capacity}")
        given = self._input(delta, min(TOKENS, capacity - length))
        own = self._without(given)  # [n, vocab]
        sound = torch.isfinite(own).all(dim=1)  # where the backbone alone fails, nothing is the delta's fault
        if not bool(sound.any()):
            return ProbeResult("failed", "the backbone alone computes nothing finite for the probe")
        watch = self._watch(delta, given, closely=False)
        hidden, logits = self._forward(given, delta, watch)
        if not bool(torch.isfinite(logits[sound]).all()):
            return ProbeResult("not_finite", self._where_broken(delta, given))
        everywhere = self._named(delta, sorted(delta.patches)) or "its prefix"
        if missed := sorted(set(delta.patches) - watch.asked):
            return ProbeResult("failed", f"the forward pass never comes to {self._named(delta, missed)}")
        if delta.head is not None:
            scores = heads.apply(delta.head, hidden)
            if not bool(torch.isfinite(scores).all()):
                return ProbeResult(
                    "not_finite", f"computing in {self._dtype}, its head gives NaN or infinity"
                )
            if bool(scores.any()):
                return ProbeResult("changes")  # an output of its own, which the backbone does not have
        if not _attended(delta) and all(self._inert(group, step) for group, step in _steps(delta)):
            return ProbeResult("nothing", f"its changes come to nothing, at {everywhere}")
        if not torch.equal(logits[sound], own[sound]):
            return ProbeResult("changes")
        watch = self._watch(delta, given, closely=True)
        self._forward(given, delta, watch)
        if watch.changed:
            return ProbeResult("rounding", f"no logit of the probe changes: {self._dtype} rounds it away")
        return ProbeResult("nothing", f"no bit of any output changes in {self._dtype}, at {everywhere}")

    # -- passes ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _capacity(self) -> int:
        """Tokens that a row may have, virtual ones included."""

    @abstractmethod
    def _virtual(self, delta: PackedDelta) -> int:
        """Of those, how many are the delta's."""

    @abstractmethod
    def _watch(self, delta: PackedDelta, given: Given, *, closely: bool) -> Watch:
        """The delta's plan for these tokens, watched."""

    @abstractmethod
    def _forward(self, given: Given, delta: PackedDelta | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
        """Last hidden states ``[tokens, hidden]`` and logits ``[n, vocab]``, by the path of a row alone in its step."""

    def _without(self, given: Given) -> Tensor:
        count = len(given.ids)
        if not given.usual:
            return self._forward(given, None, None)[1]
        if count not in self._kept:
            self._kept = {count: self._forward(given, None, None)[1]}
        return self._kept[count]

    # -- tokens ------------------------------------------------------------------------------------------------

    def _input(self, delta: PackedDelta, count: int) -> Given:
        """``count`` tokens: the usual ones, but for those that a table of embeddings was changed for."""
        device, spec = self.runner.backbone.device, self.runner.backbone.spec
        ids = torch.randint(spec.vocab, (count,), generator=torch.Generator().manual_seed(SEED))
        positions = torch.arange(count)
        usual = True
        for index in delta.patches:
            group = self.runner.groups[index]
            if group.kind is not SiteKind.EMBEDDING:
                continue
            trained = self._trained(group, delta.patches[index])
            if group.sites[0].name == "embed.positions":
                # a table may begin with rows that are no token's
                first = group.sites[0].in_features - spec.max_positions + delta.shift
                trained = trained[trained >= first] - first
            chosen = _spread(trained, min(CHOSEN, count))
            if len(chosen) == 0:
                continue
            usual = False
            if group.sites[0].name == "embed.positions":
                positions[-len(chosen) :] = chosen
            else:
                ids[: len(chosen)] = chosen
        return Given(ids.to(device), positions.to(device), usual)

    def _trained(self, group: SiteGroup, steps: tuple[Applied, ...]) -> Tensor:
        """The rows of a table that these steps change, int64 ``[n]``, sorted; none where they change all alike."""
        own = weight_of(self._modules[group.sites[0].path])
        rows: list[Tensor] = []
        for step in steps:
            match step.patch if isinstance(step, Placed) else None:
                case EmbeddingRows(indices=indices, rows=values):
                    rows.append(indices[(values != own[indices]).any(dim=1)])
                case EmbeddingLowRank(table=table):
                    rows.append(table.any(dim=1).nonzero()[:, 0])
                case Override(weight=weight):
                    rows.append((weight != own).any(dim=1).nonzero()[:, 0])
        return torch.unique(torch.cat(rows)).cpu() if rows else torch.empty(0, dtype=torch.int64)

    # -- findings ----------------------------------------------------------------------------------------------

    def _inert(self, index: int, step: Applied) -> bool:
        group = self.runner.groups[index]

        def own() -> tuple[Tensor, Tensor | None]:
            j = max(j for j, offset in enumerate(group.offsets) if offset <= step.out0)
            module = self._modules[group.sites[j].path]
            if group.kind is not SiteKind.LINEAR:
                bias = getattr(module, "bias", None)
                return weight_of(module), None if bias is None else bias.detach()
            start = step.out0 - group.offsets[j]
            bias, columns = bias_of(module), slice(start, start + step.out)
            return weight_of(module)[columns], None if bias is None else bias[columns]

        return inert(step, own)

    def _where_broken(self, delta: PackedDelta, given: Given) -> str:
        watch = self._watch(delta, given, closely=True)
        self._forward(given, delta, watch)
        first = self._named(delta, watch.broken[:1]) or "layers that follow its changes"
        return f"computing in {self._dtype}, outputs become NaN or infinite, first at {first}"

    @property
    def _dtype(self) -> str:
        return str(self.runner.backbone.dtype)[6:]

    def _named(self, delta: PackedDelta, groups: list[int]) -> str:
        """The sites where the delta has steps in these groups, for a message."""
        steps = [(index, step.out0, step.out) for index in groups for step in delta.patches[index]]
        names = list(dict.fromkeys(self._names[step] for step in steps))
        more = len(names) - _NAMED
        return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


class Probe(AnyProbe[Runner]):
    """The decoders' probe: its passes use the scratch slot."""

    @property
    def _capacity(self) -> int:
        return self.runner.kv.capacity

    def _virtual(self, delta: PackedDelta) -> int:
        return delta.prefix_length

    def _watch(self, delta: PackedDelta, given: Given, *, closely: bool) -> Watch:
        count = len(given.ids)
        return Watch(self.runner.ops.plan([Segment(0, count, delta)], count) or Idle(), closely)

    def _forward(self, given: Given, delta: PackedDelta | None, watch: Watch | None) -> tuple[Tensor, Tensor]:
        runner = self.runner
        prefix, shift = (0, 0) if delta is None else (delta.prefix_length, delta.shift)
        if delta is not None and delta.prefix is not None:
            runner.kv.put_prefix(runner.scratch_slot, delta.prefix)
        attention = Attention(runner.kv, runner.ops.rows, [runner.scratch_slot], [prefix], [len(given.ids)])
        runner.hooks.plan = watch
        hidden = runner.forward(attention, given.positions[None] + shift, input_ids=given.ids[None])[0]
        logits = runner.backbone.logits(hidden)
        runner.hooks.plan = None
        return hidden, logits


class Idle:
    """The plan of a delta that has no steps: it acts by its prefix alone."""

    def active(self, _group: int) -> bool:
        return False

    def feed(self, _group: int, x: Tensor, _columns: int, /) -> Tensor:
        return x

    def apply(self, _group: int, _x: Tensor, _y: Tensor, _hooked: Hooked) -> None:
        """Does nothing."""


def _attended(delta: PackedDelta) -> bool:
    """Does the delta put something before a row, beside its steps?"""
    return delta.prefix is not None or delta.prompt is not None or bool(delta.prefixes)


def _steps(delta: PackedDelta) -> list[tuple[int, Applied]]:
    return [(group, step) for group, steps in delta.patches.items() for step in steps]


def _spread(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, from all over."""
    if len(rows) <= most:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, most).long()]

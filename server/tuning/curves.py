"""A job's metrics, step by step: kept in its folder while it runs, a CSV among its result files when it ends."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from server.tuning.messages import Evaluated, Stepped

_FIRST = ("step", "epoch", "train_loss", "learning_rate", "grad_norm", "tokens", "seconds", "valid_loss")


class Curves:
    """Rows by step. Each message is a line of ``metrics.jsonl``; a step that is taken again replaces what was known of it.

    Reading and writing block, a line at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._rows: dict[int, dict[str, float]] = {}
        if self._path.exists():
            for line in self._path.read_bytes().split(b"\n")[
                :-1
            ]:  # what follows the last newline was cut short
                self._merge(json.loads(line))

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``: the job goes on from there."""
        self._rows = {number: row for number, row in self._rows.items() if number <= step}
        lines = [json.dumps(row) + "\n" for _, row in sorted(self._rows.items())]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(lines))
        temporary.replace(self._path)

    def stepped(self, message: Stepped) -> None:
        """A step was taken."""
        self._add(
            {
                "step": message.step,
                "epoch": message.epoch,
                "train_loss": message.loss,
                "learning_rate": message.learning_rate,
                "grad_norm": message.grad_norm,
                "tokens": message.tokens,
                "seconds": message.seconds,
            }
        )

    def evaluated(self, message: Evaluated) -> None:
        """The validation set was looked at."""
        self._add({"step": message.step, **valid(message.metrics)})

    def at(self, step: int) -> dict[str, float]:
        """What is known of a step: a checkpoint's metrics."""
        return dict(self._rows.get(step, {}))

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return int(sum(row.get("tokens", 0) for row in self._rows.values()))

    def text(self) -> str:
        """The CSV: a line a step, empty where nothing was measured."""
        more = sorted({name for row in self._rows.values() for name in row} - set(_FIRST))
        out = io.StringIO()
        writer = csv.DictWriter(out, [*_FIRST, *more], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(self._rows.items()))
        return out.getvalue()

    def _add(self, row: dict[str, float]) -> None:
        self._merge(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _merge(self, row: dict[str, float]) -> None:
        self._rows.setdefault(int(row["step"]), {}).update(row)


def valid(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of the validation set by the names that events, checkpoints and the CSV give them."""
    return {f"valid_{name}": value for name, value in metrics.items()}

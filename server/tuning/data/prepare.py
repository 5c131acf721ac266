"""A job's files, checked row by row and encoded: what is wrong with any row is known before a job is queued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.engine.spans import OUTSIDE
from server.engine.templates import Template
from server.errors import InvalidRequest
from server.store.durable import make_folder
from server.store.reference import shown
from server.tuning.data.encode import Encoder, Kind
from server.tuning.data.encoded_file import EncodedFile, encode_file
from server.tuning.data.forms import LONGEST_LABEL, Forms, Pair, Tagged
from server.tuning.data.problems import TRAINING, VALIDATION, DataWarning, Problems, RowError
from server.tuning.data.rows import rows
from server.tuning.data.tagging import names_of
from server.tuning.data.tokenizer import Tokenizer
from server.tuning.spec import Task

MOST_LABELS = 1024
SHORTEST = 8  # tokens that 'max_length' must allow
TRAIN_FILE, VALID_FILE, REPORT_FILE = "train.msgpack", "valid.msgpack", "problems.jsonl"


@dataclass(frozen=True)
class Prepared:
    """A job's data, in its folder: ``train.msgpack``, and ``valid.msgpack`` where there is a validation file, each a list
    of :class:`server.tuning.spec.Example`. ``labels`` are in the order of a head's outputs; None where there are none.
    """

    labels: list[str] | None
    training: EncodedFile
    validation: EncodedFile | None
    warnings: list[DataWarning]


def prepare(
    train: Path,
    valid: Path | None,
    *,
    kind: Kind,
    task: Task,
    template: Template | None,
    labels: list[str] | None,
    max_length: int,
    tokenizer: Tokenizer,
    folder: Path,
    positions: int,
) -> Prepared:
    """Check and encode a job's files into ``folder``. Blocks; holds one row at a time, and 24 bytes for each.

    Examples are cut to ``max_length`` tokens, or to the backbone's ``positions`` where they are fewer. Where ``labels``
    are None, they are those of the training file, sorted.

    Raises DatasetInvalid with the bad rows of both files (its ``report``, ``folder/problems.jsonl``, has all of them), and
    InvalidRequest or UnsupportedTask for a template, labels or a task that do not fit each other or the backbone.
    """
    limit = min(max_length, positions)
    if limit < SHORTEST:
        raise InvalidRequest(f"Invalid 'max_length': it must be at least {SHORTEST}.", param="max_length")
    _check_labels(task, labels)
    # What does not fit at all is said before files are read.
    encoder = Encoder(kind, task, template, labels, tokenizer, limit)
    make_folder(folder)
    report, encoded = folder / REPORT_FILE, [folder / TRAIN_FILE, folder / VALID_FILE]
    with report.open("wb") as file:
        problems = Problems(file)
        inferred = labels is None and task in ("classify", "tag")
        if inferred:
            labels = _labels_of(train, task, template, problems)
            encoder = Encoder(kind, task, template, labels, tokenizer, limit, inferred=True)
        known = labels or []
        training, seen = encode_file(
            train, encoded[0], TRAINING, Forms(task, template), encoder, known, problems
        )
        seen.repeated(problems, one_target=task in ("classify", "tag"))
        validation = None
        if valid is not None:
            validation, held_out = encode_file(
                valid, encoded[1], VALIDATION, Forms(task, template), encoder, known, problems
            )
            held_out.overlapping(seen, problems)
        for label, count in zip(known, training.counts, strict=True):
            if not count and not inferred and task != "generate":
                problems.warn(TRAINING, "unused_label", f"no row has the label {shown(label)}", 1, [])
    if problems.any:
        for path in encoded:
            path.unlink(missing_ok=True)
        raise problems.error(report)
    report.unlink()
    return Prepared(labels, training, validation, problems.warnings())


def _check_labels(task: Task, labels: list[str] | None) -> None:
    if labels is None:
        return
    why = None
    if task == "regress":
        why = "a task of kind 'regress' has none"
    elif len(set(labels)) < len(labels):
        why = "a label is there twice"
    elif not all(0 < len(label) <= LONGEST_LABEL for label in labels):
        why = f"a label has 1 to {LONGEST_LABEL} characters"
    elif not 2 <= len(labels) <= MOST_LABELS:
        why = f"there must be 2 to {MOST_LABELS}"
    elif task == "tag" and OUTSIDE not in labels:
        why = f"a task of kind 'tag' needs '{OUTSIDE}' among them, for words in no span"
    if why is not None:
        raise InvalidRequest(f"Invalid 'labels': {why}.", param="labels")


def _labels_of(train: Path, task: Task, template: Template | None, problems: Problems) -> list[str]:
    """The labels of the rows that can be read; what is wrong with the others is said when they are encoded."""
    found: set[str] = set()
    forms = Forms(task, template)
    for row in rows(train):
        try:
            item, _ = forms.read(row)
        except RowError:
            continue
        if isinstance(item, Tagged):
            found.update(names_of(item))
        elif isinstance(item, Pair):
            found.add(str(item.target))
        if len(found) > MOST_LABELS:
            message = f"there are more than {MOST_LABELS} different labels: is this a task of kind '{task}'?"
            problems.bad(TRAINING, row.line, RowError("too_many_labels", message, "label"))
            break
    else:
        if len(found) == 1:
            message = f"there is only the label {shown(*found)}: nothing can be learnt"
            problems.bad(TRAINING, None, RowError("one_label", message, "label"))
    return sorted(found)

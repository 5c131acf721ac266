"""Rows that are there twice: within a file, or in both. Sixteen bytes a row, and its line's eight."""

from __future__ import annotations

from array import array
from hashlib import blake2b

import msgspec
import numpy as np
from numpy.typing import NDArray

from server.tuning.data.chat import Chat
from server.tuning.data.forms import Item, Tagged
from server.tuning.data.problems import SHOWN_LINES, TRAINING, VALIDATION, Problems


class Seen:
    """What a file's rows were: their inputs, and inputs with targets, as 64-bit digests."""

    def __init__(self) -> None:
        self._lines = array("Q")
        self._inputs = array("Q")
        self._wholes = array("Q")

    def add(self, line: int, item: Item) -> None:
        """A row that can be used."""
        given, target = _parts(item)
        self._lines.append(line)
        self._inputs.append(_digest(given))
        self._wholes.append(_digest([given, target]))

    def repeated(self, problems: Problems, *, one_target: bool) -> None:
        """Warns of rows of the training file that came before, and, where an input has ``one_target``, of inputs that came
        before with another one."""
        wholes, first_wholes = _again(self._wholes)
        if not one_target:
            return
        inputs, _ = _again(self._inputs)
        self._warn(problems, TRAINING, "duplicate", "the same row came before", wholes)
        known = np.zeros(len(inputs), bool)
        known[first_wholes] = True
        message = "the same input came before with another target"
        self._warn(problems, TRAINING, "contradiction", message, inputs & known)

    def overlapping(self, training: Seen, problems: Problems) -> None:
        """Warns of rows of the validation file whose inputs are in the training file."""
        there = np.isin(_numbers(self._inputs), _numbers(training._inputs))
        message = "the same input is in the training file: the validation's figures will be too good"
        self._warn(problems, VALIDATION, "in_training_file", message, there)

    def _warn(self, problems: Problems, file: str, code: str, message: str, which: NDArray[np.bool_]) -> None:
        if count := int(which.sum()):
            lines = [self._lines[int(at)] for at in np.flatnonzero(which)[:SHOWN_LINES]]
            problems.warn(file, code, message, count, lines)


def _parts(item: Item) -> tuple[object, object]:
    if isinstance(item, Chat):
        *before, answer = item.messages
        return before, [answer, item.learnt]
    if isinstance(item, Tagged):
        return item.text, item.marks
    return item.values, item.target


def _digest(value: object) -> int:
    return int.from_bytes(blake2b(msgspec.msgpack.encode(value), digest_size=8).digest(), "little")


def _numbers(values: array[int]) -> NDArray[np.uint64]:
    return np.frombuffer(values, np.uint64) if values else np.empty(0, np.uint64)


def _again(values: array[int]) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which values came before, and where each first came."""
    _, first = np.unique(_numbers(values), return_index=True)
    again = np.ones(len(values), bool)
    again[first] = False
    return again, first

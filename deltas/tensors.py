"""Trees of dataclasses, sequences and mappings that hold tensors: look at them all, change them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from types import NoneType
from typing import Any, TypeVar

from torch import Tensor

Tree = TypeVar("Tree")


def surely_finite(tensors: Iterable[Tensor]) -> bool:
    """False if a NaN or an infinity is among the values of these float tensors; also where only a sum overflows.

    One small operation a tensor: a sum of finite numbers that is finite tells that all are.
    """
    return all(math.isfinite(tensor.sum().item()) for tensor in tensors)


def tensors_of(tree: object) -> Iterator[Tensor]:
    """Every tensor in the tree, depth first, in the order of fields and entries."""
    if isinstance(tree, Tensor):
        yield tree
    elif names := _fields_of(tree):
        for name in names:
            value = getattr(tree, name)
            if isinstance(value, Tensor):
                yield value
            elif not isinstance(value, _LEAVES):
                yield from tensors_of(value)
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_of(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)


def map_tensors(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    """The same tree with every tensor changed, visited in the order of :func:`tensors_of`."""
    changed: Any = tree
    if isinstance(tree, Tensor):
        changed = change(tree)
    elif names := _fields_of(tree):
        values = {name: getattr(tree, name) for name in names}
        new = {n: map_tensors(value, change) for n, value in values.items() if not isinstance(value, _LEAVES)}
        changed = replace(changed, **new)
    elif isinstance(tree, dict):
        changed = {key: map_tensors(value, change) for key, value in tree.items()}
    elif isinstance(tree, list | tuple):
        changed = type(tree)(map_tensors(value, change) for value in tree)
    return changed  # type: ignore[no-any-return]


_LEAVES = (int, float, str, NoneType)
"""What most fields beside tensors are; a bool and the members of our enumerations are among these too."""


def _fields_of(tree: object) -> tuple[str, ...]:
    """The names of a dataclass's fields; none of a class itself, or of anything else."""
    kind: Any = type(tree)
    return _names(kind)


@cache
def _names(kind: type[Any]) -> tuple[str, ...]:
    """Kept by class: a delta's tree has hundreds of objects of a few of them."""
    return tuple(item.name for item in fields(kind)) if is_dataclass(kind) else ()

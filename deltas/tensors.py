"""Trees of dataclasses, sequences and mappings that hold tensors: look at them all, change them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
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
    elif is_dataclass(tree) and not isinstance(tree, type):
        for item in fields(tree):
            yield from tensors_of(getattr(tree, item.name))
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
    elif is_dataclass(tree) and not isinstance(tree, type):
        new = {item.name: map_tensors(getattr(tree, item.name), change) for item in fields(tree)}
        changed = replace(tree, **new)
    elif isinstance(tree, dict):
        changed = {key: map_tensors(value, change) for key, value in tree.items()}
    elif isinstance(tree, list | tuple):
        changed = type(tree)(map_tensors(value, change) for value in tree)
    return changed  # type: ignore[no-any-return]

"""From a delta's file to a packed delta, on threads of their own: read, verified, lowered, packed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from deltas import methods
from deltas.bank import PackedDelta
from deltas.delta import Delta
from deltas.errors import DeltaError
from deltas.formats import native
from deltas.pack import pack
from deltas.sites import BackboneSpec
from deltas.weights import Source
from server.types import DeltaPart, DeltaRef

LOADERS = 2


@dataclass(frozen=True)
class LoadFailure:
    """A delta that could not be brought to the device. ``of_sum``: its parts are sound, what is asked of them is not."""

    digest: str
    message: str
    of_sum: bool = False


class Loaders:
    """A small pool of threads. Each :meth:`load` ends in one call of ``done`` from one of them, in host memory
    (page-locked where the device is a GPU) or with the reason why not.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        dtype: torch.dtype,
        device: torch.device,
        weights: Source | None,
        done: Callable[[str, PackedDelta | LoadFailure], None],
    ) -> None:
        self._spec, self._dtype, self._device = spec, dtype, device
        self._weights = weights
        self._done = done
        self._pool = ThreadPoolExecutor(LOADERS, thread_name_prefix="delta-loader")

    def load(self, ref: DeltaRef) -> None:
        """Starts; returns at once."""
        self._pool.submit(self._load, ref)

    def close(self) -> None:
        """Takes nothing more; what a thread is at is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, ref: DeltaRef) -> None:
        result: PackedDelta | LoadFailure
        try:
            result = self._lowered(ref)
        except Exception as error:  # noqa: BLE001 - a loader must always answer: its rows wait for it
            result = LoadFailure(ref.digest, f"{type(error).__name__}: {error}")
        self._done(ref.digest, result)

    def _lowered(self, ref: DeltaRef) -> PackedDelta | LoadFailure:
        """Reads and verifies every part, each by itself; only then is what fails the sum's fault."""
        try:
            parts = [(_read(part), part.weight) for part in ref.summands]
            if ref.parts:  # what is wrong with a delta by itself, lowering finds too
                for delta, _ in parts:
                    methods.check(delta, self._spec)
        except (DeltaError, OSError) as error:
            return LoadFailure(ref.digest, str(error))
        try:
            patches = methods.lower_sum(parts, self._spec, self._weights)
            packed = pack(patches, self._spec, self._dtype, pin=self._device.type == "cuda")
        except DeltaError as error:
            return LoadFailure(ref.digest, str(error), of_sum=bool(ref.parts))
        packed.nbytes  # noqa: B018 - counted here, once: it looks at every tensor, and the step loop asks for it
        return packed


def _read(part: DeltaPart) -> Delta:
    delta = native.load(Path(part.path))
    if delta.digest != part.digest:
        raise DeltaError(f"the stored tensors of {part.digest[:12]} are damaged: their digest differs")
    return delta

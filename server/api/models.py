"""Model names: which delta, if any, a request's ``model`` means for its tenant."""

from __future__ import annotations

from dataclasses import dataclass

from server.api.services import Backbone, Services
from server.errors import Conflict, InvalidRequest
from server.types import DeltaRecord, DeltaRef, Principal


@dataclass(frozen=True)
class Target:
    """What serves a request: the backbone alone (``record`` is None) or with one delta."""

    model: str
    record: DeltaRecord | None = None
    delta: DeltaRef | None = None

    @property
    def headers(self) -> dict[str, str]:
        """``x-delta-digest``, where a delta serves."""
        return {} if self.record is None else {"x-delta-digest": self.record.digest}


async def resolve(services: Services, backbone: Backbone, caller: Principal, model: str) -> Target:
    """What ``model`` means. Raises ``ModelNotFound``, ``Conflict`` for a quarantined delta,
    ``InvalidRequest``.
    """
    if model == backbone.info.name:
        return Target(model)
    if "+" in model or "*" in model:
        raise InvalidRequest(f"'{model}' is a sum of deltas: composition is not served yet.", param="model")
    record = await services.registry.resolve(caller.tenant, model)
    if record.status == "quarantined":
        raise Conflict(
            f"The delta '{model}' is quarantined: its computation failed.",
            param="model",
            code="delta_quarantined",
        )
    path = services.blobs.path(record.digest)
    return Target(model, record, DeltaRef(record.digest, str(path)))

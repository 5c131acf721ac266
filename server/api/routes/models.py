"""``/v1/models``: the backbone and the caller's deltas."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from server.api import models
from server.api.auth import Caller, Served, authenticate
from server.api.services import Backbone
from server.types import DeltaRecord

router = APIRouter(prefix="/v1/models", dependencies=[Depends(authenticate)])

_PAGE = 1000


@router.get("")
async def list_models(services: Served, caller: Caller) -> JSONResponse:
    """The backbone first, then every delta of the caller, by its name."""
    backbone = services.backbone()
    data = [_backbone_model(backbone)]
    after: str | None = None
    more = True
    while more:
        page = await services.registry.list(caller.tenant, after, _PAGE)
        data += [_delta_model(record.name, record, backbone) for record in page.items]
        more = page.has_more
        after = page.items[-1].name if page.items else None
    return JSONResponse({"object": "list", "data": data})


@router.get("/{model:path}")
async def get_model(model: str, services: Served, caller: Caller) -> JSONResponse:
    """One model by any name that a request may use."""
    backbone = services.backbone()
    target = await models.resolve(services, backbone, caller, model)
    if not target.records:
        return JSONResponse(_backbone_model(backbone))
    newest = max(target.records, key=lambda record: record.created_at)
    shown = _delta_model(model, newest, backbone)
    return JSONResponse(shown | {"owned_by": caller.tenant} if len(target.records) > 1 else shown)


def _backbone_model(backbone: Backbone) -> dict[str, Any]:
    return {
        "id": backbone.info.name,
        "object": "model",
        "created": backbone.since,
        "owned_by": "deltaserve",
        "root": backbone.info.name,
        "parent": None,
        "kind": backbone.spec.kind,
        "max_model_len": backbone.info.max_model_len,
    }


def _delta_model(name: str, record: DeltaRecord, backbone: Backbone) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": record.created_at,
        "owned_by": record.tenant,
        "root": backbone.info.name,
        "parent": backbone.info.name,
        "max_model_len": backbone.info.max_model_len,
    }

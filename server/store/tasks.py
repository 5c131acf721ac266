"""The tenants' tasks, by name. Each change is one Lua script."""

from __future__ import annotations

import msgspec
from redis.asyncio import Redis

from server.errors import Conflict, InvalidRequest, NotFound
from server.store.connect import load_script
from server.store.keys import Keys
from server.store.reference import check_task, is_name, shown
from server.store.registry import check_limit
from server.types import DEFAULT_TENANT, Page, Task


class TaskStore:
    """All tenants' tasks. A tenant reaches its own only. Methods raise Unavailable while Redis cannot be reached."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._create = load_script(redis, "task_create")
        self._page = load_script(redis, "records_page")
        self._delete = load_script(redis, "task_delete")

    async def create(self, tenant: str, task: Task) -> tuple[Task, bool]:
        """Keep a task; the kept one, and whether it is new. The same definition again is the one that is there.

        Raises InvalidRequest (bad name), Conflict (the name has another definition), NotFound (no such tenant).
        """
        check_task(task.name)
        keys = self._keys
        reply = await self._create(
            keys=[keys.tenants, keys.tasks(tenant), keys.task_order(tenant), keys.counts],
            args=["" if tenant == DEFAULT_TENANT else tenant, task.name, msgspec.json.encode(task)],
        )
        if reply is None:
            raise NotFound(f"tenant {shown(tenant)} does not exist", param="tenant")
        if reply[0]:
            return task, True
        kept = msgspec.json.decode(reply[1], type=Task)
        if msgspec.structs.replace(kept, created_at=task.created_at) != task:
            raise Conflict(
                f"task {shown(task.name)} exists with another definition: delete it first, or take another name",
                param="name",
            )
        return kept, False

    async def get(self, tenant: str, name: str) -> Task:
        """The tenant's own task. Raises NotFound."""
        record = await self._redis.hget(self._keys.tasks(tenant), name) if is_name(name) else None
        if record is None:
            raise _no_task(name)
        return msgspec.json.decode(record, type=Task)

    async def list(self, tenant: str, after: str | None = None, limit: int = 20) -> Page:
        """A page of the tenant's own tasks, oldest first. ``after`` is the last name of the page before.

        Raises InvalidRequest when ``after`` is gone or ``limit`` is out of range.
        """
        check_limit(limit)
        rows = None
        if after is None or is_name(after):
            keys = [self._keys.tasks(tenant), self._keys.task_order(tenant)]
            rows = await self._page(keys=keys, args=[after or "", limit])
        if rows is None:
            raise InvalidRequest(f"there is no task {shown(after or '')} to go on after", param="after")
        return Page(items=[msgspec.json.decode(row, type=Task) for row in rows[1:]], has_more=bool(rows[0]))

    async def delete(self, tenant: str, name: str) -> None:
        """Forget the tenant's own task. Raises NotFound."""
        keys = [self._keys.tasks(tenant), self._keys.task_order(tenant)]
        if not (is_name(name) and await self._delete(keys=keys, args=[name])):
            raise _no_task(name)


def _no_task(name: str) -> NotFound:
    return NotFound(f"the task {shown(name)} does not exist", param="name")

"""What the routes need from the memory of learning, and the service that has it in this process.

The routes know this interface only, so the same routers serve inside another server's process, where the store is reached
over a socket.
"""

from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool

from insitu.live.records import Canary, Completion, Event, Feedback, FeedbackKind, FeedbackStatus, Rollback, Version
from insitu.live.store import Store


class LiveService(Protocol):
    """The store, asynchronously. Every method answers as :class:`insitu.live.store.Store`'s of the same name."""

    async def add_completion(self, completion: Completion) -> None: ...

    async def completion(self, id: str) -> Completion | None: ...

    async def add_feedback(
        self,
        kind: FeedbackKind,
        payload: dict[str, Any],
        id: str | None = None,
        *,
        hold: bool = False,
        max_queue: int | None = None,
    ) -> tuple[Feedback, bool]: ...

    async def feedback(self, id: str) -> Feedback | None: ...

    async def hold(self, id: str) -> Feedback | None: ...

    async def release(self, id: str) -> Feedback | None: ...

    async def withdraw(self, id: str) -> Feedback | None: ...

    async def list_feedback(
        self, status: FeedbackStatus | None = None, limit: int = 100, after: str | None = None
    ) -> list[Feedback]: ...

    async def events(self, after: int | None = None, limit: int = 100) -> list[Event]: ...

    async def counters(self) -> dict[str, int]: ...

    async def counts(self) -> dict[str, int]: ...

    async def head(self) -> int | None: ...

    async def version(self, id: int) -> Version | None: ...

    async def versions(self) -> list[Version]: ...

    async def pin(self, id: int, pinned: bool = True) -> None: ...

    async def add_rollback(self, target: int) -> Rollback: ...

    async def rollback(self, id: int) -> Rollback | None: ...

    async def add_canary(self, prompt: str) -> tuple[Canary, bool]: ...

    async def canaries(self) -> list[Canary]: ...

    async def remove_canary(self, id: int) -> bool: ...


class LocalService:
    """A :class:`LiveService` over a store in this process. SQLite blocks, so each call runs in a thread."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def add_completion(self, completion: Completion) -> None:
        await run_in_threadpool(self._store.add_completion, completion)

    async def completion(self, id: str) -> Completion | None:
        return await run_in_threadpool(self._store.completion, id)

    async def add_feedback(
        self,
        kind: FeedbackKind,
        payload: dict[str, Any],
        id: str | None = None,
        *,
        hold: bool = False,
        max_queue: int | None = None,
    ) -> tuple[Feedback, bool]:
        return await run_in_threadpool(self._store.add_feedback, kind, payload, id, hold=hold, max_queue=max_queue)

    async def feedback(self, id: str) -> Feedback | None:
        return await run_in_threadpool(self._store.feedback, id)

    async def hold(self, id: str) -> Feedback | None:
        return await run_in_threadpool(self._store.hold, id)

    async def release(self, id: str) -> Feedback | None:
        return await run_in_threadpool(self._store.release, id)

    async def withdraw(self, id: str) -> Feedback | None:
        return await run_in_threadpool(self._store.withdraw, id)

    async def list_feedback(
        self, status: FeedbackStatus | None = None, limit: int = 100, after: str | None = None
    ) -> list[Feedback]:
        return await run_in_threadpool(self._store.list_feedback, status, limit, after)

    async def events(self, after: int | None = None, limit: int = 100) -> list[Event]:
        return await run_in_threadpool(self._store.events, after, limit)

    async def counters(self) -> dict[str, int]:
        return await run_in_threadpool(self._store.counters)

    async def counts(self) -> dict[str, int]:
        return await run_in_threadpool(self._store.counts)

    async def head(self) -> int | None:
        return await run_in_threadpool(self._store.head)

    async def version(self, id: int) -> Version | None:
        return await run_in_threadpool(self._store.version, id)

    async def versions(self) -> list[Version]:
        return await run_in_threadpool(self._store.versions)

    async def pin(self, id: int, pinned: bool = True) -> None:
        await run_in_threadpool(self._store.pin, id, pinned)

    async def add_rollback(self, target: int) -> Rollback:
        return await run_in_threadpool(self._store.add_rollback, target)

    async def rollback(self, id: int) -> Rollback | None:
        return await run_in_threadpool(self._store.rollback, id)

    async def add_canary(self, prompt: str) -> tuple[Canary, bool]:
        return await run_in_threadpool(self._store.add_canary, prompt)

    async def canaries(self) -> list[Canary]:
        return await run_in_threadpool(self._store.canaries)

    async def remove_canary(self, id: int) -> bool:
        return await run_in_threadpool(self._store.remove_canary, id)

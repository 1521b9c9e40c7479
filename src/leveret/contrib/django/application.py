"""The application of a Django project."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import close_old_connections, connections, transaction

from leveret.client import App
from leveret.contrib.django.configuration import configuration

if TYPE_CHECKING:
    from collections.abc import Callable

    from leveret.client import Handle, Task
    from leveret.model import CurrentTask, Inner

P = ParamSpec("P")
R = TypeVar("R")


def with_connections(current: CurrentTask, inner: Callable[[], Any]) -> Any:
    """Thread middleware: a plain task begins without a broken connection, and leaves none that is over its age."""
    del current
    close_old_connections()
    try:
        return inner()
    finally:
        close_old_connections()


async def with_own_thread(current: CurrentTask, inner: Inner) -> Any:
    """Middleware: what an asynchronous task asks of the database is asked in a thread of this run.

    As Django does for a request: the thread ends with the run, so its connections are closed whatever CONN_MAX_AGE is.
    """
    task = app.registry.tasks.get(current.task)
    if task is None or not inspect.iscoroutinefunction(task.function):
        return await inner()
    async with ThreadSensitiveContext():
        try:
            return await inner()
        finally:
            await sync_to_async(connections.close_all)()


def _made() -> App:
    given = configuration()
    given["middleware"] = [with_own_thread, *given["middleware"]]
    given["thread_middleware"] = [with_connections, *given["thread_middleware"]]
    return App(**given)


#: The project's application: ``from leveret.contrib.django import app``, and ``@app.task`` in a ``tasks.py``.
app = _made()


def enqueue_on_commit(task: Task[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
    """Store the task when the transaction of this thread is committed; at once if there is none.

    When it is rolled back, nothing is stored. When the program dies, or the broker is away, right after the commit, the
    task is lost, and its transaction is not.

    Args:
        task: The task, with ``options(...)`` if it has any.
        *args: The task's arguments, checked now.
        **kwargs: The same, by name.

    Returns:
        The handle of the task that will be stored.

    Raises:
        LeveretError: As with ``enqueue_sync``, now or at the commit.
    """
    envelope, store = task.prepared(*args, **kwargs)
    at_commit(store)
    return task.handle(envelope.id)


def at_commit(store: Callable[[], None]) -> None:
    """Call it when the transaction of this thread is committed; at once if there is none."""
    connection = transaction.get_connection()
    if connection.connection is None and not connection.in_atomic_block and connection.settings_dict["AUTOCOMMIT"]:
        # on_commit would open a connection to find that it has no transaction.
        store()
    else:
        connection.on_commit(store)

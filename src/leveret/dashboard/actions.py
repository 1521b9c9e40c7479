"""What the dashboard's forms do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from leveret.dashboard import text, views
from leveret.dashboard.site import read_form
from leveret.errors import BrokerError, LeveretError
from leveret.model import Pause, PauseLimit, Resume, ResumeLimit, Trigger

if TYPE_CHECKING:
    from starlette.requests import Request

    from leveret.dashboard.site import Site
    from leveret.model import ScheduleRequest

#: How long a cancelled task is waited for (seconds).
_CANCEL = 3.0
#: How long the broker is waited for to know a task that was enqueued (seconds).
_KNOWN = 2.0


class Actions:
    """Each answers with the page to go to, which says what was done."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def change_queue(self, request: Request) -> Response:
        form = await read_form(request)
        queue = text.unpacked(form.get("queue", ""))
        if form.get("action") == "pause":
            await self._site.app.client.broker.queues.pause(queue)
            said = "paused"
        elif form.get("action") == "resume":
            await self._site.app.client.broker.queues.resume(queue)
            said = "resumed"
        elif form.get("action") == "purge" and not form.get("sure"):
            return await self._ask_to_purge(request, queue)
        elif form.get("action") == "purge":
            await self._site.app.client.broker.queues.purge(queue, force=bool(form.get("force")))
            said = "purged"
        else:
            raise HTTPException(400, "The form does not say what to do.")
        await self._site.observer.refresh()
        return RedirectResponse(f"queue?name={text.packed(queue)}&said={said}", 303)

    async def _ask_to_purge(self, request: Request, queue: str) -> Response:
        await self._site.observer.refresh()
        stats = views.stats_of(queue, self._site.observer.stats)
        if stats is None:
            raise HTTPException(404, f"No queue {text.short(queue)!r} is known here.")
        return self._site.page(request, "purge.html", queue=stats)

    async def change_schedule(self, request: Request) -> Response:
        form = await read_form(request)
        name = text.unpacked(form.get("name", ""))
        asked: ScheduleRequest
        if form.get("action") == "pause":
            asked, said = Pause(name), "schedule-paused"
        elif form.get("action") == "resume":
            asked, said = Resume(name), "schedule-resumed"
        elif form.get("action") == "trigger":
            asked, said = Trigger(name, time.time()), "triggered"
        else:
            raise HTTPException(400, "The form does not say what to do.")
        await self._site.app.client.broker.schedules.ask(asked)
        await self._site.observer.refresh()
        return RedirectResponse(f"schedules?said={said}", 303)

    async def change_limit(self, request: Request) -> Response:
        form = await read_form(request)
        name = text.unpacked(form.get("name", ""))
        if form.get("action") not in ("pause", "resume"):
            raise HTTPException(400, "The form does not say what to do.")
        is_pause = form["action"] == "pause"
        await self._site.app.client.broker.limits.ask(PauseLimit(name) if is_pause else ResumeLimit(name))
        await self._site.observer.refresh()
        return RedirectResponse(f"limits?said=limit-{form['action']}d", 303)

    async def change_task(self, request: Request) -> Response:
        form = await read_form(request)
        id_ = text.unpacked(form.get("id", ""))
        if form.get("action") == "cancel":
            return await self._cancel(id_)
        if form.get("action") == "again":
            return await self._run_again(id_)
        raise HTTPException(400, "The form does not say what to do.")

    async def _run_again(self, id_: str) -> Response:
        """As a new task, as its own program would enqueue it now."""
        observer = self._site.observer
        call = views.known_call(await observer.tasks.task(id_), None)
        if call is None:
            raise HTTPException(409, "Its arguments are not known any more, so it cannot be run again.")
        try:
            task = self._site.app.registry.find(call.task, call.queue).options(queue=call.queue)
            args, kwargs = task.signature.decode(call.body)
            new = (await task.enqueue(*args, **kwargs)).id
        except BrokerError:
            raise
        except LeveretError as error:
            raise HTTPException(409, f"It was not enqueued: {error}") from None
        ends = time.monotonic() + _KNOWN
        version = observer.version
        while await observer.tasks.task(new) is None and time.monotonic() < ends:
            version = await observer.beyond(version, 0.5)
        await observer.refresh()
        shown = new if await observer.tasks.task(new) is not None else id_
        return RedirectResponse(f"task?id={text.packed(shown)}&said=again", 303)

    async def _cancel(self, id_: str) -> Response:
        status = await self._site.app.client.broker.control.cancel(id_)
        ends = time.monotonic() + _CANCEL
        while status is not None and not status.is_final and time.monotonic() < ends:
            version = self._site.observer.version
            status = await self._site.observer.tasks.task(id_)
            if status is not None and not status.is_final:
                await self._site.observer.beyond(version, 0.5)
        await self._site.observer.refresh()
        if status is None:
            return RedirectResponse("tasks?said=unknown", 303)
        said = "cancelled" if status.state == "cancelled" else "late" if status.is_final else "asked"
        return RedirectResponse(f"task?id={text.packed(id_)}&said={said}", 303)

    async def change_dead(self, request: Request) -> Response:
        form = await read_form(request)
        search = views.Search(text.unpacked(form.get("queue", "")), form.get("task", ""), form.get("error", ""))
        if form.get("all"):
            letters = await self._site.observer.dead_letters.current(search.queue)
            ids = [letter.envelope.id for letter in letters if search.matches(letter)]
        else:
            ids = [text.unpacked(one) for one in form.getlist("id")]
        if not ids:
            return RedirectResponse(f"dead?{search.query()}&said=none", 303)
        if form.get("action") == "retry":
            changed = await self._site.observer.dead_letters.retry(search.queue, ids)
            said = "retried"
        elif form.get("action") == "drop" and not form.get("sure"):
            return self._site.page(request, "confirm.html", search=search, ids=ids)
        elif form.get("action") == "drop":
            changed = await self._site.observer.dead_letters.drop(search.queue, ids)
            said = "dropped"
        else:
            raise HTTPException(400, "The form does not say what to do.")
        await self._site.observer.refresh()
        if said == "retried" and form.get("from") == "task":
            return RedirectResponse(f"task?id={text.packed(ids[0])}&said={'back' if changed else 'gone'}", 303)
        return RedirectResponse(f"dead?{search.query()}&said={said}&count={len(changed)}", 303)

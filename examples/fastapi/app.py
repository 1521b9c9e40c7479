"""POST an image, follow the work, GET the thumbnail: uvicorn app:web."""

import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Path, Request, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse
from tasks import THUMBNAILS, UPLOADS, app, make_thumbnail

from leveret import BrokerError, EnqueueTimeout, Handle, Status, TaskNotFound

#: The largest image that is taken (bytes).
LARGEST = 10 * 1024 * 1024
#: How long a client may leave a task alone before it asks again (seconds).
ASK_AGAIN = "1"

# What goes wrong is shown among the server's own messages.
log = logging.getLogger("uvicorn.error")

TaskId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
Width = Annotated[int, Form(ge=1, le=2_000)]


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    """Connect to the broker when the server starts, and say goodbye when it stops."""
    UPLOADS.mkdir(exist_ok=True)
    async with app:
        yield


web = FastAPI(title="Thumbnails", lifespan=lifespan)


@web.exception_handler(BrokerError)
async def broker_is_away(_: Request, error: Exception) -> JSONResponse:
    # The reason names hosts and files, so it is for the log and not for the client.
    log.warning("the broker cannot be used: %s", error)
    return JSONResponse({"detail": "the task queue cannot be used now; try again later"}, 503)


@web.post("/thumbnails", status_code=202)
async def create(request: Request, response: Response, image: UploadFile, width: Width = 160) -> dict[str, str]:
    """202 with the task's id, and where to ask for it, as soon as image and task are safely stored."""
    content = await image.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise HTTPException(413, f"the image has more than {LARGEST} bytes")
    upload = UPLOADS / uuid.uuid4().hex
    await run_in_threadpool(upload.write_bytes, content)
    try:
        handle = await make_thumbnail.enqueue(upload.name, width)
    except EnqueueTimeout:
        raise  # nobody knows whether the task is stored: it may need the image
    except BrokerError:
        upload.unlink()
        raise
    location = str(request.url_for("status", task_id=handle.id))
    response.headers["Location"] = location
    return {"id": handle.id, "status": location}


async def known(handle: Handle[str]) -> Status:
    """What is known of a task."""
    try:
        return await handle.status()
    except TaskNotFound:
        raise HTTPException(404, "no such task, or it ended more than an hour ago") from None


@web.get("/thumbnails/{task_id}")
async def status(request: Request, response: Response, task_id: TaskId) -> dict[str, Any]:
    """How far it is; with the thumbnail's address when that is made."""
    found = await known(make_thumbnail.handle(task_id))
    answer: dict[str, Any] = {"id": task_id, "state": found.state}
    if found.progress is not None:
        answer["progress"] = {
            "done": found.progress.done,
            "total": found.progress.total,
            "note": found.progress.note,
        }
    if found.error is not None:
        answer["error"] = found.error
    if found.state == "succeeded":
        answer["result"] = str(request.url_for("result", task_id=task_id))
    if not found.is_final:
        response.headers["Retry-After"] = ASK_AGAIN
    return answer


@web.get("/thumbnails/{task_id}/image")
async def result(task_id: TaskId) -> FileResponse:
    """The thumbnail. 409 while there is none, 422 when there will be none."""
    handle = make_thumbnail.handle(task_id)
    found = await known(handle)
    if not found.is_final:
        raise HTTPException(409, f"the task is {found.state}", {"Retry-After": ASK_AGAIN})
    if found.state != "succeeded":
        raise HTTPException(422, found.error)
    return FileResponse(THUMBNAILS / handle.result_in(found), media_type="image/webp")

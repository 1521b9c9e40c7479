"""A web application that answers at once and leaves the slow work to a worker: uvicorn app:web."""

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tasks import app, render

from leveret import BrokerError, InvalidArguments, TaskTooLarge

# What goes wrong is shown among the server's own messages.
log = logging.getLogger("uvicorn.error")


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    """Connect to the broker when the server starts, and say goodbye when it stops."""
    async with app:
        yield


async def create_render(request: Request) -> JSONResponse:
    """POST /renders with {"text": "..."}: 202 with the task's id, as soon as the task is safely stored."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        return JSONResponse({"error": "the request's body is not JSON"}, 400)
    text = body.get("text") if isinstance(body, dict) else None
    if not isinstance(text, str) or not text:
        return JSONResponse({"error": 'send a JSON object with a text: {"text": "hello"}'}, 400)
    try:
        handle = await render.enqueue(text)
    except (InvalidArguments, TaskTooLarge) as error:
        return JSONResponse({"error": str(error)}, 400)
    except BrokerError as error:
        # The reason names hosts and files, so it is for the log and not for the client.
        log.warning("cannot enqueue a render: %s", error)
        return JSONResponse({"error": "the task queue cannot be used now; try again later"}, 503)
    return JSONResponse({"id": handle.id}, 202)


web = Starlette(routes=[Route("/renders", create_render, methods=["POST"])], lifespan=lifespan)

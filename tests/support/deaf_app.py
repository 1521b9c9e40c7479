"""An application that keeps its child processes from beginning anything."""

from __future__ import annotations

from leveret import App
from leveret.executors.attempt import JobRunner

app = App()
JobRunner.submit = lambda *_: None  # type: ignore[method-assign]


@app.task(queue="work")
async def say(text: str) -> None:
    raise AssertionError(text)

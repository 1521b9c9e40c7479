"""The tutorial's task: a second of work for every dot in the message."""

import asyncio

from leveret import App

# $LEVERET_URL, or leveret.db in the working directory.
app = App()


@app.task(queue="task_queue", default=True)
async def work(body: bytes) -> None:
    """Its only parameter is bytes, so it takes a message's body as it came, from producers in any language."""
    print(f" [x] Received {body.decode()!r}")
    await asyncio.sleep(body.count(b"."))
    print(" [x] Done")

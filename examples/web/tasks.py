"""The slow task behind the web application."""

import asyncio
import hashlib
import os
from pathlib import Path

from leveret import App

#: Where the rendered files go: a folder in the worker's working directory.
FOLDER = Path("renders")
#: How long a render takes (seconds).
DURATION = 3.0

# $LEVERET_URL, or leveret.db in the working directory. A web client should not wait 30 seconds, the default, to hear
# that the broker is away.
app = App(enqueue_timeout=5.0)


@app.task(queue="renders")
async def render(text: str) -> None:
    """Put a text into a box, slowly, and write it to a file."""
    await asyncio.sleep(DURATION)
    write(file_for(text), boxed(text))


def file_for(text: str) -> Path:
    """The same text always has the same file, so a task that runs twice does no harm."""
    return FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.txt"


def boxed(text: str) -> str:
    lines = text.splitlines()
    width = max((len(line) for line in lines), default=0)
    edge = f"+{'-' * (width + 2)}+"
    return "\n".join([edge, *(f"| {line:{width}} |" for line in lines), edge, ""])


def write(path: Path, content: str) -> None:
    """Write under another name first: whoever looks finds the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(path)

"""The task that workers run: make one thumbnail of one image."""

import uuid
from pathlib import Path

from PIL import Image, ImageOps

from leveret import App, Dead

# $LEVERET_URL, or leveret.db in the working directory.
app = App()


@app.task(queue="thumbnails")
def make_thumbnail(source: str, target: str, width: int) -> None:
    """Make a thumbnail at most ``width`` pixels wide, a WebP file at ``target``.

    A plain function: Pillow keeps a CPU busy, so there is nothing to await. The worker runs it on a thread of one
    of its child processes.
    """
    thumbnail = read_small(source, width)
    write_whole(thumbnail, Path(target))


def read_small(source: str, width: int) -> Image.Image:
    """Read an image and scale it down, the right way up. An image that is narrower already stays as it is."""
    try:
        with Image.open(source) as image:
            small = ImageOps.exif_transpose(image).convert("RGBA")
            small.thumbnail((width, small.height))
            return small
    except Exception as error:
        # Pillow raises errors of many kinds for a broken file, and it will be as broken the next time. So the task
        # is given up for good: Leveret keeps it as a dead letter, with this reason.
        raise Dead(f"{source}: {str(error) or type(error).__name__}") from error


def write_whole(image: Image.Image, target: Path) -> None:
    """Write the file under another name, then give it its own name in one step.

    A worker that is killed while it writes leaves no half thumbnail, and a task that runs twice does no harm.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        image.save(unfinished, format="WEBP")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

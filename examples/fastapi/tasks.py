"""The slow task behind the web application: make a thumbnail of an image that was uploaded."""

import uuid
from pathlib import Path

from PIL import Image, ImageOps

from leveret import App, Dead, current_task

#: Where the images are put, and the thumbnails: folders in the working directory of the server and of the worker.
UPLOADS = Path("uploads")
THUMBNAILS = Path("thumbnails")

# $LEVERET_URL, or leveret.db in the working directory. A web client should not wait 30 seconds, the default, to hear
# that the broker is away.
app = App(enqueue_timeout=5.0)


@app.task(queue="thumbnails", timeout=60)
def make_thumbnail(upload: str, width: int) -> str:
    """Make a thumbnail at most ``width`` pixels wide; the name of its file.

    A plain function: Pillow keeps a CPU busy, so there is nothing to await. The arguments and the result are names:
    what goes through a queue should be small.
    """
    task = current_task()
    task.progress(0, 3, "reading the image")
    image = read(UPLOADS / upload)
    task.progress(1, 3, "scaling")
    image.thumbnail((width, image.height))
    task.progress(2, 3, "writing the thumbnail")
    # The same upload always has the same thumbnail, so a task that runs twice does no harm.
    name = f"{upload}.webp"
    write_whole(image, THUMBNAILS / name)
    task.progress(3, 3, "done")
    return name


def read(path: Path) -> Image.Image:
    """The image, the right way up."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGBA")
    except Exception as error:
        # It will be as broken the next time, so there is no other attempt. The reason is for the client: no path in it.
        raise Dead(f"this is no image that can be read ({type(error).__name__})") from error


def write_whole(image: Image.Image, target: Path) -> None:
    """Write under another name first: whoever looks finds the whole file or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{uuid.uuid4().hex}.unfinished")
    try:
        image.save(unfinished, format="WEBP")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)

"""Make a thumbnail of every image in a folder: python make_thumbnails.py FOLDER [--out OUT] [--width 160].

This program only enqueues the tasks and shows how far they are. Workers, started separately, do them.
"""

import argparse
import asyncio
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tasks import app, make_thumbnail

from leveret import LeveretError
from leveret.brokers import Broker, connect

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".webp", ".bmp"}
#: How often to look at what is finished (seconds).
PAUSE = 0.2


@dataclass(frozen=True)
class Thumbnail:
    """A thumbnail to make."""

    source: Path
    target: Path
    #: What an earlier run left at the target.
    before: tuple[int, int] | None

    @property
    def is_made(self) -> bool:
        return file_version(self.target) not in (None, self.before)


def file_version(path: Path) -> tuple[int, int] | None:
    """Something that changes when the file is replaced. None: there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def plan(folder: Path, out: Path) -> list[Thumbnail]:
    """What to make: OUT/sub/cat.png.webp for FOLDER/sub/cat.png, so that no two images share a thumbnail."""
    thumbnails = []
    for source in sorted(folder.rglob("*")):
        if source.suffix.lower() in SUFFIXES and source.is_file() and not source.is_relative_to(out):
            target = out / f"{source.relative_to(folder)}.webp"
            thumbnails.append(Thumbnail(source, target, file_version(target)))
    return thumbnails


async def make(thumbnails: list[Thumbnail], width: int) -> dict[Path, str]:
    """Have the thumbnails made. Returns the images that could not be read, each with the reason."""
    async with app:
        handles = await make_thumbnail.enqueue_many((str(one.source), str(one.target), width) for one in thumbnails)
    waiting = {handle.id: thumbnail for handle, thumbnail in zip(handles, thumbnails, strict=True)}
    broker = connect(app.url)
    try:
        with Progress(TextColumn("Thumbnails"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
            return await watch(waiting, broker, progress)
    finally:
        await broker.close()


async def watch(waiting: dict[str, Thumbnail], broker: Broker, progress: Progress) -> dict[Path, str]:
    """Show the progress until every task is finished: its thumbnail is there, or it is a dead letter."""
    bar = progress.add_task("", total=len(waiting))
    unreadable: dict[Path, str] = {}
    hinted = False
    while True:
        for id_, thumbnail in list(waiting.items()):
            if thumbnail.is_made:
                del waiting[id_]
                progress.advance(bar)
        if not waiting:
            return unreadable
        workers, reasons = await look(broker)
        for id_ in waiting.keys() & reasons.keys():
            source = waiting.pop(id_).source
            unreadable[source] = reasons[id_].removeprefix(f"{source}: ")
            progress.advance(bar)
        if workers == 0 and not hinted:
            progress.console.print(hint(), markup=False, highlight=False, soft_wrap=True)
            hinted = True
        await asyncio.sleep(PAUSE)


async def look(broker: Broker) -> tuple[int, dict[str, str]]:
    """How many workers take from the queue, and its dead letters: the reason for each id."""
    name = make_thumbnail.queue
    for queue in await broker.queues.stats([name]):
        if queue.name == name:
            letters = await broker.dead_letters.read(name, limit=queue.dead) if queue.dead else []
            return queue.consumers, {letter.envelope.id: letter.reason for letter in letters}
    return 0, {}


def hint() -> str:
    tasks = os.path.relpath(Path(__file__).with_name("tasks.py"))
    command = f"leveret worker {tasks}:app --processes 2 --concurrency 1"
    return f"No worker is running yet. Start one in another terminal: {command}"


def report(thumbnails: list[Thumbnail], unreadable: dict[Path, str], folder: Path, out: Path) -> None:
    print(f"Made {len(thumbnails) - len(unreadable)} of {len(thumbnails)} thumbnails in {out}")
    if unreadable:
        print("Could not be read (leveret dead list thumbnails):")
    for source, reason in sorted(unreadable.items()):
        print(f"  {source.relative_to(folder)}: {reason}")


def pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make a thumbnail of every image in a folder.")
    parser.add_argument("folder", type=Path, help="searched with all the folders in it")
    parser.add_argument("--out", type=Path, help="where the thumbnails go (default: FOLDER-thumbnails)")
    parser.add_argument("--width", type=pixels, default=160, help="of the thumbnails, in pixels (default: 160)")
    arguments = parser.parse_args()
    # The workers may run in another folder, so the paths they get are absolute.
    folder: Path = arguments.folder.resolve()
    out: Path = (arguments.out or folder.with_name(f"{folder.name}-thumbnails")).resolve()
    if not folder.is_dir():
        return fail(f"there is no folder {folder}")
    if out == folder:
        return fail("the thumbnails need a folder of their own: --out is the folder of the images")
    thumbnails = plan(folder, out)
    if not thumbnails:
        return fail(f"there are no images in {folder}")
    try:
        unreadable = asyncio.run(make(thumbnails, arguments.width))
    except LeveretError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail("not watching any more; the tasks are stored, and workers go on with them")
    report(thumbnails, unreadable, folder, out)
    return 1 if unreadable else 0


def fail(message: str) -> int:
    print(f"make_thumbnails: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

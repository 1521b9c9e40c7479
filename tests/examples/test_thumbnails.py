"""The thumbnails example, on the photographs that scikit-image ships."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from leveret.brokers import connect
from tests.examples.programs import EXAMPLES, running, worker
from tests.support.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.model import DeadLetter, QueueStats
    from tests.conftest import Place

FOLDER = EXAMPLES / "thumbnails"
MAKE_THUMBNAILS = str(FOLDER / "make_thumbnails.py")
QUEUE = "thumbnails"
PHOTOS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
#: Where the fixture puts them in its folder.
NAMES = (*(f"sub/{name}" for name in PHOTOS[:2]), *PHOTOS[2:])


def photo(name: str) -> Path:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("data") / name


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with eight photographs, two of them in a folder within."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(photo(Path(name).name), folder / name)
    return folder


def ask(url: str) -> tuple[QueueStats, Sequence[DeadLetter]]:
    """What is in the queue, and its dead letters."""

    async def answer() -> tuple[QueueStats, Sequence[DeadLetter]]:
        broker = connect(url)
        try:
            stats = {queue.name: queue for queue in await broker.queues.stats([QUEUE])}
            return stats[QUEUE], await broker.dead_letters.read(QUEUE, limit=1000)
        finally:
            await broker.close()

    return asyncio.run(answer())


def is_settled(url: str) -> bool:
    stats, _ = ask(url)
    return stats.ready == stats.running == 0


def made(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.webp"))


def check(out: Path, names: Sequence[str], *, width: int) -> None:
    """Exactly these thumbnails exist, each a whole image of the right width."""
    assert made(out) == sorted(f"{name}.webp" for name in names)
    for name in names:
        with Image.open(out / f"{name}.webp") as thumbnail:
            thumbnail.load()
            assert thumbnail.width == width
            assert thumbnail.height > 1


def test_thumbnails_are_made_and_unreadable_images_are_named(tmp_path: Path, photos: Path, place: Place) -> None:
    whole = photo("rocket.jpg").read_bytes()
    (photos / "sub" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "text.JPG").write_text("this is no image")
    (photos / "notes.txt").write_text("nor is this, and nobody says so")
    out = tmp_path / "out"

    with (
        running(*worker(FOLDER / "tasks.py", "--processes", "2", "--concurrency", "1"), folder=tmp_path, url=place.url),
        running(MAKE_THUMBNAILS, "photos", "--out", "out", "--width", "120", folder=tmp_path, url=place.url) as making,
    ):
        assert making.wait() == 1, making.output
        wait_until(lambda: is_settled(place.url), "all tasks are settled")

    check(out, NAMES, width=120)
    assert "10/10" in making.output
    assert f"Made 8 of 10 thumbnails in {out}" in making.output
    assert "  sub/truncated.jpg: image file is truncated" in making.output
    assert "  text.JPG: cannot identify image file" in making.output
    _, dead = ask(place.url)
    reasons = sorted(letter.reason for letter in dead)
    assert len(reasons) == 2
    assert reasons[0].startswith(f"{photos / 'sub' / 'truncated.jpg'}: image file is truncated")
    assert reasons[1].startswith(f"{photos / 'text.JPG'}: cannot identify image file")


def test_a_second_run_replaces_the_thumbnails(tmp_path: Path, photos: Path, place: Place) -> None:
    out = photos.with_name("photos-thumbnails")
    with (
        running(*worker(FOLDER / "tasks.py"), folder=tmp_path, url=place.url),
        running(MAKE_THUMBNAILS, "photos", "--width", "100", folder=tmp_path, url=place.url) as making,
    ):
        assert making.wait() == 0, making.output
    check(out, NAMES, width=100)

    with running(MAKE_THUMBNAILS, "photos", "--width", "50", folder=tmp_path, url=place.url) as making:
        wait_until(lambda: making.has_ended or "No worker is running" in making.output, "it waits for a worker")
        assert not making.has_ended, "it took the old thumbnails for new ones"
        with running(*worker(FOLDER / "tasks.py"), folder=tmp_path, url=place.url):
            assert making.wait() == 0, making.output
    check(out, NAMES, width=50)


def test_nothing_is_lost_when_the_worker_is_killed(tmp_path: Path, photos: Path, place: Place) -> None:
    names = [*NAMES]
    for copy in range(10):
        (photos / str(copy)).mkdir()
        for name in PHOTOS:
            shutil.copy(photo(name), photos / str(copy))
            names.append(f"{copy}/{name}")
    out = tmp_path / "out"
    arguments = worker(FOLDER / "tasks.py", "--processes", "2", "--concurrency", "1")

    with running(MAKE_THUMBNAILS, "photos", "--out", "out", folder=tmp_path, url=place.url) as making:
        with running(*arguments, folder=tmp_path, url=place.url) as first:
            wait_until(lambda: len(made(out)) >= 5, "some thumbnails are made")
            first.kill()
        assert not making.has_ended
        stats, _ = ask(place.url)
        assert stats.ready > 0
        with running(*arguments, folder=tmp_path, url=place.url):
            assert making.wait() == 0, making.output
            wait_until(lambda: is_settled(place.url), "all tasks are settled")

    check(out, names, width=160)
    assert f"Made {len(names)} of {len(names)} thumbnails" in making.output
    assert ask(place.url)[1] == []


def test_without_a_worker_it_says_how_to_start_one(tmp_path: Path, photos: Path, place: Place) -> None:
    with running(MAKE_THUMBNAILS, str(photos), folder=tmp_path, url=place.url) as making:
        wait_until(lambda: "No worker is running" in making.output, "the hint is printed")
        assert not making.has_ended
    assert "tasks.py:app --processes 2 --concurrency 1\n" in making.output


@pytest.mark.parametrize(
    ("folder", "complaint"), [("missing", "there is no folder"), ("empty", "there are no images in")]
)
def test_without_images_it_says_so_in_one_line(tmp_path: Path, folder: str, complaint: str) -> None:
    (tmp_path / "empty").mkdir()
    with running(MAKE_THUMBNAILS, folder, folder=tmp_path, url=f"sqlite:///{tmp_path / 'unused.db'}") as making:
        assert making.wait() == 2
    assert making.output == f"make_thumbnails: {complaint} {tmp_path / folder}\n"

"""The documentation: it builds without a warning, loads nothing from outside, and its programs are programs."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
import yaml

from scripts.command_line_reference import PAGE, updated
from tests.support.handbook import DOCS, ROOT, blocks

if TYPE_CHECKING:
    from pathlib import Path

PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
SYSTEMD = shutil.which("systemd-analyze")


class Loaded(HTMLParser):
    """What a browser loads for a page, by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(attributes.get("src") or "")
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(attributes.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it; warnings are errors."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("docs", "src", "scripts", "examples/tutorial"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_nothing_is_loaded_from_outside(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert [url for url in loaded.found if re.match(r"(https?:)?//", url)] == [], page
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import\s*)['\"]?(?:https?:)?//", sheet.read_text()) == [], sheet


def test_the_reference_has_the_public_names(site: Path) -> None:
    import leveret

    reference = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    missing = [name for name in leveret.__all__ if not re.search(rf'id="leveret\.(\w+\.)*{name}"', reference)]
    assert missing == []


def test_each_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return [page for value in entry.values() for page in pages(value)]
        if isinstance(entry, list):
            return [page for value in entry for page in pages(value)]
        return [str(entry)]

    assert sorted(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == PAGES


def test_the_commands_are_up_to_date() -> None:
    page = PAGE.read_text()
    assert page == updated(page), "write the page anew: .venv/bin/python scripts/command_line_reference.py"


@pytest.mark.parametrize("page", PAGES)
def test_what_is_shown_can_be_read(page: str) -> None:
    """Each block is what it says: Python, JSON, YAML."""
    for block in blocks(DOCS / page):
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)


def write(page: str, folder: Path) -> list[str]:
    """The Python files of a page; their names."""
    files = [block for block in blocks(DOCS / page) if block.language == "python" and block.title]
    for file in files:
        (folder / file.title).write_text(f"{file.text}\n")
    return [file.title for file in files]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("guides/") or page == "index.md"])
def test_the_files_of_a_guide_are_programs(page: str, tmp_path: Path) -> None:
    for name in write(page, tmp_path):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", f"import {name.removesuffix('.py')}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{page}, {name}: {done.stderr}"


@pytest.mark.parametrize(("page", "passed"), [("guides/testing.md", 7), ("guides/ten-minutes.md", 1)])
def test_the_tests_of_a_guide(tmp_path: Path, page: str, passed: int) -> None:
    """They pass, in a project that is configured as the page says."""
    tests = [name for name in write(page, tmp_path) if name.startswith("test_")]
    (configuration,) = [block for block in blocks(DOCS / page) if block.title == "pyproject.toml"]
    (tmp_path / "pyproject.toml").write_text(configuration.text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:xdist", *tests],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
    assert f"{passed} passed" in done.stdout


@pytest.mark.skipif(SYSTEMD is None, reason="systemd is not installed")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = (DOCS / "guides/leveret-worker.service").read_text()
    program = tmp_path / "leveret"
    program.touch(mode=0o755)
    file = tmp_path / "leveret-worker.service"
    file.write_text(unit.replace("/srv/shop/.venv/bin/leveret", str(program)).replace("User=shop", "User=root"))
    assert SYSTEMD is not None
    done = subprocess.run([SYSTEMD, "verify", file], capture_output=True, text=True, check=False, timeout=60)
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "leveret-worker" in line]
    assert ours == []

"""What a release is: a wheel with all that the package has, and pages that say in one wording how to install it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

from tests.support.handbook import DOCS, ROOT

if TYPE_CHECKING:
    from pathlib import Path

#: The one file to change when there is a release, beside the same line of the README, which cannot include it.
INSTALLING = DOCS / "assets/installing.txt"


def test_the_wheel_has_all_files_of_the_package(tmp_path: Path) -> None:
    """`make dist` also installs it, and the sdist, and runs the demo."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        (entry_points,) = [name for name in packed if name.endswith(".dist-info/entry_points.txt")]
        commands = archive.read(entry_points).decode()
    source = tmp_path / "src"
    files = {file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()}
    assert {"leveret/py.typed", "leveret/dashboard/static/dashboard.css"} <= files
    assert {name for name in packed if ".dist-info/" not in name} == files
    assert "leveret = leveret.cli:main" in commands


def test_each_page_that_installs_says_where_from() -> None:
    include = f'--8<-- "{INSTALLING.relative_to(ROOT).as_posix()}"'
    pages = {page.relative_to(DOCS).as_posix(): page.read_text() for page in DOCS.rglob("*.md")}
    installs = {name: text for name, text in pages.items() if re.search(r"pip install [^`\n]*\bleveret\b", text)}
    assert "tutorial/index.md" in installs
    assert [name for name, text in installs.items() if include not in text.splitlines()] == []
    assert INSTALLING.read_text().strip() in (ROOT / "README.md").read_text().splitlines()

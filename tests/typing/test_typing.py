"""The public interface under mypy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("cases.py")
ROOT = CASES.parents[2]


def mypy(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", "--no-error-summary", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_right_uses_are_accepted_and_wrong_ones_are_not() -> None:
    """An ignore that ignores nothing is an error too, so every wrong use is known to be found."""
    done = mypy(CASES)
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr


def test_the_errors_are_those_on_the_marked_lines(tmp_path: Path) -> None:
    """Without its ignores the module has an error on each of those lines, and on no other."""
    source = CASES.read_text()
    marked = {number for number, line in enumerate(source.splitlines(), 1) if "# type: ignore[" in line}
    bare = tmp_path / "cases.py"
    bare.write_text(re.sub(r"# type: ignore\[[^]]*\]", "", source))
    done = mypy(bare)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    assert found == marked
    assert len(marked) > 30

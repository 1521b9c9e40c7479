"""The pages of docs/ as programs: their files are written, their commands are typed, and what they show must come.

In a page, a Python block with a title is a file of that name. A console block is one terminal, ``shell 1`` say: lines
that begin with ``$ `` are typed, ``^C`` and ``^\\`` are keys, and the rest is all that the terminal shows from then
on, in which ``…`` stands for anything. A terminal whose program still runs is shown again, with the same command, as
it has become. Blocks in a tab are for the broker that the tab names.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.support.waiting import wait_until
from tests.support.workers import Program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from tests.conftest import Place

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Printed before a block whose lines may come in any order.
ANY_ORDER = "<!-- in any order -->"
KEYS = {"^C": signal.SIGINT, "^\\": signal.SIGQUIT}
#: A line of RabbitMQ before 4.3, one of a new SQLite file, one at a worker's start, and one of a connection that the
#: server ended (see below): the pages tell of them, and do not show them.
_NOT_SHOWN = (
    "a task that runs 30 minutes or longer may run twice",
    "made the file ",
    "; a message of its queues for any other task becomes a dead letter",
    "results and statuses cannot be stored now: making the stream",
)
#: What aiormq prints when a server ends a connection, as RabbitMQ 3.10 now and then does on busy cores (541): Leveret
#: connects again, and what the program does and prints then is what counts.
_LOST_CONNECTION = re.compile(
    r"Unexpected connection close from remote .*?\naiormq\.exceptions\.\w+: [^\n]*\n", re.DOTALL
)
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?$")
_INCLUDE = re.compile(r"^ *--8<-- \"(?P<path>[^\"]+)\"$")
_TAB = re.compile(r"^=== \"(?P<tab>[^\"]+)\"$")
#: Programs that run until they are stopped, and questions that are asked until the answer is as shown.
_LASTING = ("python tasks_worker.py", "leveret worker")
_QUESTIONS = ("leveret queues", "leveret dead")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    #: The tab that it is in, if any.
    tab: str = ""
    any_order: bool = False
    line: int = 0


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with what they include put in."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    tab, at = "", 0
    while at < len(lines):
        line = lines[at]
        if named := _TAB.match(line):
            tab = named["tab"]
        elif line and not line.startswith(" "):
            tab = ""
        fence = _FENCE.match(line)
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(_included(text.removeprefix(fence["indent"])) for text in lines[at + 1 : end])
            any_order = bool(at) and lines[at - 1].strip() == ANY_ORDER
            found.append(Block(fence["language"], fence["title"] or "", text, tab, any_order, at + 1))
            at = end
        at += 1
    return found


def _included(line: str) -> str:
    include = _INCLUDE.match(line)
    return (ROOT / include["path"]).read_text().rstrip("\n") if include else line


class Screen(NamedTuple):
    """One command of a terminal: what is typed, and what is shown then, with keys in between."""

    command: str
    shown: Sequence[str]

    def stages(self) -> Iterator[tuple[list[str], signal.Signals | None]]:
        """What is shown before each key, from the beginning, and the key; the last without one."""
        shown: list[str] = []
        for line in self.shown:
            if line in KEYS:
                yield list(shown), KEYS[line]
            else:
                shown.append(line)
        yield shown, None


def screens(text: str) -> list[Screen]:
    """The commands of a console block."""
    found: list[Screen] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(Screen(line.removeprefix("$ "), []))
        else:
            assert found, f"the block shows {line!r} before any command"
            found[-1] = Screen(found[-1].command, [*found[-1].shown, line.rstrip()])
    return found


#: Between columns, whose width depends on what is in them.
_GAP = re.compile(r"(\\ ){2,}")


def is_shown(expected: Sequence[str], output: str, *, any_order: bool = False) -> bool:
    """Whether a terminal's output is as a page shows it."""
    lines = [line.rstrip() for line in output.splitlines() if not any(one in line for one in _NOT_SHOWN)]
    if len(lines) != len(expected):
        return False
    for one in expected:
        pattern = _GAP.sub(" {2,}", ".*".join(map(re.escape, one.split("…"))))
        candidates = lines if any_order else lines[:1]
        found = next((line for line in candidates if re.fullmatch(pattern, line)), None)
        if found is None:
            return False
        lines.remove(found)
    return True


class Reader:
    """Somebody who follows a page, in a folder of their own and on one broker."""

    def __init__(self, place: Place, folder: Path) -> None:
        self._place = place
        self._folder = folder
        self._programs: dict[str, tuple[str, Program]] = {}
        self._logs = 0
        url = {} if place.node is None else {"LEVERET_URL": place.url}
        self._environment = {**{k: v for k, v in os.environ.items() if k != "LEVERET_URL"}, **url, "COLUMNS": "120"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _command, program in self._programs.values():
            program.kill_group()

    def follow(self, page: Path) -> None:
        """Do what a page says, from top to bottom; fails when it shows what does not come."""
        for block in blocks(page):
            if block.tab and block.tab != ("SQLite" if self._place.node is None else "RabbitMQ"):
                continue
            if block.language == "python":
                self._write(block, page)
            elif block.language == "console":
                for screen in screens(block.text):
                    self._look(block, screen, f"{page.name}:{block.line}")
            else:
                raise AssertionError(
                    f"{page.name}:{block.line}: a block in {block.language!r}, which nobody can follow"
                )

    def _write(self, block: Block, page: Path) -> None:
        assert block.title, f"{page.name}:{block.line}: a Python block without a title is no file"
        (self._folder / block.title).write_text(f"{block.text}\n")
        module = block.title.removesuffix(".py")
        self._run(["-c", f"import {module}"], f"{page.name}:{block.line}", [])

    def _look(self, block: Block, screen: Screen, where: str) -> None:
        command = screen.command
        if command.startswith("export LEVERET_URL="):
            assert self._place.node is not None, f"{where}: SQLite needs no URL"
        elif command.startswith("sudo rabbitmqctl "):
            assert self._place.node is not None, f"{where}: there is no RabbitMQ"
            self._place.node.ctl(*shlex.split(command)[2:])
        elif command.startswith(_LASTING):
            self._watch(block, screen, where)
        elif command.startswith(_QUESTIONS):
            self._ask(command, screen.shown, where)
        else:
            self._run(_arguments(command), where, screen.shown)

    def _watch(self, block: Block, screen: Screen, where: str) -> None:
        """Start a program, or look at the one that runs, until it is as shown; and press the keys."""
        running = self._programs.get(block.title)
        alike = [shell for shell, (command, _) in self._programs.items() if command == screen.command]
        if running is None or running[0] != screen.command or running[1].process.poll() is not None:
            self._start(block.title, screen.command)
            alike = [block.title]
        for shown, key in screen.stages():
            shell = self._wait_for(shown, sorted(alike, key=lambda shell: shell != block.title), block, where)
            # Workers are alike: whichever got the task is the one that the page means.
            programs = self._programs
            programs[block.title], programs[shell] = programs[shell], programs[block.title]
            if key is not None:
                os.killpg(programs[block.title][1].pid, key)
        if any(line in KEYS for line in screen.shown):
            self._programs[block.title][1].exit_code()

    def _wait_for(self, shown: Sequence[str], shells: Sequence[str], block: Block, where: str) -> str:
        """The first of these terminals that is as shown."""

        def found() -> str | None:
            return next(
                (one for one in shells if is_shown(shown, self._programs[one][1].output, any_order=block.any_order)),
                None,
            )

        try:
            return wait_until(found, "a terminal is as shown") or ""
        except AssertionError:
            raise AssertionError(
                f"{where}: it should show\n{_lines(shown)}\nand there is\n{self._all_shown()}"
            ) from None

    def _all_shown(self) -> str:
        return "\n".join(
            f"{shell}: {command}\n{program.output}" for shell, (command, program) in self._programs.items()
        )

    def _start(self, shell: str, command: str) -> None:
        if shell in self._programs:
            self._programs[shell][1].kill_group()
        self._logs += 1
        log = self._folder / f"terminal-{self._logs}.log"
        self._programs[shell] = command, Program(_arguments(command), log, self._environment, folder=self._folder)

    def _ask(self, command: str, shown: Sequence[str], where: str) -> None:
        """Again and again: a broker may count a moment later."""
        try:
            wait_until(lambda: is_shown(shown, self._output(_arguments(command))), "the answer is as shown")
        except AssertionError:
            answer = self._output(_arguments(command))
            raise AssertionError(f"{where}: it should show\n{_lines(shown)}\nand it shows\n{answer}") from None

    def _run(self, arguments: list[str], where: str, shown: Sequence[str]) -> None:
        output = self._output(arguments)
        assert is_shown(shown, output), f"{where}: it should show\n{_lines(shown)}\nand it shows\n{output}"

    def _output(self, arguments: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return _LOST_CONNECTION.sub("", done.stdout)


def _lines(shown: Sequence[str]) -> str:
    return "\n".join(shown)


def _arguments(command: str) -> list[str]:
    """Of this Python."""
    program, *arguments = shlex.split(command)
    assert program in ("python", "leveret"), f"nobody can type {command!r} here"
    return arguments if program == "python" else ["-m", "leveret", *arguments]

"""Settings from the environment and from pyproject.toml."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from leveret import App, ConfigurationError
from leveret.cli import cli
from leveret.client import resolve_url

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

PROJECT = """
[tool.leveret]
app = "shop:app"
url = "sqlite:///data/shop.db"
keep-results = 60
max_message_size = 2_000
queue = ["mail", "images"]
concurrency = 4
processes = "1-3"
grace = "2m"
log_level = "WARNING"
reload = true

[tool.leveret.dashboard]
port = 9000
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a project, below the one with its pyproject.toml."""
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    below = tmp_path / "src" / "shop"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    for name in ("URL", "CONCURRENCY", "KEEP_RESULTS", "APP", "LOG_LEVEL", "ENQUEUE_TIMEOUT"):
        monkeypatch.delenv(f"LEVERET_{name}", raising=False)
    return tmp_path


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What `leveret worker` would run with."""
    kept: dict[str, Any] = {}
    monkeypatch.setattr("leveret.cli.worker.run_worker", lambda app, **options: kept.update(options, app=app))
    result = CliRunner().invoke(cli, ["worker", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return kept


def test_a_worker_takes_the_options_of_its_project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del folder
    options = started(monkeypatch)
    assert (options["app"], options["queues"], options["url"]) == ("shop:app", ("mail", "images"), None)
    assert (options["concurrency"], options["processes"], options["grace"]) == (4, (1, 3), 120.0)
    assert (options["log_level"], options["reload"], options["prefetch"]) == ("WARNING", True, "auto")


def test_the_environment_stands_before_the_project_and_the_option_before_both(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del folder
    monkeypatch.setenv("LEVERET_CONCURRENCY", "5")
    monkeypatch.setenv("LEVERET_APP", "other:app")
    monkeypatch.setenv("LEVERET_LOG_LEVEL", "error")
    options = started(monkeypatch)
    assert (options["concurrency"], options["app"], options["log_level"]) == (5, "other:app", "ERROR")
    options = started(monkeypatch, "third:app", "--concurrency", "6")
    assert (options["concurrency"], options["app"]) == (6, "third:app")


def test_an_application_takes_them_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    assert app.url == f"sqlite:///{folder}/data/shop.db"  # the same in each folder of the project
    assert (app.keep_results, app.max_message_size, app.enqueue_timeout) == (60.0, 2_000, 30.0)
    monkeypatch.setenv("LEVERET_KEEP_RESULTS", "7.5")
    monkeypatch.setenv("LEVERET_ENQUEUE_TIMEOUT", "3")
    app = App(max_message_size=10)
    assert (app.keep_results, app.max_message_size, app.enqueue_timeout) == (7.5, 10, 3.0)
    monkeypatch.setenv("LEVERET_URL", "memory://")
    assert app.url == "memory://"


def test_a_project_without_a_table_of_ours_sets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nleveret_app = 'shop:app'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEVERET_URL", raising=False)
    assert resolve_url(None) == f"sqlite:///{tmp_path}/leveret.db"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.leveret]\nconcurency = 4\n", "no setting 'concurency'; did you mean 'concurrency'?"),
        ("[tool.leveret]\nzzz = 4\n", "no setting 'zzz'; there are: "),
        ("[tool.leveret.dashboard]\nprot = 4\n", "no setting 'prot'; did you mean 'port'?"),
        ("[tool]\nleveret = 3\n", "it must be a table"),
        ("[tool.leveret\n", "cannot be read"),
        ("[tool.leveret]\nconcurrency = 'many'\n", "'many' is not a valid integer"),
    ],
)
@pytest.mark.parametrize("command", ["worker", "dashboard"])
def test_a_mistake_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str, command: str
) -> None:
    if command == "dashboard" and "many" in text:
        pytest.skip("it has no such option")
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, [command, "shop:app"])
    assert result.exit_code != 0
    assert said in result.output + str(result.exception)


@pytest.mark.parametrize("value", ["soon", "-1", "inf"])
def test_a_mistake_in_the_environment_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LEVERET_KEEP_RESULTS", value)
    with pytest.raises(ConfigurationError, match="keep_results is"):
        App()

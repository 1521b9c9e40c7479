"""Import the application that a command names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from leveret.client.app import App
from leveret.errors import AppNotLoaded
from leveret.model import shorten
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import ModuleType


def load_app(reference: str) -> App:
    """Import the application of a ``MODULE:APP`` or ``FILE.py:APP``. Raises AppNotLoaded with the reason."""
    module_name, separator, attribute = reference.rpartition(":")
    if not separator or not module_name or not attribute:
        raise AppNotLoaded(f"{reference!r} is not of the form MODULE:APP (as in tasks:app) or FILE.py:APP")
    module = _load_file(module_name) if module_name.endswith(".py") else _load_module(module_name)
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        found = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = did_you_mean(attribute, found) or (
            f"; it has: {', '.join(found)}" if found else "; it has no leveret.App at its top level"
        )
        raise AppNotLoaded(f"{module_name!r} has no application {attribute!r}{hint}")
    _check_imported_once(module, attribute, app)
    return app


def _check_imported_once(module: ModuleType, attribute: str, app: App) -> None:
    """Raises AppNotLoaded when tasks were registered with the application of the same file under another name."""
    file = getattr(module, "__file__", None)
    for name, other in list(sys.modules.items()):
        if other is module or file is None or not _is_of_file(other, file):
            continue
        twin = getattr(other, attribute, None)
        if not isinstance(twin, App) or twin is app:
            continue
        missing = sorted({task.name for task in twin.tasks} - {task.name for task in app.tasks})
        if missing:
            raise AppNotLoaded(
                f"{file} was imported twice, as {module.__name__!r} and as {name!r}, which makes two applications; "
                f"the second has the tasks that the first lacks ({', '.join(missing)}): use {name}:{attribute}, from "
                "the folder that its imports begin in"
            )


def _is_of_file(module: object, file: str) -> bool:
    found = getattr(module, "__file__", None)
    return isinstance(found, str) and Path(found).resolve() == Path(file).resolve()


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise AppNotLoaded(
                f"there is no module {error.name!r} in {Path.cwd()} or in the installed packages"
            ) from error
        raise not_loaded(f"importing {name!r} failed", error) from error
    except (Exception, SystemExit) as error:
        raise not_loaded(f"importing {name!r} failed", error) from error


def _load_file(name: str) -> ModuleType:
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise AppNotLoaded(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(path.stem, None)
        raise not_loaded(f"importing {path} failed", error) from error
    return module


def not_loaded(what: str, error: BaseException, on_the_way: Collection[str] = ()) -> AppNotLoaded:
    """What failed, with the line that raised, and the traceback of what is not Python's or Leveret's way there.

    ``on_the_way``: more files that are.
    """

    def is_on_the_way(filename: str) -> bool:
        return filename.startswith("<frozen importlib") or filename in (__file__, importlib.__file__, *on_the_way)

    at = error.__traceback__
    while at is not None and is_on_the_way(at.tb_frame.f_code.co_filename):
        at = at.tb_next
    frames = traceback.extract_tb(at)
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}, line {error.lineno})"
        message = f"{type(error).__name__}: {error.msg}"
    else:
        ours = [frame for frame in frames if not is_on_the_way(frame.filename)]
        place = f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""
        message = f"{type(error).__name__}: {error}"
    whole = "".join(traceback.format_exception(type(error), error, at))
    return AppNotLoaded(f"{what}: {message}{place}", shorten(whole))

"""What ``settings.LEVERET`` and ``settings.TASKS`` say of the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.utils.module_loading import import_string

from leveret.errors import ConfigurationError
from leveret.model import Queue
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

#: The settings' name for our backend of ``django.tasks``.
BACKEND = "leveret.contrib.django.backend.LeveretBackend"
_VALUES = ("URL", "ENQUEUE_TIMEOUT", "MAX_MESSAGE_SIZE", "KEEP_RESULTS", "MAX_RESULT_SIZE")
_FUNCTIONS = ("MIDDLEWARE", "THREAD_MIDDLEWARE", "ENQUEUE_MIDDLEWARE")
_KNOWN = (*_VALUES, "QUEUES", *_FUNCTIONS, "LIFESPAN")


def configuration() -> dict[str, Any]:
    """The arguments of ``App``. Raises ConfigurationError for a setting that there is not."""
    given: Mapping[str, Any] = getattr(settings, "LEVERET", {})
    if not isinstance(given, dict):
        raise ConfigurationError(f"settings.LEVERET is {given!r}; it must be a dict, as {{'URL': 'amqp://...'}}")
    for name in given:
        if name not in _KNOWN:
            hint = did_you_mean(str(name), _KNOWN) or "; there are: " + ", ".join(_KNOWN)
            raise ConfigurationError(f"settings.LEVERET has {name!r}, which is no setting{hint}")
    values = {name.lower(): given[name] for name in _VALUES if name in given}
    layers = {name.lower(): [_function(name, one) for one in given.get(name, ())] for name in _FUNCTIONS}
    lifespan = {"lifespan": _function("LIFESPAN", given["LIFESPAN"])} if given.get("LIFESPAN") else {}
    return {**values, **layers, **lifespan, "queues": _queues(given.get("QUEUES", ()))}


def _queues(given: Iterable[Queue | str]) -> list[Queue]:
    """Those of LEVERET as they are said there; those of TASKS besides, which have priorities."""
    queues = {one.name: one for one in (Queue(one) if isinstance(one, str) else one for one in given)}
    for params in getattr(settings, "TASKS", {}).values():
        if params.get("BACKEND") == BACKEND:
            for name in params.get("QUEUES", ["default"]):
                queues.setdefault(name, Queue(name))
    return list(queues.values())


def _function(setting: str, given: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(given, str):
        return given
    try:
        found: Callable[..., Any] = import_string(given)
    except ImportError as error:
        raise ConfigurationError(
            f"settings.LEVERET[{setting!r}] names {given!r}, which cannot be imported: {error}"
        ) from error
    return found

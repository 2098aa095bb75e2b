"""Flattens nested settings into keys and values."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def flatten(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (key, value) of every leaf, nested keys joined by dots."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flatten(value))
        else:
            yield key, value


def flat_text(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the result of flatten as a list, with values as text and None as "none"."""
    return [(key, "none" if value is None else str(value)) for key, value in flatten(settings)]


def inside(value: Any) -> Iterable[Any]:
    """Returns the values directly inside a mapping or a list, and none inside any other value."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()

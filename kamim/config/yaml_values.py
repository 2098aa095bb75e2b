"""Reads YAML as plain values of limited size: a configuration may be that of a run that somebody else made."""

from itertools import chain, islice
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError

from kamim import KamimError
from kamim.storage.escape import one_line
from kamim.storage.flatten import inside

MAX_CHARACTERS = 1 << 18  # of a file; PyYAML reads about 100,000 in a second
MAX_VALUES, MAX_LEVELS = 10_000, 20  # with aliases expanded
MAX_DIGITS = 64  # characters of a number; those of a double are at most 24

_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without tags and with short numbers. Dates are text."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See Composer. Raises ComposerError for a tag, such as !!set."""
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, f"the tag {event.tag} is not supported", event.start_mark)
        return super().compose_node(parent, index)

    def compose_scalar_node(self, anchor: Any) -> Any:
        """See Composer. Raises ComposerError for a number of more than MAX_DIGITS characters."""
        node = super().compose_scalar_node(anchor)
        if node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise ComposerError(None, None, f"a number of more than {MAX_DIGITS} characters", node.start_mark)
        return node


def parse(text: str) -> Any:
    """Returns the value of a YAML document: None, bool, int, float, str, and lists and dicts of these.

    Raises KamimError, which names the fault, for anything else and beyond the limits.
    """
    if len(text) > MAX_CHARACTERS:
        raise KamimError(f"not a configuration: {len(text):,} characters; must be at most {MAX_CHARACTERS:,}")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise KamimError(f"not YAML: {one_line(error)}") from error
    _check_size(value)
    return value


def _check_size(value: Any) -> None:
    """Raises KamimError for more than MAX_VALUES or MAX_LEVELS, such as a list that holds itself."""
    level, count = [value], 0
    for _ in range(MAX_LEVELS):
        count += len(level)
        if count > MAX_VALUES:
            raise KamimError(f"not a configuration: more than {MAX_VALUES:,} values; aliases count as what they name")
        level = list(islice(chain.from_iterable(map(inside, level)), MAX_VALUES + 1))
    if level:
        raise KamimError(f"not a configuration: more than {MAX_LEVELS} levels, or an alias inside what it names")

"""Reads configurations: YAML files and key=value overrides become typed sections, checked before any work.

An unknown key, a wrong type or an impossible combination raises KamimError, one line with the key, its value and what
is allowed. The sections are defined in kamim.config.pretrain and kamim.evaluation.options.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import pydantic
import yaml
from pydantic import AfterValidator, Field

import kamim
from kamim import KamimError
from kamim.config.yaml_values import parse
from kamim.storage.escape import one_line

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
Natural = Annotated[int, Field(ge=0, le=10**12)]
Count = Annotated[int, Field(gt=0, le=10**12)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def one_of(value: str, allowed: Sequence[str]) -> str:
    """Returns the value. Raises KamimError unless it is allowed."""
    if value not in allowed:
        raise KamimError(f"must be one of {', '.join(allowed)}")
    return value


def _not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise KamimError("must hold one at least")
    return value


NotEmpty = AfterValidator(_not_empty)
DURATION = re.compile(r"(\d+(?:\.\d*)?(?:e\d+)?) *(steps|epochs|examples)")


def _duration(value: str) -> str:
    match = DURATION.fullmatch(value)
    if match is None or float(match[1]) >= 1e15:  # which has no rounding error as a float
        raise KamimError("must be a number and its unit, such as 5000 steps, 0.5 epochs or 1e6 examples")
    return value


Duration = Annotated[str, AfterValidator(_duration)]


def in_steps(duration: str, batch_size: int, steps_per_epoch: int) -> int:
    """Converts a Duration to optimiser steps, rounded."""
    match = DURATION.fullmatch(duration)
    assert match is not None, duration
    per_unit = {"steps": 1.0, "epochs": steps_per_epoch, "examples": 1 / batch_size}[match[2]]
    return round(float(match[1]) * per_unit)


_SHORT = reprlib.Repr()  # shortens values in messages: with YAML aliases a few lines can expand without bound
_SHORT.maxstring = _SHORT.maxother = 200


class Section(pydantic.BaseModel):
    """A group of keys. Unknown keys are errors, and values are immutable. The string below a key documents it."""

    PRESETS: ClassVar[str] = ""  # the subfolder of configs/ with the presets of this kind

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


C = TypeVar("C", bound=Section)


def load(kind: type[C], file: Path | None, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None) -> C:
    """Reads a YAML file (if any), applies `key.key=value` overrides (values are YAML), and validates the result.

    file: a path, or the name of a preset, such as vit_base_kamim. given: top-level keys that override both, not parsed
    as YAML. Raises KamimError.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        file = find_preset(kind, file)
        try:
            tree = parse(file.read_text()) or {}
        except UnicodeDecodeError as error:
            raise KamimError(f"{file}: not YAML: {one_line(error)}") from error
        except KamimError as error:
            raise KamimError(f"{file}: {error}") from error
        if not isinstance(tree, dict):
            raise KamimError(f"{file}: must hold keys and values, holds {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    tree.update(given or {})
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        raise KamimError("; ".join(_line(kind, e) for e in error.errors())) from None


def find_preset(kind: type[Section], file: Path) -> Path:
    """Returns the file if it exists, otherwise the preset of that name. Raises KamimError if there is neither."""
    if file.is_file():
        return file
    if preset := presets(kind).get(str(file).removesuffix(".yaml")):
        return preset
    raise KamimError(f"-c {file}: neither a file nor a preset; presets are {', '.join(presets(kind)) or 'none'}")


def presets(kind: type[Section]) -> dict[str, Path]:
    """Returns kamim's own presets of a kind, by name."""
    return {file.stem: file for file in sorted((_configs() / kind.PRESETS).glob("*.yaml"))} if kind.PRESETS else {}


def _configs() -> Path:
    """Returns the folder configs/: within an installed package, beside the package in a clone."""
    package = Path(kamim.__file__).parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise KamimError(f"{override!r}: overrides are key=value, such as optim.lr=1e-3 or weighting=null")
    *parents, name = key.split(".")
    for parent in parents:
        if parent in tree and tree[parent] is None:
            raise KamimError(f"{override!r}: {parent} is null here; take a preset that has it, or set {parent}={{...}}")
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    try:
        tree[name] = _number(parse(value))
    except KamimError as error:
        raise KamimError(f"{override!r}: the value is {error}") from None


def _number(value: Any) -> Any:
    """Converts numbers that YAML 1.1 reads as text, such as 1e-3."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _line(kind: type[Section], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("float", "constrained", "literal")))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):
        return f"{key.rpartition('.')[0]}: has too few values"
    if error["type"] == "missing":
        return f"{key}: is missing; set it in the file or as {key}=..."
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed are {', '.join(_fields(kind, error['loc'][:-1]))}"
    if error["type"] == "value_error" and isinstance(error["input"], dict | Section):
        return f"{key}.{message}" if key and " = " in message else message
    return f"{key} = {_SHORT.repr(error['input'])}: {message[:1].lower()}{message[1:]}"


def _fields(kind: type[Section], location: Sequence[Any]) -> list[str]:
    for part in location:
        annotation = kind.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(o for o in options if isinstance(o, type) and issubclass(o, Section))
    return list(kind.model_fields)


def dump(config: Section, exclude: Any = None) -> str:
    """Returns the resolved configuration as YAML, without the keys in `exclude`. load() is its inverse."""
    text: str = yaml.safe_dump(config.model_dump(mode="json", exclude=exclude), sort_keys=False)
    return text


def document(kind: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields (key, default as YAML, meaning) of every key of a section, nested keys joined by dots."""
    for name, field in kind.model_fields.items():
        key, meaning = f"{prefix}{name}", _meaning(kind, name)
        inner = _section_in(field.annotation)
        if inner is None or field.default is None:
            yield (
                key,
                "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True)),
                meaning,
            )
        if inner is not None:
            yield from document(inner, f"{key}.")


def _meaning(kind: type[Section], name: str) -> str:
    """Returns the documentation of a field, which a class that only changes its default inherits."""
    bases = (base for base in kind.__mro__ if issubclass(base, Section) and name in base.model_fields)
    return next((" ".join(text.split()) for base in bases if (text := base.model_fields[name].description)), "")


def _section_in(annotation: Any) -> type[Section] | None:
    """Returns the section type of an annotation that is Section or Section | None, otherwise None."""
    options = [option for option in (annotation, *get_args(annotation)) if option is not NoneType]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def _as_yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True).removesuffix("\n...\n").strip()

"""Turn pydantic's errors into lines that name the parameter, its value, and the values that are valid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, TypeVar

from pydantic import ValidationError

from pipelines.config.schema import AlgorithmParams, OnPolicyBudget, PreferenceBudget
from pipelines.config.types import Section
from posttrain.algorithms import PRESETS
from posttrain.errors import ConfigError
from posttrain.text import nearest

S = TypeVar("S", bound=Section)
_MEMBER = re.compile(r"(constrained-\w+|literal\[.*\]|(list|function-\w+|dict|union)\[.*\])", re.DOTALL)
"""Names that pydantic adds to a location for each member of a union, such as `literal['auto']`."""

_EXAMPLES = {"float_type": "0.001", "int_type": "3"}
_YES, _NO = ("yes", "y", "on", "true"), ("no", "n", "off", "false")
"""Words that older YAML reads as truth values."""
MOST_PLACES = 3
"""Most places that a message names; a name that is valid in more is not specific enough."""


def validated(kind: type[S], tree: Any, location: tuple[str, ...]) -> S:
    """Validate a tree. Raises ConfigError with one line per parameter that is wrong."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        groups = [[*faults] for _, faults in groupby(error.errors(), key=_parameter)]
        raise ConfigError("\n".join(_explained(kind, faults, location) for faults in groups)) from None


def _parameter(fault: Any) -> tuple[Any, ...]:
    """Return the location of the parameter that a fault is about: up to the first member of a union."""
    loc = fault["loc"]
    member = next((i for i, part in enumerate(loc) if isinstance(part, str) and _MEMBER.fullmatch(part)), len(loc))
    return tuple(loc[:member])


def _explained(kind: type[Section], faults: Sequence[Any], location: tuple[str, ...]) -> str:
    first = faults[0]
    if _parameter(first) == first["loc"]:
        return "\n".join(_explain(kind, fault, location) for fault in faults)
    path = ".".join([*location, *map(str, _parameter(first))])
    whole = next(
        (fault["input"] for fault in faults if len(fault["loc"]) == len(_parameter(fault)) + 1), first["input"]
    )
    wanted = [_message(fault) for fault in faults]
    return f"{path} = {whole!r}: {', or '.join(dict.fromkeys(wanted))}"


def _explain(kind: type[Section], fault: Any, location: tuple[str, ...]) -> str:
    """Return one error of pydantic as a line."""
    if fault["loc"][-1:] == ("[key]",):
        path = ".".join([*location, *map(str, fault["loc"][:-2])])
        return f"{path}: the key {fault['input']!r}: {_message(fault)}"
    path = ".".join([*location, *map(str, fault["loc"])])
    if fault["type"] == "extra_forbidden":
        return f"{path}: unknown parameter{_suggestion(kind, fault['loc'], location)}"
    if fault["type"] == "missing":
        section, *rest = (*location, *map(str, fault["loc"]))
        if section == "algorithms" and rest[1:] == ["preset"]:
            return f"{path}: missing, and {rest[0]!r} is no preset{nearest(rest[0], PRESETS)}"
        return f"{path}: missing; add it"
    if not path:
        return _message(fault)
    shown = "" if isinstance(fault["input"], dict) else f" = {fault['input']!r}"
    return f"{path}{shown}: {_message(fault)}"


def _suggestion(kind: type[Section], loc: tuple[Any, ...], location: tuple[str, ...]) -> str:
    """Return the end of the message on an unknown parameter: dotted places in which its name is valid, else the nearest name here."""
    name, owner = str(loc[-1]), _model_at(kind, loc[:-1])
    known = owner.model_fields if owner else {}
    misspelt = name.strip().casefold() in {each.casefold() for each in known}
    places = [] if misspelt or owner is None else _places_below(owner, name)
    places = [(*loc[:-1], *place) for place in places]
    for depth in range(len(loc) - 2, 0, -1):
        above = _model_at(kind, loc[:depth])
        if not places and not misspelt and above is not None and name in above.model_fields:
            places = [(*loc[:depth], name)]
    if not 0 < len(places) <= MOST_PLACES:
        return nearest(name, known)
    dotted = [repr(".".join([*location, *map(str, place)])) for place in places]
    return f"; did you mean {' or '.join(dotted)}? Valid here: {', '.join(sorted(known))}"


def _places_below(owner: type[Section], name: str) -> list[tuple[str, ...]]:
    """Return the paths from a section to the parameters of this name in the sections below it, of the least depth only.

    An algorithm's budget has the fields of its kind; a place counts if both kinds have it.
    """
    if owner is AlgorithmParams:
        preference, on_policy = (_places_in_budget(kind, name) for kind in (PreferenceBudget, OnPolicyBudget))
        return [place for place in preference if place in on_policy]
    level: list[tuple[tuple[str, ...], type[Section]]] = [((), owner)]
    while level:
        level = [
            ((*path, field), section)
            for path, parent in level
            for field, info in parent.model_fields.items()
            for section in _sections(info.annotation)
        ]
        found = [(*path, name) for path, section in level if name in section.model_fields]
        if found:
            return list(dict.fromkeys(found))
    return []


def _places_in_budget(kind: type[Section], name: str) -> list[tuple[str, ...]]:
    places = [(name,)] if name in kind.model_fields else _places_below(kind, name)
    return [("budget", *place) for place in places]


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field may hold; those in dictionaries and lists have their own names."""
    options = [annotation] if isinstance(annotation, type) else getattr(annotation, "__args__", ())
    found = [each for each in options if isinstance(each, type) and issubclass(each, Section)]
    return [] if str(annotation).startswith(("dict", "list")) else found


def _message(fault: Any) -> str:
    """Return which values are valid; a number that was written as text is named as such."""
    message: str = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace(
        "List should have at least 1 item after validation, not 0", "a list needs at least one entry"
    )
    if fault["type"] == "model_type":
        return "should be a section with keys, e.g. {key: value}"
    if fault["type"] in ("float_type", "int_type", "bool_type"):
        return f"{message}{_reason(fault['type'], fault['input'])}"
    if fault["type"] == "string_type" and isinstance(fault["input"], bool | int | float):
        return (
            f"{message}, and YAML reads this as a {_kind(fault['input'])}; write it in quotes: {str(fault['input'])!r}"
        )
    return message


def _reason(wanted: str, given: Any) -> str:
    """Return why a value is no number or truth value, and which one to write; empty for lists and mappings."""
    if wanted == "bool_type":
        if isinstance(given, str) and given.strip().lower() in (*_YES, *_NO):
            return f", and YAML reads this as a text; write {'true' if given.strip().lower() in _YES else 'false'}"
        return ", and this is no truth value; write true or false" if isinstance(given, str | int | float) else ""
    if isinstance(given, bool):
        return f", and this is a truth value; write a number, such as {_EXAMPLES[wanted]}"
    if isinstance(given, str):
        return f", and this is a text; write a number without quotes, such as {_EXAMPLES[wanted]}"
    if isinstance(given, float):
        whole = given.is_integer()
        return (
            f", and this has a decimal point; write {int(given)}"
            if whole
            else ", and this is a fraction; write a whole number"
        )
    return ""


def _kind(value: Any) -> str:
    return "truth value" if isinstance(value, bool) else "number"


def _model_at(kind: Any, loc: tuple[Any, ...]) -> type[Section] | None:
    """Return the section at a location of an error."""
    for part in loc:
        if isinstance(kind, type) and issubclass(kind, Section):
            kind = kind.model_fields[part].annotation
        else:
            kind = getattr(kind, "__args__", [None])[-1]
        options = [a for a in getattr(kind, "__args__", ()) if isinstance(a, type) and issubclass(a, Section)]
        if options and not str(kind).startswith(("dict", "list")):
            kind = options[0]
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None

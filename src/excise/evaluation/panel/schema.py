"""Whether a JSON value fits a schema: the few keywords of JSON Schema that the panel's questions use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from excise.plain import Plain, Values


def fits(value: Plain, schema: Values) -> bool:
    """Whether a value fits.

    Args:
        value: what `json.loads` gave.
        schema: with keywords of `KEYWORDS` alone.

    Raises:
        ValueError: a keyword that is not known here; it would be ignored.

    Examples:
        >>> fits({"age": 36}, {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
        True
        >>> fits(True, {"type": "integer"})
        False

    """
    if unknown := schema.keys() - KEYWORDS.keys():
        raise ValueError(f"expected keywords in {', '.join(KEYWORDS)}, got {', '.join(sorted(unknown))}")
    return all(KEYWORDS[keyword](value, told, schema) for keyword, told in schema.items())


def _is_type(value: Plain, name: str, schema: Values) -> bool:
    # true and false are integers to Python, and 1.0 is one to JSON.
    if isinstance(value, bool) or value is None:
        return name == {True: "boolean", False: "boolean", None: "null"}[value]
    if isinstance(value, int | float):
        return name == "number" or (name == "integer" and float(value).is_integer())
    return isinstance(value, {"string": str, "array": list, "object": dict}.get(name, ()))


def _is_one_of(value: Plain, options: list[Any], schema: Values) -> bool:
    return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)


def _fit_properties(value: Plain, properties: Values, schema: Values) -> bool:
    if not isinstance(value, dict):
        return True
    return all(fits(value[name], inner) for name, inner in properties.items() if name in value)


def _has_only_known(value: Plain, allowed: bool, schema: Values) -> bool:
    return allowed or not isinstance(value, dict) or value.keys() <= schema.get("properties", {}).keys()


def _is_distinct(value: Plain, wanted: bool, schema: Values) -> bool:
    return not (wanted and isinstance(value, list)) or all(value.count(item) == 1 for item in value)


KEYWORDS: dict[str, Callable[[Any, Any, Values], bool]] = {
    "type": _is_type,
    "enum": _is_one_of,
    "properties": _fit_properties,
    "required": lambda value, names, schema: not isinstance(value, dict) or set(names) <= value.keys(),
    "additionalProperties": _has_only_known,
    "items": lambda value, inner, schema: not isinstance(value, list) or all(fits(item, inner) for item in value),
    "minItems": lambda value, least, schema: not isinstance(value, list) or len(value) >= least,
    "maxItems": lambda value, most, schema: not isinstance(value, list) or len(value) <= most,
    "uniqueItems": _is_distinct,
    "minimum": lambda value, least, schema: not isinstance(value, int | float) or value >= least,
    "maximum": lambda value, most, schema: not isinstance(value, int | float) or value <= most,
}

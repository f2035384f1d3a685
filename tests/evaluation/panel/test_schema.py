"""The subset of JSON Schema, keyword by keyword."""

import pytest

from excise.evaluation.panel.schema import KEYWORDS, fits

TABLE = [
    ({"type": "integer"}, [1, -3, 2.0], [True, 1.5, "1", None]),
    ({"type": "number"}, [1, 1.5], [True, "1", None]),
    ({"type": "string"}, ["", "a"], [1, None, ["a"]]),
    ({"type": "boolean"}, [True, False], [0, "true"]),
    ({"type": "null"}, [None], [0, ""]),
    ({"type": "array"}, [[], [1]], [{}, "a"]),
    ({"type": "object"}, [{}], [[], None]),
    ({"enum": [1, "a", None]}, [1, "a", None], [True, 2, "A"]),
    ({"properties": {"a": {"type": "string"}}}, [{}, {"a": "b"}, {"b": 1}, 3], [{"a": 1}]),
    ({"required": ["a"]}, [{"a": None}, 3], [{}, {"b": 1}]),
    ({"properties": {"a": {}}, "additionalProperties": False}, [{}, {"a": 1}], [{"b": 1}]),
    ({"items": {"type": "integer"}}, [[], [1, 2], "a"], [[1, "a"]]),
    ({"minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
    ({"uniqueItems": True}, [[1, 2], [], {}], [[1, 1]]),
    ({"minimum": 1, "maximum": 5}, [1, 5.0, "a"], [0, 5.5]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), TABLE)
def test_values_fit_or_do_not(schema, good, bad):
    assert [value for value in good if not fits(value, schema)] == []
    assert [value for value in bad if fits(value, schema)] == []


def test_the_table_has_every_keyword_and_others_are_refused():
    assert {keyword for schema, _, _ in TABLE for keyword in schema} == set(KEYWORDS)
    with pytest.raises(ValueError, match="got pattern"):
        fits("a", {"pattern": "a"})

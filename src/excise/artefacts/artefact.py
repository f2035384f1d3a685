"""Results of verbs as files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from excise.artefacts.json_files import read_json, write_artefact
from excise.errors import InputError
from excise.plain import Facts, Plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance as _Dataclass
else:
    _Dataclass = object


class Artefact(_Dataclass):
    """Base of dataclasses that are a verb's result: written as JSON and read again."""

    def to_json(self) -> Facts:
        """Plain values by name of field."""
        return asdict(self)

    def save(self, path: str | Path, *, key: str | None = None) -> None:
        """Write it, atomically; `key` is that of what made it."""
        write_artefact(path, self.to_json(), key=key)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; fields that are not known here are left out.

        Raises:
            InputError: no such file, not JSON, or a field is missing or of another type.

        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(read_json(path))
        except ValidationError as error:
            raise _not_one(cls, error.errors()[0], path) from None


def check_types(cls: type, value: Plain, path: str | Path) -> None:
    """Refuse content that has fields of a result with values of other types, or a field that is not whole.

    It need not have all fields; what it has must have all parts.

    Raises:
        InputError: names the first such field.

    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(cls).validate_python(value, strict=True)
    except ValidationError as error:
        absent = ("missing", "missing_argument")
        wrong = [each for each in error.errors() if each["type"] not in absent or len(each["loc"]) > 1]
        if wrong:
            raise _not_one(cls, wrong[0], path) from None


def _not_one(cls: type, error: Any, path: str | Path) -> InputError:
    where = ".".join(map(str, error["loc"]))
    return InputError(f"{path} is no {cls.__name__.strip('_')} of excise: {where}: {error['msg'].lower()}")

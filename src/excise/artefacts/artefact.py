"""Results of verbs as files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

from excise.artefacts.json_files import read_json, write_artefact
from excise.errors import InputError
from excise.plain import Facts

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
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path} is no {cls.__name__} of excise: {where}: {first['msg'].lower()}") from None

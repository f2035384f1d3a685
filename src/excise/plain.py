"""Names of plain data: what JSON and YAML hold, before a dataclass gives it a shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Values by name, as an artefact, a config or a recipe holds them; `Values` where they are only read.
Facts = dict[str, Any]
Values = Mapping[str, Any]
# One value of such a mapping: a number, a text, a list of these, or None.
Plain = Any

"""Artefacts on disk: where they may go, how they get their name, and how they are known to be what was written."""

from excise.artefacts.arrays import Arrays, read_arrays, write_arrays
from excise.artefacts.artefact import Artefact, check_types
from excise.artefacts.atomic import atomic_path, clear_leftovers, clear_leftovers_in, discarding, replacing
from excise.artefacts.destination import RECIPE, require_free
from excise.artefacts.disk import disk_error
from excise.artefacts.inside import inside, stays_inside
from excise.artefacts.json_files import as_number, json_text, read_json, write_artefact, write_json
from excise.artefacts.lock import HeldError, locked
from excise.artefacts.seal import MADE_BY, digest, facts_of, key_of

__all__ = [
    "MADE_BY",
    "RECIPE",
    "Arrays",
    "Artefact",
    "HeldError",
    "as_number",
    "atomic_path",
    "check_types",
    "clear_leftovers",
    "clear_leftovers_in",
    "digest",
    "discarding",
    "disk_error",
    "facts_of",
    "inside",
    "json_text",
    "key_of",
    "locked",
    "read_arrays",
    "read_json",
    "replacing",
    "require_free",
    "stays_inside",
    "write_arrays",
    "write_artefact",
    "write_json",
]

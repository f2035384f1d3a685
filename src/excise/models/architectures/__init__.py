"""Architectures as data: where the blocks are, what each adds to the residual stream, what the config counts.

Adding one is a record in a family file here and a line in `FAMILIES`; see CONTRIBUTING.
"""

from __future__ import annotations

from excise.errors import ArchitectureError
from excise.models.architectures import dense, hybrid, moe, parallel, post_norm
from excise.models.architectures.record import Architecture, SublayerRecord

FAMILIES = (dense, post_norm, parallel, moe, hybrid)

ARCHITECTURES: dict[str, Architecture] = {
    record.model_type: record for family in FAMILIES for record in family.ARCHITECTURES
}

HOW_TO_ADD = "CONTRIBUTING.md, section 'Add an architecture'"


def architecture_of(model_type: str) -> Architecture:
    """Return the record of a transformers `model_type`.

    Raises:
        ArchitectureError: none is known; the message says how to add one.

    Examples:
        >>> architecture_of("llama").stack
        'model.layers'

    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ArchitectureError(
            f"model_type '{model_type}' is not known to excise (known: {known}); adding one takes a few lines, which "
            f"`excise inspect MODEL --find` proposes, see {HOW_TO_ADD}"
        )
    return ARCHITECTURES[model_type]


__all__ = ["ARCHITECTURES", "HOW_TO_ADD", "Architecture", "SublayerRecord", "architecture_of"]

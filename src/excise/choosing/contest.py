"""What a comparison of criteria is asked; light, so that `--help` need not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from excise.errors import InputError
from excise.settings import Checked, names_in, option

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Contest(Checked):
    """Who takes part, and on what terms."""

    methods: str = option(
        ALL, "all (but the costly published EvoPress schedule), or names separated by commas.", group="How it chooses"
    )
    search_tokens: int = option(
        2048, "Calibration tokens for criteria that measure many candidates.", group="How it chooses", least=1
    )
    random_draws: int = option(5, "Draws of the method random.", flag="--random", group="How it chooses", least=1)
    energy: str = option(
        "fisher",
        "Energy shown beside the damage: fisher or fisher+linear.",
        group="How it chooses",
        choices=names_in("excise.ising.energies:ENERGIES"),
    )
    repair: bool = option(
        False,
        "Repair every choice in closed form, and compare what that leaves; Δ loss before it stands beside.",
        group="How it chooses",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Knowing the names imports every criterion, and torch with them; `all` needs no check.
        if self.methods != ALL:
            self.names()

    def names(self) -> tuple[str, ...]:
        """The methods by name; `all` stands for every one but those that cost a hundred times the others.

        Raises:
            InputError: an unknown name.

        Examples:
            >>> Contest(methods="norm-ratio,first").names()
            ('norm-ratio', 'first')

        """
        from excise.choosing.criteria import CRITERIA, EXPENSIVE, SUBLAYER_CRITERIA

        known = {**CRITERIA, **SUBLAYER_CRITERIA}
        names: list[str] = []
        for name in filter(None, (part.strip() for part in self.methods.split(","))):
            names += [n for n in known if n not in EXPENSIVE] if name == ALL else [name]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise InputError(f"expected --methods 'all' or some of {', '.join(known)}, got {unknown or 'none'}")
        return tuple(dict.fromkeys(names))

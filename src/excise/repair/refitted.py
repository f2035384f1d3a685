"""The artefact of a repair: new weights, how each was fitted, and what they cost and bring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from excise.artefacts import read_arrays, write_arrays
from excise.errors import InputError
from excise.plain import Facts, Values

FORMAT = "excise repair 2"


@dataclass(frozen=True)
class Step:
    """One fitted matrix.

    Attributes:
        block: original index of the block it belongs to.
        kind: of its sublayer.
        run: the removed run that it makes up for.
        features: "input" where the whole matrix was refitted, "output" where its output is mapped.
        ridge: chosen strength, relative to the features' mean square; infinite where no map helped held-out samples.
        error: weighted squared error of the stream on held-out samples, as a share of that without the step.

    """

    block: int
    kind: str
    run: tuple[int, ...]
    features: str
    ridge: float
    error: float

    def describe(self) -> Facts:
        """Plain data; JSON has no infinity, so an infinite ridge is None."""
        return {**asdict(self), "run": list(self.run), "ridge": None if math.isinf(self.ridge) else self.ridge}

    @staticmethod
    def read(facts: Values) -> Step:
        """Read what `describe` gave."""
        ridge = math.inf if facts["ridge"] is None else facts["ridge"]
        return Step(**{**facts, "run": tuple(facts["run"]), "ridge": ridge})


@dataclass(frozen=True)
class Losses:
    """Mean loss on held-out samples, nats per token: of the original, of the pruned model, and of the repaired one."""

    intact: float
    pruned: float
    repaired: float

    @property
    def helps(self) -> bool:
        """Whether the repair lowers the loss; one that cures an overflow does."""
        return math.isfinite(self.repaired) and not self.repaired >= self.pruned

    @property
    def delta_before(self) -> float:
        """Damage of the removal alone."""
        return self.pruned - self.intact

    @property
    def delta_after(self) -> float:
        """Damage of the removal, repaired."""
        return self.repaired - self.intact


@dataclass(frozen=True, eq=False)
class Repair:
    """Weights that make up for a removal.

    Attributes:
        removed: sorted original indices.
        weights: parameter name in the original model → its new value, in the parameter's own shape.
        steps: how each was fitted, in sequence.
        forward_tokens: cost of the fit, in tokens through the whole intact stack (a gradient counts as two passes).
        losses: on the held-out samples, where some were given.
        facts: hash of the model, samples and settings.

    """

    removed: tuple[int, ...]
    weights: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    forward_tokens: float
    losses: Losses | None = None
    facts: Values = field(default_factory=dict)

    def describe(self) -> Facts:
        """Everything but the weights, as plain data."""
        losses = self.losses and {
            **asdict(self.losses),
            "delta_before": self.losses.delta_before,
            "delta_after": self.losses.delta_after,
        }
        return {
            "removed": list(self.removed),
            "steps": [step.describe() for step in self.steps],
            "forward_tokens": self.forward_tokens,
            "losses": losses,
            **self.facts,
        }

    def save(self, path: str | Path) -> None:
        """Write as safetensors, atomically."""
        write_arrays(path, self.weights, {"format": FORMAT, "repair": self.describe()})

    @staticmethod
    def load(path: str | Path) -> Repair:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or no repair in it.

        """
        weights, metadata = read_arrays(path, "pt")
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} holds no repair of excise")
        facts = dict(metadata["repair"])
        steps = tuple(Step.read(step) for step in facts.pop("steps"))
        losses = facts.pop("losses")
        kept = losses and Losses(losses["intact"], losses["pruned"], losses["repaired"])
        removed = tuple(facts.pop("removed"))
        return Repair(removed, weights, steps, facts.pop("forward_tokens"), kept, facts)

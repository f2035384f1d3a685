"""What a kept block can add to the streams: after itself, or after a cut above it, however high that will reach.

With fewer fitting tokens than features, the fit is solved in its dual form, whose matrices are tokens × tokens:
Φ D = K (K_fit + ridge·s)⁻¹ R, with K = Φ Φ_fitᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from excise.data.batches import Batch
from excise.repair.folds import AUTO, Fold, Gain, as_features
from excise.repair.streams import wide

# Tokens for which a ridge of 1 is right. Held-out samples would have to choose it at every cut of every candidate, so
# it goes by the number of tokens, as what they would choose does on two models: 2 for 500 tokens, 1 for 2,000, 0.3 for
# 20,000 (log, 2026-11-30, the ridge of measurements).
RIDGE_TOKENS = 2000
# A gain for each channel is one number where a matrix has hundreds or thousands, and overfits little.
GAIN_RIDGE = 0.3


class Opening:
    """A kept block next to a cut: what its matrix can add to the streams.

    Args:
        features: [real tokens of a batch, features] of each batch.
        fits: which batches are fitted on.

    """

    def __init__(self, features: Sequence[Tensor], fits: Sequence[bool]) -> None:
        phi = torch.cat([f for f, fitting in zip(features, fits, strict=True) if fitting])
        # With fewer tokens than features, in tokens: features need not be kept, however wide they are.
        dual = phi.shape[0] < phi.shape[1]
        gram = phi @ phi.T if dual else phi.T @ phi
        # As in `NormalEquations`, the ridge is relative to the mean diagonal of ΦᵀΦ, whatever the form.
        scale = float(phi.square().sum()) / phi.shape[1]
        gram.diagonal().add_(_damping(ridge_of(phi.shape[0]), scale, gram.dtype))
        # Not a number instead of an error, as an overflow shows wherever else a removal is measured.
        self._factor = torch.linalg.cholesky(gram) if gram.isfinite().all() else torch.full_like(gram, torch.nan)
        self._fitted = None if dual else phi
        self._rows = [f @ phi.T for f in features] if dual else list(features)

    def added(self, residual: Float[Tensor, "tokens width"]) -> list[Tensor]:
        """What the refitted matrix adds [real tokens, width] to each batch.

        Args:
            residual: [tokens, width], what is missing in the streams of the batches fitted on.

        """
        right = residual if self._fitted is None else self._fitted.T @ residual
        solution = torch.cholesky_solve(right, self._factor)
        return [rows @ solution for rows in self._rows]


class Gains:
    """The same for a fold that only scales channels.

    Args:
        features: [real tokens of a batch, width] of each batch.
        fits: which batches are fitted on.

    """

    def __init__(self, features: Sequence[Tensor], fits: Sequence[bool]) -> None:
        self._features = features
        self._fitted = torch.cat([f for f, fitting in zip(features, fits, strict=True) if fitting])

    def added(self, residual: Float[Tensor, "tokens width"]) -> list[Tensor]:
        """See `Opening.added`."""
        gram = self._fitted.square().sum(dim=0)
        change = (self._fitted * residual).sum(dim=0) / (gram + _damping(GAIN_RIDGE, float(gram.mean()), gram.dtype))
        return [f * change for f in self._features]


def ridge_of(tokens: int) -> float:
    """Ridge of a matrix fitted on so many tokens, relative to the mean diagonal of its Gram matrix.

    Examples:
        >>> ridge_of(500), ridge_of(8000)
        (2.0, 0.5)

    """
    return math.sqrt(RIDGE_TOKENS / tokens)


def _damping(ridge: float, scale: float, dtype: torch.dtype) -> float:
    """What is added to the diagonal of a Gram matrix; features that are all 0 need any that can be divided by."""
    damping = ridge * scale
    return damping if damping > torch.finfo(dtype).tiny else 1.0


def features_at(fold: Fold, found: dict[str, Tensor], batch: Batch) -> Float[Tensor, "tokens features"]:
    """Of what a pass recorded at a fold, that which its repair is fitted on, real tokens only."""
    return wide(as_features(found, fold.features(AUTO), batch.real))


def opening_of(fold: Fold, features: Sequence[Tensor], fits: Sequence[bool]) -> Opening | Gains:
    """What a fold can add, by the features [real tokens, features] of every batch; `fits` says which to fit on."""
    return (Gains if isinstance(fold, Gain) else Opening)(features, fits)


def closed(
    opening: Opening | Gains,
    batches: Sequence[Batch],
    fits: Sequence[bool],
    stream_of: Callable[[int], Tensor],
    target_of: Callable[[int], Tensor],
) -> Iterator[Tensor]:
    """Streams after a cut, or after the block above it, repaired, of every batch.

    Args:
        opening: of the block below the cut, or above it.
        batches: all.
        fits: which of them are fitted on.
        stream_of: number of a batch → its stream [batch, tokens, width] there.
        target_of: number of a batch that is fitted on → the original's stream there, real tokens only.

    """
    missing = []
    for number, batch in enumerate(batches):
        if fits[number]:
            stream = stream_of(number)[batch.real]
            missing.append(wide(target_of(number).to(stream.device)) - wide(stream))
    for number, (batch, added) in enumerate(zip(batches, opening.added(torch.cat(missing)), strict=True)):
        repaired = stream_of(number).clone()
        repaired[batch.real] = (wide(repaired[batch.real]) + added).to(repaired.dtype)
        yield repaired

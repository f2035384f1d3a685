"""What others repair a cut by: linear maps P of the residual stream where blocks were, held in memory.

With X the stream that enters the removed run and Y the original's after it [tokens, width], the model goes on with X P:

- `scalar`, Prune&Comp (arXiv 2507.18212): α I, α the mean over channels k of ‖Y_k‖₁ / ‖X_k‖₁.
- `linear_patch`, LinearPatch (arXiv 2505.24680): H diag(d) Hᵀ, H a Hadamard rotation, d_k = ‖(YH)_k‖₁ / ‖(XH)_k‖₁.
- `whole_stream`, Ghosted Layers (arXiv 2605.15491): I + (XᵀX + 1e-6 I)⁻¹ Xᵀ(Y − X).

A scalar folds into the weights below or above a cut; a stock checkpoint has no place for the other two.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from excise.errors import InputError
from excise.models.stack import Stack, block_input, block_output, override_forward, pass_through

Map = Float64[Tensor, "width width"]
MapOf = Callable[[Float64[Tensor, "tokens width"], Float64[Tensor, "tokens width"]], Map]
DAMPING = 1e-6


def scalar(before: Float64[Tensor, "tokens width"], after: Float64[Tensor, "tokens width"]) -> Map:
    """Prune&Comp's factor, times the identity."""
    return torch.eye(before.shape[1], dtype=before.dtype) * _magnitudes(before, after).mean()


def linear_patch(before: Float64[Tensor, "tokens width"], after: Float64[Tensor, "tokens width"]) -> Map:
    """LinearPatch: ratios of channels' magnitudes in a rotated basis, in which no channel is an outlier."""
    rotation = hadamard(before.shape[1])
    return rotation * _magnitudes(before @ rotation, after @ rotation) @ rotation.T


def whole_stream(before: Float64[Tensor, "tokens width"], after: Float64[Tensor, "tokens width"]) -> Map:
    """Least squares of what is missing on all of the stream."""
    eye = torch.eye(before.shape[1], dtype=before.dtype)
    return eye + torch.linalg.solve(before.T @ before + DAMPING * eye, before.T @ (after - before))


def _magnitudes(before: Tensor, after: Tensor) -> Tensor:
    return after.abs().sum(dim=0) / before.abs().sum(dim=0).clamp(min=1e-30)


def hadamard(width: int) -> Map:
    """An orthogonal matrix [width, width] with all entries ±1/√width: Paley's (q + 1) times Sylvester's (2^k).

    Raises:
        InputError: the width is not (q + 1) 2^k with q = 0, or q a prime that is 3 modulo 4.

    """
    order = width
    while order > 1 and not _is_paley(order - 1):
        if order % 2:
            raise InputError(f"expected a width of (q + 1) 2^k with q = 0 or a prime that is 3 modulo 4, got {width}")
        order //= 2
    matrix = _paley(order - 1)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / width**0.5


def _is_paley(q: int) -> bool:
    return q % 4 == 3 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


def _paley(q: int) -> Tensor:
    """Paley's first construction [q + 1, q + 1]: I + S, S skew, of the quadratic residues modulo q."""
    if q == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    residues = {i * i % q for i in range(1, q)}
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    for i in range(q):
        for j in range(q):
            if i != j:
                skew[i + 1, j + 1] = 1 if (i - j) % q in residues else -1
    return skew + torch.eye(q + 1, dtype=torch.float64)


@contextlib.contextmanager
def patched(stack: Stack, removed: Sequence[int], maps: Mapping[int, Map]) -> Iterator[None]:
    """Context in which blocks are bypassed, and the stream is mapped where some of them were.

    Args:
        stack: the model.
        removed: original indices.
        maps: of the stream that enters some of the removed blocks.

    """

    def through(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = block_input(args, kwargs)
            return block_output(stack, stream @ maps[index].to(stream.device, stream.dtype))

        return forward

    plain = pass_through(stack)
    replacements = {stack.blocks[i].module: through(i) if i in maps else plain for i in removed}
    with override_forward(replacements):
        yield

"""The final norm's gains by one Gauss–Newton step on KL(original ‖ student).

With h the student's final hidden states, each channel c gets a factor 1 + d_c. The gradient of the divergence is
g = Σₜ hₜ ⊙ ∂KL/∂hₜ; its Gauss–Newton matrix is the Fisher matrix of the student's own predictions, estimated by labels
drawn from them: F = Σₜ vₜvₜᵀ with vₜ = hₜ ⊙ ∂(−log q(y))/∂hₜ, y ~ q. The step is d = −(F + ridge · s I)⁻¹ g, s the mean
diagonal of F, the ridge chosen by the divergence on every fifth sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from excise.context import Context
from excise.data.batches import IGNORED
from excise.data.samples import Samples
from excise.errors import ArchitectureError
from excise.models.stack import Stack, bypass
from excise.repair.folds import Channels, probing_factors
from excise.repair.repair import EVERY
from excise.repair.streams import swapped

RIDGES = (1e-2, 1e-1, 1.0, 10.0, math.inf)
# [positions, vocabulary] exists several times over.
CHUNK = 256
SEED = 0

Hidden = Float[Tensor, "positions width"]


def norm_gains(
    context: Context, removed: Sequence[int], weights: Mapping[str, Tensor], samples: Samples
) -> dict[str, Tensor]:
    """New weights of the final norm, by name.

    Args:
        context: the original model.
        removed: original indices.
        weights: of what else was repaired, by name.
        samples: to fit on.

    Raises:
        ArchitectureError: no norm's weight scales the final hidden states channel by channel.

    """
    stack = context.stack
    name, channels = final_norm(stack)
    teacher, chooses = _counted(context, samples)
    with bypass(stack, removed), swapped(stack.model, weights):
        student, _ = _counted(context, samples)
    fit, choice = (sums(stack, teacher[rows], student[rows]) for rows in (~chooses, chooses))
    errors = [
        divergence(stack, teacher[chooses], student[chooses] * (1 + step(*fit, ridge)).float()) for ridge in RIDGES
    ]
    best = RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]
    change = step(*(a + b for a, b in zip(fit, choice, strict=True)), best)
    return {name: channels.scaled(weights.get(name, stack.model.get_parameter(name).data), 1 + change)}


def final_norm(stack: Stack) -> tuple[str, Channels]:
    """The weight that scales the final hidden states channel by channel.

    Raises:
        ArchitectureError: there is none.

    """
    tokens = torch.arange(4, device=stack.device)[None]
    with torch.no_grad():
        before = stack.hidden(tokens)
        factors = probing_factors(before.shape[-1], before.device)
        for name, parameter in reversed(list(stack.model.named_parameters())):
            for channels in (Channels(0), Channels(0, 1.0)):
                if parameter.shape == factors.shape:
                    with swapped(stack.model, {name: channels.scaled(parameter.data, factors)}):
                        if torch.allclose(stack.hidden(tokens), before * factors, rtol=1e-4, atol=1e-5):
                            return name, channels
    raise ArchitectureError(f"no weight of {type(stack.model).__name__} scales its final hidden states")


@torch.no_grad()
def _counted(context: Context, samples: Samples) -> tuple[Hidden, Tensor]:
    """Final hidden states that predict a counted token, and which of them are of samples that choose the ridge."""
    choosing = samples.picked(EVERY, [EVERY - 1])
    states, chooses = [], []
    for batch in context.batches(samples):
        rows, positions = torch.nonzero(batch.labels != IGNORED, as_tuple=True)
        states.append(context.stack.hidden(batch.input_ids)[rows, positions])
        chooses += [batch.indices[row] in choosing for row in rows.tolist()]
    return torch.cat(states), torch.tensor(chooses)


def sums(stack: Stack, teacher: Hidden, student: Hidden) -> tuple[Float64[Tensor, " width"], Tensor]:
    """Gradient g [width] and Fisher matrix F [width, width] of the divergence in d at 0, over all positions."""
    generator = torch.Generator().manual_seed(SEED)
    width = student.shape[1]
    gradient, fisher = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for p, states in _chunks(stack, teacher, student):
        states = states.detach().requires_grad_()
        log_q = torch.log_softmax(stack.logits(states), dim=-1)
        drawn = torch.multinomial(log_q.detach().exp(), 1, generator=generator)
        (of_all,) = torch.autograd.grad(-(p.exp() * log_q).sum(), states, retain_graph=True)
        (of_drawn,) = torch.autograd.grad(-log_q.gather(1, drawn).sum(), states)
        gradient += (states * of_all).detach().double().sum(dim=0)
        scores = (states * of_drawn).detach().double()
        fisher += scores.T @ scores
    return gradient, fisher


def step(gradient: Float64[Tensor, " width"], fisher: Tensor, ridge: float) -> Float64[Tensor, " width"]:
    """The step d [width]; zeros for an infinite ridge."""
    if math.isinf(ridge):
        return torch.zeros_like(gradient)
    damped = fisher + ridge * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=torch.float64)
    return -torch.linalg.solve(damped, gradient)


@torch.no_grad()
def divergence(stack: Stack, teacher: Hidden, student: Hidden) -> float:
    """KL(teacher ‖ student), summed over the positions, nats."""
    total = 0.0
    for p, states in _chunks(stack, teacher, student):
        total += float((p.exp() * (p - torch.log_softmax(stack.logits(states), dim=-1))).sum())
    return total


def _chunks(stack: Stack, teacher: Hidden, student: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(student), CHUNK):
        with torch.no_grad():
            p = torch.log_softmax(stack.logits(teacher[start : start + CHUNK]), dim=-1)
        yield p, student[start : start + CHUNK]

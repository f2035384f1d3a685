"""Pruning as a cooperative game (ICLR 2026, arXiv 2602.07804): the blocks of least Shapley value by a surrogate.

Blocks are players, and a coalition S of kept blocks is worth v(S) = perplexity of the intact model / perplexity of S.
Removals drawn at random, as many of each size, are measured; a network of two layers learns v from the mask of what is
kept; and the Shapley value of a block,

    φ_i = mean over orders of the players of v̂(those before i, and i) − v̂(those before i),

is taken from the network over random orders. The blocks of lowest φ are removed.

The numbers of removals, hidden units, steps and orders are ours, sized to what the other searches here may spend.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from excise.choosing.brief import Brief
from excise.choosing.proposal import Cost, Proposal, ranking
from excise.context import Context
from excise.data.samples import Samples
from excise.ising.problem import Removal
from excise.measuring.measure import Measurements, measure

MEASURED = 128
HIDDEN, STEPS, LEARNING_RATE, DECAY = 64, 300, 1e-2, 1e-3
ORDERS = 256

Value = Callable[[Float64[Tensor, "coalitions players"]], Float64[Tensor, " coalitions"]]


def cooperative_game(context: Context, samples: Samples, brief: Brief) -> list[Proposal]:
    """Remove the blocks of least Shapley value."""
    stack, players = context.stack, brief.candidates(context.stack)
    removals = stratified(players, min(len(players), len(stack.blocks) - 1), brief.seed)
    measured = measure(context, samples, [(), *removals])
    value = surrogate(coalitions(measured.removals, players), worth(measured), brief.seed)
    generator = torch.Generator().manual_seed(brief.seed)
    orders = torch.stack([torch.randperm(len(players), generator=generator) for _ in range(ORDERS)])
    scores = np.full(len(stack.blocks), np.nan)
    scores[players] = shapley_values(value, orders).numpy()
    order = ranking(scores, brief.budget, players)
    known = tuple(None if np.isnan(phi) else float(phi) for phi in scores)
    return [Proposal("cooperative-game", tuple(sorted(order)), known, order, Cost(measured.forward_tokens))]


def stratified(players: Sequence[int], largest: int, seed: int) -> list[Removal]:
    """Distinct random removals of 1 to `largest` players, as many draws of each size."""
    generator = random.Random(seed)
    sizes = [1 + draw % largest for draw in range(MEASURED)]
    return list(dict.fromkeys(tuple(sorted(generator.sample(players, size))) for size in sizes))


def coalitions(removals: Sequence[Removal], players: Sequence[int]) -> Float64[Tensor, "coalitions players"]:
    """1 where a player is kept."""
    return torch.tensor([[float(i not in removed) for i in players] for removed in removals], dtype=torch.float64)


def worth(measured: Measurements) -> Float64[Tensor, " coalitions"]:
    """V of each measured removal; 0 where the model overflowed."""
    values = np.exp(measured.loss() - measured.losses)
    return torch.from_numpy(np.where(np.isfinite(measured.losses), values, 0.0))


def surrogate(kept: Float64[Tensor, "coalitions players"], values: Float64[Tensor, " coalitions"], seed: int) -> Value:
    """A network of two layers that was fitted to the values of coalitions."""
    # Layers draw their first weights from the global generator, which is others' too.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(kept.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)).double()
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
    for _step in range(STEPS):
        optimiser.zero_grad()
        (network(kept).squeeze(1) - values).square().mean().backward()
        optimiser.step()

    @torch.no_grad()
    def value(asked: Tensor) -> Tensor:
        return network(asked).squeeze(1)

    return value


def shapley_values(value: Value, orders: Int64[Tensor, "orders players"]) -> Float64[Tensor, " players"]:
    """Mean marginal contribution of each player [players] over orders in which they join.

    Args:
        value: of coalitions, 1 where a player belongs to it.
        orders: [orders, players], each a permutation; all of them give the exact Shapley values.

    """
    players = orders.shape[1]
    # Row k of an order: the first k players have joined.
    joined = torch.arange(players) < torch.arange(players + 1).unsqueeze(1)
    places = orders.argsort(dim=1)
    coalition = joined[:, places].permute(1, 0, 2).double()
    gains = value(coalition.reshape(-1, players)).reshape(len(orders), players + 1).diff(dim=1)
    # A player's gain stands where it joined.
    return gains.gather(1, places).mean(dim=0)

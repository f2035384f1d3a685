"""Models and naive references the criteria's tests share: blocks cut out by hand, one unpadded sample at a time."""

from __future__ import annotations

import copy

import numpy as np
import torch

from tests.tiny import tiny_model

FLOAT32_NORM = 1e-5  # transformers' RMSNorm computes in float32 even in a float64 model
MODELS = ("llama", "mixtral")


def last_matrix(block, kind):
    """The matrix through which a sublayer writes to the residual stream."""
    if kind == "attention":
        return block.self_attn.o_proj.weight
    return block.mlp.experts.down_proj if hasattr(block.mlp, "experts") else block.mlp.down_proj.weight


def uneven_model(model_type, layers=6, *, seed=3, spread=1.0, dtype=torch.float64):
    """A float64 model whose sublayers differ in strength at random, so that no order is a matter of course."""
    model = tiny_model(model_type, layers, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.model.layers:
            for kind in ("attention", "feed-forward"):
                strength = torch.exp(spread * torch.randn((), generator=generator) - 0.7)
                last_matrix(block, kind).mul_(float(strength))
    return model


def without(model, removed):
    """A copy of the model that never had the blocks `removed`."""
    smaller = copy.deepcopy(model)
    kept = [block for i, block in enumerate(smaller.model.layers) if i not in removed]
    smaller.model.layers = torch.nn.ModuleList(kept)
    smaller.config.num_hidden_layers = len(kept)
    return smaller


def silenced(model, gates):
    """A copy in which sublayers (two a block, attention first) write zeros."""
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        for gate in gates:
            last_matrix(quiet.model.layers[gate // 2], ("attention", "feed-forward")[gate % 2]).zero_()
    return quiet


@torch.no_grad()
def log_probabilities(model, sample):
    """Log-probabilities [tokens − 1, vocabulary] of the next token."""
    logits = model(input_ids=torch.from_numpy(sample.input_ids).unsqueeze(0), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def token_losses(model, sample):
    """Negative log-likelihoods of the counted tokens of one sample."""
    picked = log_probabilities(model, sample)[np.arange(len(sample.input_ids) - 1), sample.input_ids[1:]]
    return -picked[sample.counted[1:]]


def perplexity(model, samples):
    return float(np.exp(np.mean(np.concatenate([token_losses(model, sample) for sample in samples]))))


def divergence(model, pruned, samples):
    """Mean over counted tokens of KL(model ‖ pruned)."""
    return mean_distance(model, pruned, samples, lambda p, q: (np.exp(p) * (p - q)).sum(axis=1))


def rejection(model, pruned, samples):
    """Mean over counted tokens of 1 − Σ min(p, q)."""
    return mean_distance(model, pruned, samples, lambda p, q: 1 - np.minimum(np.exp(p), np.exp(q)).sum(axis=1))


def mean_distance(model, pruned, samples, distance):
    """Mean over counted tokens of a distance of two log-probabilities [tokens, vocabulary]."""
    terms = []
    for sample in samples:
        p, q = log_probabilities(model, sample), log_probabilities(pruned, sample)
        terms.append(distance(p, q)[sample.counted[1:]])
    return float(np.mean(np.concatenate(terms)))

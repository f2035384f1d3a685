"""How long blocks take: a model answers a request whole and without half of each kind of block, in turns.

What a block takes is what the model is faster by without it: so the time of caches, norms and of Python between the
blocks is counted as it is spent, which a clock around the block would miss, and on a GPU nothing has to wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from excise.artefacts.provenance import provenance
from excise.choosing.engines import Engine, Seconds, engine_of, error_of
from excise.context import Context
from excise.errors import ArchitectureError, InputError
from excise.evaluation.speed import positions
from excise.ising.problem import Removal
from excise.ising.times import Latency, Request, Times
from excise.models.loading import Loaded
from excise.models.stack import Block, Stack
from excise.plain import Facts
from excise.settings import LATENCIES
from excise.surgery.config import is_writable


def measure_times(context: Context, request: Request, engine: str = "transformers") -> Times:
    """Time the whole model, and what each kind of block adds.

    Args:
        context: the model.
        request: what it is asked; the prompt is shortened where the model has too few positions.
        engine: what answers, of `excise.settings.ENGINES`.

    Raises:
        InputError: the model is streamed from the disk, or no GGUF file where llama.cpp is to answer.
        MissingExtraError: llama.cpp's binding is not installed.
        ArchitectureError: no config describes the model without some of a kind.

    """
    stack, answering = context.stack, engine_of(engine, context.loaded)
    kinds = block_kinds(stack)
    left_out = {kind: found for kind in dict.fromkeys(kinds) if (found := _some_of(stack, kinds, kind))}
    request = request.within(positions(stack.model))
    turns = answering.in_turns([(), *left_out.values()], request)
    # A block that seems to cost less than nothing is one whose time is lost in the noise.
    saved = 1 - np.minimum(1, np.stack([_ratios(part)[1:] for part in turns]))
    each = saved / [len(removed) for removed in left_out.values()]
    whole = Latency(*(float(np.median(part[:, 0])) for part in turns))
    latencies = [Latency(whole.prefill * prefill, whole.decode * decode) for prefill, decode in each.T.tolist()]
    blocks = dict(zip(left_out, latencies, strict=True))
    return Times(
        model=context.loaded.source,
        model_hash=context.identity,
        request=request,
        whole=whole,
        kinds=kinds,
        blocks=tuple(blocks.get(kind, Latency(0.0, 0.0)) for kind in kinds),
        turns=len(turns[0]),
        error=error_of(*turns),
        engine=engine,
        machine=answering.machine,
        provenance=provenance(),
    )


def kept_times(context: Context, request: Request, engine: str, place: Path) -> Times:
    """Times of an interrupted run, or taken now and kept: taken again they would be others, and so would the budget.

    Args:
        context: the model.
        request: what it is asked.
        engine: what answers.
        place: file in which they are kept.

    Raises:
        InputError: as for `measure_times`; so MissingExtraError and ArchitectureError.

    """
    asked = request.within(positions(context.stack.model)), engine, context.identity
    if place.exists():
        kept = Times.load(place)
        if (kept.request, kept.engine, kept.model_hash) == asked:
            return kept
    times = measure_times(context, request, engine)
    times.save(place)
    return times


def measured_speedups(engine: Engine, removed: Removal, request: Request) -> dict[str, float]:
    """How many times as fast a model is without these blocks: "prefill", "decode", "request" → ratio.

    Medians over turns of both, one after the other.
    """
    prefill, decode = engine.in_turns([(), removed], request)
    faster = {"prefill": 1 / _ratios(prefill)[1], "decode": 1 / _ratios(decode)[1]}
    whole = Latency(float(np.median(prefill[:, 0])), float(np.median(decode[:, 0])))
    smaller = Latency(whole.prefill / faster["prefill"], whole.decode / faster["decode"])
    tokens = request.new_tokens
    return {part: float(whole.of(part, tokens) / smaller.of(part, tokens)) for part in LATENCIES}


def _ratios(seconds: Seconds) -> Float64[np.ndarray, " removals"]:
    """Of each removal's time to the first's."""
    return np.median(seconds / seconds[:, :1], axis=0)


def block_kinds(stack: Stack) -> tuple[str, ...]:
    """Names of the blocks' kinds [N]: those of the same modules, shapes and type of layer have one name."""
    named: dict[object, str] = {}
    for block in stack.blocks:
        known = _signature(stack, block)
        if known not in named:
            alike = sum(name.split("/")[0] == block.kind for name in named.values())
            named[known] = f"{block.kind}/{alike + 1}" if alike else block.kind
    return tuple(named[_signature(stack, block)] for block in stack.blocks)


def _signature(stack: Stack, block: Block) -> object:
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in block.module.named_parameters())
    # Of two alike in their weights one may attend to a window only.
    types = getattr(stack.config, "layer_types", None)
    return block.kind, type(block.module).__name__, shapes, types[block.index] if types else None


def _some_of(stack: Stack, kinds: Sequence[str], kind: str) -> Removal:
    """Every other block of a kind, as far as they may go; empty where none may."""
    members = [i for i, other in enumerate(kinds) if other == kind and i not in stack.fixed]
    # Near what a removal leaves, and large enough to be seen above the noise.
    for some in (members[::2], *([i] for i in members)):
        stays = set(range(len(kinds))) - set(some)
        if stays and (not stack.needed or stays & set(stack.needed)) and is_writable(stack, some):
            return tuple(some)
    if not members or set(members) <= set(stack.needed):
        return ()
    raise ArchitectureError(
        f"no config describes this {stack.architecture.model_type} without some of its {kind} blocks, so what they "
        f"take cannot be measured; give --remove or --remove-params instead"
    )


def predicted_and_measured(loaded: Loaded, removed: Removal, times: Times) -> Facts:
    """How many times as fast a removal makes the model, by the blocks' times and as timed here, and for what request.

    Where it cannot be timed here (a streamed model, no binding for llama.cpp), `measured` is None; `reason` says why.
    """
    facts: Facts = {
        "engine": times.engine,
        "request": asdict(times.request),
        "predicted": times.speedups(times.without(removed)),
        "times_of": times.machine,
    }
    try:
        engine = engine_of(times.engine, loaded)
    except InputError as reason:
        warnings.warn(f"the result's speed was not measured: {reason}", stacklevel=3)
        return {**facts, "measured": None, "reason": str(reason)}
    return {**facts, "measured": measured_speedups(engine, removed, times.request), "measured_on": engine.machine}

"""How long blocks take: a model answers a request whole and without half of each kind of block, in turns.

What a block takes is what the model is faster by without it: so the time of caches, norms and of Python between the
blocks is counted as it is spent, which a clock around the block would miss, and on a GPU nothing has to wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from excise.artefacts.provenance import provenance
from excise.context import Context
from excise.errors import ArchitectureError, InputError
from excise.evaluation.speed import machine, next_token, positions, random_prompt, read_prompt
from excise.ising.problem import Removal
from excise.ising.times import Latency, Request, Times
from excise.models.residency import is_offloaded
from excise.models.stack import Block, Stack
from excise.plain import Facts
from excise.settings import LATENCIES
from excise.surgery.checkpoint import pruned
from excise.surgery.config import is_writable

# Turns at least; then as many as make the ratios of times so sure, or fill so many seconds.
FEWEST, SURE, LONGEST = 5, 0.005, 60.0

Seconds = Float64[np.ndarray, "times removals"]


def measure_times(context: Context, request: Request) -> Times:
    """Time the whole model, and what each kind of block adds.

    Args:
        context: the model.
        request: what it is asked; the prompt is shortened where the model has too few positions.

    Raises:
        InputError: the model is streamed from the disk.
        ArchitectureError: no config describes the model without some of a kind.

    """
    stack = context.stack
    kinds = block_kinds(stack)
    left_out = {kind: found for kind in dict.fromkeys(kinds) if (found := _some_of(stack, kinds, kind))}
    request = request.within(positions(stack.model))
    turns = in_turns(stack, [(), *left_out.values()], request)
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
        error=_error(*turns),
        machine=machine(),
        provenance=provenance(),
    )


def kept_times(context: Context, request: Request, place: Path) -> Times:
    """Times of an interrupted run, or taken now and kept: taken again they would be others, and so would the budget.

    Args:
        context: the model.
        request: what it is asked.
        place: file in which they are kept.

    Raises:
        InputError: as for `measure_times`; so ArchitectureError.

    """
    asked = request.within(positions(context.stack.model))
    if place.exists() and (kept := Times.load(place)).request == asked and kept.model_hash == context.identity:
        return kept
    times = measure_times(context, asked)
    times.save(place)
    return times


def measured_speedups(stack: Stack, removed: Removal, request: Request) -> dict[str, float]:
    """How many times as fast the model is without these blocks: "prefill", "decode", "request" → ratio.

    Medians over turns of both, one after the other.
    """
    prefill, decode = in_turns(stack, [(), removed], request)
    faster = {"prefill": 1 / _ratios(prefill)[1], "decode": 1 / _ratios(decode)[1]}
    whole = Latency(float(np.median(prefill[:, 0])), float(np.median(decode[:, 0])))
    smaller = Latency(whole.prefill / faster["prefill"], whole.decode / faster["decode"])
    tokens = request.new_tokens
    return {part: float(whole.of(part, tokens) / smaller.of(part, tokens)) for part in LATENCIES}


def in_turns(stack: Stack, removals: Sequence[Removal], request: Request) -> tuple[Seconds, Seconds]:
    """Answer a request without each of `removals`, token by token in turns.

    What disturbs a machine disturbs neighbours in time alike, so that ratios within a row are steadier than times. A
    first turn is to warm up; then come as many as it takes, see `SURE`.

    Args:
        stack: the model.
        removals: original indices; () for the whole model, the first.
        request: what is asked, within the model's positions.

    Returns:
        Seconds [turns, removals] of the prefill, and [turns × tokens after the first, removals] of a token.

    Raises:
        InputError: the model is streamed from the disk.
        ArchitectureError: no config describes what a removal leaves.

    """
    if any(is_offloaded(block.module) for block in stack.blocks):
        raise InputError(
            "a streamed model takes as long as its disk; time its blocks where it fits in memory (`excise times`), and "
            "give --times FILE"
        )
    prompt = random_prompt(stack.model, request)
    prefill: list[list[float]] = []
    decode: list[list[float]] = []
    _turn(stack, removals, prompt, request.new_tokens)
    started = time.perf_counter()
    while len(prefill) < FEWEST or (_error(prefill, decode) > SURE and time.perf_counter() - started < LONGEST):
        reading, writing = _turn(stack, removals, prompt, request.new_tokens)
        prefill.append(reading)
        decode += writing
    return np.array(prefill), np.array(decode)


def _turn(
    stack: Stack, removals: Sequence[Removal], prompt: Tensor, new_tokens: int
) -> tuple[list[float], list[list[float]]]:
    """Seconds of the prefill without each of `removals`, and of each token after the first."""
    answers = []
    for removed in removals:
        with pruned(stack, removed) as model:
            answers.append(read_prompt(model, prompt))
    reading, writing = [answer.seconds for answer in answers], []
    for _ in range(new_tokens - 1):
        for place, removed in enumerate(removals):
            with pruned(stack, removed) as model:
                answers[place] = next_token(model, answers[place])
        writing.append([answer.seconds for answer in answers])
    return reading, writing


def _ratios(seconds: Seconds) -> Float64[np.ndarray, " removals"]:
    """Of each removal's time to the first's."""
    return np.median(seconds / seconds[:, :1], axis=0)


def _error(*parts: Seconds | Sequence[Sequence[float]]) -> float:
    """Standard error of the least sure ratio, from median deviations: outliers are other programs."""
    return max(_error_of(np.asarray(seconds)) for seconds in parts)


def _error_of(seconds: Seconds) -> float:
    ratios = seconds / seconds[:, :1]
    deviations = np.median(np.abs(ratios - np.median(ratios, axis=0)), axis=0)
    # 1.4826 median deviations are a standard deviation of a normal, and its median's error is 1.2533 of its mean's.
    return float(1.2533 * 1.4826 * deviations.max() / np.sqrt(len(ratios)))


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


def predicted_and_measured(stack: Stack, removed: Removal, times: Times) -> Facts:
    """How many times as fast a removal makes the model, by the blocks' times and as timed here, and for what request.

    Raises:
        InputError: the model is streamed from the disk.

    """
    return {
        "request": asdict(times.request),
        "predicted": times.speedups(times.without(removed)),
        "measured": measured_speedups(stack, removed, times.request),
        "times_of": times.machine,
        "measured_on": machine(),
    }

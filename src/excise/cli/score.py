"""`excise score`: per-sample gradients of the gates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from excise.cli.options import (
    BatchTokens,
    Checkpointing,
    Data,
    Device,
    Dtype,
    Force,
    LossOn,
    Model,
    SampleCount,
    Seed,
    TokenLimit,
    TrustRemoteCode,
    check_new,
)
from excise.errors import InputError


def score(
    model: Model,
    out: Annotated[Path, typer.Option(help="File for the gradients.")] = Path("gradients.safetensors"),
    data: Data = "starter",
    samples: SampleCount = 128,
    tokens: TokenLimit = 512,
    seed: Seed = 0,
    loss_on: LossOn = "content",
    part: Annotated[
        str, typer.Option(help="RANK/PARTS: do one part of the batches, for processes that share the output's folder.")
    ] = "0/1",
    batch_tokens: BatchTokens = None,
    checkpointing: Checkpointing = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
) -> None:
    """Measure the gradients A [samples, gates] of the loss with respect to the gates; an interrupted pass resumes."""
    check_new(out, force)
    rank, parts = _part(part)

    from excise.cli.terminal import console, load_model, tokens_progress
    from excise.data import load_samples
    from excise.measuring.score import score as score_gradients
    from excise.models.portable import patterns_of

    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    drawn = load_samples(data, loaded.tokenizer, samples=samples, tokens=tokens, seed=seed, loss_on=loss_on)
    journal = out.with_name(f".{out.name}.work")
    with tokens_progress("gradients", drawn.tokens // parts) as advance:
        gradients = score_gradients(
            loaded.stack,
            drawn,
            batch_tokens=batch_tokens,
            checkpointing=checkpointing,
            journal=journal,
            part=(rank, parts),
            advance=advance,
        )
    if gradients is None:
        console.print(f"part {part} is done and kept in {journal}; the last part to finish writes {out}")
        return
    patterns = patterns_of(loaded.stack.architecture, loaded.stack.model.config, loaded.raw_config)
    allowed = {reader: None if pattern is None else pattern.allowed for reader, pattern in patterns.items()}
    gradients.with_provenance(patterns=allowed).save(out)
    shutil.rmtree(journal, ignore_errors=True)
    m, gates = gradients.A.shape
    skipped = f", {len(gradients.skipped)} skipped as not finite" if gradients.skipped else ""
    console.print(
        f"wrote {out}: {m} samples × {gates} gates, mean loss {gradients.losses.mean():.4f} nats/token{skipped}"
    )


def _part(text: str) -> tuple[int, int]:
    rank, slash, parts = text.partition("/")
    if not (slash and rank.isdigit() and parts.isdigit() and int(rank) < int(parts)):
        raise InputError(f"--part expects RANK/PARTS such as 0/4 with RANK < PARTS, got '{text}'")
    return int(rank), int(parts)

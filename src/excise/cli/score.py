"""`excise score`: per-sample gradients of the gates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from excise.artefacts import json_text
from excise.settings import BackwardPass, Loading, Printing, Replacing, Sampling, option


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Replacing, Printing, BackwardPass, Sampling, Loading):
    """Settings of `excise score`."""

    divides = "passes"

    out: Path = option(Path("gradients.safetensors"), "File for the gradients.", group="Output", writes="file")


def score(settings: ScoreSettings) -> None:
    """Measure the gradients A [samples, gates] of the loss with respect to the gates; an interrupted pass resumes."""
    out = settings.out

    from excise.cli.terminal import console, load_model, tokens_progress
    from excise.context import Context
    from excise.data import Fit, load_samples, own_answers
    from excise.job import made_by
    from excise.measuring.score import score as score_gradients
    from excise.models.portable import patterns_of
    from excise.progress import Progress
    from excise.store import Store

    loaded = load_model(settings.model, **settings.loading())
    drawn = load_samples(
        settings.data, loaded.tokenizer, fit=Fit.of(loaded.stack), own=own_answers(loaded), **settings.drawing()
    )
    store = Store(out.with_name(f".{out.name}.work"))
    context = Context(loaded, store, Progress(tokens_progress), settings.batch_tokens)
    gradients = score_gradients(context, drawn, checkpointing=settings.checkpointing)
    patterns = patterns_of(loaded.stack.architecture, loaded.stack.model.config, loaded.raw_config)
    allowed = {reader: None if pattern is None else pattern.allowed for reader, pattern in patterns.items()}
    gradients.with_provenance(patterns=allowed).save(out, key=made_by(settings))
    context.finish()
    m, gates = gradients.A.shape
    if settings.as_json:
        facts = {"out": out, "samples": m, "gates": gates, "mean_loss": float(gradients.losses.mean())}
        typer.echo(json_text({**facts, "skipped": gradients.skipped}))
        return
    skipped = f", {len(gradients.skipped)} skipped as not finite" if gradients.skipped else ""
    console.print(
        f"wrote {out}: {m} samples × {gates} gates, mean loss {gradients.losses.mean():.4f} nats/token{skipped}"
    )

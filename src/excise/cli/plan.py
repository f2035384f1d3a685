"""`excise plan`: what a run will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from excise.artefacts import json_text
from excise.settings import REPAIR_TOKENS, Batching, Naming, Objecting, Printing, Sampling, option

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from excise.forecast import Forecast, Shape, Speed, Work


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Printing, Batching, Objecting, Sampling, Naming):
    """Settings of `excise plan`."""

    remove: int = option(..., "Number M of blocks to remove.", group="What to remove", least=1)
    held_out: int = option(64, "Held-out samples.", group="Data", least=1)
    memory: float | None = option(
        None, "GiB of memory there is, of the GPUs or the machine; by default what is free here.", above=0
    )
    measure: bool = option(False, "Time a few blocks and the disk here, so that stages have times.")


def plan(settings: PlanSettings) -> None:
    """Show memory, reads and time of every stage of `excise run`, resident and streamed, by the config alone."""
    from excise.forecast import forecast
    from excise.models.room import free_memory

    model = _Model.of(settings)
    work = model.work(settings)
    free = settings.memory * 2**30 if settings.memory else float(free_memory(model.device))
    speed = model.speed() if settings.measure else None
    found = [forecast(model.shape, work, placement, speed) for placement in ("resident", "streamed")]
    fitting = [each.placement for each in found if each.memory <= free]
    if settings.as_json:
        forecasts = [
            {**asdict(each), "memory": each.memory, "read": each.read, "seconds": each.seconds} for each in found
        ]
        typer.echo(json_text({"free": free, "fits": fitting, "work": asdict(work), "forecasts": forecasts}))
        return
    from excise.cli.terminal import output
    from excise.report.tables import forecast_table
    from excise.text import human_bytes

    for each in found:
        output.print(forecast_table(each))
    output.print(f"{human_bytes(int(free))} are free: {_advice(found, fitting)}")


def _advice(found: Sequence[Forecast], fitting: Sequence[str]) -> str:
    if "resident" in fitting:
        return "the whole model fits (--placement resident)"
    if fitting:
        return "it fits block by block (--placement streamed)"
    worst = max(found[1].stages, key=lambda stage: stage.memory)
    return f"not even block by block; {worst.name} takes the most: fewer --samples, smaller --batch-tokens, bfloat16"


@dataclass(frozen=True, eq=False)
class _Model:
    """What is known of a model that is not loaded."""

    shape: Shape
    config: PretrainedConfig
    tokenizer: Any
    stored: torch.dtype
    compute: torch.dtype
    device: torch.device
    file: Path | None

    @staticmethod
    def of(settings: PlanSettings) -> _Model:
        import torch

        from excise.forecast import Shape
        from excise.models.loading import described, device_map

        place = device_map(settings.dtype, settings.device)
        config, tokenizer, stored, compute, files = described(
            settings.model, settings.dtype, place, settings.trust_remote_code
        )
        device = torch.device("cuda" if place == "auto" else place)
        return _Model(Shape.of(config), config, tokenizer, stored, compute, device, files[0] if files else None)

    def work(self, settings: PlanSettings) -> Work:
        from excise.data import split_samples
        from excise.data.batches import batch_tokens_of
        from excise.forecast import Work
        from excise.models.room import STREAMS_SHARE, free_memory

        calibration, apart = (
            (settings.samples * settings.tokens, settings.held_out * settings.tokens)
            if self.tokenizer is None
            else [
                each.tokens
                for each in split_samples(
                    settings.data, self.tokenizer, held_out=settings.held_out, **settings.drawing()
                )
            ]
        )
        return Work(
            removed=settings.remove,
            calibration=calibration,
            held_out=apart,
            effort=settings.effort,
            repair_tokens=min(REPAIR_TOKENS, calibration) if settings.repair else 0,
            batch_tokens=settings.batch_tokens
            or batch_tokens_of(self.device, self.shape.width, self.shape.blocks, self.compute.itemsize),
            item=self.compute.itemsize,
            stored=self.stored.itemsize,
            room=STREAMS_SHARE * free_memory(),
        )

    def speed(self) -> Speed:
        from excise.forecast import measured_speed

        return measured_speed(self.config, self.compute, self.device, self.file)

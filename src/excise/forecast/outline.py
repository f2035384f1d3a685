"""A model that is not loaded, what a job with it will take, and which placement that advises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from excise.data.batches import batch_tokens_of
from excise.forecast.shape import Shape
from excise.forecast.speed import Speed, measured_speed
from excise.forecast.stages import Forecast, Work, forecast
from excise.models.loading import Described, described, device_map
from excise.models.room import STREAMS_SHARE, free_memory, placement_for
from excise.plain import Facts
from excise.settings import Naming, Objecting
from excise.text import human_bytes


@dataclass(frozen=True, eq=False)
class Outline:
    """What is known of a model before any weight is read.

    Attributes:
        shape: its sizes.
        known: its config, tokenizer, dtypes and files.
        device: of the computation.

    """

    shape: Shape
    known: Described
    device: torch.device

    @staticmethod
    def of(settings: Naming) -> Outline:
        """Read a config and the headers of the files.

        Raises:
            InputError: no such model, or a GGUF file.
            CheckpointError: see `excise.models.loading.described`.
            ArchitectureError: a model type that excise does not know.

        """
        place = device_map(settings.dtype, settings.device)
        known = described(settings.model, settings.dtype, place, settings.trust_remote_code)
        return Outline(
            Shape.of(known.config, settings.trust_remote_code),
            known,
            torch.device("cuda" if place == "auto" else place),
        )

    def work(
        self, asked: Objecting, *, remove: int, tokens: tuple[int, int], repair_tokens: int, batch_tokens: int | None
    ) -> Work:
        """What is asked of it.

        Args:
            asked: effort, and whether there is repair.
            remove: budget M.
            tokens: of the calibration samples, and of those held out.
            repair_tokens: at most so many of the former are fitted on.
            batch_tokens: tokens that go through at once; None for what keeps the device busy.

        """
        compute, shape = self.known.compute, self.shape
        return Work(
            removed=remove,
            calibration=tokens[0],
            held_out=tokens[1],
            effort=asked.effort,
            repair_tokens=min(repair_tokens, tokens[0]) if asked.repair else 0,
            batch_tokens=batch_tokens or batch_tokens_of(self.device, shape.width, shape.blocks, compute.itemsize),
            item=compute.itemsize,
            stored=self.known.stored.itemsize,
            room=STREAMS_SHARE * free_memory(),
        )

    def speed(self) -> Speed:
        """Of this machine with this model; takes seconds."""
        files = self.known.files
        return measured_speed(self.known.config, self.known.compute, self.device, files[0] if files else None)

    def advice(self, work: Work, free: float | None = None, speed: Speed | None = None) -> Advice:
        """What it will take, and where it should go.

        Args:
            work: what is asked.
            free: bytes of memory; None for what is free here.
            speed: of this machine; None leaves times out.

        """
        forecasts = tuple(forecast(self.shape, work, placement, speed) for placement in ("resident", "streamed"))
        return Advice(forecasts, float(free_memory(self.device)) if free is None else free, self.known.whole)


@dataclass(frozen=True)
class Advice:
    """Which placement a job should have: what `excise plan` says, and `excise run --placement auto` does.

    Attributes:
        forecasts: resident and streamed.
        free: bytes of memory.
        whole: why the weights cannot be streamed; empty where they can.

    """

    forecasts: Sequence[Forecast]
    free: float
    whole: str

    @property
    def fits(self) -> list[str]:
        """Placements for which there is memory."""
        possible = self.forecasts[:1] if self.whole else self.forecasts
        return [each.placement for each in possible if each.memory <= self.free]

    @property
    def placement(self) -> str:
        """The one advised."""
        return "resident" if self.whole else placement_for(self.forecasts[0].memory, self.free)

    @property
    def reason(self) -> str:
        """Why, in words; where nothing fits, what takes the most."""
        if self.placement in self.fits:
            how = "the whole model fits" if self.placement == "resident" else "it fits block by block"
            return f"{how} (--placement {self.placement})"
        worst = max(self.forecasts[self.placement == "streamed"].stages, key=lambda stage: stage.memory)
        said = self.whole or "not even block by block does it fit"
        return f"{said}; {worst.name} takes the most: fewer --samples, smaller --batch-tokens, bfloat16"

    def lines(self) -> list[str]:
        """Memory of every stage, resident and streamed, and what is advised."""
        stages = zip(*(each.stages for each in self.forecasts), strict=True)
        sizes = [(one.name, *(human_bytes(int(each.memory)) for each in (one, other))) for one, other in stages]
        return [
            f"memory, resident / streamed: {', '.join(f'{name} {one} / {other}' for name, one, other in sizes)}",
            f"{human_bytes(int(self.free))} are free: {self.reason}",
        ]

    def describe(self) -> Facts:
        """Plain data, with the totals of each forecast."""
        forecasts = [
            {**asdict(each), "memory": each.memory, "read": each.read, "seconds": each.seconds}
            for each in self.forecasts
        ]
        return {"free": self.free, "fits": self.fits, "placement": self.placement, "forecasts": forecasts}

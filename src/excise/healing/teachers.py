"""Teachers: the original model in memory, at any precision, or its top-k log-probabilities computed once to disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor
from typing_extensions import TypedDict

from excise.artefacts import Arrays, check_types, read_arrays, read_json, write_artefact
from excise.context import Context
from excise.data.batches import Batch
from excise.data.samples import Samples
from excise.errors import InputError, MissingExtraError, reading
from excise.healing.losses import DenseTargets, SparseTargets, Targets, counted_rows
from excise.measuring.distributions import Top
from excise.measuring.passes import final_states
from excise.models.identity import model_identity
from excise.models.loading import Loaded, load
from excise.models.stack import Stack
from excise.plain import Facts, Values
from excise.repair.streams import recorded_streams
from excise.store import Journal
from excise.surgery.config import quantisation
from excise.surgery.recipe import read_recipe

FORMAT = "excise teacher 1"
INDEX = "teacher.json"
PRECISIONS = ("auto", "float32", "bfloat16", "int8", "nf4")


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a teacher says about a batch.

    Attributes:
        targets: at the counted positions.
        streams: block index → residual stream [batch, tokens, width] after that block, of those asked for.

    """

    targets: Targets
    streams: Mapping[int, Tensor] = field(default_factory=dict)


class Teacher(Protocol):
    """Whatever can say what the student should predict."""

    @property
    def temperature(self) -> float:
        """By which its logits are divided."""
        ...

    def lesson(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch tokens"],
        samples: Sequence[int],
        blocks: Sequence[int],
    ) -> Lesson:
        """Teach a batch.

        Args:
            input_ids: [batch, tokens], padded on the right.
            labels: [batch, tokens], `excise.measuring.losses.IGNORED` where a position does not count.
            samples: [batch], which of the training samples they are.
            blocks: original indices of the blocks after which the residual stream is wanted.

        """
        ...

    def describe(self) -> Facts:
        """Facts for provenance."""
        ...


@dataclass(frozen=True, eq=False)
class OnlineTeacher:
    """The original model in memory.

    Attributes:
        stack: the original, all blocks.
        temperature: of its distribution.
        precision: a name in `PRECISIONS`, for provenance.

    """

    stack: Stack
    temperature: float = 1.0
    precision: str = "auto"

    def lesson(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch tokens"],
        samples: Sequence[int],
        blocks: Sequence[int],
    ) -> Lesson:
        """One forward pass of the teacher; see `Teacher`."""
        with torch.no_grad(), recorded_streams(self.stack, blocks) as streams:
            hidden = self.stack.hidden(input_ids.to(self.stack.device))
        rows, positions = counted_rows(labels.to(hidden.device))
        head = self.stack.model.get_output_embeddings().weight.device
        return Lesson(DenseTargets(self.stack, hidden[rows, positions].to(head), self.temperature), dict(streams))

    def describe(self) -> Facts:
        """Facts for provenance."""
        facts = {"kind": "online", "precision": self.precision, "temperature": self.temperature}
        return {**facts, "model_hash": model_identity(self.stack.model)}


@dataclass(frozen=True, eq=False)
class OfflineTeacher:
    """A teacher's top-k log-probabilities, read from the folder that `record_teacher` wrote; no model in memory.

    Attributes:
        folder: of the shards.
        facts: its index: k, temperature, kept mass, hash of the samples, shards.
        places: sample → (shard, first row, end row).

    """

    folder: Path
    facts: Values
    places: tuple[tuple[int, int, int], ...]

    @staticmethod
    def open(folder: str | Path, samples: Samples) -> OfflineTeacher:
        """Open a finished recording.

        Raises:
            InputError: it is unfinished, damaged, or of other samples.

        """
        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise InputError(
                f"{folder} holds no finished recording of a teacher; `excise heal … --teacher ORIGINAL --offline "
                f"{folder}` writes one"
            )
        with reading(folder, "a recorded teacher"):
            return _opened(folder, samples)

    @property
    def temperature(self) -> float:
        """Of the recorded distributions."""
        return float(self.facts["temperature"])

    def lesson(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        labels: Int[Tensor, "batch tokens"],
        samples: Sequence[int],
        blocks: Sequence[int],
    ) -> Lesson:
        """Read the rows of some samples; see `Teacher`.

        Raises:
            InputError: residual streams are asked for, which a recording does not hold.

        """
        if blocks:
            raise InputError(
                "a recorded teacher has no hidden states; leave out the hidden-state term, or load the teacher"
            )
        pieces: dict[str, list[Tensor]] = {"tokens": [], "log_probs": [], "rest": []}
        with ExitStack() as files:
            opened: dict[int, Any] = {}
            for sample in samples:
                shard, start, end = self.places[sample]
                if shard not in opened:
                    opened[shard] = files.enter_context(safe_open(_shard(self.folder, shard), framework="np"))
                for name, rows in pieces.items():
                    # Slices: of a shard only the rows asked for are read.
                    rows.append(torch.from_numpy(opened[shard].get_slice(name)[start:end]))
        return Lesson(SparseTargets(*(torch.cat(pieces[name]) for name in ("tokens", "log_probs", "rest"))))

    def describe(self) -> Facts:
        """Facts for provenance."""
        return {"kind": "offline", **self.facts}


class _Anatomy(TypedDict):
    model_type: str | None
    width: int | None
    blocks: int
    original_blocks: list[int] | None


class _Index(TypedDict):
    samples_hash: str
    k: int
    temperature: float
    shards: int
    positions: int
    anatomy: _Anatomy


def _opened(folder: Path, samples: Samples) -> OfflineTeacher:
    facts = read_json(folder / INDEX)
    if facts.get("format") != FORMAT:
        raise InputError(f"{folder / INDEX} is not the index of a teacher that this version of excise reads")
    check_types(_Index, facts, folder / INDEX)
    # Those of the first version know nothing of the anatomy.
    if missing := [name for name in _Index.__annotations__ if name not in (*facts, "anatomy")]:
        raise InputError(f"{folder / INDEX} lacks {', '.join(missing)}; it is damaged: record the teacher anew")
    if facts["samples_hash"] != samples.hash:
        raise InputError(
            f"{folder} was recorded on other samples; pass the same --data, --samples, --tokens, --seed and "
            f"--loss-on, or record it anew"
        )
    # Shards are batches, which group samples by length: a sample's rows may be in any of them.
    places: dict[int, tuple[int, int, int]] = {}
    for shard in range(facts["shards"]):
        # Read whole once, which checks every byte; lessons then take rows without asking again.
        kept, _ = read_arrays(_shard(folder, shard))
        ends = np.cumsum(kept["counts"])
        for sample, start, end in zip(kept["samples"], [0, *ends[:-1]], ends, strict=True):
            places[int(sample)] = (shard, int(start), int(end))
        if kept["tokens"].shape[1:] != (facts["k"],):
            raise InputError(
                f"{folder / INDEX} speaks of k = {facts['k']}, and {_shard(folder, shard).name} has another"
            )
    if places.keys() != set(range(len(samples))) or not facts["temperature"] > 0:
        raise InputError(
            f"{folder / INDEX} does not describe what lies beside it; it is damaged: record the teacher anew"
        )
    return OfflineTeacher(folder, facts, tuple(places[sample] for sample in range(len(samples))))


@torch.no_grad()
def record_teacher(
    context: Context, samples: Samples, folder: str | Path, *, k: int = 64, temperature: float = 1.0
) -> Facts:
    """Write the teacher's k most probable tokens at every counted position, once for any number of students.

    Each position takes 8·k + 4 bytes. The mass of all other tokens is kept as one number. An interrupted recording goes
    on where it stopped; the folder counts as a teacher only when its index is there.

    Args:
        context: the original.
        samples: what healing will train on.
        folder: for the shards.
        k: tokens kept at each position.
        temperature: by which the logits are divided; healing then uses the same.

    Returns:
        The index: `k`, `temperature`, `kept_mass` (mean probability of the kept tokens), `positions`, `shards`, hashes.

    Raises:
        InputError: k or temperature out of range.
        OutputError: the folder holds another recording.

    """
    stack = context.stack
    vocabulary = stack.model.config.get_text_config().vocab_size
    if not 1 <= k <= vocabulary or temperature <= 0:
        raise InputError(f"expected k between 1 and {vocabulary} and a temperature > 0, got {k} and {temperature}")
    folder, numbers = Path(folder), range(len(context.batches(samples)))
    facts = {
        "format": FORMAT,
        "model_hash": context.identity,
        "samples_hash": samples.hash,
        "k": k,
        "temperature": temperature,
        # Other batches can be as many: an interrupted recording must not mix the two.
        "batch_tokens": context.tokens_per_batch,
        "shards": len(numbers),
    }
    journal = Journal(folder, {"stage": "teacher", **facts})
    # Of a recording that may be larger than memory only the remainders are kept.
    rests = {n: shard["rest"] for n in numbers if (shard := journal.get(n)) is not None}
    missing = [number for number in numbers if number not in rests]
    for number, batch, hidden in final_states(context, samples, "recording the teacher", missing):
        shard = _recorded(batch, Top.of(stack, hidden[counted_rows(batch.labels)], k, temperature))
        journal.write(number, **shard)
        rests[number] = shard["rest"]
    remainders = np.concatenate([rests[number] for number in sorted(rests)])
    kept_mass = float(1 - remainders.mean(dtype=np.float64))
    index = {**facts, "anatomy": anatomy(stack), "positions": len(remainders), "kept_mass": kept_mass}
    write_artefact(folder / INDEX, index)
    return index


def anatomy(stack: Stack) -> Facts:
    """What tells whether a model is the one that another was made from.

    Returns:
        `model_type` (None for a GGUF file, which calls some by another's name), `width` of the residual stream, number
        of `blocks`, and `original_blocks`, those of the first original that it has, where a recipe beside it says.

    """
    config = stack.model.config
    kept = read_recipe(config.name_or_path or "").get("original_blocks")
    return {
        "model_type": None if quantisation(config) == "gguf" else stack.config.model_type,
        "width": getattr(stack.config, "hidden_size", None),
        "blocks": len(stack.blocks),
        "original_blocks": kept if kept is not None and len(kept) == len(stack.blocks) else None,
    }


def _recorded(batch: Batch, top: Top) -> Arrays:
    """What is written of a batch: 8k + 4 bytes a position, and which samples they belong to."""
    return {
        "tokens": top.tokens.cpu().numpy(),
        "log_probs": top.log_probs.float().cpu().numpy(),
        "rest": top.rest.float().cpu().numpy(),
        "counts": (batch.labels >= 0).sum(dim=1).cpu().numpy(),
        "samples": np.array(batch.indices),
    }


def _shard(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:06d}.safetensors"


def load_teacher(
    source: str,
    precision: str = "auto",
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    placement: str = "resident",
) -> Loaded:
    """Load the original as a teacher.

    Args:
        source: as for `excise.models.loading.load`.
        precision: "auto" as `load` does; "float32", "bfloat16"; "int8" or "nf4", quantised by bitsandbytes while
            loading (nf4 as in the paper: 4 bits a weight, computing in bfloat16 on a GPU and float32 on a CPU).
        device: as for `load`.
        trust_remote_code: as for `load`.
        placement: as for `load`; of a quantised one, resident.

    Raises:
        InputError: unknown precision, or a quantised teacher that is not to stay in memory.
        MissingExtraError: bitsandbytes is wanted and not installed.

    """
    if precision not in PRECISIONS:
        raise InputError(f"expected a teacher precision in {', '.join(PRECISIONS)}, got '{precision}'")
    if precision in ("int8", "nf4"):
        if placement == "streamed":
            raise InputError(f"a teacher in {precision} stays in memory; stream one in bfloat16 or float32")
        return _quantised(source, precision, device, trust_remote_code)
    return load(source, dtype=precision, device=device, trust_remote_code=trust_remote_code, placement=placement)


def _quantised(source: str, precision: str, device: str, trust_remote_code: bool) -> Loaded:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"a teacher in {precision} needs bitsandbytes; pip install 'excise[bitsandbytes]', or choose another"
        )
    if Path(source).suffix == ".gguf":
        raise InputError(f"{source} is quantised already; load it as it is, or quantise the original checkpoint")
    from transformers import BitsAndBytesConfig

    on_gpu = torch.cuda.is_available() and device != "cpu"
    compute = torch.bfloat16 if on_gpu else torch.float32
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if precision == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    )
    dtype = "bfloat16" if on_gpu else "float32"
    return load(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantisation=config)

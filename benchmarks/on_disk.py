"""What pruning on disk costs: peak resident memory, and time beside that of `cp` of the same bytes.

Builds a synthetic sharded Llama checkpoint in bfloat16 (random numbers, so that no file system takes a short cut by
holes), prunes a quarter of its blocks in a process of its own, and copies the result with `cp -r`, by turns; every time
includes writing out to the disk (`sync`). Deletes all of it and prints one JSON line.

    python -m benchmarks.on_disk --gigabytes 20 --place /scratch
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 32000
SHARD = 5_000_000_000
ROOM = 3.2  # original, pruned and its copy, and some air
CHILD = """
import json, sys, time
from transformers import AutoConfig
from excise.surgery.on_disk import prune_folder
source, out, removed = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
start = time.perf_counter()
prune_folder(source, removed, out)
print(time.perf_counter() - start)
"""


def main() -> None:
    """Run the benchmark and print its line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_disk", description=__doc__)
    parser.add_argument("--gigabytes", type=float, help="size of the checkpoint (default: 20, or what the disk allows)")
    parser.add_argument("--place", type=Path, default=Path(), help="where to build it (default: here)")
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    free = shutil.disk_usage(options.place).free / 1e9
    gigabytes = options.gigabytes or min(20.0, free / ROOM)
    if gigabytes * ROOM > free:
        sys.exit(f"{gigabytes:.1f} GB need {gigabytes * ROOM:.0f} GB on the disk for a while; {free:.0f} GB are free")
    with tempfile.TemporaryDirectory(prefix="excise-benchmark-", dir=options.place) as place:
        print(json.dumps(measure(Path(place), gigabytes, options.repetitions)))


def measure(place: Path, gigabytes: float, repetitions: int) -> dict[str, Any]:
    """Build, prune and copy in `place`."""
    blocks = build(place / "original", gigabytes)
    removed = list(range(blocks // 2, blocks // 2 + max(1, blocks // 4)))
    prune_seconds, copy_seconds, peaks = [], [], []
    for _ in range(repetitions):
        for name in ("pruned", "copy"):
            shutil.rmtree(place / name, ignore_errors=True)
        os.sync()
        seconds, peak = prune(place / "original", place / "pruned", removed)
        prune_seconds.append(seconds)
        peaks.append(peak)
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(place / "pruned"), str(place / "copy")], check=True)
        os.sync()
        copy_seconds.append(time.perf_counter() - start)
    written = sum(path.stat().st_size for path in (place / "pruned").iterdir())
    ratios = [a / b for a, b in zip(prune_seconds, copy_seconds, strict=True)]
    return {
        "ratio_to_cp": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "peak_rss_mb": round(max(peaks) / 1e6),
        "prune_seconds": [round(seconds, 2) for seconds in prune_seconds],
        "cp_seconds": [round(seconds, 2) for seconds in copy_seconds],
        "original_gb": round(sum(path.stat().st_size for path in (place / "original").iterdir()) / 1e9, 2),
        "written_gb": round(written / 1e9, 2),
        "shards": len(list((place / "original").glob("*.safetensors"))),
        "blocks": blocks,
        "removed": len(removed),
    }


def prune(source: Path, out: Path, removed: list[int]) -> tuple[float, int]:
    """Seconds of pruning with `sync`, without imports; and the process's peak resident memory in bytes."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(removed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        printed = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"pruning failed with exit status {child.returncode}")
    start = time.perf_counter()
    os.sync()
    return float(printed) + time.perf_counter() - start, usage.ru_maxrss * 1024


def build(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint; return its number of blocks."""
    folder.mkdir()
    shapes = block_shapes()
    block_bytes = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    blocks = max(4, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / block_bytes))
    tensors = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    tensors |= {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in shapes.items()}
    tensors["model.norm.weight"] = (HIDDEN,)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        if used + size > SHARD:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    noise = _noise()
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, shard, noise)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": blocks,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return blocks


def _noise() -> bytes:
    """Bfloat16 numbers of the size of weights: the upper halves of float32 ones."""
    values = np.random.default_rng(0).normal(scale=0.02, size=32 * 2**20).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def block_shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of a block of Llama-3.1-8B."""
    return {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj.weight": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    }


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], noise: bytes) -> None:
    """Write bfloat16 tensors of noise."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(noise)):
            file.write(noise[: min(len(noise), offset - start)])


if __name__ == "__main__":
    main()

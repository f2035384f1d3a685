"""Train a small hybrid from scratch, on a CPU and offline: a Nemotron-H with Mamba-2, attention, MoE and plain blocks.

    python examples/train_hybrid.py --out examples/tiny-hybrid

Its text is what every Python has: the docstrings of the standard library and the language reference of `help()`
(PSF-2.0), and the starter chats of excise (CC0). A 24th of the modules and topics and every 8th chat are kept out of
training; the former are written to `held_out.txt`. Interrupted, it goes on where it stopped. Another Python has other
docstrings, and so gives another model.

Writes OUT/model (weights in bfloat16, config, tokenizer with a chat template), OUT/held_out.txt and OUT/training.json
with the loss curve, the losses on held-out text, and how it was made.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast

from excise.artefacts import atomic_path, write_json
from excise.context import Context
from excise.data import load_samples
from excise.measuring.measure import measure
from excise.models.loading import load

PATTERN = "ME*EME-EME*EME-ME"  # Mamba-2, mixture of experts, attention, feed-forward
VOCABULARY = 1024
PAD, BEGIN, END = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROSE = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
KEPT_APART, CHATS_KEPT_APART = 24, 8
HELD_OUT: dict[str, Any] = {"samples": 128, "tokens": 128, "seed": 0}
BALANCE_RATE = 2e-3
SAVE_EVERY, SHOW_EVERY = 25, 20


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train: `steps` batches of `batch` windows of `tokens` tokens.

    The learning rate rises over `warmup` steps, stays, and falls to 0 over the last `fall` of them.
    """

    steps: int = 1600
    batch: int = 8
    tokens: int = 128
    learning_rate: float = 3e-3
    warmup: int = 40
    fall: float = 0.3
    weight_decay: float = 0.1
    seed: int = 0


def main() -> None:
    """Train and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-hybrid"))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-hybrid"), help="state of an unfinished training")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = Plan(steps=options.steps, seed=options.seed)
    prose, prose_apart = library_prose()
    chats, chats_apart = starter_chats()
    tokenizer = train_tokenizer(prose + chats)
    texts = [*prose, *(tokenizer.apply_chat_template(json.loads(chat)["messages"], tokenize=False) for chat in chats)]
    ids = token_stream(texts, tokenizer, plan.seed)
    model = new_model(configuration(tokenizer), plan.seed)
    curve, seconds = train(model, ids, plan, options.work / "state.pt")

    held_out = {"prose": options.out / "held_out.txt", "chats": options.work / "chats_apart.jsonl"}
    with atomic_path(held_out["prose"]) as path:
        path.write_text("\n\n".join(prose_apart) + "\n", encoding="utf-8")
    with atomic_path(held_out["chats"]) as path:
        path.write_text("\n".join(chats_apart) + "\n", encoding="utf-8")
    with atomic_path(options.out / "model") as folder:
        save(model, tokenizer, folder)
    facts = {
        "what": f"Nemotron-H, {PATTERN}, trained from scratch",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "command": f"python examples/train_hybrid.py --steps {plan.steps} --seed {plan.seed}",
        "plan": asdict(plan),
        "trained_tokens": plan.steps * plan.batch * plan.tokens,
        "distinct_tokens": len(ids),
        "characters": {
            "docstrings and language reference of Python, PSF-2.0": sum(map(len, prose)),
            "starter chats of excise, CC0": sum(map(len, chats)),
        },
        **_machine(options.threads, *seconds),
        "held_out": _held_out_losses(options.out / "model", held_out),
        "training_loss": {"unit": "nats/token, mean of the steps since the last", "curve": _thinned(curve)},
    }
    write_json(options.out / "training.json", facts)
    print(json.dumps(facts["held_out"]))


def library_prose(library: Path | None = None) -> tuple[list[str], list[str]]:
    """Docstrings, one document a module, and the language reference: to train on, and kept apart.

    Args:
        library: folder of modules; by default the standard library's.

    """
    documents = {f"topic {name}": text.strip() for name, text in topics.items()}
    root, seen = library or Path(sysconfig.get_path("stdlib")), set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if NO_PROSE.isdisjoint(name.parts):
            own = [text for text in _docstrings(path) if text not in seen]
            seen.update(own)
            if own:
                documents[str(name)] = "\n\n".join(own)
    apart = {name for name in documents if hashlib.sha256(name.encode()).digest()[0] % KEPT_APART == 0}
    return (
        [text for name, text in documents.items() if name not in apart],
        [text for name, text in documents.items() if name in apart],
    )


def _docstrings(path: Path) -> list[str]:
    """Those of at least a line of prose, of a module and of all that it defines."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the library keeps a few such files for its own tests
        return []
    defined = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, defined))
    return [text for text in found if text and len(text) > 80]


def starter_chats() -> tuple[list[str], list[str]]:
    """The starter chats of excise as JSON lines: to train on, and kept apart."""
    lines = resources.files("excise.data").joinpath("starter.jsonl").read_text(encoding="utf-8").splitlines()
    apart = range(CHATS_KEPT_APART - 1, len(lines), CHATS_KEPT_APART)
    return [line for i, line in enumerate(lines) if i not in apart], [lines[i] for i in apart]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text survives, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BEGIN, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast, seed: int) -> np.ndarray:
    """All documents in a random order, each ended by the end token; [tokens], int64."""
    order = np.random.default_rng(seed).permutation(len(texts))
    pieces = [tokenizer(texts[i], verbose=False)["input_ids"] + [tokenizer.eos_token_id] for i in order]
    return np.concatenate([np.array(piece, dtype=np.int64) for piece in pieces])


def configuration(tokenizer: PreTrainedTokenizerFast) -> NemotronHConfig:
    """Config of the model, in the proportions of its large relatives."""
    return NemotronHConfig(
        vocab_size=VOCABULARY,
        hybrid_override_pattern=PATTERN,
        hidden_size=128,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=2,
        ssm_state_size=16,
        chunk_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=96,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def new_model(config: NemotronHConfig, seed: int) -> NemotronHForCausalLM:
    """Random model, in float32."""
    torch.manual_seed(seed)
    return NemotronHForCausalLM(config).train()


def train(
    model: NemotronHForCausalLM, ids: np.ndarray, plan: Plan, state: Path, until: int | None = None
) -> tuple[list[float], tuple[float, float]]:
    """Train with AdamW from where `state` stands; up to step `until`, by default to the end.

    Returns:
        The loss of every step, nats/token, and the seconds that all of them took: by the clock, and of the processor.

    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))
    curve: list[float] = []
    seconds = cpu_seconds = 0.0
    kept = torch.load(state, weights_only=True) if state.exists() else {}
    if kept.get("plan") == asdict(plan):
        model.load_state_dict(kept["model"])
        optimiser.load_state_dict(kept["optimiser"])
        curve, (seconds, cpu_seconds) = kept["curve"], kept["seconds"]
    hooks = [block.mixer.gate.register_forward_hook(_balance) for block in model.model.layers if _is_moe(block)]
    last = plan.steps if until is None else until
    for step in range(len(curve), last):
        started, cpu_started = time.perf_counter(), time.process_time()
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * _schedule(step, plan)
        batch = windows(ids, plan, step)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        curve.append(loss.item())
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
        if len(curve) % SHOW_EVERY == 0:
            print(f"step {len(curve)}  loss {np.mean(curve[-SHOW_EVERY:]):.4f}  {seconds / 60:.1f} min", flush=True)
        if len(curve) % SAVE_EVERY == 0 or len(curve) == last:
            with atomic_path(state) as path:
                parts = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                done = {"plan": asdict(plan), "curve": curve, "seconds": (seconds, cpu_seconds)}
                torch.save({**parts, **done}, path)
    for hook in hooks:
        hook.remove()
    return curve, (seconds, cpu_seconds)


def windows(ids: np.ndarray, plan: Plan, step: int) -> torch.Tensor:
    """The batch of a step [batch, tokens]: every window once in an epoch, in an order of its own."""
    count = len(ids) // plan.tokens
    epoch, place = divmod(step, count // plan.batch)
    order = np.random.default_rng((plan.seed, epoch)).permutation(count)
    chosen = order[place * plan.batch : (place + 1) * plan.batch]
    return torch.from_numpy(ids[: count * plan.tokens].reshape(count, plan.tokens)[chosen])


def _schedule(step: int, plan: Plan) -> float:
    """Share of the learning rate."""
    return min((step + 1) / plan.warmup, 1.0, (plan.steps - step) / (plan.fall * plan.steps))


def _is_moe(block: Any) -> bool:
    return block.block_type == "moe"


@torch.no_grad()
def _balance(router: Any, _inputs: Any, outputs: Any) -> None:
    """Raise the bias of experts that few tokens chose, lower that of the others (Wang et al., 2024; no loss term)."""
    load = torch.bincount(outputs[2].flatten(), minlength=router.num_experts).float()
    router.e_score_correction_bias += BALANCE_RATE * (load.mean() - load).sign()


def save(model: NemotronHForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in bfloat16 (the routers' biases, as in its large relatives, in float32), config and tokenizer."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _machine(threads: int, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "minutes": round(seconds / 60, 1),
        "cpu_minutes": round(cpu_seconds / 60, 1),
        "machine": f"{threads} thread(s) on a machine of {os.cpu_count()} {platform.machine()} cores",
        "versions": versions,
    }


def _held_out_losses(folder: Path, texts: Mapping[str, Path]) -> dict[str, Any]:
    """Of the model as it was written, loaded again."""
    loaded = load(str(folder))
    facts = {}
    for name, path in texts.items():
        samples = load_samples(str(path), loaded.tokenizer, **HELD_OUT)
        loss = measure(Context(loaded), samples, [()]).loss()
        facts[name] = {"loss": round(loss, 4), "unit": "nats/token", "drawn": HELD_OUT, "tokens": samples.tokens}
    return facts


def _thinned(curve: list[float]) -> list[list[float]]:
    """(step, mean loss of the steps since the last point)."""
    return [
        [stop, round(float(np.mean(curve[stop - SHOW_EVERY : stop])), 4)]
        for stop in range(SHOW_EVERY, len(curve) + 1, SHOW_EVERY)
    ]


if __name__ == "__main__":
    main()

"""Tiny random checkpoints of every architecture excise knows, built in milliseconds and entirely offline."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from excise.models.architectures import ARCHITECTURES

MODEL_TYPES = sorted(ARCHITECTURES)
VOCABULARY = 288  # 256 bytes, the special tokens, a few merges
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
SLIDING_WINDOW = 6

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A stack of blocks loses a few of them and still speaks.",
    "Question: what is two plus two? Answer: two plus two is four.",
]

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def _alternating(layers: int, period: int = 2) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def _specific(model_type: str, layers: int) -> dict[str, Any]:
    """Keys beyond the common ones: those that make an architecture differ, with windows short enough to matter."""
    windowed = {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
    gemma = {**GQA, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 10.0}
    return {
        "llama": GQA,
        "mistral": {**GQA, "sliding_window": SLIDING_WINDOW},
        "ministral3": GQA,
        "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, **windowed, "max_window_layers": layers // 2},
        "qwen3": {**GQA, **windowed, "max_window_layers": layers // 2},
        "smollm3": {"num_attention_heads": 4, "num_key_value_heads": 2, **windowed, "no_rope_layer_interval": 3},
        "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": SLIDING_WINDOW},
        "granite": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
        },
        "gpt2": {"num_attention_heads": 4, "n_positions": 128, "n_inner": 64},
        "gpt_neox": {"num_attention_heads": 4},
        "gemma2": {**gemma, "attn_logit_softcapping": 20.0, "layer_types": _alternating(layers)},
        "gemma3_text": {**gemma, "layer_types": _alternating(layers, period=3)},
        "olmo2": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "mixtral": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {**GQA, **experts, "num_experts": 4, "mlp_only_layers": [1, layers - 2]},
    }.get(model_type, {})


def tiny_config(model_type: str, layers: int = 6, *, tied: bool = False, **overrides: Any) -> Any:
    """Config of a tiny model of `model_type`; `overrides` are config keys."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "tie_word_embeddings": tied,
        **_specific(model_type, layers),
        **overrides,
    }
    if model_type == "gpt2":  # spells them n_embd, n_inner, n_positions
        for foreign in ("intermediate_size", "max_position_embeddings"):
            values.pop(foreign)
    return AutoConfig.for_model(model_type, **values)


def tiny_model(
    model_type: str,
    layers: int = 6,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tied: bool = False,
    **overrides: Any,
) -> Any:
    """Random causal language model of `model_type` (width 32, vocabulary 288), seeded, in evaluation mode.

    Weights are large enough for every block to move the logits and for the logits to prefer some tokens. The same seed
    gives the same weights in every dtype, up to rounding.
    """
    config = tiny_config(model_type, layers, tied=tied, **overrides)
    torch_state = torch.get_rng_state()
    try:
        # Grouped matrix products know no float64.
        experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **experts)
    finally:
        torch.set_rng_state(torch_state)
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(0.4 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)
            else:  # norms and biases start from their own 1 or 0
                parameter.add_(0.1 * noise)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 3
    return model.eval()


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level fast tokenizer of 288 tokens that any text survives; with a ChatML template unless `chat` is off."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_folder(path: str | Path, model_type: str = "llama", layers: int = 6, **options: Any) -> Path:
    """Save a tiny model (`options` as for `tiny_model`) and its tokenizer in `path`, as from_pretrained wants them."""
    folder = Path(path)
    tiny_model(model_type, layers, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

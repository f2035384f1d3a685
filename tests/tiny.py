"""Tiny random checkpoints of every architecture excise knows, built in milliseconds and entirely offline."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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

# A matrix and biases, gains, fused experts, kinds of blocks, a language tower, shared keys and values: they stand for
# all where all would take long.
STANDING = ("llama", "gpt2", "gemma2", "gemma3", "mixtral", "nemotron_h", "gemma4_text")

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A stack of blocks loses a few of them and still speaks.",
    "Question: what is two plus two? Answer: two plus two is four.",
]

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def _alternating(layers: int, period: int = 2) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def _interleaved(layers: int, *types: str) -> list[str]:
    return [types[i % len(types)] for i in range(layers)]


def _hybrid_pattern(layers: int) -> str:
    """Nemotron-H's letters: Mamba-2, mixture of experts, attention, plain feed-forward."""
    return ("MEM*-E" * layers)[:layers]


def _specific(model_type: str, layers: int) -> dict[str, Any]:
    """Keys beyond the common ones: those that make an architecture differ, with windows short enough to matter."""
    windowed = {"use_sliding_window": True, "sliding_window": SLIDING_WINDOW}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
    gemma = {**GQA, "sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 10.0}
    granite = {"logits_scaling": 2.0, "residual_multiplier": 0.7, "embedding_multiplier": 1.5}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    routed = {**experts, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    delta = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": _interleaved(layers, "linear_attention", "linear_attention", "full_attention"),
    }
    mamba2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
    return {
        "llama": GQA,
        "mistral": {**GQA, "sliding_window": SLIDING_WINDOW},
        "ministral3": GQA,
        "qwen2": {**heads, **windowed, "max_window_layers": layers // 2},
        "qwen3": {**GQA, **windowed, "max_window_layers": layers // 2},
        "smollm3": {**heads, **windowed, "no_rope_layer_interval": 3},
        "phi3": {**heads, "sliding_window": SLIDING_WINDOW},
        "granite": {**heads, **granite, "attention_multiplier": 0.3},
        "gpt2": {"num_attention_heads": 4, "n_positions": 128, "n_inner": 64},
        "opt": {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 24, "dropout": 0.0},
        "gpt_neox": {"num_attention_heads": 4},
        "gemma2": {**gemma, "attn_logit_softcapping": 20.0, "layer_types": _alternating(layers)},
        "gemma3_text": {**gemma, "layer_types": _alternating(layers, period=3)},
        "gemma4_text": {
            **GQA,
            "sliding_window": SLIDING_WINDOW,
            "global_head_dim": 16,
            "final_logit_softcapping": 10.0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": layers // 3,
            "use_double_wide_mlp": True,
            "layer_types": _alternating(layers),
        },
        "olmo2": heads,
        "mixtral": {**GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
        "olmoe": {**heads, "num_experts": 4, "num_experts_per_tok": 2},
        "gpt_oss": {
            **GQA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": _interleaved(layers, "sliding_attention", "full_attention"),
        },
        "qwen3_moe": {**GQA, **experts, "num_experts": 4, "mlp_only_layers": [1, layers - 2]},
        "deepseek_v3": {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            **latent,
            **routed,
            "first_k_dense_replace": 2,
        },
        "glm4_moe": {**GQA, **routed, "first_k_dense_replace": 2, "use_qk_norm": True},
        "nemotron_h": {
            **GQA,
            **experts,
            "hybrid_override_pattern": _hybrid_pattern(layers),
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 24,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 4,
            "time_step_min": 1e-9,  # a prompt is read with time steps of at least this, single tokens are not
        },
        "granitemoehybrid": {
            **heads,
            **granite,
            **mamba2,
            "attention_multiplier": 0.3,
            "shared_intermediate_size": 48,
            "num_local_experts": 4,
            "layer_types": _interleaved(layers, "linear_attention", "full_attention"),
        },
        "jamba": {
            **heads,
            "num_experts": 4,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "qwen3_next": {
            **GQA,
            **experts,
            **delta,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
        "qwen3_5_text": {**GQA, **delta},
        "falcon_h1": {
            **heads,
            **mamba2,
            "mamba_d_ssm": 64,
            "lm_head_multiplier": 0.5,
            "ssm_out_multiplier": 0.8,
            "attention_out_multiplier": 1.2,
        },
        "lfm2": {**heads, "layer_types": _interleaved(layers, "conv", "conv", "full_attention")},
        "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    }.get(model_type, {})


# Two of six blocks that can go: Jamba's others must stay evenly spaced.
REMOVABLE = {"jamba": (0, 1)}
# Grouped matrix products know no float64, so experts are computed one by one there.
EAGER_EXPERTS = {"experts_implementation": "eager"}


def removable_pair(model_type: str) -> list[int]:
    """Two blocks of a tiny six-block model of this type that its config can do without."""
    return list(REMOVABLE.get(model_type, (1, 4)))


SPELLED_OTHERWISE = {  # common keys that a config knows under other names, or not at all
    "gpt2": ("intermediate_size", "max_position_embeddings"),
    "opt": ("intermediate_size",),
    "nemotron_h": ("num_hidden_layers",),
    "mamba2": ("intermediate_size", "max_position_embeddings"),
}
MULTIMODAL = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text"}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_config(model_type: str, layers: int = 6, *, tied: bool = False, **overrides: Any) -> Any:
    """Config of a tiny model of `model_type`; `overrides` are config keys (of the text model)."""
    text_type = MULTIMODAL.get(model_type, model_type)
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
        **_specific(text_type, layers),
        **overrides,
    }
    for foreign in SPELLED_OTHERWISE.get(text_type, ()):
        values.pop(foreign)
    if model_type == text_type:
        return AutoConfig.for_model(model_type, **values)
    vision = {**VISION, **({"head_dim": 8} if model_type == "gemma4" else {})}
    text = {"model_type": text_type, **values}
    return AutoConfig.for_model(model_type, text_config=text, vision_config=vision, tie_word_embeddings=tied)


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
    torch.manual_seed(seed)  # some parameters with one dimension are random at the start
    try:
        options = EAGER_EXPERTS if dtype == torch.float64 else {}
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
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


def beginning_tokenizer(*, ending: bool = False) -> PreTrainedTokenizerFast:
    """One that adds <s> to every text, as those of Llama and Gemma do, and </s> if wished."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if ending else "<s> $A",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")],
    )
    return tokenizer


def tiny_folder(path: str | Path, model_type: str = "llama", layers: int = 6, **options: Any) -> Path:
    """Save a tiny model (`options` as for `tiny_model`) and its tokenizer in `path`, as from_pretrained wants them."""
    folder = Path(path)
    tiny_model(model_type, layers, **options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder

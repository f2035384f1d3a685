"""Pre-norm transformers: x + attention(norm(x)), then x + feed-forward(norm(x))."""

from excise.models.architectures.readers import LLAMA_CPP_PERIODS
from excise.models.architectures.record import Architecture, Placement, SublayerRecord

ARCHITECTURES = (
    Architecture("llama"),
    Architecture("mistral"),
    Architecture("ministral3"),
    Architecture("qwen2", positions=("max_window_layers",)),
    Architecture("qwen3", positions=("max_window_layers",)),
    Architecture(
        "smollm3",
        per_block_keys=("layer_types", "no_rope_layers"),
        positions=("max_window_layers",),
        placements=(
            Placement(
                "llama.cpp",
                "no_rope_layers",
                LLAMA_CPP_PERIODS["smollm3"],
                usual=1,
                last=0,
                source="src/models/smollm3.cpp, n_no_rope_layer_step: no key of a GGUF file sets it",
            ),
        ),
    ),
    Architecture("phi3"),
    Architecture("granite", logit_divisor="logits_scaling"),
    Architecture(
        "gpt2",
        stack="transformer.h",
        sublayers=(
            SublayerRecord("attention", "attn", writes=("attn.c_proj",)),
            SublayerRecord("feed-forward", "mlp", writes=("mlp.c_proj",)),
        ),
        index_attributes=("attn.layer_idx",),
        required={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        learned_positions=True,
    ),
    Architecture(
        "opt",
        stack="model.decoder.layers",
        sublayers=(
            SublayerRecord("attention", "self_attn", writes=("self_attn.out_proj",)),
            SublayerRecord("feed-forward", "fc2", inner=("fc1",), writes=("fc2",)),
        ),
        required={"do_layer_norm_before": True},
        learned_positions=True,
    ),
)

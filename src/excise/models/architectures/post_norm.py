"""Transformers with a norm after the sublayer, inside the residual branch: the gate belongs on that norm's output."""

from excise.models.architectures.record import Architecture, SublayerRecord

POST_NORMS = (
    SublayerRecord("attention", "post_attention_layernorm", inner=("self_attn",)),
    SublayerRecord("feed-forward", "post_feedforward_layernorm", inner=("mlp",)),
)

ARCHITECTURES = (
    Architecture("gemma2", sublayers=POST_NORMS, logit_softcap="final_logit_softcapping"),
    Architecture(
        "gemma3_text",
        sublayers=POST_NORMS,
        index_attributes=("layer_idx", "self_attn.layer_idx"),
        logit_softcap="final_logit_softcapping",
    ),
    Architecture("olmo2", sublayers=POST_NORMS),
)

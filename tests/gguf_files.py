"""GGUF files of tiny models."""

from __future__ import annotations

import json

import gguf
import numpy as np

from tests.tiny import tiny_tokenizer


def paired_halves_to_neighbours(weight, heads):
    """Rows of a query or key matrix in GGUF's order of rotary dimensions."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model, path, *, quantised=None, alignment=None, general=None, **metadata):
    """Write a tiny Llama as GGUF, as llama.cpp's converter does.

    Args:
        model: the model.
        path: the file.
        quantised: type of the matrices in blocks, such as `gguf.GGMLQuantizationType.Q8_0`; None keeps float32.
        alignment: of the tensors in the file, in bytes; None for GGUF's 32.
        general: what the file says of itself, after `general.`, such as {"name": "Tiny"}.
        metadata: more of it, after `llama.` (dots as double underscores), such as `nextn_predict_layers=1`.

    """
    config, tokenizer = model.config, json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if "attention__head_count_kv" not in metadata:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["merges"]])
    writer.add_token_types([gguf.TokenType.CONTROL] * 6 + [gguf.TokenType.NORMAL] * (config.vocab_size - 6))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.endswith("q_proj.weight"):
            array = paired_halves_to_neighbours(array, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            array = paired_halves_to_neighbours(array, config.num_key_value_heads)
        own_name = names.get_name(name, (".weight",))
        if quantised is not None and array.ndim == 2 and own_name.startswith("blk."):
            writer.add_tensor(own_name, gguf.quants.quantize(array, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(own_name, np.ascontiguousarray(array))
    for key, value in (general or {}).items():
        writer.add_string(f"general.{key}", value)
    for key, value in metadata.items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"llama.{key.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

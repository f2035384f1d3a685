"""Ask stock transformers whether it finds every weight of a checkpoint by name and shape, without reading any.

Run as `stock_names.py FOLDER [plain]`, in a process of its own; prints one JSON object, with `load_error` where the
model cannot be built. It is built and filled on the meta device, where tensors have a shape and no content. With
`plain` the config's quantisation is forgotten, since transformers does not know every quantisation.
"""

import json
import sys
from typing import Any

import transformers


def main(folder: str, plain: str = "") -> dict[str, Any]:
    """Return the report on `folder`."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if plain and hasattr(config, "quantization_config"):
            del config.quantization_config
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever loading raises
        machine = "this machine lacks a package: " if isinstance(error, ImportError) else ""
        text = (str(error).strip() or "no message").splitlines()[0]
        return {"transformers": transformers.__version__, "load_error": f"{machine}{type(error).__name__}: {text}"}
    keys = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    head = model.get_output_embeddings()
    own = () if head is None else tuple(head.parameters())
    return {
        **keys,
        "head": [name for name, weight in model.named_parameters() if any(weight is parameter for parameter in own)],
        "is_stock": type(model).__module__.startswith("transformers."),
        "weights": len(list(model.parameters())),
        "model_class": type(model).__name__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))  # noqa: T201

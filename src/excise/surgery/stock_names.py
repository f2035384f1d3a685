"""Ask stock transformers whether it finds every weight of a checkpoint by name and shape, without reading any.

Run as `python -I stock_names.py FOLDER [plain]`, in a process of its own; prints one JSON object. The model is built
and filled on the meta device, where tensors have a shape and no content. With `plain` the config's quantisation is
forgotten, since transformers does not know every quantisation.
"""

import json
import sys
from typing import Any

import transformers


def main(folder: str, plain: str = "") -> dict[str, Any]:
    """Return the report on `folder`."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if plain and hasattr(config, "quantization_config"):
        del config.quantization_config
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
    )
    keys = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return {
        **keys,
        "is_stock": type(model).__module__.startswith("transformers."),
        "weights": len(list(model.parameters())),
        "model_class": type(model).__name__,
        "transformers": transformers.__version__,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201

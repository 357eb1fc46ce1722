"""llama-perplexity on a GGUF file, beside transformers' reading of it on the same tokens.

    python studies/gguf/llama_perplexity.py FILE --bin llama.cpp/build/bin --window 256 --chunks 8

The text is the built-in one, cut as llama-perplexity does: into chunks whose first token gives way
to <bos> where the tokenizer puts one, and which count from their middle on. llama.cpp rounds
activations to 8 bits, transformers computes in float32: the weights are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autocompress.documents import read_documents


def llama_perplexity(bin: Path, file: Path, text: str, window: int, chunks: int) -> float:
    """What llama.cpp finds, one thread."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as raw:
        raw.write(text)
        raw.flush()
        sizes = ("-c", window, "-b", window, "--chunks", chunks, "-t", 1)
        command = [bin / "llama-perplexity", "-m", file, "-f", raw.name, *sizes]
        ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", ran.stdout + ran.stderr)
    assert found, ran.stderr[-2000:]
    return float(found[1])


def transformers_perplexity(file: Path, text: str, window: int, chunks: int) -> float:
    """The same of transformers' reading of the file, float32."""
    settings = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **settings)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **settings)
    ids = tokenizer(text)["input_ids"]
    first = tokenizer.bos_token_id if tokenizer("")["input_ids"] else None
    total, count = 0.0, 0
    for start in range(0, chunks * window, window):
        chunk = torch.tensor(ids[start : start + window])
        labels = chunk[window // 2 + 1 :].clone()
        if first is not None:
            chunk[0] = first
        with torch.inference_mode():
            logits = model(chunk[None]).logits[0, window // 2 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += len(labels)
    return math.exp(total / count)


def main() -> None:
    """Compare both readers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n\n".join(read_documents(None))[: given.window * given.chunks * 8]
    sizes = (text, given.window, given.chunks)
    facts: dict[str, Any] = {"file": str(given.file), "window": given.window}
    facts["chunks"] = given.chunks
    facts["transformers"] = ours = transformers_perplexity(given.file, *sizes)
    facts["llama.cpp"] = theirs = llama_perplexity(given.bin, given.file, *sizes)
    facts["difference"] = f"{100 * (theirs / ours - 1):+.2f} %"
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

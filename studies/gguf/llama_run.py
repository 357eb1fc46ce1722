"""llama.cpp itself on a GGUF file: greedy text and perplexity beside transformers' reading of it.

    pip install --no-deps --target xl xllamacpp==2026.10.11549   # a prebuilt llama.cpp
    PYTHONPATH=xl python studies/gguf/llama_run.py FILE TEXT [--tokens N]

llama.cpp rounds activations to 8 bits, transformers computes in float32: the weights are the same.
Perplexity is of tokens among llama.cpp's likeliest 4,096 only; of all, see llama_perplexity.py.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GREEDY = 32  # tokens
CANDIDATES = 4096  # likeliest tokens that the server tells


def serve(path: Path) -> Any:
    """A server of llama.cpp inside this process, one thread."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = 1024, 1
    params.cpuparams.n_threads = 1
    return xllamacpp.Server(params)


def complete(server: Any, ids: list[int], count: int, candidates: int = 1) -> list[Any]:
    """Token by token what follows a prompt of tokens, with the likeliest candidates."""
    request = {
        "prompt": ids,
        "n_predict": count,
        "temperature": 0.0,
        "n_probs": candidates,
        "cache_prompt": True,
        "ignore_eos": False,
    }
    answer = server.handle_completions(request)
    return list(answer["choices"][0]["logprobs"]["content"])


def main() -> None:
    """Compare both readers."""
    parser = argparse.ArgumentParser(description="llama.cpp beside transformers.")
    parser.add_argument("file", type=Path)
    parser.add_argument("text", type=Path, help="jsonl with a field 'text'")
    parser.add_argument("--tokens", type=int, default=128, help="that are predicted")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"gguf_file": given.file.name}
    tokenizer = AutoTokenizer.from_pretrained(given.file.parent, **settings)
    model: Any = AutoModelForCausalLM.from_pretrained(
        given.file.parent, dtype=torch.float32, **settings
    ).eval()
    text = json.loads(given.text.read_text().splitlines()[0])["text"]
    ids = tokenizer(text)["input_ids"][: 32 + given.tokens]  # <bos> included
    server = serve(given.file)
    theirs = [row["id"] for row in complete(server, ids[:32], GREEDY)]
    prompt = torch.tensor([ids[:32]])
    ours = model.generate(prompt, max_new_tokens=GREEDY, do_sample=False)[0, 32:].tolist()
    agree = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    with torch.inference_mode():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    nll_ours, nll_theirs = [], []
    for position in range(32, len(ids)):
        (answer,) = complete(server, ids[:position], 1, CANDIDATES)
        found = {row["id"]: row["logprob"] for row in answer["top_logprobs"]}
        if ids[position] in found:
            nll_theirs.append(-found[ids[position]])
            nll_ours.append(-float(logp[position - 1, ids[position]]))
    facts = {
        "file": str(given.file),
        "greedy_tokens": GREEDY,
        "first_difference": agree,
        "transformers": tokenizer.decode(ours),
        "llama.cpp": tokenizer.decode(theirs),
        "tokens": len(nll_ours),
        "perplexity_transformers": math.exp(sum(nll_ours) / len(nll_ours)),
        "perplexity_llama_cpp": math.exp(sum(nll_theirs) / len(nll_theirs)),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()

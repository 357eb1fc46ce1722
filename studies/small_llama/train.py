"""Trains a small Llama on the manuals of PostgreSQL and SQLite.

    python studies/small_llama/train.py [--out FOLDER] [--steps N]

By default 8.4 M parameters, 52 minutes of one core (Zen 3). Deterministic on one machine: one
thread, every batch follows from the step's number. A killed run goes on from its last checkpoint.
FOLDER then holds the model (safetensors, with its own tokenizer), `held_out.jsonl` (pages that it
never saw, to calibrate and to judge on), `loss.jsonl` and `loss.png`.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from text import documents, download

OUT = Path.home() / ".cache" / "autocompress" / "small-llama"
CHECKPOINT_EVERY = 50  # steps
DECAY = 0.25  # of all steps, the last ones: the learning rate falls to 0
STATE = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, for each parameter
END = "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; `batch` windows of `window` tokens a step."""

    out: Path
    steps: int
    blocks: int
    vocabulary: int
    batch: int
    window: int
    warmup: int = 30  # steps
    peak: float = 4e-3  # learning rate


def make_model(recipe: Recipe) -> transformers.LlamaForCausalLM:
    """Widths are multiples of 256, queries are grouped, head and embedding are one."""
    config = transformers.LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=1 / 16,  # 256 ** -0.5: at the usual 0.02 blocks learn late
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config)


def train_tokenizer(texts: list[str], size: int) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's splitting, which llama.cpp knows as `gpt-2`."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, size, special_tokens=[END], show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def prepare(recipe: Recipe) -> Tensor:
    """The training tokens, (tokens,); writes the tokenizer and the held-out pages once."""
    out, stream = recipe.out, recipe.out / "train.safetensors"
    if not stream.exists():
        download(out / "packages")
        train, kept = documents(out / "packages")
        tokenizer = train_tokenizer(list(train.values()), recipe.vocabulary)
        tokenizer.save_pretrained(out)
        rows = [json.dumps({"text": text, "page": name}) for name, text in kept.items()]
        (out / "held_out.jsonl").write_text("\n".join(rows) + "\n")
        pages = tokenizer(list(train.values()), add_special_tokens=False)["input_ids"]
        ids = [token for page in pages for token in [*page, tokenizer.eos_token_id]]
        save_file({"ids": torch.tensor(ids, dtype=torch.int32)}, stream)
    return load_file(stream)["ids"].long()


def batch_of(ids: Tensor, step: int, recipe: Recipe) -> Tensor:
    """(batch, window): the windows of a step; every epoch shifts and shuffles them anew."""
    batch, window = recipe.batch, recipe.window
    windows = len(ids) // window - 1
    epoch, first = divmod(step * batch, windows - windows % batch)
    rng = torch.Generator().manual_seed(epoch)
    shift = int(torch.randint(window, (), generator=rng))
    order = torch.randperm(windows, generator=rng)[first : first + batch]
    return torch.stack([ids[shift + i * window :][:window] for i in order.tolist()])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rises, stays, falls: only the fall depends on the number of steps."""
    left = (recipe.steps - step) / max(1, round(DECAY * recipe.steps))
    return recipe.peak * min(1.0, (step + 1) / recipe.warmup, left)


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; norms do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))


def save(path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    """A checkpoint: whole or not at all."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in STATE}
    draft = path.with_suffix(".part")
    save_file(tensors, draft)
    draft.replace(path)


def restore(path: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> int:
    """The step to go on at."""
    if not path.exists():
        return 0
    tensors = load_file(path)
    for name, p in model.named_parameters():
        p.data.copy_(tensors[f"model.{name}"])
        optimizer.state[p] = {key: tensors[f"{key}.{name}"] for key in STATE}
    some = next(iter(model.parameters()))
    return int(optimizer.state[some]["step"])


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.AdamW, rows: Tensor, rate: float
) -> float:
    """The batch's mean loss, nats per token, before the step."""
    loss = model(input_ids=rows, labels=rows).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(loss.item())


def train(recipe: Recipe) -> None:
    """Trains from the last checkpoint on, writes the model and its loss curve."""
    ids = prepare(recipe)
    torch.manual_seed(0)
    model = make_model(recipe)
    optimizer = make_optimizer(model)
    checkpoint, curve = recipe.out / "checkpoint.safetensors", recipe.out / "loss.jsonl"
    first = restore(checkpoint, model, optimizer)
    print(
        f"{model.num_parameters():,} parameters, {len(ids):,} tokens, at step {first}", flush=True
    )
    rows = curve.read_text().splitlines()[:first] if curve.exists() else []
    curve.write_text("".join(f"{row}\n" for row in rows))  # without what followed the checkpoint
    with curve.open("a") as log:
        for step in range(first, recipe.steps):
            start = time.process_time()
            rate = learning_rate(step, recipe)
            loss = train_step(model, optimizer, batch_of(ids, step, recipe), rate)
            row = {"step": step, "loss": round(loss, 4)}
            row["cpu_seconds"] = round(time.process_time() - start, 2)
            print(json.dumps(row), file=log, flush=True)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == recipe.steps:
                save(checkpoint, model, optimizer)
                print(f"step {step + 1} of {recipe.steps}: loss {loss:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(recipe.out)
    plot(curve, recipe)


def plot(curve: Path, recipe: Recipe) -> None:
    """The loss curve as loss.png, where matplotlib is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in curve.read_text().splitlines()]
    tokens = [(row["step"] + 1) * recipe.batch * recipe.window / 1e6 for row in rows]
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.plot(tokens, [row["loss"] for row in rows], linewidth=0.8)
    axes.set(xlabel="million tokens", ylabel="training loss, nats/token")
    figure.tight_layout()
    figure.savefig(curve.with_suffix(".png"), dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small Llama.")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    recipe = Recipe(**vars(parser.parse_args()))
    recipe.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train(recipe)


if __name__ == "__main__":
    main()

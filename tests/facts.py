"""A realistic `facts` dict, as a search of SmolLM2-135M at 3.5 bits writes it."""

from __future__ import annotations

import math
import random
from typing import Any

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
BITS = {f"w{b}g64": b + 16 / 64 + b / 64 for b in (2, 3, 4, 5, 6)}
BLOCKS = 30


def make_allocation(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for block in range(BLOCKS):
        for kind, (out, width) in SHAPES.items():
            need = 3.2 + 0.9 * (kind.endswith(("v_proj", "down_proj"))) + rng.gauss(0, 0.5)
            need += 1.2 * math.exp(-block / 2) + 0.8 * (block == BLOCKS - 1)
            level = f"w{min(6, max(2, round(need)))}g64"
            rows.append(
                {
                    "layer": f"model.layers.{block}.{kind}",
                    "level": level,
                    "weights": out * width,
                    "bits": round(out * width * BITS[level]),
                    "loss_predicted": 0.02 * 4.0 ** (3 - int(level[1])) * rng.random(),
                }
            )
    return rows


def make_trials(rng: random.Random) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = []
    spent = 12_288  # sensitivities

    def add(loss: float, bits: float, origin: str, split: str, tokens: int) -> None:
        nonlocal spent
        spent += tokens
        trials.append(
            {
                "number": len(trials),
                "spent": spent,
                "loss": loss,
                "effective_bits": bits,
                "origin": origin,
                "split": split,
                "tokens": tokens,
            }
        )

    for bits, loss in ((2.2812, 1.41), (3.2969, 0.312), (4.3125, 0.083), (5.3281, 0.024)):
        add(loss, bits, f"uniform w{int(bits)}g64", "search", 16_384)
    add(0.247, 3.4999, "ilp", "search", 16_384)
    best = 0.247
    for generation in range(12):
        for _ in range(16):
            loss = best * rng.uniform(0.97, 1.15) + rng.gauss(0, 0.01)
            add(loss, rng.uniform(3.46, 3.5), "evolution", "search", 512)
        for _ in range(4):
            add(best * rng.uniform(0.97, 1.05), rng.uniform(3.48, 3.5), "evolution", "search", 4096)
        if generation % 3 == 2:
            best *= 0.985
            add(best, 3.4997, "evolution", "search", 16_384)
    for loss, bits, origin in (
        (0.306, 3.2969, "uniform w3g64"),
        (0.249, 3.4999, "ilp"),
        (0.238, 3.4997, "evolution"),
    ):
        add(loss, bits, origin, "validate", 16_384)
    return trials


def score(kl: float, perplexity: float, tokens: int = 16_384) -> dict[str, Any]:
    return {"kl": kl, "kl_stderr": kl / 40, "perplexity": perplexity, "tokens": tokens}


def make_results() -> dict[str, Any]:
    rows = {
        "dense": ("dense", 16.0, 268_830_720, "dense", (0.0, 0.0, 0.0), (14.6, 15.1, 15.4)),
        "uniform": (
            *("w3g64", 3.2969, 100_375_296, "uniform w3g64"),
            *((0.312, 0.306, 0.301), (19.9, 20.4, 20.8)),
        ),
        "ilp": (None, 3.4999, 103_069_440, "ilp", (0.247, 0.249, 0.246), (18.7, 19.3, 19.6)),
        "winner": (
            *(None, 3.4997, 103_066_112, "evolution"),
            *((0.232, 0.238, 0.2364), (18.4, 19.0, 19.4)),
        ),
    }
    return {
        name: {
            "level": level,
            "effective_bits": bits,
            "total_bytes": size,
            "origin": origin,
            **{
                split: score(kl, perplexity)
                for split, kl, perplexity in zip(
                    ("search", "validate", "test"), kls, perplexities, strict=True
                )
            },
        }
        for name, (level, bits, size, origin, kls, perplexities) in rows.items()
    }


def make_facts() -> dict[str, Any]:
    rng = random.Random(0)
    weights = BLOCKS * sum(out * width for out, width in SHAPES.values())
    return {
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "parameters": 134_515_008,
            "fingerprint": "5e1f0a9c3b7d2468",
        },
        "machine": {
            "cpu": "AMD EPYC 9R14",
            "cores": 2,
            "threads": 2,
            "memory_gib": 23.4,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "dtype": "bfloat16",
        },
        "budgets": [
            {
                "text": "3.5bits",
                "cost": "bits",
                "limit": weights * 3.5,
                "reached": 371_557_344,
            }
        ],
        "space": {"name": "quant-2-8", "layers": 210, "weights": weights, "levels": [*BITS]},
        "effective_bits": 3.4997,
        "model_bits": 6.1296,
        "total_bytes": 103_066_112,
        "file_bytes": 103_113_472,
        "dense_bytes": 268_830_720,
        "results": make_results(),
        "allocation": make_allocation(rng),
        "trials": make_trials(rng),
        "tokens": {
            "calibrate": 32_768,
            "sensitivities": 12_288,
            "search": 489_472,
            "total": 534_528,
        },
        "seconds": {
            "database": 184.2,
            "teacher": 41.0,
            "sensitivities": 62.5,
            "search": 498.1,
            "verify": 77.3,
        },
        "notes": [
            "calibration text: pydoc_data.topics (Python's own documentation), split by topic",
            "the model's weights sit on a Q4_1 grid (groups of 32), which flatters 4-bit levels",
        ],
        "command": "autocompress search --budget 3.5bits --out results/demo",
        "seed": 0,
        "versions": {"autocompress": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }

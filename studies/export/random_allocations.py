"""Random allocations of a tiny model, exported, read by stock transformers, compared.

    python studies/export/random_allocations.py 200

Trains the tests' tiny Llama (250 steps), solves every level of the `ct-transformers` space with
scales of 8 significant bits, draws allocations with as many budgets, and counts those whose logits
differ from the stitched model's in float32 or whose files exceed their cost.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from conftest import train_llama, train_tokenizer
from test_export import Made, logits_of, read

from autocompress.build import build_database
from autocompress.core import Budget
from autocompress.cost import choose
from autocompress.database import LevelDatabase, database_identity
from autocompress.exporting import export
from autocompress.levels import parse_level
from autocompress.models import find_layers, load_model
from autocompress.operators import Solver
from autocompress.parts import module_parts
from autocompress.runtimes import find_runtime
from autocompress.runtimes.rules import legal_space, runtime_space
from autocompress.session import file_costs

RUNTIME = find_runtime("ct-transformers")


def prepare(folder: Path) -> Made:
    """The trained model, its legal space, its levels."""
    tokenizer = train_tokenizer()
    train_llama(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    loaded = load_model(str(folder / "model"), torch.float32)
    layers = find_layers(loaded.model, RUNTIME.scope)
    space, _ = legal_space(RUNTIME, runtime_space(RUNTIME), layers, module_parts(loaded.model))
    windows = np.random.default_rng(0).integers(0, 512, (8, 64))
    solver, prefix = Solver(scale_bits=RUNTIME.scale_bits), parse_level("w4g32sym")
    identity = database_identity(loaded.fingerprint, windows, prefix, solver, "float32")
    database = LevelDatabase.open(folder / "levels", identity)
    build_database(loaded.model, space, windows, database, prefix=prefix, solver=solver)
    return Made(loaded, space, database)


def main() -> None:
    """Draw, export, compare, count."""
    count = int(sys.argv[1])
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = prepare(folder)
        costs = file_costs(made.loaded.model, made.space, RUNTIME)
        least = costs[1].total(choose(made.space, costs, (Budget("bytes", 10**12, ""),)))
        different = above = 0
        largest = 0.0
        for number in range(count):
            limit = int(least * rng.uniform(1.02, 1.35))
            prices = [{lv: rng.random() for lv in row} for row in made.space.levels]
            budget = Budget("bytes", limit, f"{limit}B")
            allocation = choose(made.space, costs, (budget,), tuple(prices))
            source = made.result(folder / f"r{number}", allocation)
            out = folder / f"o{number}"
            facts = export(source, out, runtime=RUNTIME.name, check=False)
            gap = float((logits_of(read(out)) - made.logits(allocation)).abs().max())
            largest = max(largest, gap)
            different += gap != 0
            above += facts["file_bytes"] > limit
        print(
            f"{count} allocations: {different} with logits that differ (largest difference "
            f"{largest:g}), {above} above their budget in bytes of file"
        )


if __name__ == "__main__":
    main()

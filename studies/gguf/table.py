"""The figures of `run.py` as tables: python studies/gguf/table.py OUT [OUT …]."""

import json
import math
import sys
from pathlib import Path
from typing import Any


def rows(folder: str) -> list[dict[str, Any]]:
    """Every figure of a folder."""
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def grid(found: list[dict[str, Any]]) -> None:
    """GPTQ's codes beside the encoder's."""
    by = {(row["way"], row["type"]): row for row in found if row["study"] == "grid"}
    print("| Type | Bits | KL, encoder | KL, GPTQ | Change |\n|---|---|---|---|---|")
    for way, kind in by:
        if way == "encoder" and ("gptq", kind) in by:
            before, after = by[way, kind], by["gptq", kind]
            cells = [f"{row['kl']:.5f} ± {row['stderr']:.5f}" for row in (before, after)]
            change = 100 * (after["kl"] / before["kl"] - 1)
            print(
                f"| {kind} | {before['bits_per_weight']} | {' | '.join(cells)} | {change:.1f} % |"
            )


def mixes(found: list[dict[str, Any]]) -> None:
    """Searches beside llama.cpp's mixes of the same size."""
    fixed = {(row["way"], row["mix"]): row for row in found if row["study"] == "mixes"}
    searched = {
        row["mix"]: row for row in found if row["study"] == "searched" and row["way"] == "winner"
    }
    ratios = []
    print("| Mix | Bits | KL, llama.cpp | KL, same types, GPTQ | Bits, searched | KL | Change |")
    print("|---|---|---|---|---|---|---|")
    for mix, row in searched.items():
        encoder, gptq = fixed["encoder", mix], fixed["gptq", mix]
        ratios.append(row["kl"] / encoder["kl"])
        print(
            f"| {mix} | {encoder['bits_per_weight']} | {encoder['kl']:.5f} | {gptq['kl']:.5f} | "
            f"{row['bits_per_weight']} | {row['kl']:.5f} | {100 * (ratios[-1] - 1):.1f} % |"
        )
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"\nGeometric mean of the ratios: {mean:.3f}, {100 * (mean - 1):.1f} %.")


def main() -> None:
    """Print what there is."""
    found = [row for folder in sys.argv[1:] for row in rows(folder)]
    grid(found)
    print()
    mixes(found)


if __name__ == "__main__":
    main()

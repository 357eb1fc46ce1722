"""Six widths mixed over all layers of SmolLM2: exported as compressed-tensors, read back, compared.

    autocompress build --config studies/export/six-bits-study.toml --out results/six
    python studies/export/six_bits.py results/six.run results/six

Writes a plan with random levels (seed 0), builds its model from the run's database, exports it and
prints what `export` found. Stock transformers and compressed-tensors read it in a fresh process.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from autocompress.exporting import export
from autocompress.planning import build_plan

STUDY = Path(__file__).with_name("six-bits-study.toml")
SEED = 0


def main() -> None:
    """Plan, build, export."""
    import tomllib

    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    entries = json.loads((run / "database" / "manifest.json").read_text())["entries"]
    pick = random.Random(SEED).choice
    levels = {module: pick(sorted(solved)) for module, solved in entries.items()}
    settings = tomllib.loads(STUDY.read_text())
    settings.pop("space")
    plan = {
        "format": "autocompress-plan",
        "version": 1,
        "settings": settings,
        "levels": levels,
        "prefixes": {"*": "w3g64sym"},
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "plan.json"
    path.write_text(json.dumps(plan, indent=1))
    build_plan(path, out / "packed", run=run)
    there = out / "export"
    facts = export(out / "packed", there, runtime="ct-transformers", windows=1, overwrite=True)
    used = {level: list(levels.values()).count(level) for level in sorted(set(levels.values()))}
    print(json.dumps({"levels": used, **facts["verification"]}, indent=1))


if __name__ == "__main__":
    main()

"""GGUF types on a model: codes by GPTQ against the encoder's, searched mixes against llama.cpp's.

    python studies/gguf/run.py grid  MODEL OUT [--text T] [--only PATTERN]
    python studies/gguf/run.py mixes MODEL OUT [--text T] [--spend N]

MODEL is what --model takes, or "default". Every figure is appended to OUT/results.jsonl; mixes that
have theirs are not measured again.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from autocompress.config import StudyConfig
from autocompress.core import Allocation
from autocompress.documents import SplitTokens
from autocompress.gguf_mixes import BASE, mix_allocation
from autocompress.levels import parse_level
from autocompress.pipeline import run_search
from autocompress.progress import terminal_progress
from autocompress.quality import Teacher, score, teacher
from autocompress.session import Session, complete_database, open_session
from autocompress.stitch import StitchedModel

SEARCHED = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
OTHERS = ("IQ2_S", "IQ3_XXS", "IQ3_S")  # that only some mixes use
NARROW = ("Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0")  # where 256 does not divide the inputs
GRID = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS", "Q4_0", "Q5_0")
WAYS = {  # name -> settings of the level database
    "encoder": {"method": "rtn", "prefix": "dense"},  # as llama-imatrix and llama-quantize
    "gptq": {"method": "gptq", "prefix": "Q3_K"},
}


@dataclass(frozen=True)
class Run:
    """What all sessions share."""

    model: str | None
    out: Path
    text: str | None
    window: int
    tokens: SplitTokens
    spend: int

    def config(self, name: str, space: Path, **settings: object) -> StudyConfig:
        """Settings of a session whose database lies in OUT/NAME.run."""
        return StudyConfig(
            model=self.model,
            space=str(space),
            runtime="gguf",
            calibration=self.text,
            window=self.window,
            tokens=self.tokens,
            out=self.out / name,
            dtype="float32",
            **settings,
        )

    def known(self, **keys: object) -> dict[str, object] | None:
        """The figure with these values, where OUT has it."""
        file = self.out / "results.jsonl"
        rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        return next((row for row in rows if keys.items() <= row.items()), None)

    def record(self, **row: object) -> None:
        """Append a figure and show it."""
        with (self.out / "results.jsonl").open("a") as file:
            print(json.dumps(row), file=file)
        print(json.dumps(row), flush=True)


def write_space(
    path: Path, levels: tuple[str, ...], only: str | None = None, wide: tuple[str, ...] = ()
) -> Path:
    """A search space with these levels.

    Args:
        only: pattern of layers that take them; all others stay dense.
        wide: patterns of layers that take them; all others take `NARROW`. Empty is all layers.
    """
    lines = [f'name = "{path.stem}"', f"levels = {json.dumps(levels)}"]
    if only is None:
        lines += ['scope = ["blocks", "embedding", "head"]']
    else:
        lines[1] = 'levels = ["dense"]'
        lines += ["[[override]]", f'layers = "{only}"', f"levels = {json.dumps(levels)}"]
    if wide:
        lines[1] = f"levels = {json.dumps(NARROW)}"
    for pattern in wide:
        lines += ["[[override]]", f'layers = "{pattern}"', f"levels = {json.dumps(levels)}"]
    path.write_text("\n".join([*lines, ""]))
    return path


def built(config: StudyConfig) -> Session:
    """A session with a complete level database."""
    session = open_session(config, terminal_progress())
    complete_database(session)
    return session


def reference(session: Session) -> Teacher:
    """The dense model on test windows."""
    return teacher(session.loaded.model, session.windows.test)


def measure(session: Session, dense: Teacher, levels: dict[str, str]) -> dict[str, object]:
    """Loss and size of an allocation by layer name; layers without one stay dense."""
    keys = [levels.get(layer.name, "dense") for layer in session.space.layers]
    allocation = Allocation(tuple(map(parse_level, keys)))
    stitched = StitchedModel(session.loaded.model, session.space, session.database)
    found = score(stitched.stitch(allocation), dense)
    stitched.restore()
    bits = sum(
        layer.storage_bits(level)
        for layer, level in zip(session.space.layers, allocation.levels, strict=True)
    )
    return {
        "bits": bits,
        "bits_per_weight": round(bits / session.space.weights, 4),
        "kl": round(found.loss, 5),
        "stderr": round(found.stderr, 5),
        "perplexity": round(found.perplexity, 3),
        "dense_perplexity": round(dense.perplexity, 3),
    }


def grid(run: Run, only: str | None, types: tuple[str, ...]) -> None:
    """One type everywhere: the encoder's codes and GPTQ's beside the same scales."""
    space = write_space(run.out / "grid.toml", types, only)
    dense = None
    for way, settings in WAYS.items():
        session = built(run.config(f"grid-{way}", space, **settings))
        dense = dense or reference(session)
        for kind in types:
            level = parse_level(kind)
            rows = zip(session.space.layers, session.space.levels, strict=True)
            chosen = {layer.name: kind for layer, allowed in rows if level in allowed}
            if chosen:
                row = measure(session, dense, chosen)
                run.record(study="grid", way=way, type=kind, layers=len(chosen), **row)


def mixes(run: Run, names: tuple[str, ...], wide: tuple[str, ...]) -> None:
    """llama.cpp's mixes, encoded and with GPTQ's codes, and searches at their sizes."""
    fixed = write_space(run.out / "mixes.toml", (*SEARCHED[:-1], *OTHERS), wide=wide)
    searched = write_space(run.out / "searched.toml", SEARCHED, wide=wide)
    for way in WAYS:
        bits_per_weight = fixed_mixes(run, way, fixed, names)
    for mix, bits in bits_per_weight.items():
        if run.known(study="searched", way="winner", mix=mix) is None:
            search(run, searched, mix, bits)


def fixed_mixes(run: Run, way: str, space: Path, names: tuple[str, ...]) -> dict[str, float]:
    """Measure the mixes solved one way; their bits per weight."""
    session = built(run.config(f"mixes-{way}", space, **WAYS[way]))
    dense: Teacher | None = None
    found = {}
    for mix in names:
        row = run.known(study="mixes", way=way, mix=mix)
        if row is None:
            dense = dense or reference(session)
            row = measure(session, dense, mix_levels(session, mix))
            run.record(study="mixes", way=way, mix=mix, **row)
        found[mix] = int(str(row["bits"])) / session.space.weights
    return found


def mix_levels(session: Session, mix: str) -> dict[str, str]:
    """The type of every layer in a mix."""
    allocation = mix_allocation(session.space, mix, session.loaded.model.config)
    assert allocation is not None, f"a layer may not take its type in {mix}"
    named = zip(session.space.layers, allocation.levels, strict=True)
    return {layer.name: str(level) for layer, level in named}


def search(run: Run, space: Path, mix: str, bits: float) -> None:
    """A search for at most the bits of a mix, in the levels of the mixes with GPTQ's codes."""
    config = run.config(
        f"searched-{mix}",
        space,
        budgets=(f"{bits + 5e-10:.9f}bits",),  # rounded up: the mix itself must fit
        run=run.out / "mixes-gptq.run",
        spend=run.spend,
        **WAYS["gptq"],
    )
    facts = run_search(config, terminal_progress()).facts
    for role in ("uniform", "winner"):
        row = facts["results"].get(role)
        if row:
            test = row["test"]
            kept = {key: test[key] for key in ("kl", "kl_stderr", "perplexity")}
            run.record(
                study="searched",
                way=role,
                mix=mix,
                bits_per_weight=round(row["effective_bits"], 4),
                **kept,
            )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", choices=("grid", "mixes"))
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", help="what is calibrated and judged on; default built-in")
    parser.add_argument("--only", help="pattern of the layers that are quantized")
    parser.add_argument("--types", nargs="+", default=GRID, help="of the grid")
    parser.add_argument("--mixes", nargs="+", default=tuple(BASE), choices=tuple(BASE))
    parser.add_argument(
        "--wide", nargs="+", default=(), help="layers that 256 divides, where it does not all"
    )
    parser.add_argument("--spend", type=int, default=30000, help="tokens of a search")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs=4, default=[16384, 16384, 8192, 16384])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = None if given.model == "default" else given.model
    run = Run(model, given.out, given.text, given.window, SplitTokens(*given.tokens), given.spend)
    if given.study == "grid":
        grid(run, given.only, tuple(given.types))
    else:
        mixes(run, tuple(given.mixes), tuple(given.wide))


if __name__ == "__main__":
    main()

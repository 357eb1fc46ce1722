"""`doctor`: what would fail if a runtime loaded a folder, found without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from autocompress.architectures import check_causal, check_llama_cpp
from autocompress.errors import LevelError, ModelError
from autocompress.folders import Folder, Module, read_folder
from autocompress.gguf_files import architecture, check_loadable, only_gguf, read_gguf
from autocompress.levels import Dense, Level, Quantize, parse_level
from autocompress.machine import installed
from autocompress.runtimes import Runtime, find_runtime
from autocompress.runtimes.compressed_tensors import CompressedTensors
from autocompress.runtimes.rules import part_of, tied_groups
from autocompress.tables import did_you_mean

# Runtime -> preset that holds its rules. vLLM is CUDA's unless the name says otherwise.
CHECKED = {
    "transformers": "ct-transformers",
    "vllm": "ct-vllm-cuda",
    "vllm-cpu": "ct-vllm-cpu",
    "sglang": "ct-universal",
    "llama.cpp": "gguf",
}
HERE = "here"  # where a finding is about this machine
DENSE_BITSTREAM = (3, 5, 6, 7)  # bits that compressed-tensors packs since 0.18 without gaps


@dataclass(frozen=True)
class Finding:
    """Something that would go wrong.

    Args:
        where: a module, a file, or the whole folder.
        what: the rule, and what was got.
        fatal: whether loading fails; otherwise it needs attention.
    """

    where: str
    what: str
    fatal: bool = True


def examine(path: Path, runtime: str) -> list[Finding]:
    """All that would fail if a runtime loaded a folder or GGUF file; empty where nothing would.

    Args:
        runtime: a name in `CHECKED`.

    Raises:
        ModelError: no such runtime, or nothing that any runtime loads: damaged, pickled.
    """
    if runtime not in CHECKED:
        raise ModelError(
            f"a runtime must be one of {', '.join(CHECKED)}. "
            f"Got '{runtime}'.{did_you_mean(runtime, CHECKED)}"
        )
    file = only_gguf(path)
    if file is not None:
        return list(_gguf(file, runtime))
    folder = read_folder(path)
    if runtime == "llama.cpp":
        return [Finding(str(path), "llama.cpp reads GGUF files only. Export with --runtime gguf")]
    if folder.method == "autocompress":
        what = f"{runtime} does not know the format 'autocompress'. Export it with --runtime"
        return [Finding(str(path), what)]
    if folder.method not in ("dense", "compressed-tensors"):
        what = f"the rules of quant_method '{folder.method}' are not known here"
        return [Finding(str(path), what, fatal=False)]
    return [
        *_architecture(folder, runtime),
        *_modules(folder, runtime),
        *_versions(folder, runtime),
    ]


def _gguf(file: Path, runtime: str) -> Iterator[Finding]:
    name = architecture(read_gguf(file))
    if runtime == "transformers":
        yield from _unless(str(file), lambda: check_loadable(file))
    elif runtime == "llama.cpp":
        yield from _unless(str(file), lambda: check_llama_cpp(name, file))
    else:
        plugin = "vLLM 0.24 and later need its vllm-gguf-plugin; this is not checked further"
        yield Finding(str(file), plugin if "vllm" in runtime else f"{runtime}: not checked", False)


def _unless(where: str, check: Callable[[], None], fatal: bool = True) -> Iterator[Finding]:
    """What a check says, if it raises."""
    try:
        check()
    except ModelError as error:
        yield Finding(where, str(error).removesuffix("."), fatal)


def _architecture(folder: Folder, runtime: str) -> Iterator[Finding]:
    """Other runtimes have models of their own; what transformers does not know needs a look."""
    known = partial(check_causal, folder.config, folder.path)
    yield from _unless("config.json", known, fatal=runtime == "transformers")


def _modules(folder: Folder, runtime: str) -> Iterator[Finding]:
    preset = find_runtime(CHECKED[runtime])
    levels: dict[str, Level] = {}
    for module in folder.modules():
        if len(module.shape) != 2:
            continue
        yield from _packing(module)
        if runtime == "vllm-cpu":
            yield from _activations(module)
        try:
            level = parse_level(module.level)
        except LevelError as error:
            yield Finding(module.name, f"not known here: {error}", fatal=False)
            continue
        levels[module.name] = level
        shape = (module.shape[0], module.shape[1])
        part = part_of(module.name, _parts(folder, module.name))
        reason = preset.refuses(_as_seen(level, runtime), shape, part)
        if reason is not None and not (part == "experts" and isinstance(level, Dense)):
            yield Finding(module.name, f"{module.level}, {shape[0]} x {shape[1]}: {reason}")
    yield from _fused(preset, levels)


def _as_seen(level: Level, runtime: str) -> Level:
    """A level as the runtime's own rules see it: vLLM takes zeros, which presets leave out."""
    if isinstance(level, Quantize) and "vllm" in runtime:
        return replace(level, symmetric=True)
    return level


def _parts(folder: Folder, name: str) -> dict[str, str]:
    if name.endswith(("lm_head", "embed_out")):
        return {name: "head"}
    return {name: "embedding"} if name.endswith(("embed_tokens", "wte")) else {}


def _packing(module: Module) -> Iterator[Finding]:
    """Whether codes are packed as compressed-tensors 0.18 and later do."""
    if module.scheme is None or module.packed is None:
        return
    bits, width = module.scheme["weights"]["num_bits"], module.shape[1]
    wanted, padded = ceil(width * bits / 32), ceil(width / (32 // bits))
    if module.packed[1] not in (wanted, padded):
        yield Finding(
            f"{module.name}.weight_packed",
            f"{bits} bits of {width} inputs must be {wanted} words a row. Got {module.packed[1]}",
        )
    elif module.packed[1] != wanted:
        yield Finding(
            f"{module.name}.weight_packed",
            f"{bits} bits are packed with gaps, as compressed-tensors did before 0.18; it reads "
            "such files no more. Export again",
        )


def _activations(module: Module) -> Iterator[Finding]:
    """vLLM on CPU multiplies 8-bit codes by 8-bit inputs only."""
    scheme = module.scheme
    if scheme and scheme["weights"]["num_bits"] == 8 and not scheme.get("input_activations"):
        what = "8-bit codes need inputs of 8 bits (W8A8). Got W8A16. Export with ct-vllm-cpu"
        yield Finding(module.name, what)


def _fused(preset: Runtime, levels: dict[str, Level]) -> Iterator[Finding]:
    for first, *others in tied_groups(preset, list(levels)):
        for name in others:
            if levels[name] != levels[first]:
                what = (
                    f"{levels[name]} where {first}, which is fused with it, has {levels[first]}: "
                    "the runtime takes the first one's for both and stops"
                )
                yield Finding(name, what)
                break


def _versions(folder: Folder, runtime: str) -> Iterator[Finding]:
    """Libraries that are installed here; the runtime's machine may have others."""
    if folder.method != "compressed-tensors":
        return
    bits = {m.scheme["weights"]["num_bits"] for m in folder.modules() if m.scheme is not None}
    odd = sorted(bits & set(DENSE_BITSTREAM))
    needs = "0.18" if odd else "0.15"
    have = installed("compressed-tensors")
    if runtime == "transformers" and have is None:
        yield Finding(HERE, f"compressed-tensors {needs} or later must be installed. Got none")
    elif runtime == "transformers" and _older(have or "", needs):
        yield Finding(HERE, f"{odd} bits need compressed-tensors {needs} or later. Got {have}")
    if runtime == "vllm-cpu" and 4 in bits:
        what = "4 bits need a CPU with AVX-512: the build for AVX2 has no cpu_gemm_wna16 (0.32)"
        yield Finding("the machine with vLLM", what, fatal=False)
    preset = find_runtime(CHECKED[runtime])
    humming = sorted(bits - {4, 8})
    if runtime == "vllm" and humming and isinstance(preset, CompressedTensors):
        what = f"{humming} bits need `pip install humming-kernels` and a GPU of SM75 or later"
        yield Finding("the machine with vLLM", what, fatal=False)


def _older(have: str, needs: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".")[:2] if part.isdigit()]

    return numbers(have) < numbers(needs)


def loading(path: Path) -> dict[str, list[str]]:
    """Runtimes that load a folder by their rules, wherever they run -> what needs attention.

    Raises:
        ModelError: as `examine`.
    """
    found = {runtime: examine(path, runtime) for runtime in CHECKED}
    return {
        runtime: [f"{it.where}: {it.what}" for it in rows if not it.fatal]
        for runtime, rows in found.items()
        if not any(it.fatal and it.where != HERE for it in rows)
    }


def facts(path: Path, runtime: str) -> dict[str, Any]:
    """The findings as JSON can hold them."""
    found = examine(path, runtime)
    return {
        "path": str(path),
        "runtime": runtime,
        "loads": not any(finding.fatal for finding in found),
        "findings": [vars(finding) for finding in found],
    }

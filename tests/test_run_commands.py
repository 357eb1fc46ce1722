"""`generate` and `bench`: what they print, what they measure, and what they refuse."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Ran, command, finished
from safetensors.torch import load_file, save_file
from test_models import make_model

import autocompress
from autocompress import benchmark as benchmarks
from autocompress.benchmark import Turn, race, ratios, spread
from autocompress.generation import PlainDecoder
from autocompress.run_commands import _write
from autocompress.runtime import packed_modules, prepare
from autocompress.runtime_facts import chosen_backends, runtime_warning, weight_bytes

WEIGHTS = "autocompress.safetensors"
PROMPT = "The statement – naïve 🙂"
SHORT = ("--prompt-length", 6, "--tokens", 3, "--rounds", 2)


@pytest.fixture(scope="module")
def result(tiny_folder: Path) -> Path:
    return finished(tiny_folder)


@pytest.fixture
def copied(result: Path, tmp_path: Path) -> Path:
    """A copy of the result to change."""
    return Path(shutil.copytree(result, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    """Commands run in this process: its number of threads is put back."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def generate(folder: Path, *arguments: object) -> Ran:
    return command("generate", folder, "--prompt", PROMPT, "--max-tokens", 6, *arguments)


def change_manifest(folder: Path, **entries: object) -> None:
    path = folder / "autocompress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# --- generate --------------------------------------------------------------------------------


def test_greedy_text_is_that_of_transformers(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autocompress.generation.make_decoder", PlainDecoder)
    facts = generate(result, "--json").json()
    model, tokenizer = autocompress.load(result)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]
    length = prompt["input_ids"].shape[1]
    assert facts["text"] == tokenizer.decode(written[length:])
    assert (facts["tokens"], facts["prompt_tokens"]) == (6, length)
    assert facts["stopped"] == "max_tokens"
    assert facts["tokens_per_second"] > 0 and facts["first_token_seconds"] > 0
    assert facts["dtype"] == "float32"
    assert facts["decoder"] and facts["backends"]


def test_text_is_on_standard_output_alone(result: Path) -> None:
    facts = generate(result, "--json").json()
    ran = generate(result)
    assert ran.code == 0
    assert ran.out == facts["text"] + "\n"
    line = ran.err.splitlines()[-1]
    assert f"{facts['prompt_tokens']} + 6 tokens" in line
    assert facts["decoder"] in line and "tokens/s" in line


def test_pieces_are_written_as_they_come(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    step = PlainDecoder.step
    monkeypatch.setattr(PlainDecoder, "step", lambda *given: events.append("step") or step(*given))
    monkeypatch.setattr("autocompress.generation.make_decoder", PlainDecoder)
    monkeypatch.setattr("autocompress.run_commands._write", events.append)
    assert generate(result).code == 0
    pieces = [event for event in events if event != "step"]
    assert len(pieces) > 2 and events.count("step") == 5
    assert events.index(pieces[0]) < events.index("step"), events


def test_drawn_text_is_the_seeds(result: Path) -> None:
    def text(seed: int) -> str:
        drawn = ("--temperature", 1.5, "--top-k", 200, "--top-p", 0.99, "--seed", seed)
        return str(generate(result, *drawn, "--json").json()["text"])

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(3)}) > 1


def test_a_chat_template_is_used_unless_told_otherwise(copied: Path) -> None:
    plain = generate(copied, "--json").json()
    (copied / "chat_template.jinja").write_text("USER {{ messages[0]['content'] }} ANSWER")
    chat = generate(copied, "--json").json()
    assert chat["prompt_tokens"] > plain["prompt_tokens"]
    assert generate(copied, "--no-chat", "--json").json()["text"] == plain["text"]


def test_the_models_end_ends_the_text(copied: Path) -> None:
    full = generate(copied, "--json").json()
    model, tokenizer = autocompress.load(copied)
    ids = tokenizer(PROMPT)["input_ids"]
    ends = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0].tolist()
    path = copied / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends[-4:-2]}))
    cut = generate(copied, "--json").json()
    assert cut["stopped"] == "end" and cut["tokens"] < 6
    assert full["text"].startswith(cut["text"])


@pytest.mark.parametrize("name", ["int8", "bfloat16", "float32"])
def test_activations_can_be_chosen(result: Path, name: str) -> None:
    facts = generate(result, "--activations", name, "--json").json()
    assert facts["activations"] == name and facts["dtype"] == "float32"


def test_threads_can_be_chosen(result: Path) -> None:
    assert generate(result, "--threads", 3).code == 0
    assert torch.get_num_threads() == 3


def test_a_terminal_that_lacks_a_character_shows_another(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="latin-1"))
    _write("naïve 🙂")
    assert buffer.getvalue() == b"na\xefve ?"


@pytest.mark.parametrize("name", ["generate", "bench"])
def test_help_needs_nothing_heavy(name: str) -> None:
    code = (
        "import sys\nfrom autocompress.cli import main\ntry:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print(*[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, name, "--help"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines()[-1] == "", "what was loaded"
    assert "--threads" in ran.stdout and "--json" in ran.stdout


# --- bench -----------------------------------------------------------------------------------


def test_bench_tells_what_it_measured(result: Path) -> None:
    facts = command("bench", result, *SHORT, "--threads", 1, "--json").json()
    assert [facts[key] for key in ("prompt_length", "tokens", "rounds")] == [6, 3, 2]
    for name in ("dense", "packed"):
        for phase in ("prefill", "decode"):
            row = facts[name][phase]
            assert len(row["rounds"]) == 2
            assert 0 < row["low"] <= row["median"] <= row["high"]
    assert facts["dense"]["dtype"] == "bfloat16" and facts["dense"]["decoder"] == "plain"
    for phase in ("prefill", "decode"):
        pairs = zip(facts["dense"][phase]["rounds"], facts["packed"][phase]["rounds"], strict=True)
        expected = [packed / dense for dense, packed in pairs]
        assert facts["ratio"][phase]["rounds"] == pytest.approx(expected)
    assert facts["machine"]["threads"] == 1
    assert facts["packed"]["weight_bytes"] < facts["dense"]["weight_bytes"] * 2
    assert facts["warning"] is None and facts["unfused_experts"] is False
    assert facts["isa"] and facts["backends"]


def test_bench_prints_speeds_and_conditions(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "load_average", lambda: 99.0)
    ran = command("bench", result, *SHORT)
    assert ran.code == 0, ran.err
    for word in ("prefill", "decode", "ms/token", "dense", "packed", "ratio", "6 random tokens"):
        assert word in ran.out
    assert "99.00 in the minute before" in ran.out and "other processes were running" in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines())
    monkeypatch.setattr(benchmarks, "load_average", lambda: None)
    quiet = command("bench", result, *SHORT).out
    assert "unknown in the minute before" in quiet and "other processes" not in quiet


class Slow:
    """A decoder whose prompt and steps take the seconds it is told; writes down when it ran."""

    capacity = 99

    def __init__(self, name: str, seconds: float, clock: list[float], log: list[str]) -> None:
        self.name, self.seconds, self.clock, self.log = name, seconds, clock, log

    def reset(self) -> None:
        """Nothing to forget."""

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.log.append(self.name)
        self.clock[0] += 10 * self.seconds
        return torch.zeros(2)

    def step(self, token: int) -> torch.Tensor:
        self.clock[0] += self.seconds
        return torch.zeros(2)


def test_models_take_turns_and_the_first_turn_does_not_count() -> None:
    clock, log = [0.0], list[str]()
    decoders = {"dense": Slow("dense", 4.0, clock, log), "packed": Slow("packed", 1.0, clock, log)}
    turns = race(decoders, torch.arange(5), 3, 3, lambda: clock[0])
    assert turns == {"dense": 3 * [Turn(40.0, 4.0)], "packed": 3 * [Turn(10.0, 1.0)]}
    assert log[:2] == ["dense", "packed"]
    assert log[2:] == [*2 * ["dense"], *4 * ["packed"], *4 * ["dense"], *2 * ["packed"]]


def test_ratios_are_taken_within_rounds() -> None:
    dense = [Turn(8.0, 2.0), Turn(80.0, 20.0), Turn(8.0, 3.0)]
    packed = [Turn(4.0, 1.0), Turn(20.0, 10.0), Turn(1.0, 1.0)]
    found = ratios(dense, packed)
    assert found["prefill"] == {"median": 4.0, "low": 2.0, "high": 8.0, "rounds": [2.0, 4.0, 8.0]}
    assert found["decode"]["rounds"] == [2.0, 2.0, 3.0]
    assert spread([3.0, 1.0, 9.0])["median"] == 3.0


def test_weights_of_a_token_are_counted_once() -> None:
    tied, untied = make_model("llama, tied"), make_model("llama")
    everything = sum(4 * p.numel() for p in tied.parameters())
    assert weight_bytes(tied) == everything, "the embedding is the head"
    table = 4 * 512 * 64
    assert weight_bytes(untied) == everything + 4 * 64, "head, and one row of the embedding"
    assert sum(4 * p.numel() for p in untied.parameters()) == everything + table


def test_only_the_experts_of_a_token_are_counted() -> None:
    from autocompress.experts import unfuse_experts

    model = make_model("qwen3 moe")
    assert unfuse_experts(model) == 2
    parts = {name: 4 * p.numel() for name, p in model.named_parameters()}
    idle = sum(size for name, size in parts.items() if "unfused" in name) // 2
    assert weight_bytes(model) == sum(parts.values()) - idle - 4 * 511 * 64


def test_packed_weights_are_counted_as_they_are_read(result: Path) -> None:
    model, _ = autocompress.load(result)
    count = weight_bytes(model)
    packed = sum(module.prepare().bytes for module in packed_modules(model))
    dense = sum(p.numel() for p in model.parameters())
    assert count == packed + 4 * dense
    assert weight_bytes(model, 2) == packed + 2 * dense
    prepare(model)
    assert weight_bytes(model) == count
    stored = sum(tensor.nbytes for tensor in load_file(result / WEIGHTS).values())
    assert stored <= weight_bytes(model, 2) < 1.3 * stored, "zeros are bytes, rows are padded"


# --- another machine -------------------------------------------------------------------------


def test_a_result_measured_elsewhere_warns(copied: Path) -> None:
    model, _ = autocompress.load(copied)
    here = chosen_backends(model)
    change_manifest(copied, runtime={"backends": here})
    assert generate(copied, "--json").err.count("warning:") == 0
    for isa, run in (
        ("neon", lambda: generate(copied, "--json")),
        ("sve", lambda: command("bench", copied, *SHORT, "--json")),
    ):
        change_manifest(copied, runtime={"backends": {"native": f"native 1 {isa}"}})
        with pytest.warns(UserWarning, match=f"native 1 {isa}"):
            autocompress.load(copied)
        ran = run()
        warned = [line for line in ran.err.splitlines() if line.startswith("warning: ")]
        assert len(warned) == 1, ran.err
        assert f"native 1 {isa}" in warned[0] and next(iter(here.values())) in warned[0]
        ran.json()


def test_without_a_budget_of_latency_there_is_no_warning() -> None:
    assert runtime_warning({}, make_model("llama")) is None
    assert chosen_backends(make_model("llama")) == {}


# --- bad input -------------------------------------------------------------------------------


def assert_refused(ran: Ran, *words: str) -> None:
    """Exit code 2, nothing on standard output, one error line with every one of `words`."""
    assert (ran.code, ran.out) == (2, ""), ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in ran.err, ran.err
    for word in words:
        assert word in errors[0], f"'{word}' must be in: {errors[0]}"


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def short_tensor(folder: Path) -> None:
    """A whole file, one tensor of which has too few rows."""
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in sorted(tensors) if name.endswith(".codes"))
    tensors[name] = tensors[name][:-4].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


DAMAGE = {
    "truncated file": (truncated, (WEIGHTS, "bytes long by its header")),
    "short tensor": (short_tensor, ("copy' must ",)),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), (WEIGHTS,)),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ("whole result",)),
    "not JSON": (
        lambda folder: (folder / "autocompress.json").write_text("{"),
        ("autocompress.json",),
    ),
}


@pytest.mark.parametrize("name", ["generate", "bench"])
class TestBothRefuse:
    """What neither command can run."""

    def run(self, name: str, folder: Path, *arguments: object) -> Ran:
        if name == "generate":
            return generate(folder, *arguments)
        return command("bench", folder, *SHORT, *arguments)

    def test_a_folder_that_is_no_result(self, name: str, tiny_folder: Path, tmp_path: Path) -> None:
        for folder in (tmp_path / "missing", tmp_path, tiny_folder):
            assert_refused(self.run(name, folder), "must hold autocompress.json", str(folder))

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_a_damaged_result(self, name: str, damage: str, copied: Path) -> None:
        harm, words = DAMAGE[damage]
        harm(copied)
        assert_refused(self.run(name, copied), *words)

    def test_threads(self, name: str, result: Path) -> None:
        for threads in (0, -1):
            ran = self.run(name, result, "--threads", threads)
            assert_refused(ran, f"threads must be at least 1. Got {threads}")
        assert_refused(self.run(name, result, "--threads", "x"), "--threads")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max-tokens", 0), ("max_tokens must be at least 1. Got 0",)),
        (("--max-tokens", 2000), ("at most 1024", "Shorten the prompt or ask for fewer tokens")),
        (("--temperature", -1), ("temperature must be finite and at least 0", "-1")),
        (("--top-k", 0), ("top_k must be at least 1",)),
        (("--top-p", 0), ("top_p must be above 0",)),
        (("--seed", -1), ("seed must be between 0",)),
        (("--activations", "int4"), ("activations must be one of", "float32", "'int4'")),
        (("--prompt", ""), ("at least one token",)),
        (("--prompt", "\udcff"), ("must be Unicode text",)),
    ],
)
def test_generate_refuses(
    result: Path, arguments: tuple[object, ...], words: tuple[str, ...]
) -> None:
    assert_refused(generate(result, *arguments), *words)


@pytest.mark.parametrize("flag", ["--prompt-length", "--tokens", "--rounds"])
def test_bench_refuses_counts_below_one(result: Path, flag: str) -> None:
    message = f"{flag.removeprefix('--').replace('-', '_')} must be at least 1. Got 0"
    assert_refused(command("bench", result, *SHORT, flag, 0), message)


def test_bench_refuses_more_than_the_context(result: Path) -> None:
    assert_refused(command("bench", result, *SHORT, "--tokens", 1020), "at most 1024", "1026")


def test_bench_refuses_another_dense_model(result: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    tensors: dict[str, Any] = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert_refused(command("bench", result, *SHORT, "--model", other), "--model", "weights differ")

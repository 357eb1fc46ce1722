"""Bad input: exit code 2, one line that says what to do, and nothing written into --out."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import BUDGET, TOKENS, Ran, command, content, copied_run, finished, write_config
from safetensors.torch import load_file, save_file

import autocompress
from autocompress.errors import AutocompressError, DatabaseError, StudyError
from autocompress.files import exclusive

WEIGHTS = "model.safetensors"


def assert_refused(ran: Ran, *words: str) -> None:
    """One error line, which holds every one of `words`; nothing else but progress."""
    assert ran.code == 2, ran.err
    assert ran.out == "", "standard output is for results"
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.err
    assert "Traceback" not in ran.err
    for word in words:
        assert word in errors[0], f"'{word}' must be in: {errors[0]}"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a refused search must write nothing."""
    folder = tmp_path / "result"
    yield folder
    assert not folder.exists(), "a refused search must not write into --out"


def search(model: Path, out: Path, *arguments: object, **settings: object) -> Ran:
    """A search of `model` with small splits; `settings` go into its configuration file."""
    tokens = settings.pop("tokens", TOKENS)
    config = write_config(out.with_name("config.toml"), model, tokens, **settings)  # type: ignore[arg-type]
    return command("search", "--config", config, "--out", out, *arguments)


# Budgets


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("3.5bitz", ("must be a positive number and one of the units", "'3.5bitz'", "3.5bits")),
        ("3.5", ("one of the units", "'3.5'", "such as 3.5bits")),
        ("-3bits", ("must be a positive number", "'-3bits'")),
        ("0.00001KL", ("must be at least 0.0", "loses on validation windows", "more bits")),
        ("1bits", ("must be at least 2.", "Got 1bits", "raise the budget")),
        ("60kB", ("must be at least ", "kB", "Got 60kB")),
        ("16.1bits", ("must be at most 16.00 bits", "Got 16.1bits", "Lower the budget")),
        ("10MB", ("must be at most", "Got 10MB")),
        ("50%", ("must be at least 100.00 %", "the cheapest", "Got 50%")),
        ("101%", ("must be at most 100.00 %", "Got 101%")),
        (" ", ("a budget must not be blank",)),
    ],
)
def test_budgets(tiny_folder: Path, out: Path, budget: str, words: tuple[str, ...]) -> None:
    assert_refused(search(tiny_folder, out, "--budget", budget), *words)


def test_no_budget(tiny_folder: Path, out: Path) -> None:
    assert_refused(search(tiny_folder, out), "must have a budget", "Add --budget 3.5bits")


def test_two_budgets_that_exclude_each_other(tiny_folder: Path, out: Path) -> None:
    asked = ("--budget", "8bits", "--budget", "60kB")
    assert_refused(search(tiny_folder, out, *asked), "must be at least", "Got 60kB")


@pytest.mark.parametrize("budget", ["1bits", "60kB"])
def test_the_smallest_budget_that_an_error_names_works(
    tiny_folder: Path, tmp_path: Path, budget: str
) -> None:
    out, run = tmp_path / "result", copied_run(tiny_folder, tmp_path / "run")
    asked = ("--run", run)
    refused = search(tiny_folder, out, *asked, "--budget", budget)
    assert_refused(refused, "at least")
    named = re.search(r"at least ([\d.]+ \w+)", refused.err)
    assert named is not None
    ran = search(tiny_folder, out, *asked, "--budget", named[1], "--json", generations=0)
    (reached,) = ran.json()["budgets"]
    assert reached["text"] == named[1]
    assert reached["reached"] <= reached["limit"] < reached["reached"] * 1.01


# Models


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def change(model: Path, **values: object) -> None:
    """Change entries of config.json; None takes them out."""
    config = json.loads((model / "config.json").read_text())
    kept = {key: value for key, value in {**config, **values}.items() if value is not None}
    (model / "config.json").write_text(json.dumps(kept))


def poison(model: Path, value: float) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_a_missing_model(tmp_path: Path, out: Path) -> None:
    ran = search(tmp_path / "nothing", out, "--budget", BUDGET)
    assert_refused(ran, "a model must exist", str(tmp_path / "nothing"), "Check the path")


def test_an_empty_model_folder(tmp_path: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = search(tmp_path / "empty", out, "--budget", BUDGET)
    assert_refused(ran, "must hold config.json or exactly one .gguf file", "empty")


def test_a_model_that_is_a_file(tiny_folder: Path, out: Path) -> None:
    ran = search(tiny_folder / WEIGHTS, out, "--budget", BUDGET)
    assert_refused(ran, "a model file must be .gguf", "Give the model's folder")


def test_a_file_that_only_says_gguf(tmp_path: Path, out: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not that")
    ran = search(tmp_path / "model.gguf", out, "--budget", BUDGET)
    assert_refused(ran, "must start with 'GGUF'", "model.gguf")


@pytest.mark.parametrize("kind", ["vit", "t5"])
def test_a_model_that_is_not_causal(broken: Path, out: Path, kind: str) -> None:
    change(broken, model_type=kind, architectures=None)
    ran = search(broken, out, "--budget", BUDGET)
    assert_refused(ran, "must be a causal LM", str(broken), kind)


def test_a_model_that_is_quantized_already(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    ran = search(finished(tiny_folder), out, "--budget", BUDGET)
    assert_refused(ran, "must be dense", "already quantized", "original model")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_truncated_weights(broken: Path, out: Path, share: float) -> None:
    truncate(broken / WEIGHTS, share)
    ran = search(broken, out, "--budget", BUDGET)
    assert_refused(ran, str(broken), "every file is complete")


def test_a_missing_weight(broken: Path, out: Path) -> None:
    tensors = load_file(broken / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / WEIGHTS, metadata={"format": "pt"})
    ran = search(broken, out, "--budget", BUDGET)
    assert_refused(ran, "must hold every weight", "layers.1.mlp.up_proj")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damaged_configuration(broken: Path, out: Path, name: str) -> None:
    truncate(broken / name, 0.5)
    assert_refused(search(broken, out, "--budget", BUDGET), str(broken))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(broken: Path, out: Path, value: float) -> None:
    poison(broken, value)
    ran = search(broken, out, "--budget", BUDGET)
    assert_refused(ran, "must be finite", "model.layers.1.mlp.up_proj.weight", "damaged")


# Calibration text


def test_too_little_text(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words are not enough to calibrate on.\n" * 20)
    ran = search(tiny_folder, out, "--budget", BUDGET, "--calibration", tmp_path / "short.txt")
    needed = sum(TOKENS.values())
    assert_refused(ran, f"at least {needed} tokens", "Got ", "lacks", "Give more text")


def test_the_built_in_text_has_an_end(tiny_folder: Path, out: Path) -> None:
    tokens = {**TOKENS, "calibrate": 64 * 10**5}
    ran = search(tiny_folder, out, "--budget", BUDGET, tokens=tokens)
    assert_refused(ran, "at least 6401024 tokens", "ask for fewer tokens")


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("nothing/here.txt", None, "Nothing exists at"),
        ("blank.txt", b" \n", "at least one word"),
        ("latin.txt", b"caf\xe9 " * 100, "must be UTF-8"),
        ("table.csv", b"text\nhello\n", "plain text, .jsonl or .parquet"),
        ("rows.jsonl", b'{"text": "one"}\n{"text": ', "line 2 must be one JSON object"),
        ("data.parquet", b"PAR1", "whole Parquet file"),
    ],
)
def test_unreadable_text(
    tiny_folder: Path, tmp_path: Path, out: Path, name: str, text: bytes | None, word: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text)
    ran = search(tiny_folder, out, "--budget", BUDGET, "--calibration", tmp_path / name)
    assert_refused(ran, word, name)


# Search spaces and pins

SPACE = 'name = "mine"\nlevels = ["w3g64", "w4g64"]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SPACE + 'levls = ["w2g64"]\n', ("a key must be one of", "'levls'", "'levels'?")),
        (SPACE.replace("w4g64", "w4g65x"), ("w4g65x",)),
        (SPACE.replace("w4g64", "w9g64"), ("bits must be one of", "Got 9", "mine.toml")),
        (SPACE + '[pins]\n"*.layers.9.*" = "w4g64"\n', ("matches none", "'*.layers.9.*'", "Near")),
        (
            SPACE + '[[override]]\nlayers = "*.dwn_proj"\nlevels = ["w4g64"]\n',
            ("'*.dwn_proj' matches none", "down_proj"),
        ),
        (SPACE + 'scope = ["block"]\n', ("'block'", "'blocks'?")),
        (SPACE.replace("w4g64", "s0"), ("above 0 % and below 100 %", "Got 0 %", "mine.toml")),
        (SPACE.replace("w4g64", "s100+w4g64"), ("above 0 % and below 100 %", "Got 100 %")),
        (SPACE.replace("w4g64", "r65"), ("at most 64, the full rank of", "cannot take r65")),
        (SPACE.replace("w4g64", "3:2"), ("keep n of each m inputs", "Got '3:2'")),
        (SPACE.replace("w4g64", "s50+2:4"), ("must not repeat a part", "Got 's50+2:4'")),
        (
            SPACE + '[pins]\n"*" = "w8g64"\n',
            ("at least 8.", "free some of the 21 layers", "3.5bits"),
        ),
        (SPACE + '[minimum]\n"*.mlp.*" = "w8g64"\n', ("minimum must leave", "all below w8g64")),
        ("levels = [\n", ("must be TOML",)),
    ],
)
def test_search_space_files(
    tiny_folder: Path, tmp_path: Path, out: Path, text: str, words: tuple[str, ...]
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    ran = search(tiny_folder, out, "--budget", BUDGET, "--space", tmp_path / "mine.toml")
    assert_refused(ran, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--space", "quant-2-9"), ("must be a .toml file or one of", "'quant-2-8'?")),
        (("--space", "no/where.toml"), ("must be readable", "no/where.toml", "Check the path")),
        (("--pin", "*.layers.9.*=w4g64"), ("'*.layers.9.*' matches none", "Near names")),
        (("--pin", "w4g64"), ("must be written 'pattern=level'", "'w4g64'")),
        (("--pin", "*.mlp.*=w4k64"), ("w4k64",)),
        (("--generations", "-1"), ("generations must be between 0", "Got -1")),
        (("--offspring", "0"), ("offspring must be between 1", "Got 0")),
        (("--seed", "-1"), ("seed must be between 0", "Got -1")),
        (("--sensitivity-tokens", "100"), ("must be a multiple of the window, 64", "Got 100")),
        (("--sensitivity-tokens", "1024"), ("must be between 1 and 512", "Got 1024")),
        (("--prefix", "w4x"), ("w4x",)),
        (("--method", "gtpq"), ("must be one of gptq, rtn", "'gptq'?")),
        (("--dtype", "float16"), ("must be one of auto, bfloat16, float32", "'float16'")),
        (("--generations", "many"), ("--generations", "valid integer")),
        (("--storage", "nosql:///study"), ("storage must be", "nosql:///study")),
    ],
)
def test_settings(
    tiny_folder: Path, out: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(search(tiny_folder, out, "--budget", BUDGET, *arguments), *words)


def test_an_unknown_strategy_is_known_at_once(tiny_folder: Path, out: Path) -> None:
    ran = search(tiny_folder, out, "--budget", BUDGET, "--strategy", "evolutin")
    assert_refused(ran, "a strategy must be one of", "'evolutin'", "'evolution'?")
    assert not out.with_name("result.run").exists(), "no database may be built before"


# Configuration files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("must be readable", "config.toml", "No such file", "Check the path")),
        (b"seed = ", ("must be TOML", "Got: ")),
        (b"sed = 1", ("config.toml: a key must be one of", "'sed'", "'seed'?")),
        (b'seed = "one"', ("seed must be an integer", "'one'")),
        (b'space = "\xe9"', ("must be UTF-8", "byte")),
        (b"[tokens]\nserch = 64", ("'serch'", "'search'?")),
        (
            b"[tokens]\nsearch = 100",
            ("'search' must be a multiple of the window", "Got 100"),
        ),
        (b"window = 1", ("window must be at least 2",)),
    ],
)
def test_configuration_files(
    tmp_path: Path, out: Path, text: bytes | None, words: tuple[str, ...]
) -> None:
    config = tmp_path / "config.toml"
    if text is not None:
        config.write_bytes(text)
    ran = command("search", "--config", config, "--budget", BUDGET, "--out", out)
    assert_refused(ran, *words)


def test_a_configuration_that_is_a_folder(tmp_path: Path, out: Path) -> None:
    ran = command("search", "--config", tmp_path, "--budget", BUDGET, "--out", out)
    assert_refused(ran, "must be readable", str(tmp_path), "Is a directory")


# The output folder


def test_an_output_folder_that_is_not_ours(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    before = content(out)
    ran = search(tiny_folder, out, "--budget", BUDGET)
    assert_refused(ran, "must be new, empty or a former result", "thesis.txt", "another folder")
    assert content(out) == before


def test_an_output_folder_that_is_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "file"
    out.write_text("mine")
    ran = search(tiny_folder, out, "--budget", BUDGET)
    assert_refused(ran, "must be a folder", str(out), "Choose another")
    assert out.read_text() == "mine"


def test_an_output_folder_below_a_file(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "result"
    config = write_config(tmp_path / "config.toml", tiny_folder)
    ran = command("search", "--config", config, "--budget", BUDGET, "--out", out)
    assert_refused(ran, "file")


@pytest.mark.parametrize("run", ["result", "result/run"])
def test_a_run_folder_in_the_output_folder(tiny_folder: Path, out: Path, run: str) -> None:
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", out.parent / run)
    assert_refused(ran, "run must be a folder outside of out")


def test_a_refused_search_leaves_a_former_result_whole(tiny_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished(tiny_folder), tmp_path / "result"))
    before = content(out)
    run = copied_run(tiny_folder, tmp_path / "run")
    entry = next((run / "database").glob("*.safetensors"))
    truncate(entry, 0.9)
    assert_refused(search(tiny_folder, out, "--run", run, "--budget", BUDGET), entry.name)
    assert content(out) == before


# Databases and studies


def test_a_truncated_database(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    entry = next((run / "database").glob("*.safetensors"))
    truncate(entry, 0.5)
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, "must be as it was built", entry.name, f"Delete '{run / 'database'}'")


def test_a_database_with_one_flipped_bit(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    entry = next((run / "database").glob("*.safetensors"))
    changed = bytearray(entry.read_bytes())
    changed[-1] ^= 1
    entry.write_bytes(changed)
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, entry.name, "its checksum differs", "Delete")


def test_a_database_with_a_missing_file(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    entry = next((run / "database").glob("*.safetensors"))
    entry.unlink()
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, entry.name, "the file is gone", "Delete")


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"identity": 3}'])
def test_a_damaged_manifest(tiny_folder: Path, tmp_path: Path, out: Path, damage: str) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    (run / "database" / "manifest.json").write_text(damage)
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, "manifest.json", "Delete")


def test_a_database_of_another_model(
    tiny_folder: Path, broken: Path, tmp_path: Path, out: Path
) -> None:
    poison(broken, 0.5)
    run = copied_run(tiny_folder, tmp_path / "run")
    ran = search(broken, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, "must belong to this model", "another model.", "another --run")


def test_a_database_of_other_text(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    tokens = {**TOKENS, "calibrate": 512}
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run, tokens=tokens)
    assert_refused(ran, "must belong to this model", "another calibration.", "another --run")


def test_a_study_of_other_text(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    """The database fits, but its losses were measured on other windows."""
    run = copied_run(tiny_folder, tmp_path / "run")
    facts = json.loads((run / "study.json").read_text())
    facts["calibration"]["fingerprint"] = "0" * 32
    (run / "study.json").write_text(json.dumps(facts))
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, "must continue with the facts", "calibration", "another folder")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("evaluations.jsonl", '{"number": 7}\n'),
        ("study.json", "{"),
        *(
            ("sensitivities-128-0.json", text)
            for text in (
                "",
                "[3]",
                '{"facts": "x", "mean": [{"w9": 1}]}',
                '{"mean": [], "stderr": []}',
            )
        ),
        ("teacher-search.safetensors", "half"),
        ("optuna.journal", "{}\n"),
    ],
)
def test_a_damaged_run_folder(
    tiny_folder: Path, tmp_path: Path, out: Path, name: str, damage: str
) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    assert (run / name).exists()
    (run / name).write_text(damage)
    assert_refused(search(tiny_folder, out, "--budget", BUDGET, "--run", run), str(run))


def test_sensitivities_of_another_model(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = copied_run(tiny_folder, tmp_path / "run")
    path = run / "sensitivities-128-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "facts": "0" * 32}))
    ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, str(path), "must belong to this model", "Delete it")


def test_two_runs_on_one_study(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = tmp_path / "run"
    with exclusive(run / "study.lock", StudyError, "the first run"):
        ran = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(ran, "one run at a time", str(run), "Wait for the other run")


def test_two_builds_of_one_database(tiny_folder: Path, tmp_path: Path, out: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.toml", tiny_folder)
    with exclusive(run / "database" / "lock", DatabaseError, "the first build"):
        built = command("build", "--config", config, "--run", run)
        searched = search(tiny_folder, out, "--budget", BUDGET, "--run", run)
    assert_refused(built, "one process at a time", str(run / "database"))
    assert_refused(searched, "one process at a time", "Wait for it")


# A disk that fills up


@contextmanager
def disk_of(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: writes fail half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_not_whole(out: Path) -> None:
    """Neither command nor API takes the folder for a result."""
    assert command("inspect", out).code == 2
    assert command("eval", out).code == 2
    with pytest.raises(AutocompressError):
        autocompress.load(out)


@pytest.mark.parametrize("limit", [0, 4_000, 30_000, 500_000])
def test_a_full_disk_while_searching(
    tiny_folder: Path, tmp_path: Path, out: Path, limit: int
) -> None:
    """The run folder stays usable: the same command goes on once there is room."""
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.toml", tiny_folder)
    asked = ("search", "--config", config, "--budget", BUDGET, "--out", out, "--run", run)
    with disk_of(limit):
        ran = command(*asked)
    assert_refused(ran, "must be", "Got: ", str(run))
    assert command(*asked).code == 0
    expected = json.loads((finished(tiny_folder) / "autocompress.json").read_text())
    facts = command("inspect", out, "--json").json()
    assert facts["allocation"] == expected["allocation"]
    shutil.rmtree(out)


def test_a_full_disk_while_exporting(tiny_folder: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "result", copied_run(tiny_folder, tmp_path / "run")
    config = finished(tiny_folder).with_name("config.toml")
    asked = ("search", "--config", config, "--budget", BUDGET, "--out", out, "--run", run)
    with disk_of(100_000):  # more than the study appends, less than the weights
        ran = command(*asked)
    assert_refused(ran, "must be writable", str(out))
    assert_not_whole(out)
    left = [path.name for path in out.rglob("*") if path.stat().st_size]
    assert left == [], f"nothing half-written must be left. Got {left}."
    assert command(*asked).code == 0


def full(*arguments: object, **settings: object) -> None:
    raise OSError(28, "No space left on device")


EXPORTED = (
    "autocompress.safetensors",
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "report.md",
    "report.html",
    "autocompress.json",
)
WRITERS = {
    "autocompress.safetensors": "autocompress.exporters.native.save_file",
    "tokenizer.json": "transformers.PreTrainedTokenizerFast.save_pretrained",
    "generation_config.json": "transformers.GenerationConfig.save_pretrained",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_disk_that_fills_up_at_any_file_of_the_export(
    tiny_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(finished(tiny_folder), tmp_path / "result"))  # a former result
    run = copied_run(tiny_folder, tmp_path / "run")
    config = finished(tiny_folder).with_name("config.toml")
    asked = ("search", "--config", config, "--budget", BUDGET, "--out", out, "--run", run)
    write_text = Path.write_text

    def write(path: Path, *arguments: str, **settings: str) -> int:
        if path.name.startswith(f".{name}."):  # the draft of this file
            full()
        return write_text(path, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", write)
        if name in WRITERS:
            patched.setattr(WRITERS[name], full)
        ran = command(*asked)
    assert_refused(ran, "must be writable", "No space left on device", str(out))
    assert command("inspect", out).code == 2, "the former result is gone, so nothing is whole"
    assert [path.name for path in out.glob(".*.*")] == [], "no draft may be left"
    assert command(*asked).code == 0
    assert command("inspect", out).code == 0


# Results


@pytest.mark.parametrize("name", ["inspect", "eval"])
def test_a_folder_that_is_no_result(tmp_path: Path, name: str) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        assert_refused(command(name, folder), "autocompress.json", str(folder))


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"results": '])
def test_a_damaged_result_manifest(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    out = Path(shutil.copytree(finished(tiny_folder), tmp_path / "result"))
    (out / "autocompress.json").write_text(damage)
    assert_refused(command("inspect", out), "autocompress.json", str(out))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.5, 0.9999])
def test_a_truncated_result(tiny_folder: Path, tmp_path: Path, share: float) -> None:
    out = Path(shutil.copytree(finished(tiny_folder), tmp_path / "result"))
    truncate(out / "autocompress.safetensors", share)
    assert_refused(command("eval", out), "autocompress.safetensors")
    with pytest.raises(AutocompressError, match=r"autocompress\.safetensors"):
        autocompress.load(out)


def test_a_truncated_tensor_in_a_whole_file(tiny_folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished(tiny_folder), tmp_path / "result"))
    tensors = load_file(out / "autocompress.safetensors")
    name = next(name for name in tensors if name.endswith(".codes"))
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, out / "autocompress.safetensors", {"format": "pt"})
    ran = command("eval", out)
    assert_refused(ran, "exactly the tensors of its configuration", name)
    assert "MISMATCH" not in ran.err  # transformers' own report


def test_eval_beside_another_dense_model(tiny_folder: Path, broken: Path) -> None:
    poison(broken, 0.5)
    ran = command("eval", finished(tiny_folder), "--model", broken, "--window", 64)
    assert_refused(ran, "must be the dense model that", "whose weights differ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window", "1"), ("--window must be at least 2",)),
        (("--window", "512", "--tokens", "64"), ("--tokens at least one window",)),
        (("--data", "no/such.txt"), ("Nothing exists at 'no/such.txt'",)),
    ],
)
def test_eval_settings(
    tiny_folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(command("eval", finished(tiny_folder), *arguments), *words)


def test_eval_of_too_little_text(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    ran = command("eval", finished(tiny_folder), "--data", tmp_path / "short.txt")
    assert_refused(ran, "at least one window of 512 tokens", "Got ")


def test_plain_transformers_does_not_take_a_result_for_random_weights(tiny_folder: Path) -> None:
    """Without autocompress there is no weights file by a name that transformers knows."""
    names = {path.name for path in finished(tiny_folder).iterdir()}
    assert not {name for name in names if name.endswith(".bin")}
    assert "model.safetensors" not in names
    assert torch.isfinite(autocompress.load(finished(tiny_folder))[0].lm_head.weight).all()

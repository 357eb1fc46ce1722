"""A SentencePiece model for a tokenizer that only has tokenizer.json.

llama.cpp's converter wants one for Gemma, and gives all pieces of a Llama one score where there is
none, so that llama.cpp would merge them in another order. transformers does not save it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from autocompress.errors import ConfigError
from autocompress.files import write_json

MODEL = "tokenizer.model"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write_sentencepiece(folder: Path) -> None:
    """Write tokenizer.model beside a tokenizer.json that was once made from one.

    Nothing is written where it stands already, or the tokenizer is of another kind: no BPE that
    falls back to bytes. SentencePiece merges the pair whose piece has the highest score (Kudo and
    Richardson 2018), so a piece's score is minus the rank of the first merge that makes it.

    Raises:
        ConfigError: sentencepiece or protobuf is not installed.
    """
    path = folder / "tokenizer.json"
    if (folder / MODEL).exists() or not path.exists():
        return
    described = json.loads(path.read_text(encoding="utf-8"))
    model = described["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not model.get("unk_token"):
        return
    added = {token["id"]: token for token in described.get("added_tokens") or ()}
    (folder / MODEL).write_bytes(_proto(model, added, _prepends(described)))
    plain = {token["content"]: i for i, token in added.items() if not token["special"]}
    if plain:  # the converter takes them for ordinary pieces otherwise
        write_json(folder / "added_tokens.json", plain)


def _proto(model: dict[str, Any], added: dict[int, Any], prefix: bool) -> bytes:
    spm = _definitions()
    texts = {i: text for text, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    found, kinds = spm.ModelProto(), spm.ModelProto.SentencePiece
    for i in range(max(texts) + 1):
        text = texts.get(i, f"[PAD{i}]")
        kind = kinds.NORMAL if i in texts else kinds.UNUSED
        if text == model["unk_token"]:
            kind = kinds.UNKNOWN
        elif i in added:
            kind = kinds.CONTROL if added[i]["special"] else kinds.USER_DEFINED
        elif BYTE.fullmatch(text):
            kind = kinds.BYTE
        score = 0.0 if i in added else -float(ranks.get(text, len(ranks) + i))
        found.pieces.add(piece=text, score=score, type=kind)
    found.trainer_spec.model_type = spm.TrainerSpec.BPE
    found.trainer_spec.byte_fallback = True
    found.trainer_spec.unk_id = next(i for i, t in texts.items() if t == model["unk_token"])
    found.normalizer_spec.name = "identity"
    found.normalizer_spec.add_dummy_prefix = prefix
    found.normalizer_spec.remove_extra_whitespaces = False
    return bytes(found.SerializeToString())


def _definitions() -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ConfigError(
            "a GGUF file of this tokenizer needs sentencepiece and protobuf. Got "
            f"'{error}'. Run: pip install 'autocompress[gguf]'."
        ) from error
    return sentencepiece_model_pb2


def _prepends(described: dict[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    normalizer = described.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    splitting = described.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        splitting.get("type") == "Metaspace" and splitting.get("prepend_scheme") != "never"
    )

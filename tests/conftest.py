"""A tiny trained Llama that compression hurts, with its space, windows and level database.

Everything here is built once per test session and shared: a test that changes the model's weights
takes `stitched`, which puts them back, or loads its own copy from `tiny_folder`. Torch and
transformers are imported inside the fixtures, so that tests of plain numbers start at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from autocompress.calibration import SplitTokens, calibration_windows
from autocompress.core import SearchSpace
from autocompress.levels import Level, parse_level
from autocompress.spaces import SpaceConfig, build_space
from autocompress.windows import Windows

if TYPE_CHECKING:
    from autocompress.database import LevelDatabase
    from autocompress.models import LoadedModel
    from autocompress.stitch import StitchedModel

VOCABULARY = 512
END = "<|endoftext|>"
WINDOW = 64  # tokens
STEPS, ROWS = 250, 8  # of training: 6 s; then 2 bits cost 0.4 nats/token and 4 bits 0.01
LEVELS = ("w2g64", "w4g64", "w6g64", "w8g64", "dense")
PREFIX = "w4g64"  # of the tiny database

Build = Callable[..., "LevelDatabase"]


def train_tokenizer() -> Any:
    """A byte-level BPE of the built-in text, as a `PreTrainedTokenizerFast`."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def make_llama(eos: int) -> Any:
    """Three blocks, grouped queries, an FFN width that 64 does not divide, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,  # larger than usual, for so few steps
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config)


def train_llama(tokenizer: Any) -> Any:
    """A tiny Llama that has learnt some of the built-in text."""
    from pydoc_data.topics import topics

    import torch

    ids = torch.tensor(tokenizer("\n\n".join(topics.values()))["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make_llama(tokenizer.eos_token_id)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
        for _ in range(STEPS):
            starts = torch.randint(len(ids) - WINDOW, (ROWS, 1))
            batch = ids[starts + torch.arange(WINDOW)]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local Hugging Face folder: config.json, model.safetensors, tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer()
    train_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """The tiny model in float32. Shared: see the module's docstring."""
    import torch

    from autocompress.models import load_model

    return load_model(str(tiny_folder), torch.float32)


@pytest.fixture(scope="session")
def tiny_space(tiny: LoadedModel) -> SearchSpace:
    """The block linears and the embedding, which is also the head, at 2 to 8 bits or dense."""
    from autocompress.models import find_layers

    config = SpaceConfig("tiny", tuple(map(parse_level, LEVELS)), ("blocks", "embedding", "head"))
    return build_space(config, find_layers(tiny.model, config.scope))


@pytest.fixture(scope="session")
def tiny_windows(tiny: LoadedModel) -> Windows:
    """Disjoint windows of the built-in text."""
    return calibration_windows(
        None,
        lambda text: tiny.tokenizer(text, add_special_tokens=False)["input_ids"],
        WINDOW,
        SplitTokens(calibrate=2048, search=1024, validate=512, test=1024),
        separator=tiny.tokenizer.eos_token_id,
    )


@pytest.fixture(scope="session")
def build_levels() -> Build:
    """Builds, completes or reuses the level database of a loaded model, as `autocompress` does."""
    from autocompress.build import build_database
    from autocompress.database import LevelDatabase, database_identity
    from autocompress.operators import Solver

    def build(
        loaded: LoadedModel,
        space: SearchSpace,
        calibrate: np.ndarray,  # (n, window) int64
        path: Path,
        prefix: Level | None = None,
    ) -> LevelDatabase:
        prefix, solver = prefix or parse_level(PREFIX), Solver()
        dtype = str(loaded.model.dtype)
        identity = database_identity(loaded.fingerprint, calibrate, prefix, solver, dtype)
        database = LevelDatabase.open(path, identity)
        return build_database(
            loaded.model, space, calibrate, database, prefix=prefix, solver=solver
        )

    return build


@pytest.fixture(scope="session")
def tiny_database(
    tiny: LoadedModel,
    tiny_space: SearchSpace,
    tiny_windows: Windows,
    build_levels: Build,
    tmp_path_factory: pytest.TempPathFactory,
) -> LevelDatabase:
    """Every level of every layer of `tiny_space`. Read only."""
    path = tmp_path_factory.mktemp("levels") / "database"
    return build_levels(tiny, tiny_space, tiny_windows.calibrate, path)


@pytest.fixture
def stitched(
    tiny: LoadedModel, tiny_space: SearchSpace, tiny_database: LevelDatabase
) -> Iterator[StitchedModel]:
    """The tiny model to put allocations into; dense again after the test."""
    from autocompress.stitch import StitchedModel

    model = StitchedModel(tiny.model, tiny_space, tiny_database)
    yield model
    model.restore()

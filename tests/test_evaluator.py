"""Several candidates scored at once have the scores that each has alone, for fewer blocks."""

from __future__ import annotations

import pytest
from test_prefix import W2, W6, changed

from autocompress.core import Fidelity
from autocompress.evaluator import Evaluator
from autocompress.models import find_blocks
from autocompress.progress import Silent
from autocompress.quality import score

AT = Fidelity(320)  # five windows: two batches


@pytest.fixture
def make(tiny, tiny_space, tiny_database, tiny_windows, tmp_path):
    """Evaluators that know nothing, one at a time: they share the model."""
    made: list[Evaluator] = []

    def evaluator() -> Evaluator:
        for former in made:
            former.stitched.restore()
        made[:] = [
            Evaluator(tiny.model, tiny_space, tiny_database, tiny_windows, tmp_path, Silent())
        ]
        return made[0]

    yield evaluator
    for last in made:
        last.stitched.restore()


@pytest.fixture
def candidates(tiny_space):
    """In the order of a trie: two leave the base in block 2, one in block 1, one before all."""
    base = tiny_space.uniform(W6)
    two = changed(base, "model.layers.2.mlp.up_proj", tiny_space)
    names = ("model.layers.2.mlp.down_proj", "model.layers.1.mlp.up_proj", "model.embed_tokens")
    return [base, two, *(changed(base, name, tiny_space) for name in names)]


@pytest.mark.parametrize("every", [1, 4])
def test_together_is_one_by_one(make, candidates, every):
    fidelity = Fidelity(AT.tokens, every=every)
    alone = [make()(candidate, fidelity) for candidate in candidates]
    assert len(set(alone)) == len(alone)
    assert make().together(candidates, fidelity) == alone


def test_they_share_what_they_have_in_common(make, candidates):
    evaluator = make()
    blocks = len(find_blocks(evaluator.stitched.model)[1])
    evaluator.together(candidates, AT)
    assert evaluator.forward.blocks_run == 2 * (blocks + 1 + 1 + (blocks - 1) + blocks)


def test_they_share_it_in_the_memory_of_one_batch(make, candidates):
    """Taking turns on batches, not on all windows, is what a long run can afford."""
    evaluator = make()
    blocks = find_blocks(evaluator.stitched.model)[1]
    evaluator.forward.memory = 2 * 4 * 64 * 64 * 4  # of two blocks, 4 windows, 64 wide, 4 bytes
    evaluator.together(candidates, AT)
    assert evaluator.forward.blocks_run == 2 * (3 * len(blocks) + 1)


def test_known_windows_are_left_out(make, candidates):
    whole = make().together(candidates, AT)
    behind = make().together(candidates, AT, 3)
    for score_, rest in zip(whole, behind, strict=True):
        assert rest.losses == pytest.approx(score_.losses[3:], rel=1e-5)


def test_the_loss_is_that_of_the_stitched_model(make, candidates, tiny_windows):
    evaluator = make()
    found = evaluator.together(candidates, AT)
    rows = tiny_windows.rows(AT)
    reference = evaluator.teacher("search").rows(rows)
    for candidate, expected in zip(candidates, found, strict=True):
        assert score(evaluator.stitched.stitch(candidate), reference) == expected
    assert W2 in candidates[-1].levels

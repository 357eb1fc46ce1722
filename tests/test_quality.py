"""The loss against full logits, its teacher on disk, and perplexity computed directly.

Measured here on the tiny model (512 tokens in the vocabulary, perplexity 36) at 2 bits: the loss
over the 256 most likely tokens is 98.9 % of the full KL divergence, over 64 of them 87 %, over 16
of them 66 %; over all of them it is the divergence.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import autocompress.quality
from autocompress.core import Fidelity
from autocompress.errors import OutputError, StudyError
from autocompress.levels import parse_level
from autocompress.quality import (
    divergence,
    log_probabilities,
    score,
    stored_teacher,
    teacher,
    window_logits,
)

VOCABULARY = 512


@pytest.fixture
def windows(tiny_windows):
    return tiny_windows.test[:7]  # not a multiple of the batch


@pytest.fixture
def coarse(stitched, tiny_space):
    """The tiny model at 2 bits."""
    return lambda: stitched.stitch(tiny_space.uniform(parse_level("w2g64")))


@torch.inference_mode()
def full_logits(model, windows):
    """(n, window, vocab) float64, window by window."""
    return torch.stack([model(torch.from_numpy(w)[None]).logits[0].double() for w in windows])


def full_divergence(dense, candidate):
    """KL (n, window) from full logits."""
    logp, logq = dense.log_softmax(2), candidate.log_softmax(2)
    return (logp.exp() * (logp - logq)).sum(2)


def test_all_tokens_give_the_exact_divergence(tiny, windows, coarse):
    dense = full_logits(tiny.model, windows)
    reference = teacher(tiny.model, windows, top=VOCABULARY)
    found = score(coarse(), reference)
    per_window = full_divergence(dense, full_logits(coarse(), windows)).mean(1)
    assert found.loss == pytest.approx(float(per_window.mean()), abs=1e-5)
    assert found.stderr == pytest.approx(float(per_window.std()) / 7**0.5, rel=1e-3)
    assert found.loss > 0.2


@pytest.mark.parametrize(("top", "share"), [(256, 0.97), (64, 0.82), (16, 0.6)])
def test_fewer_tokens_give_a_lower_bound_that_is_near(top, share, tiny, windows, coarse):
    reference = teacher(tiny.model, windows, top=top)
    dense = full_logits(tiny.model, windows)
    exact = float(full_divergence(dense, full_logits(coarse(), windows)).mean())
    found = score(coarse(), reference).loss
    assert share * exact < found < exact + 1e-6


def test_the_teacher_keeps_the_most_likely_tokens_and_the_rest_as_one(tiny, windows):
    reference = teacher(tiny.model, windows, top=20)
    chance = full_logits(tiny.model, windows).softmax(2)
    kept = chance.gather(2, reference.index.long())
    torch.testing.assert_close(reference.logp.double().exp(), kept, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(reference.tail.double(), 1 - kept.sum(2), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(kept.sum(2), chance.topk(20, 2).values.sum(2))
    assert torch.equal(reference.windows, torch.from_numpy(windows))


@pytest.mark.parametrize("top", [16, VOCABULARY, 10_000])
def test_the_dense_model_has_no_loss(top, tiny, windows):
    reference = teacher(tiny.model, windows, top=top)
    assert reference.index.shape[2] == min(top, VOCABULARY)
    found = score(tiny.model, reference)
    assert abs(found.loss) < 1e-6
    assert found.perplexity == pytest.approx(reference.perplexity, rel=1e-6)


def test_perplexity_is_that_of_the_next_token(tiny, windows, coarse):
    reference = teacher(tiny.model, windows)
    tokens = torch.from_numpy(windows)

    def direct(model):
        logits = full_logits(model, windows)[:, :-1].reshape(-1, VOCABULARY)
        return float(F.cross_entropy(logits, tokens[:, 1:].reshape(-1)).exp())

    assert reference.perplexity == pytest.approx(direct(tiny.model), rel=1e-5)
    found = score(coarse(), reference).perplexity
    assert found == pytest.approx(direct(coarse()), rel=1e-5)
    assert found > 1.2 * reference.perplexity


def test_some_windows_are_scored_as_a_teacher_of_theirs(tiny, windows, coarse):
    whole, chosen = teacher(tiny.model, windows), [5, 0]
    alone = teacher(tiny.model, windows[chosen])
    part = whole.rows(torch.tensor(chosen))
    assert torch.equal(part.windows, alone.windows)
    assert part.perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    assert score(coarse(), part).loss == pytest.approx(score(coarse(), alone).loss, rel=1e-4)


def test_one_window_has_no_standard_error(tiny, windows, coarse):
    reference = teacher(tiny.model, windows[:1])
    assert score(coarse(), reference).stderr == 0


@pytest.mark.parametrize("most", [1, 3 * 64 * VOCABULARY, 1 << 27])
def test_batches_of_windows_are_the_windows_one_by_one(most, tiny, windows, monkeypatch):
    monkeypatch.setattr(autocompress.quality, "LOGITS", most)
    sizes = []
    hook = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with torch.inference_mode():
        found = torch.stack(list(window_logits(tiny.model, torch.from_numpy(windows))))
    hook.remove()
    assert sizes == {1: [1] * 7, 3 * 64 * VOCABULARY: [3, 3, 1], 1 << 27: [4, 3]}[most]
    expected = full_logits(tiny.model, windows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every", [2, 3, 8, 64])
def test_some_positions_are_scored_as_they_are_among_all(every, tiny, windows, coarse):
    positions = Fidelity(64, every=every).positions
    reference, candidate = teacher(tiny.model, windows), coarse()
    rows = []
    hook = candidate.lm_head.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].shape[1])
    )
    found = score(candidate, reference, positions)
    hook.remove()
    at = torch.arange(64)[positions]
    assert set(rows) == {len(at)} == {len(range(64)[positions])}
    with torch.inference_mode():
        for i, logits in enumerate(window_logits(candidate, reference.windows)):
            logq, nll = log_probabilities(logits, reference.index[i], reference.windows[i])
            losses = divergence(reference.logp[i], reference.tail[i], logq)
            assert found.losses[i] == pytest.approx(float(losses[at].mean()), rel=1e-6, abs=1e-7)
            assert found.nlls[i] == pytest.approx(float(nll[at[at < 63]].mean()), rel=1e-6)


def test_a_forward_that_cannot_spare_the_head_gives_the_same(tiny, windows, coarse):
    class Whole:
        def __init__(self, model):
            self.model, self.get_output_embeddings = model, model.get_output_embeddings

        def forward(self, input_ids, use_cache):
            return self.model(input_ids=input_ids, use_cache=use_cache)

        __call__ = forward

    reference, candidate = teacher(tiny.model, windows), coarse()
    found = score(Whole(candidate), reference, slice(1, None, 4))
    expected = score(candidate, reference, slice(1, None, 4))
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.nlls == pytest.approx(expected.nlls, rel=1e-6)


def test_the_last_position_has_no_next_token(tiny, windows):
    reference = teacher(tiny.model, windows)
    two = score(tiny.model, reference, slice(62, None)).nlls
    assert two == pytest.approx(score(tiny.model, reference, slice(62, 63)).nlls, rel=1e-6)


def never():
    raise AssertionError("computed again")


def test_the_teacher_is_computed_once_and_read_back(tiny, windows, tmp_path):
    path = tmp_path / "new" / "teacher.safetensors"
    made = stored_teacher(path, lambda: teacher(tiny.model, windows, top=16), windows)
    read = stored_teacher(path, never, windows)
    for name in ("windows", "index", "logp", "tail", "nll"):
        assert getattr(read, name).dtype == getattr(made, name).dtype
        assert torch.equal(getattr(read, name), getattr(made, name))


def test_a_teacher_of_other_windows_is_refused(tiny, windows, tmp_path):
    path = tmp_path / "teacher.safetensors"
    stored_teacher(path, lambda: teacher(tiny.model, windows, top=16), windows)
    other = windows.copy()
    other[-1, -1] ^= 1
    for wrong in (other, windows[:6], np.flip(windows, 0).copy()):
        with pytest.raises(StudyError, match=r"must hold this run's windows"):
            stored_teacher(path, never, wrong)


@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_a_damaged_teacher_is_refused(length, tiny, windows, tmp_path):
    path = tmp_path / "teacher.safetensors"
    stored_teacher(path, lambda: teacher(tiny.model, windows, top=16), windows)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StudyError, match="must be whole") as error:
        stored_teacher(path, never, windows)
    assert str(path) in str(error.value)


def test_a_file_of_something_else_is_refused(tiny_folder, windows):
    with pytest.raises(StudyError, match="must be whole"):
        stored_teacher(tiny_folder / "model.safetensors", never, windows)


def test_a_teacher_that_cannot_be_written_leaves_no_file(tiny, windows, tmp_path, monkeypatch):
    def full(tensors, draft):
        draft.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(autocompress.quality, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        stored_teacher(tmp_path / "a", lambda: teacher(tiny.model, windows, top=4), windows)
    assert list(tmp_path.iterdir()) == []

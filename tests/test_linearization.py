"""Linearizations against finite differences and measured losses."""

import pytest
import torch

from autocompress.levels import Dense, parse_level
from autocompress.linearization import linearize
from autocompress.models import set_weight
from autocompress.quality import divergence, divergence_slope, log_probabilities, score, teacher

W2, W4, W6 = map(parse_level, ("w2g64", "w4g64", "w6g64"))


@pytest.fixture
def reference(tiny, tiny_windows):
    return teacher(tiny.model, tiny_windows.search)


def test_the_slope_of_the_divergence_is_its_derivative(tiny, tiny_windows):
    reference = teacher(tiny.model, tiny_windows.search[:1], top=16).rows(0)
    torch.manual_seed(0)
    logits = torch.randn(len(reference.windows), 512, requires_grad=True)
    logq, _ = log_probabilities(logits, reference.index.clone(), reference.windows)
    divergence(reference.logp.clone(), reference.tail.clone(), logq).sum().backward()
    torch.testing.assert_close(divergence_slope(logits.detach(), reference), logits.grad)


@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("level", [W2, W6], ids=str)
def test_slopes_are_finite_differences(index, level, stitched, tiny_space, reference):
    allocation = tiny_space.uniform(W4)
    (name,) = tiny_space.layers[index].modules
    found = linearize(stitched, allocation, reference).slope.mean[index][level]
    step, losses = 0.02, []
    for sign in (-1, 1):
        stitched.blend(allocation, 0.5)
        module = stitched.model.get_submodule(name)
        set_weight(module, module.weight + sign * step * stitched.change(name, level))
        stitched._tie(name)
        losses.append(score(stitched.model, reference).loss)
    stitched.restore()
    assert found == pytest.approx((losses[1] - losses[0]) / (2 * step), rel=0.05, abs=1e-6)


def test_slopes_of_the_allocation_sum_to_its_loss(stitched, tiny_space, reference):
    allocation = tiny_space.uniform(W4)
    found = linearize(stitched, allocation, reference)
    total = sum(row[level] for row, level in zip(found.slope.mean, allocation.levels, strict=True))
    assert total == pytest.approx(score(stitched.stitch(allocation), reference).loss, rel=0.1)


def test_overlaps_are_correlations(stitched, tiny_space, reference):
    allocation = tiny_space.uniform(W4).swap(2, Dense())
    found = linearize(stitched, allocation, reference).overlap
    for index, (row, own) in enumerate(zip(found, allocation.levels, strict=True)):
        assert row[own] == pytest.approx(float(index != 2), abs=1e-5)
        assert row[Dense()] == 0
        assert all(abs(value) <= 1.00001 for value in row.values())
    (name,) = tiny_space.layers[5].modules
    pair = [stitched.change(name, level).flatten() for level in (W4, W2)]
    expected = torch.nn.functional.cosine_similarity(*pair, dim=0)
    assert found[5][W2] == pytest.approx(float(expected), rel=1e-4)


def test_the_model_is_dense_again(tiny, stitched, tiny_space, reference):
    stitched.stitch(tiny_space.uniform(W2))
    linearize(stitched, tiny_space.uniform(W4), reference)
    assert set(stitched.current.values()) == {Dense()}
    assert score(stitched.model, reference).loss == pytest.approx(0, abs=1e-6)
    assert not any(module._forward_hooks for module in tiny.model.modules())
    stitched.stitch(tiny_space.uniform(W2))
    whole = score(stitched.model, reference).loss
    stitched.blend(tiny_space.uniform(W4), 0.5)
    assert score(stitched.stitch(tiny_space.uniform(W2)), reference).loss == whole


def test_a_large_layer_is_compared_a_few_rows_at_a_time(stitched, tiny_space, monkeypatch):
    changes = [stitched.change(tiny_space.layers[-1].modules[0], level) for level in (W2, W4, W6)]
    flat = torch.stack([change.flatten() for change in changes])
    monkeypatch.setattr("autocompress.stitch.TOGETHER", flat.numel() // 5)
    parts = list(stitched._changes(tiny_space.layers[-1].modules[0], (W2, W4, W6)))
    assert len(parts) > 4
    torch.testing.assert_close(torch.cat(parts, 1), flat)

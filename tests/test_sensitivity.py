"""Sensitivities against a slow computation with loops, and against measured losses."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

import autocompress.sensitivity
from autocompress.core import SearchSpace
from autocompress.levels import Dense, parse_level
from autocompress.models import LoadedModel, find_layers
from autocompress.quality import score, teacher
from autocompress.sensitivity import METHODS, fisher_sensitivities
from autocompress.stitch import StitchedModel

W2, W6 = parse_level("w2g64"), parse_level("w6g64")


@pytest.fixture
def windows(tiny_windows):
    return tiny_windows.search[:5]  # not a multiple of the batch


@pytest.fixture
def slopes(monkeypatch):
    """The random roots that were drawn, one (tokens, vocab) per window."""
    drawn, root = [], autocompress.sensitivity._random_root

    def spy(chance, generator):
        drawn.append(root(chance, generator))
        return drawn[-1]

    monkeypatch.setattr(autocompress.sensitivity, "_random_root", spy)
    return drawn


def slow_sensitivity(model, users, change, windows, slopes):
    """Half the token mean of (gT dW x)^2 summed over the modules that read the weight."""
    total, embedding = 0.0, model.get_input_embeddings()
    for window, slope in zip(torch.from_numpy(windows), slopes, strict=True):
        seen = []

        def keep(module, args, output, seen=seen):
            output.retain_grad()
            seen.append((args[0].detach(), output))

        handles = [user.register_forward_hook(keep) for user in users if user is not embedding]
        with torch.enable_grad():
            embedded = embedding(window[None]).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
            logits.backward(slope)
        for handle in handles:
            handle.remove()
        if embedding in users:
            seen.append((window[None], embedded))
        assert len(seen) == len(users)
        for inputs, output in seen:
            for t in range(len(window)):
                x = inputs[0, t]
                moved = change @ x if x.is_floating_point() else change[x]
                total += float(moved.double() @ output.grad[0, t].double()) ** 2
    return total / 2 / windows.size


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens", "model.layers.0.self_attn.v_proj", "model.layers.2.mlp.down_proj"],
)
@pytest.mark.parametrize("level", [W2, W6], ids=str)
def test_equals_a_slow_computation(
    name, level, tiny, tiny_space, tiny_database, windows, slopes, stitched
):
    found = fisher_sensitivities(stitched, windows, method="exact").mean
    module = tiny.model.get_submodule(name)
    users = [module, tiny.model.lm_head] if name == "model.embed_tokens" else [module]
    change = tiny_database.load(name, level).dense() - module.weight
    index = [layer.name for layer in tiny_space.layers].index(name)
    expected = slow_sensitivity(tiny.model, users, change, windows, slopes)
    assert found[index][level] == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_random_roots_have_the_curvature_of_the_logits():
    chance = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.0, 0.0, 1.0]]).repeat(20_000, 1)
    drawn = autocompress.sensitivity._random_root(chance, torch.Generator().manual_seed(0))
    first, p = drawn[::2], chance[0]
    torch.testing.assert_close(first.T @ first / 20_000, p.diag() - p.outer(p), rtol=0, atol=0.01)
    torch.testing.assert_close(first.mean(0), torch.zeros(4), rtol=0, atol=0.015)
    torch.testing.assert_close(drawn[1::2], torch.zeros(20_000, 4))


def test_random_roots_vary_less_than_labels_do():
    """A confident model: seldom does a label differ, and then it says everything."""
    chance, generator = torch.tensor([[0.98, 0.01, 0.01]]).repeat(20_000, 1), torch.Generator()
    labels = F.one_hot(chance.multinomial(1, generator=generator.manual_seed(0))[:, 0], 3)
    direction = torch.tensor([1.0, -1.0, 0.5])
    by_labels = ((chance - labels) @ direction).square()
    roots = autocompress.sensitivity._random_root(chance, generator)
    by_roots = (roots @ direction).square()
    assert float(by_roots.mean()) == pytest.approx(float(by_labels.mean()), rel=0.2)
    assert by_roots.var() < 0.2 * by_labels.var()


def test_diagonal_is_the_sum_over_all_weights(tiny, tiny_space, tiny_database, windows, stitched):
    name, found = "model.layers.1.mlp.up_proj", []
    for method in ("diagonal", "kronecker"):
        seen = {}
        module = tiny.model.get_submodule(name)
        handle = module.register_forward_hook(lambda m, args, out, s=seen: s.update(x=args[0]))
        estimate = fisher_sensitivities(stitched, windows[:1], method=method).mean
        handle.remove()
        found.append(estimate[[layer.name for layer in tiny_space.layers].index(name)][W2])
    x, change = seen["x"][0].detach().float(), tiny_database.load(name, W2).dense() - module.weight
    second = x.square().mean(0)
    rows = tiny_database.row_errors(name, W2)
    # Both are sums over outputs of the same gradients' squares, times what each says of a row.
    low, high = (change.square() @ second / rows).aminmax()
    assert float(low) <= found[0] / found[1] <= float(high)
    assert found[0] != found[1]


@pytest.mark.parametrize("method", [it for it in METHODS if it != "diagonal"])
@pytest.mark.parametrize("level", [W6, parse_level("w8g64")], ids=str)
def test_the_sum_predicts_the_loss_of_a_uniform_model(
    level, method, tiny, tiny_space, tiny_windows, tiny_database, stitched
):
    windows = tiny_windows.search
    found = fisher_sensitivities(stitched, windows, method=method).mean
    reference = teacher(tiny.model, windows)
    measured = score(stitched.stitch(tiny_space.uniform(level)), reference).loss
    assert 0.7 < sum(row[level] for row in found) / measured < 1.5


def test_each_layer_predicts_its_own_loss(tiny, tiny_space, tiny_windows, tiny_database, stitched):
    windows, level = tiny_windows.search, parse_level("w4g64")
    found = fisher_sensitivities(stitched, windows).mean
    reference = teacher(tiny.model, windows)
    dense = tiny_space.uniform(Dense())
    ratios = {}
    for index, layer in enumerate(tiny_space.layers):
        loss = score(stitched.stitch(dense.swap(index, level)), reference).loss
        if loss > 1e-4:  # less is lost in the noise
            ratios[layer.name] = found[index][level] / loss
    assert "model.embed_tokens" in ratios and len(ratios) >= 7
    wrong = {name: ratio for name, ratio in ratios.items() if not 0.5 < ratio < 2}
    assert not wrong


def test_an_embedding_that_scales_its_rows(build_levels, tmp_path):
    """Gemma multiplies with sqrt(hidden): its output changes by as much more."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32},
        **{"initializer_range": 0.1, "tie_word_embeddings": False},
    )
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    layers = find_layers(model, ("embedding",))
    space = SearchSpace("embedding", layers, ((parse_level("w4g64"),),))
    windows = np.random.default_rng(0).integers(0, 512, (8, 64))
    database = build_levels(LoadedModel(model, None, "g", "g"), space, windows, tmp_path / "g")
    stitched = StitchedModel(model, space, database)
    [[found]] = [row.values() for row in fisher_sensitivities(stitched, windows).mean]
    reference = teacher(model, windows)
    measured = score(stitched.stitch(space.uniform(parse_level("w4g64"))), reference).loss
    assert 0.5 < found / measured < 2


def test_one_seed_gives_one_result_and_another_seed_another(tiny_space, windows, stitched):
    one, again, other = (fisher_sensitivities(stitched, windows, seed) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    for rows in one:
        assert [list(row) for row in rows] == [list(levels) for levels in tiny_space.levels]
        assert all(row[Dense()] == 0 for row in rows)


def test_scaled_is_exact_at_one_level_and_kronecker_at_the_others(tiny_space, windows, stitched):
    exact, scaled, kronecker = (
        fisher_sensitivities(stitched, windows, method=method).mean
        for method in ("exact", "scaled", "kronecker")
    )
    for layer, levels, *rows in zip(
        tiny_space.layers, tiny_space.levels, exact, scaled, kronecker, strict=True
    ):
        one, other, product = ([row[lv] for lv in levels if lv != Dense()] for row in rows)
        if layer.name == "model.embed_tokens":
            assert one == other == product
            continue
        at = len(one) // 2
        assert other[at] == pytest.approx(one[at], rel=1e-6)
        ratio = other[at] / product[at]
        assert other == pytest.approx([ratio * value for value in product], rel=1e-6)
        assert 0.4 < ratio < 2.5


def test_standard_errors_are_those_of_the_windows(windows, stitched):
    whole = fisher_sensitivities(stitched, windows, method="exact")
    parts = [
        fisher_sensitivities(stitched, windows[i : i + 1], seed)
        for i in range(len(windows))
        for seed in range(20)
    ]
    name, level = 5, W2
    spread = np.std([part.mean[name][level] for part in parts], ddof=1) / len(windows) ** 0.5
    assert 0.3 < whole.stderr[name][level] / spread < 3
    assert parts[0].stderr == parts[0].mean, "one window knows no error"


def test_the_model_is_left_as_it_was(tiny, windows, stitched):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    fisher_sensitivities(stitched, windows)
    for module in tiny.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for parameter in tiny.model.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    assert all(torch.equal(before[name], t) for name, t in tiny.model.state_dict().items())


def test_hooks_are_removed_after_an_error(tiny, windows, stitched):
    with pytest.raises(IndexError):
        fisher_sensitivities(stitched, windows + 10_000)
    assert not any(module._forward_hooks for module in tiny.model.modules())


def test_progress_counts_windows(windows, stitched):
    seen = []
    fisher_sensitivities(
        stitched,
        windows,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (5, 5)
    assert json.dumps(seen) == json.dumps(sorted(seen))

"""Native kernels: every format, path and odd shape against float64, and inside torch."""

import itertools

import pytest
import torch

kernels = pytest.importorskip("autocompress_kernels")

if kernels.missing() is not None:
    pytest.skip(kernels.missing(), allow_module_level=True)

from packed_weights import draw, sparse, weight  # noqa: E402

from autocompress_kernels import check, reference  # noqa: E402

LIBRARY = kernels.load()
MODES = tuple(kernels.MODES)
GROUPS = (32, 64, 96, 256, None)
SHAPES = ((1, 1), (5, 3), (16, 32), (17, 33), (33, 100), (50, 257), (64, 576), (7, 1025))
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 31, 32, 33)
CODES = (2, 3, 4, 5, 6, 8)


@pytest.fixture(params=LIBRARY.isas())
def isa(request):
    """An instruction set, in use during the test."""
    before = LIBRARY.isa()
    LIBRARY.select_isa(request.param)
    assert LIBRARY.isa() == request.param
    yield request.param
    LIBRARY.select_isa(before)


def assert_all_within(every, isa):
    """All modes, with another number of rows, type and bias from weight to weight."""
    turns = itertools.cycle(itertools.product(ROWS, (torch.float32, torch.bfloat16), (True, False)))
    cases = []
    for packed in every:
        x = draw(max(ROWS), packed.format.width, seed=1)
        bias = draw(packed.format.rows, seed=2)
        for mode in MODES:
            count, kind, has_bias = next(turns)
            some = x[-count:].to(kind)
            cases.append(check.Case(packed, some, bias if has_bias else None, mode, isa))
    found = check.run(cases)
    assert {mode for mode, _, _ in found} == set(MODES)
    assert check.failures(found) == []


@pytest.mark.parametrize("bits", [*CODES, 16])
def test_full_weights(bits, isa):
    variants = [(group, symmetric) for group in GROUPS for symmetric in (False, True)]
    every = [
        weight(*shape, bits, group, symmetric)
        for shape in SHAPES
        for group, symmetric in (variants if bits < 16 else [(None, True)])
    ]
    assert_all_within(every, isa)


@pytest.mark.parametrize("mode", ["a16", "a32"])
@pytest.mark.parametrize("bits", [3, 8])
def test_inputs_of_any_size(bits, mode, isa):
    """Sizes of x differ from row to row and within a row, and a NaN is seen in its row only."""
    packed = weight(33, 257, bits, 64, False)
    x = draw(4, 257, seed=3) * torch.tensor([1e-25, 1e-3, 1.0, 1e25])[:, None]
    x[:, ::61] *= 300  # outliers
    limit = {"a16": 3e-3, "a32": 1e-5}[mode]
    wanted = reference.linear(x, packed, None)
    for row in range(4):
        found = kernels.linear(x[row : row + 1], packed, None, mode).double()
        assert (found - wanted[row]).norm() < limit * wanted[row].norm()
    assert not kernels.linear(torch.zeros(1, 257), packed, None, mode).any()
    x[1, 70] = torch.nan
    for rows in (slice(0, 2), slice(0, 4)):  # few rows are multiplied in another way than more
        seen = kernels.linear(x[rows], packed, None, mode).isnan()
        assert seen.all(1).tolist()[:2] == [False, True] and not seen[0].any()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["bitmask", "2:4"])
def test_sparse_weights(pattern, bits, isa):
    every = []
    for i, shape in enumerate(SHAPES):
        for kept in (0.5, 0.3) if pattern == "2:4" else (0.03, 0.5, 1.0):
            packed, dense = sparse(*shape, bits, pattern, kept, GROUPS[i % len(GROUPS)])
            assert torch.equal(reference.weight(packed), dense), "the layout is the documented one"
            assert torch.equal(kernels.dequantize(packed, torch.float32).double(), dense)
            every.append(packed)
    assert_all_within([p for p in every if reference.weight(p).any()], isa)
    nothing, dense = sparse(50, 257, bits, pattern, 0.0)
    assert not dense.any() and not kernels.dequantize(nothing, torch.float32).any()
    for mode in MODES:
        assert kernels.linear(draw(3, 257), nothing, None, mode).abs().max() < 1e-2


def test_the_layout_is_the_documented_one():
    """Four bits by hand: row r, column c is byte 4 * (r % 16) + c % 4 of block c // 4."""
    packed = weight(18, 40, 4, 32)
    codes, _, _ = kernels.unpack_codes(packed)
    values = packed.tensors["values"].view(2, 2, 4, 64)  # tiles, superblocks, vectors, bytes
    for row, column in [(0, 0), (3, 5), (15, 31), (16, 0), (17, 39), (2, 33)]:
        block = column % 32 // 4
        byte = values[row // 16, column // 32, block // 2, 4 * (row % 16) + column % 4]
        assert (int(byte) >> 4 * (block % 2)) & 15 == codes[row, column]


@pytest.mark.parametrize("bits", CODES)
def test_packing_can_be_undone(bits):
    for shape in SHAPES:
        for group in GROUPS:
            generator = torch.Generator().manual_seed(0)
            grid = (shape[0], kernels.Format(*shape, bits, group).groups)
            codes = torch.randint(1 << bits, shape, dtype=torch.uint8, generator=generator)
            zeros = torch.randint(1 << bits, grid, dtype=torch.uint8, generator=generator)
            scales = torch.rand(grid, generator=generator).half()
            packed = kernels.pack_codes(codes, scales, zeros, bits, group)
            found = kernels.unpack_codes(packed)
            assert all(map(torch.equal, found, (codes, scales, zeros)))
            exact = kernels.dequantize(packed, torch.float32)
            assert torch.equal(exact, reference.weight(packed, torch.float32))
            spread = [t.float().repeat_interleave(packed.format.inputs, 1) for t in (scales, zeros)]
            scale, zero = (t[:, : shape[1]] for t in spread)
            assert torch.equal(exact, (codes - zero) * scale)


def test_gathered_rows_are_rows_of_the_weight():
    for bits in (*CODES, 16):
        packed = weight(50, 100, bits)
        for kind in (torch.float32, torch.bfloat16):
            dense = kernels.dequantize(packed, torch.float32).to(kind)
            assert torch.equal(kernels.dequantize(packed, kind), dense)
            indices = torch.tensor([[0, 49, 7], [7, 16, 15]])
            assert torch.equal(kernels.gather(packed, indices, kind), dense[indices])
            assert torch.equal(kernels.gather(packed, indices.int().T, kind), dense[indices.T])
            assert kernels.gather(packed, indices[:, :0], kind).shape == (2, 0, 100)
    for pattern in ("bitmask", "2:4"):
        for bits in (8, 16):
            packed, dense = sparse(50, 100, bits, pattern)
            found = kernels.gather(packed, torch.tensor([49, 0, 17]), torch.float32)
            assert torch.equal(found.double(), dense[[49, 0, 17]])


def test_x_may_have_any_shape_and_strides():
    packed, bias = weight(40, 96), draw(40)
    x = draw(6, 5, 96)
    expected = kernels.linear(x.reshape(30, 96), packed, bias, "a32").view(6, 5, 40)
    wide = torch.zeros(6, 5, 100)
    wide[..., 3:99] = x
    shapes = {
        "as it is": x,
        "a slice": wide[..., 3:99],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for name, some in shapes.items():
        assert torch.equal(some, x)
        found = kernels.linear(some, packed, bias, "a32")
        torch.testing.assert_close(found, expected, msg=name)
        assert found.is_contiguous()
    same = kernels.linear(x[0, 0].expand(7, 96), packed, bias, "a32")
    torch.testing.assert_close(same, expected[0, 0].expand(7, 40))
    assert kernels.linear(x[0, 0], packed).shape == (40,)
    for mode in MODES:
        assert kernels.linear(x[:0], packed, bias, mode).shape == (0, 5, 40)
    half = bias.bfloat16()
    torch.testing.assert_close(
        kernels.linear(x, packed, half, "a32"), kernels.linear(x, packed, half.float(), "a32")
    )


@pytest.mark.parametrize("mode", MODES)
def test_results_are_added_in_place(mode):
    packed = weight(40, 96)
    for count in (1, 7, 40):
        x, y = draw(count, 96), draw(count, 40, seed=1)
        expected = y + kernels.linear(x, packed, None, mode)
        assert kernels.add_linear(y, x, packed, mode) is y
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_low_rank_factors(kind):
    x, bias = draw(9, 200).to(kind), draw(70)
    for bits in (16, 4):
        first, second = weight(24, 200, bits), weight(70, 24, bits, 32)
        inner = reference.weight(second) @ reference.weight(first)
        exact = x.double() @ inner.T
        for mode, most in (("a32", 1e-5), ("a16", 3e-3), ("a8", 6e-3)):
            limit = max(most, 1e-2 if kind == torch.bfloat16 else 0)
            found = kernels.low_rank(x, first, second, bias, mode)
            assert (found - bias - exact).norm() < limit * exact.norm()
            onto = draw(9, 70, seed=3).to(kind)
            wanted = onto.double() + exact
            kernels.low_rank(x, first, second, None, mode, onto)
            assert (onto.double() - wanted).norm() < limit * wanted.norm()
    with pytest.raises(ValueError, match="bias must be part of what is added onto"):
        kernels.low_rank(x, first, second, bias, "a8", onto)


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_read_one_input_are_multiplied_in_one_call(mode, isa):
    formats = ((33, 3, 32), (576, 4, 64), (17, 5, None), (16, 16, None), (40, 8, 96))
    weights = [weight(rows, 200, bits, group) for rows, bits, group in formats]
    weights += [sparse(40, 200, bits, "bitmask")[0] for bits in (8, 16)]
    weights += [weight(20, 200, seed=seed) for seed in range(3)]  # more than one call takes
    biases = [draw(one.format.rows) if i % 2 else None for i, one in enumerate(weights)]
    before = torch.get_num_threads()
    try:
        for threads, count, kind in itertools.product(
            (1, 2), (1, 9, 40), (torch.float32, torch.bfloat16)
        ):
            torch.set_num_threads(threads)
            x = draw(count, 200).to(kind)
            found = kernels.linears(x, weights, biases, mode)
            for y, packed, bias in zip(found, weights, biases, strict=True):
                assert torch.equal(y, kernels.linear(x, packed, bias, mode))
    finally:
        torch.set_num_threads(before)


def test_weights_multiplied_in_one_call_must_fit_together():
    weights, x = [weight(16, 96), weight(48, 96)], draw(3, 192)[:, :96]
    for y, packed in zip(kernels.linears(x, weights), weights, strict=True):
        assert torch.equal(y, kernels.linear(x, packed))
    assert [y.shape for y in kernels.linears(x[:0], weights)] == [(0, 16), (0, 48)]
    with pytest.raises(ValueError, match="x must have 64 inputs"):
        kernels.linears(x, [weights[0], weight(16, 64)])
    with pytest.raises(ValueError, match="Got 2 weights and 1 biases"):
        kernels.linears(x, weights, [None])
    with pytest.raises(ValueError, match="Got 0 weights"):
        kernels.linears(x, [])
    with pytest.raises(ValueError, match="must have one width"):
        kernels.ops.linears_of([weights[0], weight(16, 64)], "a8")


@pytest.mark.parametrize("mode", ["a16", "a32"])
def test_many_rows_take_the_weight_tile_by_tile(mode):
    packed, x, bias = weight(1000, 1025), draw(40, 1025), draw(1000)
    dense = reference.weight(packed)
    assert dense.numel() * 2 > 1 << 20, "more than one tile"
    exact = reference.linear(x, packed, bias)
    found = kernels.linear(x, packed, bias, mode)
    assert reference.relative_error(found, exact, x, dense) < check.EXACT[mode]
    kernels.add_linear(found, x, packed, mode)
    twice = 2 * exact - bias.double()
    assert reference.relative_error(found, twice, 2 * x, dense) < check.EXACT[mode]


def test_threads_do_not_change_results():
    assert LIBRARY.parallel, "torch exports its parallel loop"
    before = torch.get_num_threads()
    packed, x = weight(1024, 1024), draw(37, 1024)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            some = [kernels.linear(x[:m], packed, None, "a8") for m in (1, 9, 37)]
            found.append([*some, kernels.dequantize(packed, torch.float32)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))


def test_random_cases():
    found = check.run(check.random_cases(400, seed=1))
    assert check.failures(found) == []
    assert sum(tally.cases for tally in found.values()) == 400


def test_the_check_finds_a_wrong_kernel(monkeypatch, capsys):
    right = check.linear

    def wrong(x, packed, bias, mode):
        x = x.clone()
        x[..., -1] = 0  # the last input is forgotten
        return right(x, packed, bias, mode)

    monkeypatch.setattr(check, "linear", wrong)
    assert check.main(["--cases", "40"]) == 1
    assert "above" in capsys.readouterr().out


# --- in torch --------------------------------------------------------------------------------


def calls():
    packed, x = weight(48, 96, 4, 32), draw(5, 96)
    some, _ = sparse(48, 96, 8, "bitmask")
    ops = torch.ops.autocompress_kernels
    yield ops.linear.default, (x, *packed.parts, draw(48), *packed.numbers, 0)
    yield ops.linear.default, (x.bfloat16(), *some.parts, None, *some.numbers, 1)
    pair = (*packed.parts, *some.parts), (draw(48), None), (*packed.numbers, *some.numbers)
    yield ops.linears.default, (x, *map(list, pair), 0)
    yield ops.add_linear.default, (draw(5, 48), x, *packed.parts, *packed.numbers, 2)
    yield ops.rows.default, (torch.tensor([[1, 2]]), *packed.parts, *packed.numbers, torch.bfloat16)
    yield ops.dense.default, (*packed.parts, *packed.numbers, torch.float32)


def test_operators_are_what_torch_expects():
    for op, arguments in calls():
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, (op, results)


def test_operators_compile_whole():
    packed, bias = weight(48, 96, 4, 32), draw(48)
    inner = weight(16, 96), weight(48, 16)

    def function(x, tokens):
        y = sum(kernels.linears(x, [packed, packed], [bias, None])) + 1
        y = kernels.low_rank(x, *inner, None, "a16", y * 2)
        return y @ kernels.dequantize(packed, torch.float32) + kernels.gather(
            packed, tokens, torch.float32
        )

    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
        for count in (3, 5):
            x, tokens = draw(count, 96), torch.arange(count) * 7
            expected = function(x, tokens)
            torch.testing.assert_close(compiled(x, tokens), expected, rtol=1e-4, atol=1e-4)
            with torch.inference_mode():
                torch.testing.assert_close(compiled(x, tokens), expected, rtol=1e-4, atol=1e-4)


def test_watched_calls_go_through_torch():
    """The short way past torch's dispatcher is for plain calls only."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    packed, x = weight(48, 96), draw(5, 96)
    plain = kernels.linear(x, packed)
    with Watch():
        assert torch.equal(kernels.linear(x, packed), plain)
    assert "autocompress_kernels.linear.default" in seen

"""Every registered backend: the exact product within the mode's tolerance, or a reason why not."""

import copy
import warnings

import pytest
import torch

from autocompress import backends
from autocompress.backends import BACKENDS, choose_backend
from autocompress.backends.native import sparse_is_faster
from autocompress.errors import BackendError
from autocompress.levels import Dense, LowRank, Prune, Quantize, parse_level
from autocompress.operators import Solver, Statistics, solve
from autocompress.packed import Packed, pack_quantized
from autocompress.targets import MODES

SHAPES = ((16, 64), (48, 576), (33, 100), (7, 30), (1, 1), (17, 257), (64, 256), (100, 64))
LEVELS = [
    Dense(),
    *[
        Quantize(bits, group, symmetric)
        for bits in Quantize.WIDTHS
        for group in (None, 8, 32, 64, 96, 128)
        for symmetric in (False, True)
    ],
    *map(
        parse_level,
        (
            *(
                "s50",
                "s90",
                "2:4",
                "1:4",
                "4:8",
                "s50+w4g64",
                "s70+w8g32sym",
                "s50+w8",
                "4:8+w8sym",
            ),
            *("2:4+w8sym", "2:4+w3g32", "r25%", "r2", "r50%w8", "r2w4g8", "r2+w4g64", "r2w8+s50"),
            *("o2%+w3g64", "o2%+w8sym", "r2+o2%+w4g32", "r2+2:4+w4g32", "r2w8sym+s50+w8sym"),
        ),
    ),
]
TOLERANCE = {"a8": 6e-3, "a16": 3e-3, "a32": 1e-5}
BF16 = 5e-3  # weights, inputs and outputs are rounded to 16 bits, whatever the mode
RANDOM_PRODUCTS = 150  # fewer can round unluckily


def random_packed(level, shape, seed=0):
    """Any codes, scales and zeros; never a weight that is all zero."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(level, Dense):
        weight = torch.randn(shape, generator=generator).bfloat16()
        return Packed(level, shape, {"weight": weight})
    if not isinstance(level, Quantize):
        weight = torch.randn(shape, generator=generator)
        solver = Solver(method="rtn", search_scales=False, alternations=0)
        return solve([weight], Statistics(None, 0), [level], solver)[0][0].packed
    grid = (shape[0], level.groups(shape[1]))
    codes = torch.randint(1 << level.bits, shape, generator=generator)
    zeros = torch.randint(1 << level.bits, grid, generator=generator)
    scales = (torch.rand(grid, generator=generator) * 0.9 + 0.1).half()
    codes[0, 0], zeros[0, 0] = (1 << level.bits) - 1, 0
    return pack_quantized(level, codes, scales, zeros)


def draw(*shape, seed=1):
    """Uniform in [-1, 1)."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def error(found, x, weight, bias):
    """Relative (Frobenius) to the product, or to what random signs would make of its terms."""
    exact = x.double() @ weight.double().T + bias.double()
    usual = (x.double().square() @ weight.double().square().T).sum().sqrt()
    return float((found.double() - exact).norm() / max(exact.norm(), usual))


def thin(level):
    """Whether the weight holds two matrices, one after the other."""
    return isinstance(level, LowRank) or getattr(level, "low_rank", None) is not None


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def supported(backend, mode):
    """(level, shape) that the backend runs in the mode here."""
    return [(v, s) for v in LEVELS for s in SHAPES if backend.supports(v, s, mode) is None]


@pytest.mark.parametrize("key", ["s50", "2:4", "1:4", "4:8", "s70+w8g32sym", "2:4+w8sym"])
@pytest.mark.parametrize("shape", [(48, 576), (33, 104)], ids=str)
def test_sparse_weights_are_the_same_on_sparse_and_on_full_kernels(key, shape, monkeypatch):
    """Which are faster depends on the machine."""
    level, native = parse_level(key), BACKENDS["native"]
    if (reason := native.supports(level, shape, "a32")) is not None:
        pytest.skip(reason)
    packed, x, patterns = random_packed(level, shape), draw(40, shape[1]), set()
    for sparse in (True, False):
        where = "autocompress.backends.native.sparse_is_faster"
        monkeypatch.setattr(where, lambda level, codes, sparse=sparse: sparse)
        op = native.prepare(packed, torch.float32, "a32")
        patterns.add(op.packed.format.pattern)
        assert error(op(x), x, packed.dense(), torch.zeros(shape[0])) < TOLERANCE["a32"]
        assert torch.equal(op.dense(), packed.dense())
        for name, tensor in op.stored().tensors.items():
            assert torch.equal(tensor, packed.tensors[name])
    assert patterns == {"full", "2:4" if key.startswith("2:4") else "bitmask"}


def test_sparse_kernels_are_used_where_they_are_faster(monkeypatch):
    def isa(name):
        library = type("", (), {"isa": lambda self: name})()
        monkeypatch.setattr("autocompress_kernels.library.load", lambda: library)

    prune, bits8, bits4 = Prune(70), Quantize(8, 64, True), Quantize(4, 64, True)
    isa("avx512bf16")
    assert sparse_is_faster(prune, None) and sparse_is_faster(prune, bits8)
    assert not sparse_is_faster(Prune(50, 4), bits8)
    assert not sparse_is_faster(prune, bits4)
    assert not sparse_is_faster(prune, Quantize(8, 64))
    isa("avx2")
    assert not sparse_is_faster(prune, None) and not sparse_is_faster(prune, bits8)


@pytest.mark.parametrize("mode", MODES.values())
def test_outputs_are_those_of_the_dense_weight(backend, mode):
    for level, shape in supported(backend, mode):
        packed = random_packed(level, shape)
        before = {name: tensor.clone() for name, tensor in packed.tensors.items()}
        kinds = (torch.float32, torch.bfloat16, *([torch.float16] if shape == SHAPES[1] else []))
        for kind in kinds:
            op = backend.prepare(packed, kind, mode)
            bias = draw(shape[0], seed=2).to(kind)
            limit = max(TOLERANCE[mode], 0 if kind == torch.float32 else BF16)
            limit *= 1 + 0.5 * thin(level)  # activations are rounded twice
            for size in ((40,), (1, 9), (1, 1)):
                x = draw(*size, shape[1]).to(kind)
                y = op(x, bias)
                assert (y.shape, y.dtype) == ((*size, shape[0]), kind)
                lucky = y.numel() < RANDOM_PRODUCTS or x.numel() < RANDOM_PRODUCTS
                found = error(y, x, packed.dense(), bias)
                assert found < limit * (3 if lucky else 1), (str(level), shape, kind, size)
                plain = op(x)
                assert error(plain, x, packed.dense(), torch.zeros(shape[0])) < 3 * limit
            assert op(x[:0], bias).shape == (0, 1, shape[0])
        assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in before.items())


def test_the_weight_can_be_read_back_exactly(backend):
    mode = "a8"
    for level, shape in supported(backend, mode):
        packed = random_packed(level, shape)
        op = backend.prepare(packed, torch.float32, mode)
        backend.place([op])
        assert torch.equal(op.dense(), packed.dense())
        stored = op.stored()
        assert (stored.level, stored.shape) == (packed.level, packed.shape)
        assert stored.tensors.keys() == packed.tensors.keys()
        for name, tensor in packed.tensors.items():
            assert torch.equal(stored.tensors[name], tensor), (str(level), shape, name)
        indices = torch.tensor([[0, shape[0] - 1], [shape[0] // 2, 0]])
        rows = packed.dense()[indices]
        if thin(level):  # a product of few rows is summed up in another order
            torch.testing.assert_close(op.rows(indices), rows, rtol=1e-5, atol=1e-5)
            continue
        assert torch.equal(op.rows(indices), rows)
        assert op.rows(indices[:0]).shape == (0, 2, shape[1])
        half = backend.prepare(packed, torch.bfloat16, mode).rows(indices)
        assert torch.equal(half, packed.dense()[indices].bfloat16())


def test_an_op_holds_its_tensors_and_can_be_copied(backend):
    """The profiler makes cold copies: other tensors in the same op."""
    for level, shape in supported(backend, "a8"):
        op = backend.prepare(random_packed(level, shape), torch.float32, "a8")
        tensors = list(op.tensors.values())
        assert op.bytes == sum(tensor.nbytes for tensor in tensors) > 0
        clones = [tensor.clone() for tensor in tensors]
        memo = {id(old): new for old, new in zip(tensors, clones, strict=True)}
        other = copy.deepcopy(op, memo)
        assert [t.data_ptr() for t in other.tensors.values()] == [t.data_ptr() for t in clones]
        x = draw(3, shape[1])
        assert torch.equal(other(x), op(x))
        for tensor in clones:
            tensor.zero_()
        assert not other(x).any() and op(x).any(), "the copy reads its own tensors"


def test_x_may_be_a_view(backend):
    for level, shape in supported(backend, "a16"):
        op = backend.prepare(random_packed(level, shape), torch.bfloat16, "a16")
        flat = draw(6 * shape[1] + 9).bfloat16()
        odd = flat[1 : 1 + 6 * shape[1]].view(6, shape[1])  # begins at any address
        turned = odd.T.contiguous().T
        expected = op(odd.clone())
        for x in (odd, turned):
            torch.testing.assert_close(op(x), expected, rtol=2e-2, atol=2e-2)


def test_ops_run_in_inference_mode_and_compile_whole(backend):
    level, shape = (parse_level("w4g64"), (48, 576))
    if backend.supports(level, shape, "a8") is not None:
        level = Dense()
    if (reason := backend.supports(level, shape, "a8")) is not None:
        pytest.skip(reason)
    op = backend.prepare(random_packed(level, shape), torch.bfloat16, "a8")
    x = draw(2, 3, 576).bfloat16()
    expected = op(x)
    with torch.inference_mode():
        assert torch.equal(op(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x) + 0, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=2e-2, atol=1e-1)


def test_what_is_not_supported_says_why(backend):
    said = set()
    for mode in MODES.values():
        for level in LEVELS:
            for shape in SHAPES:
                reason = backend.supports(level, shape, mode)
                if reason is not None:
                    assert reason.strip() and not reason.endswith(".")
                    said.add(reason)
    assert said, "no backend runs every level"


def test_names_and_versions(backend):
    assert BACKENDS[backend.name] is backend
    assert backend.version().startswith(f"{backend.name} ")
    assert backend.version() == backend.version()


# --- choosing ---------------------------------------------------------------------------------


def chosen(key, shape=(48, 576), mode="a8", name=None):
    return choose_backend(parse_level(key), shape, mode, name).name


def test_kernels_come_first_then_aten_then_plain_torch(monkeypatch):
    native = BACKENDS["native"]
    monkeypatch.setattr("autocompress.backends.native._missing", lambda: None)
    for key in ("w2g32", "w3g64", "w4", "w5g96", "w6g64sym", "w8g128"):
        assert chosen(key) == "native"
    assert chosen("dense") == "dense"
    assert chosen("w4g8") == chosen("w4g40") == "dequantize", "groups of 8 and 40 are nobody's"
    assert chosen("w4g40", (8, 30)) == "native", "but one group per row is"
    monkeypatch.setattr("autocompress.backends.native._missing", lambda: "never built")
    assert native.supports(parse_level("w4g64"), (48, 576), "a8") == "never built"
    assert native.version() == "native missing"
    assert chosen("w4g64") == chosen("w4g64sym") == chosen("w8sym") == "aten"
    assert chosen("w4g64", mode="a32") == "dequantize", "ATen rounds to bf16"
    assert chosen("w4g64", (48, 544)) == chosen("w4g64", (40, 576)) == "dequantize"
    assert chosen("w8") == chosen("w8g64sym") == chosen("w8sym", (48, 575)) == "dequantize"
    assert chosen("w3g64") == "dequantize"


def test_a_named_backend_runs_or_says_why_not():
    assert chosen("w4g64", name="dequantize") == "dequantize"
    with pytest.raises(
        BackendError, match=r"one of native, aten, dense, dequantize\. Got 'nativ'.*"
    ):
        chosen("w4g64", name="nativ")
    with pytest.raises(
        BackendError, match=r"w3g64 of 48 x 576 in mode a8\. Got aten: it has kernels"
    ):
        chosen("w3g64", name="aten")
    with pytest.raises(BackendError, match="aten: it rounds activations to bf16"):
        chosen("w4g64", mode="a32", name="aten")
    with pytest.raises(BackendError, match="dense: it runs dense layers only, not 'w4g64'"):
        chosen("w4g64", name="dense")
    with pytest.raises(BackendError, match=r"native: groups must be multiples of 32 .* not 8"):
        chosen("w4g8", name="native")
    with pytest.raises(BackendError, match="native: it has no kernels for 'dense'"):
        chosen("dense", name="native")


def test_a_level_that_nobody_runs_names_every_reason(monkeypatch):
    monkeypatch.setattr(
        backends, "BACKENDS", {name: b for name, b in BACKENDS.items() if name != "dense"}
    )
    with pytest.raises(BackendError) as caught:
        chosen("dense")
    assert all(f"{name}: " in str(caught.value) for name in ("native", "aten", "dequantize"))


def test_native_ops_lie_side_by_side():
    if (reason := BACKENDS["native"].supports(parse_level("w4g64"), (48, 576), "a8")) is not None:
        pytest.skip(reason)
    native, x = BACKENDS["native"], draw(3, 576)
    ops = [
        native.prepare(random_packed(parse_level(key), (48, 576)), torch.float32, "a8")
        for key in ("w4g64", "w3g32", "w8")
    ]
    expected = [op(x) for op in ops]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.place(ops)
    tensors = [tensor for op in ops for tensor in op.tensors.values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(torch.equal(op(x), y) for op, y in zip(ops, expected, strict=True))
    places = [tensor.data_ptr() for tensor in tensors]
    native.place(ops)
    assert [t.data_ptr() for op in ops for t in op.tensors.values()] == places

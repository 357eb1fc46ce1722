"""Native kernels: memory they touch, bad input they refuse, and how their library is found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

kernels = pytest.importorskip("autocompress_kernels")

if kernels.missing() is not None:
    pytest.skip(kernels.missing(), allow_module_level=True)

from packed_weights import draw, sparse, weight  # noqa: E402

from autocompress_kernels.library import Library  # noqa: E402

LIBRARY = kernels.load()
NAMES = ("values", "scales", "zeros", "masks", "offsets")


def test_an_arena_holds_exact_aligned_copies():
    tensors = [draw(3, 5), torch.arange(7), torch.tensor([7], dtype=torch.uint8), draw(90).half()]
    views = kernels.arena(tensors)
    assert [v.data_ptr() % 64 for v in views] == [0] * 4
    assert views[0].data_ptr() % (2 << 20) == 0
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype and view.is_contiguous()
    starts = [view.data_ptr() for view in views]
    ends = [start + tensor.nbytes for start, tensor in zip(starts, tensors, strict=True)]
    assert all(end + 64 <= start for end, start in zip(ends, starts[1:], strict=False))
    whole = views[0].untyped_storage()
    assert ends[-1] + 64 <= whole.data_ptr() + whole.nbytes(), "a kernel may read that far"
    views[1].fill_(9)
    assert torch.equal(views[0], tensors[0]) and torch.equal(views[2], tensors[2])


GUARDED = """if True:
    import ctypes, mmap
    from dataclasses import replace
    import torch
    import autocompress_kernels as kernels
    from packed_weights import sparse, weight

    libc = ctypes.CDLL(None, use_errno=True)
    keep = []

    def guard(tensor):
        "A copy that ends where memory ends: one byte further is a crash."
        page = mmap.PAGESIZE
        size = -(-max(1, tensor.nbytes) // page) * page
        block = mmap.mmap(-1, size + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0
        view = torch.frombuffer(block, dtype=torch.uint8, count=size)[size - tensor.nbytes:]
        keep.append(block)
        return view.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    weights = [weight(rows, width, bits, group, symmetric)
        for rows, width in ((1, 1), (17, 33), (40, 160))
        for bits in (2, 3, 4, 5, 6, 8, 16)
        for group in (32, 64, None) for symmetric in (False, True)]
    weights += [sparse(rows, width, bits, pattern, kept)[0]
        for rows, width in ((1, 1), (17, 33), (40, 160)) for kept in (0.0, 0.4)
        for bits in (8, 16) for pattern in ("bitmask", "2:4")]
    for isa in kernels.load().isas():
        kernels.load().select_isa(isa)
        for packed in weights:
            guarded = {name: guard(t) for name, t in packed.tensors.items()}
            packed = replace(packed, tensors=guarded)
            rows, width = packed.format.rows, packed.format.width
            for count in (1, 3, 8, 33):
                for kind in (torch.float32, torch.bfloat16):
                    x, y = guard(torch.ones(count, width, dtype=kind)), guard(
                        torch.zeros(count, rows, dtype=kind))
                    for mode in kernels.MODES:
                        kernels.add_linear(y, x, packed, mode)
                        kernels.linear(x, packed, guard(torch.ones(rows)), mode)
            kernels.dequantize(packed, torch.float32)
            kernels.gather(packed, torch.tensor([rows - 1]), torch.bfloat16)
            del x, y, packed, guarded
            keep.clear()
    print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses mprotect of Linux")
def test_kernels_stay_inside_their_buffers():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, "tests"])}
    ran = subprocess.run(
        [sys.executable, "-c", GUARDED],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr[-2000:]


# --- bad input -------------------------------------------------------------------------------

X = draw(2, 96)
GOOD = weight(40, 96)
SPARSE, _ = sparse(40, 96, 8, "bitmask")
TWO_OF_FOUR, _ = sparse(40, 96, 16, "2:4")
CODES_OF = torch.zeros(40, 96, dtype=torch.uint8)
SCALES = torch.ones(40, 2).half()


def changed(packed, **tensors):
    return replace(packed, tensors={**packed.tensors, **tensors})


def raw(x=X, **changes):
    """A call of the operator itself, with other tensors or numbers than those of `GOOD`."""
    source = changes.pop("source", GOOD)
    parts = dict(zip(NAMES, source.parts, strict=True))
    numbers = dict(
        zip(("rows", "width", "bits", "group", "pattern"), source.numbers, strict=True), mode=0
    )
    bias = changes.pop("bias", None)
    for name, value in changes.items():
        (parts if name in parts else numbers)[name] = value
    return torch.ops.autocompress_kernels.linear(x, *parts.values(), bias, *numbers.values())


BAD = {
    "a narrow x": (lambda: kernels.linear(X[:, :95].contiguous(), GOOD), "96 inputs .* Got .2, 95"),
    "no x": (lambda: kernels.linear(torch.tensor(1.0), GOOD), "96 inputs"),
    "x of float16": (
        lambda: kernels.linear(X.half(), GOOD),
        "float32 or bfloat16. Got torch.float16",
    ),
    "x of float64": (lambda: kernels.linear(X.double(), GOOD), "Got torch.float64"),
    "a long bias": (
        lambda: kernels.linear(X, GOOD, torch.ones(41)),
        r"bias .*\(40,\). Got \(41,\)",
    ),
    "y of another shape": (lambda: kernels.add_linear(draw(2, 39), X, GOOD), "y must be"),
    "y of another type": (lambda: kernels.add_linear(draw(2, 40).bfloat16(), X, GOOD), "y must be"),
    "y with strides": (lambda: kernels.add_linear(draw(40, 2).T, X, GOOD), "y must be contiguous"),
    "an index too high": (lambda: kernels.gather(GOOD, torch.tensor([40]), torch.float32), "range"),
    "an index too low": (lambda: kernels.gather(GOOD, torch.tensor([-1]), torch.float32), "range"),
    "no integers": (lambda: kernels.gather(GOOD, torch.tensor([1.0]), torch.float32), "int64"),
    "rows in float16": (lambda: kernels.dequantize(GOOD, torch.float16), "float32 or bfloat16"),
    "short values": (lambda: raw(values=GOOD.tensors["values"][:-1]), "every buffer .* 40 x 96"),
    "no values": (lambda: raw(values=torch.empty(0, dtype=torch.uint8)), "every buffer"),
    "values of another type": (lambda: raw(values=GOOD.tensors["values"].char()), "values must be"),
    "values with strides": (lambda: raw(values=GOOD.tensors["values"][::2]), "not contiguous"),
    "short scales": (lambda: raw(scales=GOOD.tensors["scales"][:-1]), "every buffer"),
    "no scales": (lambda: raw(scales=None), "every buffer"),
    "scales in float32": (lambda: raw(scales=GOOD.tensors["scales"].float()), "scales must be"),
    "symmetric scales in float32": (
        lambda: raw(zeros=None, scales=GOOD.tensors["scales"].float()),
        "scales must be",
    ),
    "scales with strides": (lambda: raw(scales=GOOD.tensors["scales"].mT), "scales must be"),
    "short zeros": (lambda: raw(zeros=GOOD.tensors["zeros"][:-1]), "every buffer"),
    "zeros of another type": (lambda: raw(zeros=GOOD.tensors["zeros"].char()), "zeros must be"),
    "more rows": (lambda: raw(rows=49), "every buffer"),
    "no rows": (lambda: raw(rows=0), "shapes must be"),
    "seven bits": (lambda: raw(bits=7), "bits, group, pattern"),
    "more bits": (lambda: raw(bits=8), "every buffer"),
    "an odd group": (lambda: raw(group=48), "bits, group, pattern"),
    "no group": (lambda: raw(group=0), "bits, group, pattern"),
    "a negative group": (lambda: raw(group=-32), "bits, group, pattern"),
    "an unknown mode": (lambda: raw(mode=3), "bits, group, pattern, mode"),
    "an unknown pattern": (lambda: raw(pattern=3), "bits, group, pattern"),
    "sparse 4 bits": (lambda: raw(pattern=1), "bits, group, pattern"),
    "no masks": (lambda: raw(source=SPARSE, masks=None), "every buffer|bits, group"),
    "short masks": (lambda: raw(source=SPARSE, masks=SPARSE.tensors["masks"][:-1]), "every buffer"),
    "no offsets": (lambda: raw(source=SPARSE, offsets=None), "every buffer"),
    "falling offsets": (
        lambda: raw(source=SPARSE, offsets=SPARSE.tensors["offsets"].flip(0)),
        "offsets of sparse tiles",
    ),
    "far offsets": (
        lambda: raw(source=SPARSE, offsets=SPARSE.tensors["offsets"] + 9),
        "every buffer",
    ),
    "sparse values without a tail": (
        lambda: raw(source=SPARSE, values=SPARSE.tensors["values"][:-1]),
        "every buffer",
    ),
    "other codes": (
        lambda: kernels.pack_codes(CODES_OF.int(), SCALES, None, 4, 64),
        "codes must be torch.uint8",
    ),
    "a row of codes": (lambda: kernels.pack_codes(CODES_OF[0], SCALES, None, 4, 64), "codes must"),
    "no codes": (lambda: kernels.pack_codes(CODES_OF[:0], SCALES, None, 4, 64), "codes must"),
    "other scales": (
        lambda: kernels.pack_codes(CODES_OF, SCALES.float(), None, 4, 64),
        "scales must be torch.float16 of shape 40 x 2",
    ),
    "scales of other groups": (
        lambda: kernels.pack_codes(CODES_OF, SCALES, None, 4, 32),
        "scales must be torch.float16 of shape 40 x 3",
    ),
    "zeros of other groups": (
        lambda: kernels.pack_codes(CODES_OF, SCALES, CODES_OF[:, :1], 4, 64),
        "zeros must be torch.uint8 of shape 40 x 2",
    ),
    "codes of 16 bits": (lambda: kernels.pack_codes(CODES_OF, SCALES, None, 16), "pack_bf16"),
    "codes of 7 bits": (lambda: kernels.pack_codes(CODES_OF, SCALES, None, 7, 64), "one of"),
    "groups of 48": (lambda: kernels.pack_codes(CODES_OF, SCALES, None, 4, 48), "multiple of 32"),
    "a float32 weight": (lambda: kernels.pack_bf16(draw(4, 4)), "weight must be torch.bfloat16"),
    "three of four": (
        lambda: kernels.pack_sparse(CODES_OF, torch.ones(40, 96).bool(), "2:4", SCALES, 64),
        "at most two of each four",
    ),
    "an unknown kind of sparse": (
        lambda: kernels.pack_sparse(CODES_OF, torch.ones(40, 96).bool(), "1:4", SCALES, 64),
        "pattern must be one of",
    ),
    "a full kind of sparse": (
        lambda: kernels.pack_sparse(CODES_OF, torch.ones(40, 96).bool(), "full", SCALES, 64),
        "must have a sparse pattern",
    ),
    "sparse codes without scales": (
        lambda: kernels.pack_sparse(CODES_OF, torch.ones(40, 96).bool(), "bitmask"),
        "codes must have scales",
    ),
    "a mask of another shape": (
        lambda: kernels.pack_sparse(CODES_OF, torch.ones(40, 95).bool(), "bitmask", SCALES, 64),
        "keep must be torch.bool of shape 40 x 96",
    ),
    "other masks": (
        lambda: changed(SPARSE, masks=torch.full_like(SPARSE.tensors["masks"], 255)),
        "masks must keep",
    ),
    "other masks of 2:4": (
        lambda: changed(TWO_OF_FOUR, masks=torch.full_like(TWO_OF_FOUR.tensors["masks"], 255)),
        "masks must keep",
    ),
    "packed values of another length": (
        lambda: changed(GOOD, values=GOOD.tensors["values"][:-16]),
        "values must be contiguous torch.uint8",
    ),
    "packed scales in float32": (
        lambda: changed(GOOD, scales=GOOD.tensors["scales"].float()),
        "scales must be contiguous torch.float16",
    ),
    "a packed tensor too many": (
        lambda: changed(GOOD, masks=GOOD.tensors["values"]),
        "Got 'masks' too",
    ),
    "a packed tensor too few": (
        lambda: replace(GOOD, tensors={"values": GOOD.tensors["values"]}),
        "must have 'scales'",
    ),
    "sparse codes of a full weight": (
        lambda: kernels.unpack_codes(SPARSE),
        "must be of full codes",
    ),
    "an unknown instruction set": (lambda: LIBRARY.select_isa("mmx"), "one of .* Got 'mmx'"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error(what):
    call, message = BAD[what]
    before = kernels.linear(X, GOOD)
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(kernels.linear(X, GOOD), before)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 16])
def test_the_largest_shape_needs_more_bytes_than_there_are(bits):
    """Nothing is read: no row is asked for. Sizes must not wrap around."""
    from autocompress_kernels.calls import matrix

    largest = 2**31 - 1
    parts = GOOD.parts if bits < 16 else (GOOD.parts[0], *[None] * 4)
    for rows, width in ((largest, largest), (largest, 1), (1, largest)):
        described = matrix(*parts, rows, width, bits, 32, 0)
        assert LIBRARY.rows(described, None, 0, 0, X.data_ptr(), 0, largest, None, 1) == 3


def test_gradients_are_not_silently_lost():
    x = draw(2, 96).requires_grad_()
    y = kernels.linear(x, GOOD)
    assert not y.requires_grad


# --- the library -----------------------------------------------------------------------------


def say(code, **environment):
    """What a fresh process prints."""
    ran = subprocess.run(
        [sys.executable, "-c", f"import autocompress_kernels as kernels; {code}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_the_instruction_set_can_be_forced():
    code = "print(kernels.missing() or kernels.load().isa())"
    assert say(code, AUTOCOMPRESS_ISA="portable") == "portable"
    assert "must be one of" in (text := say(code, AUTOCOMPRESS_ISA="mmx")) and "'mmx'" in text


def test_a_missing_library_says_why(tmp_path):
    code = "print(kernels.missing())"
    there = str(tmp_path / "none.so")
    assert "were not built" in say(code, AUTOCOMPRESS_KERNELS_LIBRARY=there)
    (tmp_path / "none.so").write_text("no library")
    assert there in say(code, AUTOCOMPRESS_KERNELS_LIBRARY=there)
    use = "import torch; kernels.pack_bf16(torch.ones(2, 2).bfloat16())"
    with pytest.raises(AssertionError, match="RuntimeError: the kernels must be usable"):
        say(use, AUTOCOMPRESS_KERNELS_LIBRARY=there)
    other = next(Path(torch.__file__).parent.glob("lib/libc10.*"))
    with pytest.raises(OSError, match="must export ack_abi"):
        Library(other)


def test_importing_is_light():
    code = "import sys; dir(kernels); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert say(code) == "[]"

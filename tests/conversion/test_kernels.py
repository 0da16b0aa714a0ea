import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.checkpoints.layouts.awq_gemm import ORDER
from quantline.checkpoints.layouts.compressed_tensors import pack_quantized
from quantline.checkpoints.layouts.packing import pack
from quantline.conversion import kernels
from quantline.conversion.kernels_jit import kernel


class Codes:
    """Signed codes within a larger matrix, the words that the layouts' own NumPy makes of them, and the kernels' calls."""

    def __init__(self, kind, bits, rows, columns, seed):
        first, width, rest = columns
        self.kind, half = kind, 2 ** (bits - 1)
        self.whole = np.random.default_rng(seed).integers(-half, half, (rows, first + width + rest)).astype(np.int8)
        if kind == "flat":
            self.whole = np.ascontiguousarray(self.whole[:, first : first + width])
            first = 0
        self.codes = self.whole[:, first : first + width]
        unsigned = (self.codes.astype(np.int16) + half).astype(np.uint8)
        self.expected = {
            "along": lambda: pack(unsigned.T, bits, axis=0), "across": lambda: pack(unsigned.T, 4, axis=1, order=ORDER),
            "flat": lambda: pack_quantized._pack(unsigned, bits),
        }[kind]()  # fmt: skip
        self.tile = np.empty((kernels.ROWS, kernels.COLUMNS), np.uint32)
        scratch, start, stride = self.tile.ctypes.data, self.whole.ctypes.data + first, self.whole.shape[1]
        kept = (bits,) if kind == "along" else ()
        self.before = (start, rows * width, bits) if kind == "flat" else (start, stride, rows, width, *kept)
        self.after = () if kind == "flat" else (scratch, scratch)

    def packed(self):
        words = np.empty(self.expected.shape, np.int32)
        assert kernel(f"pack_{self.kind}")(*self.before, words.ctypes.data, *self.after) == 0
        return words

    def differs(self, words):
        return kernel(f"differ_{self.kind}")(*self.before, words.ctypes.data, *self.after) != 0


@st.composite
def drawn_codes(draw):
    kind = draw(st.sampled_from(["flat", "along", "across"]))
    bits = 4 if kind == "across" else draw(st.sampled_from([4, 8]))
    rows = 8 * draw(st.integers(16, 40)) if kind == "across" else draw(st.integers(16, 60))
    width = draw(st.integers(1, 600)) if kind == "across" else 8 * draw(st.one_of(st.integers(1, 20), st.just(300)))
    first, rest = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return Codes(kind, bits, rows, (first, width, rest), draw(st.integers(0, 2**32 - 1)))


@settings(max_examples=150, deadline=None)
@given(codes=drawn_codes(), data=st.data())
def test_kernels_make_the_words_of_the_layouts_and_see_any_bit_that_is_other(codes, data):
    words = codes.packed()
    assert np.array_equal(words, codes.expected)
    assert not codes.differs(words)
    place = data.draw(st.integers(0, words.size - 1))
    words.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert codes.differs(words)


@settings(max_examples=50, deadline=None)
@given(codes=drawn_codes(), data=st.data())
def test_kernels_see_any_bit_of_a_code_that_is_other_than_what_was_packed(codes, data):
    words = codes.packed()
    row, column = (data.draw(st.integers(0, size - 1)) for size in codes.codes.shape)
    codes.codes[row, column] ^= np.int8(data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, -128])))
    assert codes.differs(words)

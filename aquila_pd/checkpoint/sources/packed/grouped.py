"""Group-wise quantized matrix: one scale and zero point per group of inputs, dequantized part by part.

GPTQ and AWQ both keep W [in, out] = scale[group of in, out] * (q - zero[group of in, out]) with several q in an int32
word. They differ in the order within a word and in the direction in which words run, which the subclasses say.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..reader import ALL, Reader, Stored
from .survey import bounds, strips

# What is unpacked at once: a multiple of the values in any word (of 3 bits: any three words) and of the usual group
# sizes, and small enough for a processor's second cache.
INPUTS = 32
OUTPUTS = 4096
WORD = 32  # bits


@dataclass(frozen=True)
class Grouped:
    """stored.shape: [out, in]; qweight, qzeros, scales: names in the file; g_idx: of the tensor with the group of each
    input, None when they follow each other, group_size inputs each."""

    stored: Stored
    bits: int
    qweight: str
    qzeros: str
    scales: str
    group_size: int
    g_idx: str | None = None

    def read(self, reader: Reader, rows: slice, columns: slice) -> np.ndarray:
        """[out, in] float32, a transposed view: the array in memory is [in, out], which is Paddle's layout.

        The product with a float16 scale is exact in float32.
        """
        out, in_ = self.stored.shape
        outs, ins = bounds(rows, out), bounds(columns, in_)
        part = np.empty((ins.stop - ins.start, outs.stop - outs.start), np.float32)
        if part.size:
            self._fill(part, reader, ins, outs)
        return part.T

    def _fill(self, part: np.ndarray, reader: Reader, ins: slice, outs: slice) -> None:
        """part [ins, outs] = the values, a tile of whole words at a time."""
        whole_ins, whole_outs = _whole_words(ins, self.stored.shape[1]), _whole_words(outs, self.stored.shape[0])
        words = reader.read(self.qweight, *self._words(whole_ins, whole_outs))
        groups, index = np.unique(self.groups(reader, ins), return_inverse=True)
        scales = _rows(reader.read(self.scales, ALL, outs), groups).astype(np.float32)
        zeros = self._zeros(reader, groups, whole_outs)[:, _within(outs, whole_outs)]
        for tall, some_ins in _strips(whole_ins, INPUTS, ins):
            target, group = part[_within(some_ins, ins)], _one_or_each(index[_within(some_ins, ins)])
            for wide, some_outs in _strips(whole_outs, OUTPUTS, outs):
                tile = self._unpack(words[self._words(_within(tall, whole_ins), _within(wide, whole_outs))])
                q = tile[_within(some_ins, tall), _within(some_outs, wide)]
                here = _within(some_outs, outs)
                q -= zeros[group, here]
                np.multiply(q, scales[group, here], out=target[:, here])

    def groups(self, reader: Reader, ins: slice) -> np.ndarray:
        """Group index of each of these inputs."""
        if self.g_idx is None:
            return np.arange(ins.start, ins.stop) // self.group_size
        return reader.read(self.g_idx, ins)

    def stored_zeros(self, reader: Reader) -> Iterator[np.ndarray]:
        """Zero points as stored, [some groups, out] at a time."""
        return map(self._unpack_zeros, strips(reader, self.qzeros))

    def _zeros(self, reader: Reader, groups: np.ndarray, outs: slice) -> np.ndarray:
        """Zero points [these groups, these outputs, which are whole words]."""
        columns = slice(outs.start * self.bits // WORD, outs.stop * self.bits // WORD)
        return self._true_zeros(self._unpack_zeros(_rows(reader.read(self.qzeros, ALL, columns), groups)))

    def _words(self, ins: slice, outs: slice) -> tuple[slice, slice]:
        """Rows and columns of qweight that hold these inputs and outputs, which are whole words."""
        raise NotImplementedError

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """Integers [in, out] of words of qweight; signed, so that a zero point can be taken off."""
        raise NotImplementedError

    def _unpack_zeros(self, words: np.ndarray) -> np.ndarray:
        """Integers [groups, out] of words of qzeros, of the dtype that _unpack returns."""
        raise NotImplementedError

    def _true_zeros(self, zeros: np.ndarray) -> np.ndarray:
        """Zero points from what the file stores."""
        raise NotImplementedError


def _whole_words(part: slice, size: int) -> slice:
    """The part, grown so that it begins and ends with a word in either direction."""
    return slice(part.start // WORD * WORD, min(-(-part.stop // WORD) * WORD, size))


def _strips(whole: slice, size: int, part: slice) -> Iterator[tuple[slice, slice]]:
    """Strips of whole words, each with what of it is in the part."""
    for begin in range(whole.start, whole.stop, size):
        end = min(begin + size, whole.stop)
        yield slice(begin, end), slice(max(begin, part.start), min(end, part.stop))


def _within(part: slice, whole: slice) -> slice:
    """The part counted from where the whole begins."""
    return slice(part.start - whole.start, part.stop - whole.start)


def _rows(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows, in rising order; a copy only where they do not follow each other."""
    first, last = rows[0], rows[-1]
    return table[first : last + 1] if last - first + 1 == len(rows) else table[rows]


def _one_or_each(groups: np.ndarray) -> np.ndarray | slice:
    """Inputs of one group share its row of scales; else each needs a row of its own."""
    return slice(groups[0], groups[0] + 1) if (groups == groups[0]).all() else groups

"""Linear cross-entropy: loss of a language-model head in blocks of rows, without the logits of all tokens.

With a vocabulary of 100,008 the logits of 4096 tokens are 1.6 GB, their softmax and its gradient as much again. Here a
block of logits becomes its own gradient in place, gives its share to the gradients of x and of the weight, and is
gone; what is kept for the backward pass are these two, which it would make anyway. Nothing is computed twice.

Letters in shapes: n rows (tokens that have a label), D hidden, V vocabulary.
"""

from functools import partial

import paddle
from paddle.autograd import PyLayer

from ..utils.errors import AquilaError
from . import threads

BLOCK_BYTES = 256 * 2**20  # of float32 logits at a time; smaller blocks make slower matrix products


def block_rows(vocab: int) -> int:
    """Rows of logits in memory at a time."""
    return max(1, BLOCK_BYTES // (4 * vocab))


def linear_cross_entropy(x, weight, labels, *, transposed: bool = False, logits=None, places=None):
    """The sum of the cross-entropies of x @ weight, a float32 scalar.

    x [n, D]; weight [D, V], or transposed [V, D] (the table of embeddings of a tied head); labels int [n], each within
    the vocabulary. logits [m, V]: those that exist already, with places int [n], the row of each x; they
    get no gradient.

    Products are in the weight's dtype, also under autocast; the softmax is in float32, and so is the sum of the
    weight's gradient over blocks. A result can be differentiated once: not its gradient, nor again with retain_graph
    (Paddle ends the process then, as with every PyLayer, recompute's too).

    Raises AquilaError for a label that the vocabulary does not have.
    """
    V = weight.shape[0 if transposed else 1]
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= V:  # would be read in the row beside
        raise AquilaError(f"Labels go from {lowest} to {highest}; the vocabulary has {V} entries, from 0.")
    if paddle.is_grad_enabled() and not (x.stop_gradient and weight.stop_gradient):
        return _LinearCrossEntropy.apply(x, weight, labels, logits, places, transposed)
    total = paddle.zeros([], "float32")
    with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
        for part, rows in _blocks(x, weight, logits, places, transposed):
            total += _exponentials(part, labels[rows])[0]
    return total


class _LinearCrossEntropy(PyLayer):
    @staticmethod
    def forward(ctx, x, weight, labels, logits, places, transposed):
        ctx.inputs = 3 if logits is None else 5
        total, dx, dw = paddle.zeros([], "float32"), [], None
        with paddle.amp.auto_cast(enable=False):
            for part, rows in _blocks(x, weight, logits, places, transposed):
                loss, sums = _exponentials(part, labels[rows])
                total += loss
                # Softmax less one at the label, times `sums`: the division is left to the small matrices of a product,
                # which have D numbers in a row and not V.
                _subtract_at(part, labels[rows], sums)
                if weight.dtype != paddle.float32:  # but float16 has no room for numbers as large as V
                    part, sums = part.divide_(sums).astype(weight.dtype), paddle.ones_like(sums)
                if not x.stop_gradient:
                    dx.append((paddle.matmul(part, weight, transpose_y=not transposed) / sums).astype(x.dtype))
                if not weight.stop_gradient:
                    dw = _add_product(dw, (x[rows] / sums).astype(weight.dtype), part, transposed)
                del part  # before the next block is made
        ctx.gradients = [paddle.concat(dx) if dx else None, None if dw is None else dw.astype(weight.dtype)]
        return total

    @staticmethod
    def backward(ctx, upstream):
        gradients, ctx.gradients = ctx.gradients, None
        factor = float(upstream)
        for gradient in gradients:
            if gradient is not None and factor != 1.0:
                gradient.scale_(factor)
        return (*gradients, None, None, None)[: ctx.inputs]


def _blocks(x, weight, logits, places, transposed: bool):
    """(logits in float32 [rows, V], not shared; which rows) for block after block, of about equal sizes."""
    n, V = x.shape[0], weight.shape[0 if transposed else 1]
    count = -(-n // block_rows(V))
    step = -(-n // count)
    for begin in range(0, n, step):
        rows = slice(begin, min(begin + step, n))
        if logits is None:
            yield paddle.matmul(x[rows].astype(weight.dtype), weight, transpose_y=transposed).astype("float32"), rows
        else:
            yield paddle.gather(logits, places[rows]).astype("float32"), rows


def _exponentials(part, labels):
    """Turn logits [rows, V] into exp(logits - the highest of the row), in place.

    Returns the sum of the rows' losses, and the exponentials' sums [rows, 1].
    """
    shares = threads.shares(len(part)) if part.place.is_cpu_place() else [slice(None)]
    found = threads.together([partial(_exponentials_of_rows, part[rows], labels[rows]) for rows in shares])
    losses, sums = zip(*found, strict=True)
    return paddle.add_n(list(losses)), paddle.concat(sums)


def _exponentials_of_rows(part, labels):
    at_label = _at(part, labels)
    highest = part.max(axis=-1, keepdim=True)
    part.subtract_(highest)
    part.exp_()
    sums = _row_sums(part)
    return (sums.log() + highest - at_label).sum(), sums


def _row_sums(part):
    """[rows, V] -> [rows, 1]"""
    if not part.place.is_cpu_place():
        return part.sum(axis=-1, keepdim=True)  # a GPU may round the factors of a float32 product to TF32
    # On a CPU the sum over the last axis takes four times as long as a product with ones (benchmarks/RESULTS.md).
    return paddle.matmul(part, paddle.ones([part.shape[1], 1]))


def _at(part, labels):
    """The value at each row's label, [rows, 1]. (take_along_axis copies the whole of it first.)"""
    rows, V = part.shape
    return paddle.gather(part.reshape([-1]), paddle.arange(rows) * V + labels.astype("int64")).unsqueeze(1)


def _subtract_at(part, labels, values) -> None:
    """part[i, labels[i]] -= values[i], in place."""
    part.put_along_axis_(labels.astype("int64").unsqueeze(1), _at(part, labels) - values, 1)


def _add_product(total, x, part, transposed: bool):
    """total + x^T part [D, V], or its transposed [V, D], in float32; total is None at first, and changed in place."""
    if transposed:
        product = paddle.matmul(part, x, transpose_x=True)
    elif total is None or part.dtype != paddle.float32:
        product = paddle.matmul(x, part, transpose_x=True)
    else:
        return total.addmm_(x.t(), part)  # without a second [D, V]
    return product.astype("float32") if total is None else total.add_(product.astype("float32"))

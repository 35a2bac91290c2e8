"""What a product with an adapted weight costs, factored and formed, counted before it runs."""

from __future__ import annotations

import dataclasses
import numbers

#: Arithmetic per byte of memory traffic that takes as long: a round number for CPUs. Accelerators
#: have more, which speaks for what computes more and moves less.
_FLOPS_PER_BYTE = 8.0


@dataclasses.dataclass(frozen=True)
class Product:
    """The sizes of ``x W``, or of a stack of such products.

    Attributes:
        inputs: The elements of ``x``.
        rows: The rows of the result, of all products together.
        fan_in: The inputs of one matrix.
        fan_out: The outputs of one matrix.
        rank: The rank of its update.
        stack: The number of matrices.
        itemsize: The bytes of one number.
    """

    inputs: int
    rows: int
    fan_in: int
    fan_out: int
    rank: int
    stack: int = 1
    itemsize: int = 4

    @property
    def factored(self) -> float:
        """What ``scale (x a) b`` adds to a forward pass and a backward one, in FLOPs.

        Forward ``h = x a`` and ``h b``; backward ``dh = g b^T``, ``db = h^T g``, ``dx = dh a^T``
        and ``da = x^T dh``. Each takes the longer of its arithmetic and its memory traffic.
        """
        x, h, y = self.inputs, self.rows * self.rank, self.rows * self.fan_out
        a, b = (self.stack * self.rank * n for n in (self.fan_in, self.fan_out))
        near, far = 2 * h * self.fan_in, 2 * h * self.fan_out
        forward = self._op(near, x + a + h) + self._op(far, h + b + 2 * y)
        behind = self._op(far, y + b + h) + self._op(far, h + y + b)
        return forward + behind + self._op(near, h + a + 2 * x) + self._op(near, x + h + a)

    @property
    def formed(self) -> float:
        """What forming ``W + scale a b`` adds to a forward pass and a backward one, in FLOPs.

        ``a b`` twice, as it is formed again for the backward pass; then ``dW = x^T g``,
        ``da = dW b^T`` and ``db = a^T dW``.
        """
        w = self.stack * self.fan_in * self.fan_out
        x, y = self.inputs, self.rows * self.fan_out
        small, large = 2 * w * self.rank, 2 * y * self.fan_in
        return 2 * self._op(small, 2 * w) + self._op(large, x + y + w) + 2 * self._op(small, w)

    def _op(self, flops: float, elements: float) -> float:
        return max(flops, _FLOPS_PER_BYTE * self.itemsize * elements)


def verdict(product: Product) -> tuple[bool, str]:
    """Whether to form the weight, and why in a few words.

    Example:
        >>> verdict(Product(inputs=65536, rows=512, fan_in=128, fan_out=128, rank=8))
        (False, 'factored, 1.1x cheaper')
    """
    if not all(isinstance(size, numbers.Integral) for size in dataclasses.astuple(product)):
        return False, "factored, as sizes are symbolic"
    factored, formed = product.factored, product.formed
    form = formed < factored
    ratio = max(factored, formed) / max(min(factored, formed), 1)
    return form, f"{'formed' if form else 'factored'}, {ratio:.2g}x cheaper"

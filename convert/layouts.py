"""How a published tensor's numbers lie, against how a leaf of the parameter tree has them.

Each layout is a bijection: `to_leaf` and `to_tensor` undo each other, and `shape` says what the
published tensor looks like for a leaf. `rules.py` names one per tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """The tensor is the leaf."""

    axis = 0
    """Along which fused tensors are joined."""

    def shape(self, leaf: Shape) -> Shape:
        """Shape of the published tensor for a leaf's."""
        return leaf

    def to_leaf(self, tensor: np.ndarray, leaf: Shape) -> np.ndarray:
        """Published numbers as the leaf."""
        return tensor.reshape(leaf)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf as published: the inverse of `to_leaf`."""
        return leaf.reshape(self.shape(leaf.shape))


PLAIN = Plain()


@dataclass(frozen=True)
class Vector(Plain):
    """A bias, flat where the leaf has heads."""

    def shape(self, leaf: Shape) -> Shape:
        """Shape of the published tensor for a leaf's."""
        return (math.prod(leaf),)


@dataclass(frozen=True)
class Row(Plain):
    """A vector published as a matrix of one row."""

    def shape(self, leaf: Shape) -> Shape:
        """Shape of the published tensor for a leaf's."""
        return (1, *leaf)


@dataclass(frozen=True)
class Conv1D(Plain):
    """A kernel `(in, out)`, the leaf's first `inputs` axes being the input."""

    inputs: int = 1
    axis = 1

    def shape(self, leaf: Shape) -> Shape:
        """Shape of the published tensor for a leaf's."""
        return math.prod(leaf[: self.inputs]), math.prod(leaf[self.inputs :])


@dataclass(frozen=True)
class Linear(Plain):
    """A kernel `(out, in)`, as torch.nn.Linear has it."""

    inputs: int = 1

    def shape(self, leaf: Shape) -> Shape:
        """Shape of the published tensor for a leaf's."""
        return math.prod(leaf[self.inputs :]), math.prod(leaf[: self.inputs])

    def to_leaf(self, tensor: np.ndarray, leaf: Shape) -> np.ndarray:
        """Published numbers as the leaf."""
        return tensor.T.reshape(leaf)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf as published: the inverse of `to_leaf`."""
        return leaf.reshape(self.shape(leaf.shape)[::-1]).T


@dataclass(frozen=True)
class Conv(Plain):
    """A kernel `(out, in, width)`, as torch.nn.Conv1d has it, for a leaf `(width, in, out)`."""

    def shape(self, leaf: Shape) -> Shape:
        """Shape of the published tensor for a leaf's."""
        return leaf[::-1]

    def to_leaf(self, tensor: np.ndarray, leaf: Shape) -> np.ndarray:
        """Published numbers as the leaf."""
        return tensor.T

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf as published: the inverse of `to_leaf`."""
        return leaf.T

"""Build a model shape of any number of parameters, in the manner of the sizes in configs/model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

from dlm.core.errors import UserError
from dlm.core.shape import ModelShape

MLP_RANGE = 2.0  # the ratio of intermediate_size to n_embd stays within this factor of the neighbours' ratio
NEAR = 0.01  # a shape whose N is within this share of the target reaches the target
FINE = 0.005  # intermediate_size is a multiple of a power of two; one step of it adds at most this share of N
WIDE_HEAD = 32  # head sizes from here on are multiples of 8, which attention kernels need; smaller ones are even
LARGEST_UNIT = 64  # of these multiples; a GPU multiplies such matrices fastest


def shape_near(target: float, shapes: Sequence[ModelShape]) -> ModelShape:
    """Build the shape whose number of parameters N is nearest to a target, between two neighbouring sizes.

    Depth, width and the ratio of intermediate_size to n_embd are interpolated between the neighbours in log N. The head
    size is that of the neighbours, or lies between theirs. Of the shapes that reach the target to within 1 %,
    the one nearest to the interpolated depth, width and ratio is taken; intermediate_size, which is free, is chosen so
    that N meets the target as closely as possible.

    Args:
        target: N, non-embedding parameters.
        shapes: The sizes to interpolate between, of one vocabulary. All other fields come from the nearest of them.

    Returns:
        The shape, named like the nearest of ``shapes``. Its N misses the target by more than 1 % only if the target
        lies so far outside the sizes that no shape in their manner reaches it, or is so small (about a thousand
        parameters) that one step of intermediate_size changes it by more than 2 %.

    Raises:
        UserError: ``target`` is not a number above zero.
    """
    if not 0 < target < math.inf:
        raise UserError(f"the target is {target} parameters: it must be a number above zero")
    known = sorted(shapes, key=lambda shape: shape.num_params)
    low, high = _neighbours(target, known)
    base = min((low, high), key=lambda shape: abs(math.log(shape.num_params / target)))
    wanted = _between(low, high, target)
    found = list(_candidates(target, base, low, high))
    reached = [shape for shape in found if abs(shape.num_params / target - 1) <= NEAR]
    if not reached:
        return min(found, key=lambda shape: (abs(math.log(shape.num_params / target)), _distance(shape, wanted)))
    return min(reached, key=lambda shape: (_distance(shape, wanted), abs(shape.head_dim - base.head_dim)))


def _neighbours(target: float, known: Sequence[ModelShape]) -> tuple[ModelShape, ModelShape]:
    """Return the sizes below and above the target; the outermost two sizes for a target outside all sizes."""
    if len(known) == 1:
        return known[0], known[0]
    above = next((place for place, shape in enumerate(known) if shape.num_params >= target), len(known) - 1)
    place = max(above, 1)
    return known[place - 1], known[place]


def _manner(shape: ModelShape) -> tuple[float, float, float]:
    """Return log depth, log width and the log of the ratio of intermediate_size to n_embd."""
    return math.log(shape.n_layer), math.log(shape.n_embd), math.log(shape.intermediate_size / shape.n_embd)


def _between(low: ModelShape, high: ModelShape, target: float) -> list[float]:
    """Interpolate ``_manner`` between two neighbours in log N; beyond the sizes, that of the outermost size."""
    span = math.log(high.num_params / low.num_params)
    share = min(max(math.log(target / low.num_params) / span, 0.0), 1.0) if span else 0.0
    return [a + share * (b - a) for a, b in zip(_manner(low), _manner(high), strict=True)]


def _distance(shape: ModelShape, wanted: Sequence[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(_manner(shape), wanted, strict=True))


def _candidates(target: float, base: ModelShape, low: ModelShape, high: ModelShape) -> Iterator[ModelShape]:
    """Yield the shapes with depths, heads and head sizes between those of the neighbours, each as near as it can be."""
    depths, heads = (_all_between(getattr(low, key), getattr(high, key)) for key in ("n_layer", "n_head"))
    step = 2 if base.head_dim < WIDE_HEAD else 8
    ends = sorted((low.head_dim, high.head_dim))
    head_sizes = sorted({*range(ends[0], ends[1] + 1, step), ends[1]})
    ratios = sorted(shape.intermediate_size / shape.n_embd for shape in (low, high))
    for n_layer, n_head, head_dim in itertools.product(depths, heads, head_sizes):
        if base.n_query_groups is not None and n_head % base.n_query_groups:
            continue
        n_embd = n_head * head_dim
        least, most = math.ceil(ratios[0] / MLP_RANGE * n_embd), math.floor(ratios[1] * MLP_RANGE * n_embd)
        shape = dataclasses.replace(base, n_layer=n_layer, n_head=n_head, n_embd=n_embd, intermediate_size=1)
        per_unit = 3 * n_layer * n_embd  # parameters of one channel of the three projections of SwiGLU
        unit = _unit(FINE * target / per_unit)
        exact = 1 + (target - shape.num_params) / per_unit
        width = min(max(round(exact / unit) * unit, least), most)
        yield dataclasses.replace(shape, intermediate_size=width)


def _all_between(a: int, b: int) -> range:
    return range(min(a, b), max(a, b) + 1)


def _unit(largest: float) -> int:
    """Return the largest power of two up to ``largest`` and LARGEST_UNIT, and at least 1."""
    return 2 ** max(0, math.floor(math.log2(min(largest, LARGEST_UNIT)))) if largest >= 1 else 1

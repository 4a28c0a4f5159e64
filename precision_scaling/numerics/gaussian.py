"""Mean squared error of a format on Gaussian data: the number that capacity laws predict a format's worth from.

Computed by integrating over every cell of the grid, not by sampling (but for blocks that choose between two scales, to
0.3 %); reads `formats` and feeds the analysis.
"""

import functools
import itertools

import numpy as np
from scipy import optimize, special

from precision_scaling.numerics.formats import FOUR_OVER_SIX, POWERS_OF_TWO, Format, FormatError, parse

_REACH = 12.0  # standard deviations; 1e-32 of the mass lies beyond
_PIECE = 0.25  # widest interval that one quadrature rule covers, standard deviations
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_TENSOR_COUNT = 2**20  # elements of the tensor whose abs-max sets the outer scale of a two-level block format


def gaussian_mse(fmt: object, scale: float | str = "optimal", count: int | None = None) -> float:
    """E (x - Q(x))² for x of unit variance; relative to the variance it holds for any.

    scale: 'optimal', the one scale of least error; 'absmax', the abs-max scale of `count` values, averaged over
        their draws; or a number, the standard deviations per unit of the grid.
    count: how many values share a scale, for 'absmax'; of block formats their block, or its square for tiles.
    Block formats know only their own scales ('absmax', which 'optimal' then means too). A two-level one is measured in
    a tensor of 2^20 elements. Formats that pass through have error 0.
    Raises FormatError with one line.
    """
    fmt = parse(fmt)
    if not (scale in ("optimal", "absmax") if isinstance(scale, str) else scale > 0):
        raise FormatError(f"scale {scale!r} is not known; allowed: 'optimal', 'absmax' or a positive number")
    if fmt.family == "none":
        return 0.0
    if fmt.block_size is not None:
        blocks = fmt.block_size, fmt.block_size**2
        if not isinstance(scale, str) or count not in (None, *blocks):
            allowed = " or ".join(map(str, blocks))
            raise FormatError(f"format {fmt.name!r} sets its scales; allowed: scale 'absmax', count {allowed}")
        if str(fmt.block_scale).endswith(FOUR_OVER_SIX):
            return _mse_of_better(fmt, count or fmt.block_size)
        return _mse_under_own_max(fmt, count or fmt.block_size)
    if scale == "absmax":
        if count is None or count < 1:
            raise FormatError(f"scale 'absmax' with count {count!r}; allowed: how many values share a scale, from 1")
        return _mse_under_own_max(fmt, count)
    if scale == "optimal":
        return _optimal_mse(fmt)
    return _mse(fmt.values() * scale, _REACH)


def _mse(levels: np.ndarray, reach: float) -> float:
    """Mean squared error of rounding to the nearest of `levels` for a Gaussian truncated to ±reach."""
    middles = (levels[1:] + levels[:-1]) / 2
    edges = np.linspace(-reach, reach, 2 + int(2 * reach / _PIECE))
    edges = np.union1d(edges, middles[np.abs(middles) < reach])
    half = np.diff(edges)[:, None] / 2
    centre = edges[:-1, None] + half
    x = centre + half * _NODES
    error = x - levels[np.searchsorted(middles, centre)]
    return float(np.sum(half * _WEIGHTS * error**2 * _density(x)) / special.erf(reach / np.sqrt(2)))


@functools.cache
def _optimal_mse(fmt: Format) -> float:
    """The least mean squared error that any one scale gives."""
    levels = fmt.values()
    mse = lambda log_clip: _mse(levels * np.exp(log_clip) / fmt.max_value, _REACH)
    # Floats repeat every octave, so that the error has many minima: search all, then refine the best.
    coarse = np.arange(np.log(0.3), np.log(64), 0.1)
    start = coarse[np.argmin([mse(log_clip) for log_clip in coarse])]
    best = optimize.minimize_scalar(mse, bounds=(start - 0.1, start + 0.1), method="bounded", options={"xatol": 1e-6})
    return float(best.fun)


def _mse_under_own_max(fmt: Format, count: int) -> float:
    """Mean over the abs-max of `count` Gaussians; given it, the others are Gaussians truncated to it."""
    low, high = _abs_max_quantile(1e-13, count), _abs_max_quantile(1 - 1e-13, count)
    if fmt.family == "block":
        thresholds, scales = _stored_scales(fmt)
        edges = np.union1d(np.linspace(low, high, 33), thresholds[(thresholds > low) & (thresholds < high)])
    else:
        edges = np.linspace(low, high, 9)
    values = fmt.values()
    total = 0.0
    for left, right in itertools.pairwise(edges):
        half, centre = (right - left) / 2, (right + left) / 2
        for largest, weight in zip(centre + half * _NODES, half * _WEIGHTS, strict=True):
            scale = scales[np.searchsorted(thresholds, centre)] if fmt.family == "block" else largest / fmt.max_value
            error_of_largest = np.min(np.abs(values * scale - largest)) ** 2
            error = (error_of_largest + (count - 1) * _mse(values * scale, largest)) / count
            inside = special.erf(largest / np.sqrt(2))
            total += weight * error * count * 2 * _density(largest) * inside ** (count - 1)
    return float(total)


@functools.cache
def _mse_of_better(fmt: Format, count: int) -> float:
    """Of blocks that take the better of two scales, which no integral over one element tells: over 2^20 draws."""
    blocks = np.random.default_rng(0).normal(size=(_TENSOR_COUNT // count, count))
    largest, levels = np.abs(blocks).max(axis=1, keepdims=True), fmt.values()
    stored = parse(str(fmt.block_scale).removesuffix(FOUR_OVER_SIX)).values()
    tensor_scale = largest.max() / (fmt.max_value * 256)
    errors = []
    for share in (1, 2 / 3):
        scale = tensor_scale * _nearest(stored, largest / (fmt.max_value * share * tensor_scale))
        errors.append(np.mean((scale * _nearest(levels, blocks / scale) - blocks) ** 2, axis=1))
    return float(np.minimum(*errors).mean())


def _nearest(levels: np.ndarray, x: np.ndarray) -> np.ndarray:
    return levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]


def _stored_scales(fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Abs-max values of a block at which its stored scale changes, and the scales between them (one more)."""
    if fmt.block_scale in POWERS_OF_TWO:
        powers = 2.0 ** np.arange(-40, 5)
        if fmt.block_scale == "e8m0_up":  # the largest element is at most the last level
            return powers[:-1] * fmt.max_value, powers
        return powers[1:], powers / 2.0 ** np.floor(np.log2(fmt.max_value))
    stored = parse(fmt.block_scale)
    tensor_scale = _abs_max_quantile(0.5, _TENSOR_COUNT) / (fmt.max_value * stored.max_value)
    scales = stored.values()[stored.values() >= 0] * tensor_scale
    return (scales[1:] + scales[:-1]) / 2 * fmt.max_value, scales


def _abs_max_quantile(probability: float, count: int) -> float:
    """The abs-max of `count` Gaussians that is exceeded with 1 - probability."""
    beyond = -np.expm1(np.log(probability) / count)  # of one value
    return float(-special.ndtri(beyond / 2))


def _density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)

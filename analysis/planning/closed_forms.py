"""What the laws say in closed form: compute-optimal sizes, cost-optimal precision, and the tokens past which PTQ loses.

The report quotes them with intervals, `analysis.plan` minimizes the laws themselves, and the tests compare the two.
Symbols as in Scaling Laws for Precision (arXiv 2411.04330); `params` are those of a fit, arrays of bootstrap samples
included.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
from scipy import optimize

from analysis.planning.cost import FLOPS_PER_PARAMETER_TOKEN

PRECISION_GRID = np.linspace(1.0, 24.0, 2301)  # bits; P* is searched here, then refined


def compute_optimal(params: Mapping[str, float], flops, relative_cost=1.0, capacity=1.0):
    """(N*, D*) that minimize `A (f N)^-α + B D^-β` under `6 N D r = flops`, with f the capacity and r the cost at P
    bits.

    `N* = G (C/6r)^(β/(α+β))`, `D* = (C/6r)^(α/(α+β)) / G`, `G = (α A f^-α / (β B))^(1/(α+β))`: at fixed C the product
    N* D* goes as 1/r, which the paper's printed D* misses by a factor `P^(-α/(α+β))`.
    """
    alpha, beta = params["alpha"], params["beta"]
    products = flops / (FLOPS_PER_PARAMETER_TOKEN * relative_cost)
    tilt = (alpha * params["A"] * capacity**-alpha / (beta * params["B"])) ** (1 / (alpha + beta))
    return tilt * products ** (beta / (alpha + beta)), products ** (alpha / (alpha + beta)) / tilt


def best_precision(capacity: Callable, relative_cost: Callable, grid: np.ndarray = PRECISION_GRID) -> float:
    """P* in bits: the argmax of `f(P) / r(P)`, at every budget and whatever A, α, B, β are.

    Compute-optimal loss depends on C, f and r through `C f / r` alone (paper, section 4.3, with its conditions
    corrected). An optimum at either end of `grid` is returned as that end.
    """
    value = np.asarray(capacity(grid)) / np.asarray(relative_cost(grid))
    at = int(np.argmax(value))
    if at in (0, len(grid) - 1):
        return float(grid[at])
    found = optimize.minimize_scalar(
        lambda p: -float(capacity(np.float64(p)) / relative_cost(np.float64(p))),
        bounds=(grid[at - 1], grid[at + 1]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)


def tied_unbiased_optimum() -> float:
    """x = P*/γ of `f(P) = (1 - exp(-P/γ))³` under a cost linear in P: the root of `3 x e^-x = 1 - e^-x`, 1.904."""
    return float(optimize.brentq(lambda x: 3 * x * math.exp(-x) - 1 + math.exp(-x), 1.0, 4.0, xtol=1e-13))


def make_up_factor(capacity: Callable, precision, base: float = 16.0):
    """Factor on N that brings training at `precision` bits back to the loss of `base` bits at equal D: f(base)/f(P)."""
    return np.asarray(capacity(np.float64(base))) / np.asarray(capacity(np.asarray(precision, np.float64)))


def critical_tokens(params: Mapping[str, float], n, p_post):
    """D_crit: tokens past which a model of N parameters, trained in 16 bits, gets worse at P_post bits the longer it
    trains.

    Where `β B D^-β = γ_D δ(D)`: `(β B N^γN exp(P_post/γ_post - b) / (γ_D C_T))^(1/(γ_D + β))`. Infinite where γ_D ≤ 0
    (degradation that does not grow with data).
    """
    beta, gamma_d, n = params["beta"], np.asarray(params["gamma_D"], np.float64), np.asarray(n, np.float64)
    growth = np.maximum(gamma_d, 1e-300)
    log_d = np.log(beta * params["B"]) + params["gamma_N"] * np.log(n) + p_post / params["gamma_post"]
    log_d = (log_d - params.get("b", 0.0) - np.log(growth * params["C_T"])) / (growth + beta)
    with np.errstate(over="ignore"):
        return np.where(gamma_d > 0, np.exp(log_d), np.inf)


def fixed_size_precision(
    params: Mapping[str, float], capacity: Callable, n: float, flops: float, grid=PRECISION_GRID
) -> float:
    """P* in bits for a model of fixed N under `6/16 N D P = flops`: the root of `α A (f N)^-α f'/f = β B D^-β / P`.

    It rises without bound, like `β γ ln C` for large C with γ the largest of the parts' γ, and D* = 16 C/(6 N P*).
    An optimum at either end of `grid` is returned as that end.
    """
    alpha, beta = params["alpha"], params["beta"]

    def loss(p):
        tokens = flops * 16.0 / (FLOPS_PER_PARAMETER_TOKEN * n * p)
        return params["A"] * (capacity(p) * n) ** -alpha + params["B"] * tokens**-beta

    at = int(np.argmin(loss(grid)))
    if at in (0, len(grid) - 1):
        return float(grid[at])
    found = optimize.minimize_scalar(
        lambda p: float(loss(np.float64(p))),
        bounds=(grid[at - 1], grid[at + 1]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return float(found.x)

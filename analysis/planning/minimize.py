"""Minimizes a fitted loss over N, D and P under a budget of training and serving, numerically.

A `Surface` (surface.py) is the loss by one or two fits; a `Budget` is what may be spent and what is fixed; `minimize`
finds the best point.
"""

import dataclasses

import numpy as np

from analysis.planning.cost import CostModel
from analysis.planning.memory import Serving, bytes_label
from analysis.planning.surface import Surface
from precision_scaling.errors import UserError

LINEAR_COST, WEIGHTS_ALONE = CostModel(), Serving()
SMALLEST_N = 1e3  # parameters; smaller than any fitted model, so that no plan ends at this bound
P_RANGE = (2.0, 16.0)  # bits searched where P is free; a precision given by hand may be higher
GRID = {0: 1, 1: 41, 2: 25, 3: 13}  # free quantities -> points of each per round of the search
ROUNDS = 60  # at most
TOLERANCE = 1e-9  # of log N, log D and P (bits) at which the search ends


class BudgetError(UserError):
    """A budget that no model can meet, or too few or too many quantities fixed."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a plan may spend (FLOP-equivalents at 16 bits, bytes of memory as served) and which of N, D, P are given."""

    flops: float | None = None
    n: float | None = None
    d: float | None = None
    p: float | None = None
    serve_bits: float | None = None
    inference_tokens: float = 0.0
    memory_bytes: float | None = None
    serving: Serving = WEIGHTS_ALONE
    cost: CostModel = LINEAR_COST
    p_range: tuple[float, float] = P_RANGE
    p_choices: tuple[float, ...] = ()  # the only precisions to choose from; () for any

    def spent(self, n, d, p):
        """Training plus serving; without PTQ the model is served at the precision it was trained in."""
        total = self.cost.training(n, d, p)
        if self.inference_tokens:
            total = total + self.cost.inference(n, self.inference_tokens, self.served_at(p))
        return total

    def most_tokens(self, n, p):
        """Tokens that the budget leaves for training N parameters at P bits; 0 or less where serving alone exceeds
        it.
        """
        left = self.flops
        if self.inference_tokens:
            left = left - self.cost.inference(n, self.inference_tokens, self.served_at(p))
        return left / self.cost.training(n, 1.0, p)

    def most_parameters(self, p):
        """Largest N that training on the given D (or on one token) and serving at P bits leave affordable and in
        memory.
        """
        n = self.flops / self.spent(1.0, 1.0 if self.d is None else self.d, p)
        if self.memory_bytes is not None:
            n = np.minimum(n, self.serving.most_parameters(self.memory_bytes, self.served_at(p), p))
        return n

    def fits_memory(self, n, p):
        if self.memory_bytes is None:
            return np.full(np.broadcast(n, p).shape, True)
        return self.serving.total(n, self.served_at(p), p) <= self.memory_bytes * (1 + 1e-9)

    def served_at(self, p):
        """Bits of the served weights of a model trained at P bits: it is never rounded to more bits than it has."""
        return np.minimum(p, np.inf if self.serve_bits is None else self.serve_bits)


@dataclasses.dataclass(frozen=True)
class Point:
    """One plan: N (count), D (tokens), P (bits), nats per token as served and δ of PTQ in it, FLOP-equivalents."""

    n: float
    d: float
    p: float
    loss: float
    delta: float
    flops: float


def precisions(budget: Budget) -> tuple[float, ...]:
    """The precisions to choose from where P is free: those with a speed and a law; empty where any number of bits
    are allowed.
    """
    if not budget.p_choices:
        return budget.cost.precisions
    found = tuple(p for p in budget.p_choices if budget.cost.linear or p in budget.cost.precisions)
    if not found:
        raise BudgetError(f"the fit knows {_bits(budget.p_choices)} bits, --speeds has {_bits(budget.cost.precisions)}")
    return found


def _bits(values) -> str:
    return ", ".join(f"{value:g}" for value in values)


def minimize(surface: Surface, budget: Budget) -> Point:
    """The point of least loss as served within the budget. Raises BudgetError where none exists.

    D may end below what the budget pays for: past D_crit a model served in few bits gets worse with more data. Where
    P is free but only some formats have a speed, each is tried.
    """
    if budget.flops is None and (budget.n is None or budget.d is None):
        raise BudgetError("without --flops both --params and --tokens must be given: nothing else bounds the plan")
    if budget.p is not None:
        choices = [(budget.p, budget.p)]
    elif discrete := precisions(budget):
        choices = [(p, p) for p in discrete]
    elif budget.flops is None:
        choices = [(budget.p_range[1], budget.p_range[1])]  # nothing to trade precision for
    else:
        choices = [budget.p_range]
        if budget.serve_bits is not None and budget.p_range[0] <= budget.serve_bits <= budget.p_range[1]:
            choices.append(
                (budget.serve_bits, budget.serve_bits)
            )  # δ drops to zero at exactly this point, which a grid would miss
    found = [point for choice in choices if (point := _search(surface, budget, choice)) is not None]
    if not found:
        raise BudgetError(_why_impossible(budget))
    return min(found, key=lambda point: point.loss)


def _search(surface: Surface, budget: Budget, p_range: tuple[float, float]) -> Point | None:
    """A grid over P, log of the share of the largest N and log of the share of the affordable tokens, narrowed around
    its best point. In shares every constraint is a side of the box, so that a grid finds an optimum on it exactly.
    """
    sizes_free = budget.n is None and budget.d is None  # at a given D a larger model is never worse
    tokens_free = budget.d is None and budget.serve_bits is not None  # without PTQ more tokens are never worse
    smallest = np.log(SMALLEST_N / _largest(budget, p_range)) if sizes_free else 0.0
    if smallest > 0:
        return None
    boxes = np.array([(smallest, 0.0), p_range, (np.log(1e-6) if tokens_free else 0.0, 0.0)], np.float64)
    limits = boxes.copy()
    points = GRID[int(np.sum(boxes[:, 1] > boxes[:, 0]))]
    best = None
    for _ in range(ROUNDS):
        axes = [np.linspace(low, high, points) if high > low else np.array([low]) for low, high in boxes]
        size_share, p, token_share = np.meshgrid(*axes, indexing="ij", sparse=True)
        n, d, loss = _losses(surface, budget, size_share, p, token_share)
        if not np.isfinite(loss).any():
            break
        at = np.unravel_index(np.argmin(loss), loss.shape)
        if best is None or loss[at] <= best[0]:
            best = (float(loss[at]), float(n[at]), float(d[at]), float(axes[1][at[1]]))
        for row, (axis, index) in enumerate(zip(axes, at, strict=True)):
            if len(axis) == 1:
                continue
            reach = (axis[1] - axis[0]) * 2.0
            if index in (0, len(axis) - 1) and limits[row, 0] < axis[index] < limits[row, 1]:
                reach = (axis[-1] - axis[0]) / 2.0  # the optimum lies outside the box: follow it before narrowing
            boxes[row] = np.clip((axis[index] - reach, axis[index] + reach), *limits[row])
        if np.all(boxes[:, 1] - boxes[:, 0] < TOLERANCE):
            break
    if best is None:
        return None
    loss, n, d, p = best
    return evaluate(surface, budget, n, d, p)


def _largest(budget: Budget, p_range: tuple[float, float]) -> float:
    return max(1e-300, *(float(budget.most_parameters(np.float64(p))) for p in p_range))


def evaluate(surface: Surface, budget: Budget, n: float, d: float, p: float) -> Point:
    """Loss, δ and cost at one point, budget or not."""
    n, d, p = np.float64(n), np.float64(d), np.float64(p)
    delta = 0.0 if budget.serve_bits is None else float(surface.delta(n, d, p, budget.serve_bits))
    return Point(
        float(n), float(d), float(p), float(surface.loss(n, d, p)) + delta, delta, float(budget.spent(n, d, p))
    )


def _losses(surface: Surface, budget: Budget, size_share, p, token_share):
    """N, D and loss as served on the grid; infinite where budget or memory is exceeded or nothing is left to train
    on.
    """
    shape = np.broadcast_shapes(size_share.shape, p.shape, token_share.shape)
    n = np.broadcast_to(budget.most_parameters(p) * np.exp(size_share) if budget.n is None else budget.n, shape)
    p = np.broadcast_to(p, shape)
    d = np.broadcast_to(budget.d if budget.d is not None else budget.most_tokens(n, p) * np.exp(token_share), shape)
    allowed = (d >= 1.0) & (n >= 1.0) & budget.fits_memory(n, p)
    if budget.flops is not None:
        allowed = allowed & (budget.spent(n, d, p) <= budget.flops * (1 + 1e-9))
    loss = surface.served(n, np.where(allowed, d, 1.0), p, budget.serve_bits)
    return n, d, np.where(allowed & np.isfinite(loss), loss, np.inf)


def _why_impossible(budget: Budget) -> str:
    parts = [
        f"--{name}={value:g}"
        for name, value in (
            ("flops", budget.flops),
            ("params", budget.n),
            ("tokens", budget.d),
            ("precision", budget.p),
            ("inference_tokens", budget.inference_tokens or None),
        )
        if value is not None
    ]
    if budget.memory_bytes is not None:
        parts.append(f"--memory={bytes_label(budget.memory_bytes).replace(' ', '')}")
    return f"no model meets {' '.join(parts)}: raise the budget or free one of them"


def turning_point(surface: Surface, n: float, p: float, serve_bits: float) -> float:
    """D_crit in tokens by the law itself: where loss after PTQ to `serve_bits` is least in D; infinite where
    it has no minimum.
    """
    low, high = np.log(1.0), np.log(1e30)
    for _ in range(ROUNDS):
        log_d = np.linspace(low, high, 201)
        with np.errstate(over="ignore"):
            loss = surface.served(np.full(log_d.shape, n), np.exp(log_d), np.full(log_d.shape, p), serve_bits)
        at = int(np.argmin(np.where(np.isfinite(loss), loss, np.inf)))
        if high >= np.log(1e30) and at >= len(log_d) - 2:
            return float("inf")
        low, high = log_d[max(at - 1, 0)], log_d[min(at + 1, len(log_d) - 1)]
        if high - low < TOLERANCE:
            break
    return float(np.exp(log_d[at]))

"""The solver under every fit: many small robust regressions at once, by batched Levenberg-Marquardt in float64.

A problem compares a law's predictions with measurements, such as logs of losses. Starts, bootstrap resamples, folds and
profile points differ only in start, row weights and frozen parameters, so all of them run through one compiled program,
a chunk at a time.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.runtime.progress import progress_bar

CHUNK_BYTES = 8 * 2**20  # of Jacobian per compiled call: what a core's cache holds
LARGEST_CHUNK = 64  # places are computed whether a problem is left for them or not
ITERATIONS_PER_CALL = 25  # after which finished problems leave the chunk and waiting ones take their place
MAX_STEP = 3.0  # in units of Problem.scale
LEVENBERG = 0.03  # weight of the absolute damping that keeps dead terms from running away
LEAST_DAMPING, FINE_DAMPING, MOST_DAMPING = 1e-13, 1e-6, 1e9


def stay_off_accelerators() -> None:
    """For commands, before anything runs: JAX would otherwise reserve GPU memory that a training run may need."""
    jax.config.update("jax_platforms", "cpu")


def on_cpu_in_float64(function: Callable) -> Callable:
    """Runs `function` in float64 on the CPU, whatever the process uses elsewhere.

    The fits are small and need double precision, which TPUs lack; the setting is scoped and leaves float32
    training code alone.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            return function(*args, **kwargs)

    return wrapped


@dataclasses.dataclass(frozen=True)
class Problem:
    """Rows to fit: `prediction(theta_F, data)` gives n values, such as logs of losses, to compare with `target_n`.

    `prediction` is hashable and pure, so that problems of one shape share a compiled program; every array that it
    reads is in `data`. theta holds F parameters as fitted (positive ones as logarithms) within [lower_F, upper_F];
    scale_F is a typical step of each. `huber_delta` infinite means least squares.
    """

    prediction: Callable
    data: Mapping
    target_n: np.ndarray
    lower_F: np.ndarray
    upper_F: np.ndarray
    scale_F: np.ndarray
    huber_delta: float = 1e-3

    @property
    def rows(self) -> int:
        return len(self.target_n)


@dataclasses.dataclass(frozen=True)
class Solution:
    """Where S problems ended: theta_SxF, the Huber sum objective_S, and whether each converged."""

    theta_SxF: np.ndarray
    objective_S: np.ndarray
    converged_S: np.ndarray


def huber(residual, delta, xp=np):
    """Huber's function: r²/2 up to delta, then delta (|r| - delta/2); delta may be infinite."""
    size = xp.abs(residual)
    finite = xp.where(xp.isfinite(delta), delta, 0.0)
    return xp.where(size <= delta, 0.5 * residual * residual, finite * (size - 0.5 * finite))


def chunk_size(problem: Problem) -> int:
    """Problems per compiled call that keep its Jacobian within CHUNK_BYTES."""
    per_problem = 8 * problem.rows * (len(problem.lower_F) + 4)
    return int(np.clip(2 ** math.floor(math.log2(max(CHUNK_BYTES / per_problem, 1))), 2, LARGEST_CHUNK))


def solve(
    problem: Problem,
    start_SxF: np.ndarray,
    weight_Mxn: np.ndarray | None = None,
    which_S: np.ndarray | None = None,
    frozen_SxF: np.ndarray | None = None,
    iterations: int = 300,
    tolerance: float = 1e-11,
    progress: str | None = None,
) -> Solution:
    """Minimize Σ_n w_n huber(r_n) from every start, theta within bounds.

    weight_Mxn holds M sets of row weights (default: ones) and which_S the set of each problem; frozen_SxF marks
    parameters that stay at their start. A problem ends when a step gains less than `tolerance` of its objective.
    `progress` names a progress bar. Chunks of `chunk_size` problems bound the memory.
    """
    start_SxF = np.clip(np.asarray(start_SxF, np.float64), problem.lower_F, problem.upper_F)
    total, width = start_SxF.shape
    weight_Mxn = np.ones((1, problem.rows)) if weight_Mxn is None else np.asarray(weight_Mxn, np.float64)
    which_S = np.zeros(total, int) if which_S is None else np.asarray(which_S)
    frozen_SxF = np.zeros((total, width), bool) if frozen_SxF is None else np.asarray(frozen_SxF, bool)
    size = chunk_size(problem)
    bounds = tuple(np.asarray(a, np.float64) for a in (problem.lower_F, problem.upper_F, problem.scale_F))
    options = (*bounds, float(problem.huber_delta), float(tolerance))
    constant = (problem.data, np.asarray(problem.target_n, np.float64), *options)

    theta_SxF = start_SxF.copy()
    objective_S, damping_S = np.full(total, np.nan), np.full(total, 0.1)
    converged_S, rounds_S = np.zeros(total, bool), np.zeros(total, int)
    waiting = collections.deque(range(total))
    bar = progress_bar(total=total, desc=progress, disable=progress is None, unit="fit", leave=False)

    @on_cpu_in_float64
    def work() -> None:
        active: list[int] = []
        while True:
            while waiting and len(active) < size:
                active.append(waiting.popleft())
            if not active:
                return
            filled = np.resize(
                active, size
            )  # every chunk has one shape: spare places repeat its problems and count as done
            spare = np.arange(size) >= len(active)
            out = _advance(
                problem.prediction,
                ITERATIONS_PER_CALL,
                (theta_SxF[filled], damping_S[filled], spare),
                weight_Mxn[which_S[filled]],
                frozen_SxF[filled],
                *constant,
            )
            theta, damping, objective, finished = (np.asarray(a)[: len(active)] for a in out)
            theta_SxF[active], damping_S[active], objective_S[active] = theta, damping, objective
            converged_S[active] = finished
            rounds_S[active] += ITERATIONS_PER_CALL
            over = finished | (rounds_S[active] >= iterations)
            active = [s for s, leaves in zip(active, over, strict=True) if not leaves]
            bar.update(int(over.sum()))

    # One chunk at a time: programs that run side by side can wait for each other's threads forever on a small CPU.
    with bar:
        work()
    return Solution(theta_SxF, objective_S, converged_S)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(prediction, iterations, state, weight_Sxn, frozen_SxF, data, target_n, lower, upper, scale, delta, tol):
    """At most `iterations` Levenberg-Marquardt steps on every problem of a chunk that is not done."""

    def residual(theta_F):
        return prediction(theta_F, data) - target_n

    def objective(theta_F, weight_n):
        value = jnp.sum(weight_n * huber(residual(theta_F), delta, jnp))
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    def step(theta_F, damping, value, done, weight_n, frozen_F):
        residual_n, push = jax.linearize(residual, theta_F)
        jacobian = jax.vmap(push)(jnp.eye(len(theta_F)))  # (F, n)
        # iteratively reweighted: the quadratic that touches Huber's function at this residual and lies above it
        # elsewhere
        curvature_n = weight_n * jnp.minimum(1.0, delta / jnp.maximum(jnp.abs(residual_n), 1e-300))
        gradient_F, normal_FxF = _normal_equations(jacobian, curvature_n, residual_n)
        held = frozen_F | ((theta_F <= lower) & (gradient_F > 0)) | ((theta_F >= upper) & (gradient_F < 0))
        diagonal = jnp.diagonal(normal_FxF)
        damped = normal_FxF + jnp.diag(damping * (diagonal + LEVENBERG * value / scale**2) + 1e-300)
        unit = jax.lax.rsqrt(jnp.diagonal(damped))
        free = jnp.where(held, 0.0, unit)
        system = damped * free[:, None] * free[None, :] + jnp.diag(jnp.where(held, 1.0, 1e-14))
        factor = jax.scipy.linalg.cho_factor(system)
        move = jnp.nan_to_num(-free * jax.scipy.linalg.cho_solve(factor, free * gradient_F), posinf=0.0, neginf=0.0)
        move = move * jnp.minimum(1.0, MAX_STEP / jnp.maximum(jnp.max(jnp.abs(move) / scale), 1e-300))
        trial_F = jnp.clip(theta_F + move, lower, upper)
        trial_value = objective(trial_F, weight_n)
        better = trial_value < value
        gain = value - trial_value
        small = (better & (gain < tol * value) & (damping < FINE_DAMPING)) | (value < 1e-26)
        stuck = ~better & ((damping >= MOST_DAMPING) | (jnp.max(jnp.abs(trial_F - theta_F) / scale) < 1e-10))
        accept = better & ~done
        next_damping = jnp.where(
            better, jnp.maximum(damping * 0.25, LEAST_DAMPING), jnp.minimum(damping * 4, MOST_DAMPING)
        )
        return (
            jnp.where(accept, trial_F, theta_F),
            jnp.where(done, damping, next_damping),
            jnp.where(accept, trial_value, value),
            done | small | stuck,
        )

    def body(carry):
        count, *inner = carry
        return (count + 1, *jax.vmap(step)(*inner, weight_Sxn, frozen_SxF))

    theta, damping, done = state
    value = jax.vmap(objective)(theta, weight_Sxn)
    carry = (0, theta, damping, value, done)
    _, theta, damping, value, done = jax.lax.while_loop(lambda c: (c[0] < iterations) & ~jnp.all(c[4]), body, carry)
    return theta, damping, value, done


def _normal_equations(jacobian_Fxn, curvature_n, residual_n):
    """Jᵀ W r and Jᵀ W J."""
    weighted = jacobian_Fxn * curvature_n[None, :]
    return jnp.sum(weighted * residual_n[None, :], axis=1), jnp.einsum("in,jn->ij", weighted, jacobian_Fxn)


@on_cpu_in_float64
def residuals(problem: Problem, theta_F: np.ndarray) -> np.ndarray:
    """Prediction minus target of every row at theta."""
    return np.asarray(_prediction(problem.prediction, theta_F, problem.data)) - problem.target_n


@on_cpu_in_float64
def jacobian(problem: Problem, theta_F: np.ndarray) -> np.ndarray:
    """(n, F) derivatives of the predictions at theta."""
    return np.asarray(_jacobian(problem.prediction, theta_F, problem.data))


@functools.partial(jax.jit, static_argnums=0)
def _prediction(prediction, theta_F, data):
    return prediction(theta_F, data)


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(prediction, theta_F, data):
    return jax.jacfwd(prediction)(theta_F, data)

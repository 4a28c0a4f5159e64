"""Seconds that GPTQ takes for a layer at 4 bits, beside the method written column by column.

    python -m benchmarks.gptq [--large] [--repeats=5] [--noplain]
    python -m benchmarks.gptq --model=30M [--sequences=16] [--length=512]

Times are the least of the repeats. `compile` is the XLA compilation, `Cholesky` the factorization (the rest of the time
is the sweep over the rows), `memory` what the compiled program holds at once (arguments, results and temporaries).
`plain` solves the same by the definition of GPTQ: the Cholesky factor of the inverse Hessian, and after every row an
update of all the rows that follow. `same` is the share of codes in which the two agree (they differ at ties, and after
one). `error` is the layer's squared output error over that of rounding to nearest.

With --model, the time of a whole decoder of a named size at one bit-width, split into the calibration text's way
through the layers, the Hessians of their inputs, and solving.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from precision_scaling.model import decoder, sizes
from precision_scaling.model.accounting import count_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.model.decoder import Block
from precision_scaling.ptq import apply, gptq, rtn, statistics
from precision_scaling.ptq.error import output_error
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.quantize.products import Products
from precision_scaling.quantize.static import UNQUANTIZED
from precision_scaling.runtime import cli
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig

FLAGS = flags.FlagValues()
flags.DEFINE_bool(
    "large", False, "also 4096 x 4096: minutes on a small CPU, and never in the plain version there", flag_values=FLAGS
)
flags.DEFINE_bool("plain", True, "also the plain column-by-column version, for the ratio", flag_values=FLAGS)
flags.DEFINE_string(
    "model", "", "a size of precision_scaling.model.sizes: times that whole model instead of layers", flag_values=FLAGS
)
flags.DEFINE_integer("sequences", 16, "calibration sequences of --model", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("length", 512, "tokens of each", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 5, "runs of which the fastest counts", lower_bound=1, flag_values=FLAGS)

SHAPES = ((512, 512), (1024, 1024), (2048, 1024), (1024, 2816))
LARGE = (4096, 4096)
BITS = 4


def plain(kernel_IxO, hessian_IxI, bits):
    """Codes (I, O), row by row without blocks."""
    mean = jnp.mean(jnp.diagonal(hessian_IxI))
    inverse_IxI = jnp.linalg.inv(hessian_IxI + 0.01 * mean * jnp.eye(len(hessian_IxI)))
    factor_IxI = jnp.linalg.cholesky(inverse_IxI, upper=True)
    high = jnp.exp2(bits - 1).round() - 1
    scale_O = jnp.max(jnp.abs(kernel_IxO), axis=0) / high

    def row(i, state):
        w_IxO, code_IxO = state
        code_O = jnp.clip(jnp.round(w_IxO[i] / scale_O), -high, high)
        error_O = (w_IxO[i] - code_O * scale_O) / factor_IxI[i, i]
        return w_IxO - jnp.outer(factor_IxI[i], error_O), code_IxO.at[i].set(code_O)

    return jax.lax.fori_loop(0, len(kernel_IxO), row, (kernel_IxO, jnp.zeros_like(kernel_IxO)))[1]


def problem(rows: int, outputs: int):
    """A Gaussian kernel and the Hessian of correlated inputs, eigenvalues 1/i, features of different size."""
    k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(k1, (4 * rows, rows)) * jnp.arange(1, rows + 1) ** -0.5
    x = x @ jax.random.normal(k2, (rows, rows)) * jnp.exp(0.5 * jax.random.normal(k3, (rows,)))
    return jax.random.normal(k4, (rows, outputs)), jnp.matmul(x.T, x, precision="highest")


def compiled(function, *args):
    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    return program, time.perf_counter() - start


def fastest(programs, args, repeats):
    """Least seconds of each program, taken in turn so that a busy machine slows all of them."""
    best = [np.inf] * len(programs)
    for _ in range(repeats + 1):  # the first one warms up
        for i, (program, arg) in enumerate(zip(programs, args, strict=True)):
            start = time.perf_counter()
            jax.block_until_ready(program(*arg))
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def whole_model(size: str, sequences: int, length: int) -> None:
    """Prints what a decoder of random weights takes at 4 bits: all at once, and the parts of one layer times layers."""
    shape = sizes.named(size)
    config = ModelConfig(257, shape.width, shape.depth, shape.heads, shape.mlp_width, length, shape.width, shape.depth)
    step_config = StepConfig(config, UNQUANTIZED, OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1))
    params = jax.jit(lambda: decoder.init(config, jax.random.key(0)))()
    tokens_NxS = np.random.default_rng(0).integers(0, 257, (sequences, length)).astype(np.int32)
    batch = next(b for b in (4, 2, 1) if sequences % b == 0)

    def whole():
        options = {"scheme": scheme_of("gptq"), "batch_size": batch, "layout": local_layout()}
        models, _ = apply.quantize_model(step_config, params, {}, tokens_NxS, (4,), 0.01, **options)
        return models

    start = time.perf_counter()
    jax.block_until_ready(whole())
    first = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(whole())
    again = time.perf_counter() - start

    block = jax.tree.map(lambda x: x[0], params["layers"]["block"])
    x_CxBxSxD = jax.random.normal(jax.random.key(1), (sequences // batch, batch, length, config.width))

    def forward(block, x_CxBxSxD):
        """The inputs of the four projections, as quantization makes them."""

        def call(method, *streams):
            return Block(config).apply({"params": block}, *streams, method=method)

        def one(x_BxSxD):
            qkv = call(Block.before_qkv, x_BxSxD)
            out = call(Block.before_out, qkv, Products())
            x_BxSxD = call(Block.after_out, x_BxSxD, out, Products())
            gate_up = call(Block.before_gate_up, x_BxSxD)
            down = call(Block.before_down, gate_up, Products())
            return (qkv, out, gate_up, down), call(Block.after_down, x_BxSxD, down, Products())

        return jax.lax.map(one, x_CxBxSxD)

    def hessians(inputs):
        def total(x_CxBxSxI):
            add = lambda found, x_BxSxI: (statistics.add(Products(), found, x_BxSxI), None)
            return jax.lax.scan(add, statistics.nothing(x_CxBxSxI.shape[-1]), x_CxBxSxI)[0].hessian_IxI

        return [total(x_CxBxSxI) for x_CxBxSxI in inputs]

    def solved(kernels, hessians):
        return [gptq.solve(k, h, 4).codes for k, h in zip(kernels, hessians, strict=True)]

    kernels = [block[module][name]["kernel"] for module, name in apply.LINEARS]
    kernels = [kernel.reshape(kernel.shape[0], -1) for kernel in kernels]
    passing, _ = compiled(forward, block, x_CxBxSxD)
    inputs, _ = passing(block, x_CxBxSxD)
    summing, _ = compiled(hessians, inputs)
    summed = summing(inputs)
    solving, _ = compiled(solved, kernels, summed)
    parts = fastest((passing, summing, solving), ((block, x_CxBxSxD), (inputs,), (kernels, summed)), FLAGS.repeats)
    non_embedding, _ = count_parameters(config)
    print(f"{size}: {non_embedding:,} parameters, {sequences} x {length} = {sequences * length:,} calibration tokens")
    print(
        f"whole model {again:.2f} s, the first time {first:.2f} s with compilation; of one layer times {config.depth}:"
    )
    for name, seconds in zip(("calibration", "Hessians", "solving"), parts, strict=True):
        print(f"{name:>12} {seconds * config.depth:8.2f} s")


def main() -> None:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{device.device_kind} ({device.platform}, {cores} cores), JAX {jax.__version__}, bits {BITS}, float32")
    if FLAGS.model:
        whole_model(FLAGS.model, FLAGS.sequences, FLAGS.length)
        return
    columns = (
        "in x out",
        "compile s",
        "Cholesky s",
        "solve s",
        "memory MB",
        "plain s",
        "plain / ours",
        "same",
        "error",
    )
    print(("{:>13}" * len(columns)).format(*columns))
    for rows, outputs in (*SHAPES, *((LARGE,) if FLAGS.large else ())):
        kernel, hessian = problem(rows, outputs)
        bits = jnp.float32(BITS)
        # A first, small program takes JAX's own start-up out of the compile time.
        compiled(gptq.solve, kernel[:8, :8], hessian[:8, :8], bits)
        solving, seconds = compiled(gptq.solve, kernel, hessian, bits)
        used = solving.memory_analysis()
        memory = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        cholesky, _ = compiled(gptq.factorize, hessian)
        arguments = (hessian,), (kernel, hessian, bits)
        t_factor, t_solve = fastest((cholesky, solving), arguments, FLAGS.repeats)
        solution = solving(kernel, hessian, bits)
        by_column, same = np.nan, np.nan
        if FLAGS.plain and (device.platform != "cpu" or rows * outputs < 4096**2):
            program, _ = compiled(plain, kernel, hessian, bits)
            (by_column,) = fastest((program,), ((kernel, hessian, bits),), 1)
            same = np.mean(program(kernel, hessian, bits) == solution.codes)
        nearest = rtn.quantize_kernel(kernel, BITS)
        error = output_error(kernel, solution.dequantized, hessian) / output_error(kernel, nearest, hessian)
        numbers = (
            f"{rows} x {outputs}",
            f"{seconds:.2f}",
            f"{t_factor:.4f}",
            f"{t_solve:.4f}",
            f"{memory / 1e6:.0f}",
            f"{by_column:.2f}",
            f"{by_column / t_solve:.1f}",
            f"{same:.4f}",
            f"{error:.2f}",
        )
        print(("{:>13}" * len(columns)).format(*numbers), flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

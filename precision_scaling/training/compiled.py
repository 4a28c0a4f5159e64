"""The compiled programs of a cohort, and how many lanes of them the devices' memory holds."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from precision_scaling.errors import ConfigError
from precision_scaling.model.accounting import count_parameters
from precision_scaling.model.config import ModelConfig
from precision_scaling.runtime import compilation, hosts
from precision_scaling.runtime.sharding import Layout, splitting
from precision_scaling.training import step
from precision_scaling.training.step import RunInputs, StepConfig

MEMORY_SHARE = 0.9  # of a device's memory that training may take; evaluation and copies of single runs need some, too


@dataclasses.dataclass(frozen=True)
class CompiledCohort:
    """Compiled for a shape, a layout and a number of lanes; every result is made in its place on the mesh."""

    one: Any  # abstract state of a run
    initialize: Callable  # seed -> state of one run
    spread: Callable  # state of one run -> that state in all lanes
    train: jax.stages.Wrapped  # (state, inputs, tokens, steps) -> (state, metrics)
    parameters: Callable  # (parameters of all lanes, lane) -> those of one
    pick: Callable  # (state of any number of lanes, lane) -> that of one
    put: Callable  # (state, lane, state of one run) -> state


@functools.lru_cache(maxsize=8)
def compiled_cohort(config: StepConfig, layout: Layout, lanes: int) -> CompiledCohort:
    """Those of a cohort. train's tokens: (T, R, M, B, S + 1), T steps at most, R lanes; see `feed`."""
    one = jax.eval_shape(functools.partial(step.init_state, config), 0)
    single, many = layout.of_tree(one), layout.of_tree(stacked(one, lanes), lanes=True)

    def train(state, inputs, tokens_TxRxMxBxS1, steps):
        def fetch(t):
            tokens = jax.lax.dynamic_index_in_dim(tokens_TxRxMxBxS1, t, 0, keepdims=False)
            return tokens.astype(jnp.int32)

        with splitting(layout):
            return step.train_chunk(config, state, inputs, fetch, steps, tokens_TxRxMxBxS1.shape[0])

    take = lambda tree, lane: jax.tree.map(lambda x: x[lane], tree)
    put = lambda state, lane, one: jax.tree.map(lambda x, y: x.at[lane].set(y), state, one)
    spread = lambda one: jax.tree.map(lambda x: jnp.repeat(x[None], lanes, axis=0), one)
    return CompiledCohort(
        one,
        initialize=compilation.jit(
            functools.partial(step.init_state, config), level=1, platform=layout.platform, out_shardings=single
        ),
        spread=jax.jit(spread, out_shardings=many),
        train=compilation.jit(train, platform=layout.platform, donate_argnums=0, out_shardings=(many, layout.place())),
        parameters=jax.jit(take, out_shardings=single.params),
        pick=jax.jit(take, out_shardings=single),
        put=jax.jit(put, donate_argnums=0, out_shardings=many),
    )


def stacked(one: Any, lanes: int) -> Any:
    """The abstract state of so many runs, from that of one."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype), one)


def lanes_that_fit(
    config: StepConfig, layout: Layout, lanes: int, arguments: Callable[[int], tuple[RunInputs, jax.ShapeDtypeStruct]]
) -> int:
    """The number of lanes, at most `lanes`, whose training program fits the devices; it is compiled then.

    arguments: from a number of lanes to the program's inputs and abstract tokens. The compiler says what a program
    needs, for the lanes that are asked for, the fewest that the mesh allows, and those that a line through both has at
    MEMORY_SHARE of the device. ConfigError where the fewest are too many.
    """
    memory, fewest = device_memory(layout), layout.sizes["run"]
    most = MEMORY_SHARE * memory
    needed = lambda n: _bytes(config, layout, n, *arguments(n))
    if (all_ := needed(lanes)) <= most:
        return lanes
    if (least := needed(fewest) if lanes > fewest else all_) > most:
        _, _, microbatches, sequences, _ = arguments(fewest)[1].shape
        raise ConfigError(
            "train.batch_size",
            microbatches * sequences,
            f"what fits a device's {memory / 2**30:.3g} GiB: width {config.model.width} and depth "
            f"{config.model.depth} need {least / 2**30:.3g}; train.microbatches, model.remat, mesh.fsdp save some",
        )
    steps = (most - least) / (all_ - least) * (lanes // fewest - 1)
    found = fewest * (1 + int(steps))
    while found > fewest and needed(found) > most:
        found -= fewest
    return found


def check_memory(layout: Layout, model: ModelConfig) -> None:
    """ConfigError for a model whose parameters alone are more than the devices hold; before they are made."""
    _, parameters = count_parameters(model)
    needed, memory = 4 * parameters // (layout.sizes["fsdp"] * layout.sizes["tensor"]), device_memory(layout)
    if needed > memory:
        shape = f"width {model.width}, depth {model.depth} and a vocabulary of {model.vocab_size:,}"
        raise ConfigError(
            "model.size",
            shape,
            f"what fits a device's {memory / 2**30:.3g} GiB: the parameters need {needed / 2**30:.3g}; mesh.fsdp and "
            "mesh.tensor divide them",
        )


def _bytes(config: StepConfig, layout: Layout, lanes: int, inputs: RunInputs, tokens: jax.ShapeDtypeStruct) -> int:
    """What each device holds while the program runs."""
    these = compiled_cohort(config, layout, lanes)
    state = layout.abstract(stacked(these.one, lanes), lanes=True)
    return bytes_in_use(these.train.lower(state, inputs, tokens, 1).compile().memory_analysis())


def bytes_in_use(used: Any) -> int:
    """What each device holds while a program runs. used: its `memory_analysis()`."""
    return (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        - used.alias_size_in_bytes
        + used.temp_size_in_bytes
        + used.generated_code_size_in_bytes
    )


def device_memory(layout: Layout) -> int:
    """Bytes that a program may take on the smallest device of a layout: what the device tells, or the share of its
    machine's memory."""
    mine = [device for device in layout.mesh.devices.flat if device.process_index == jax.process_index()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    smallest = min((device.memory_stats() or {}).get("bytes_limit", machine) for device in mine)
    return -hosts.largest(-(smallest >> 20)) << 20  # in whole MiB, for all processes to agree on

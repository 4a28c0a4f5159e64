"""Text from a trained run: its own tokenizer, its own precision, one token after the other.

For looking at what a model has learned. Each token takes a forward pass over a whole window; there is no KV cache.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_scaling.errors import UserError
from precision_scaling.model.decoder import Decoder, ModelConfig
from precision_scaling.quantize.static import StaticPrecision
from precision_scaling.runtime import compilation
from precision_scaling.runtime.sharding import Layout
from precision_scaling.study import results
from precision_scaling.study.workspace import Workspace
from precision_scaling.training.run import Cohort, Run


def trained_run(workspace: Workspace, run_id: str = "") -> tuple[Cohort, Run]:
    """A run that has a checkpoint, with its cohort; the id may be left empty where there is only one. UserError."""
    trained = {
        run.id: (group, run)
        for group in workspace.experiment.cohorts
        for run in workspace.experiment.models(group.runs)
        if any(row["status"] == "ok" for row in results.read_rows(workspace.directory(run), "trained"))
    }
    itself = [found for found in trained.values() if not found[1].ema]  # not one of the averages of its parameters
    if run_id not in trained and (run_id or len(itself) != 1):
        allowed = f"one of {', '.join(trained)}" if trained else "the workdir of a run that is trained"
        raise UserError(f"--run={run_id}: allowed is {allowed}")
    return trained[run_id] if run_id else itself[0]


def next_token_logits(workspace: Workspace, cohort: Cohort, run: Run) -> Callable[[Sequence[int]], np.ndarray]:
    """ids -> logits of the token that follows them, float32 (V,), at the precision that the run is evaluated at.

    Of more ids than the sequence length S, the last S count. Fewer are repeated up to S, so that one compiled program
    serves all lengths; attention is causal, so that what follows a position does not reach it, except through a scale
    that the whole tensor shares: then the positions are scaled together as those of a window are in training.

    V: ids of the tokenizer; further rows of the embedding are left out.
    """
    static, params = cohort.static.evaluation(), workspace.parameters(run)
    grids, length = static.grids(run.precision, cohort.shape.model.depth), cohort.shape.model.sequence_length
    logits = _logits(cohort.shape.model, static, workspace.layout)

    def of(ids: Sequence[int]) -> np.ndarray:
        window = np.asarray(ids[-length:], np.int32)
        found = logits(params, grids, np.resize(window, length), np.int32(len(window) - 1))
        return np.asarray(found)[: workspace.corpus.vocab_size]

    return of


@functools.lru_cache(maxsize=8)
def _logits(model: ModelConfig, static: StaticPrecision, layout: Layout) -> Callable[..., jax.Array]:
    def logits(params: Any, grids: Any, ids_S: jax.Array, position: jax.Array) -> jax.Array:
        logits_1xSxV = Decoder(model, static).apply({"params": params}, ids_S[None], grids)
        return jnp.take(logits_1xSxV[0], position, axis=0)

    return compilation.jit(logits, out_shardings=layout.place())


def sample(
    logits: Callable[[Sequence[int]], np.ndarray],
    ids: Sequence[int],
    tokens: int,
    end_of_text: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Ids that follow `ids`: at most `tokens`, fewer where a document ends.

    temperature: 0 takes the likeliest token, 1 samples from the distribution that the logits are of. Raises UserError.
    """
    if tokens < 0 or not 0 <= temperature < np.inf:
        raise UserError(f"tokens={tokens}, temperature={temperature}: allowed is 0 or more")
    seen, rng = list(ids), np.random.default_rng(seed)
    for _ in range(tokens):
        scores_V = logits(seen)
        if temperature:  # argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T)
            scores_V = scores_V / temperature + rng.gumbel(size=scores_V.shape)
        seen.append(int(np.argmax(scores_V)))
        if seen[-1] == end_of_text:
            return
        yield seen[-1]


def continuation(
    workspace: Workspace, prompt: str, tokens: int, temperature: float, seed: int, run_id: str
) -> Iterator[bytes]:
    """The text, token by token, with which a trained run continues a prompt that begins a document; see `sample`.

    A piece may end within a character.
    """
    corpus, logits = workspace.corpus, next_token_logits(workspace, *trained_run(workspace, run_id))
    tokenizer = corpus.load_tokenizer()
    (encoded,) = tokenizer.encode([prompt.encode("utf-8")])
    ids = [corpus.end_of_text, *encoded.tolist()]  # documents follow each other, with this between them
    said: list[int] = []
    length = 0
    for token in sample(logits, ids, tokens, corpus.end_of_text, temperature, seed):
        said.append(token)
        text = tokenizer.decode(said)
        yield text[length:]
        length = len(text)

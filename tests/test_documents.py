"""Attention within documents against models that run on each document alone, from starts to a command's tables."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError
from precision_scaling.layer_stats import measure
from precision_scaling.model import attention, documents
from precision_scaling.model.decoder import Decoder
from precision_scaling.numerics.formats import parse
from precision_scaling.ptq import apply, codes
from precision_scaling.ptq.registry import scheme_of
from precision_scaling.quantize.static import UNQUANTIZED, StaticPrecision, StaticQuantizer
from precision_scaling.runtime.sharding import local_layout
from precision_scaling.training import step
from precision_scaling.training.optimizer import OptimizerConfig
from precision_scaling.training.step import StepConfig
from tests.test_model import CONFIG, grids_of, initial, numpy_decoder, variant

pytestmark = pytest.mark.usefixtures("quick_compile")

END = 7
OPTIMIZER = OptimizerConfig(0.9, 0.95, 1e-15, 0.1, 1.0, 0.1)
WITHIN = dataclasses.replace(CONFIG, document_token=END)
# Three documents, the first without its beginning; documents of one token, at the end of a window, and none at all.
TOKENS = np.array(
    [[3, 5, END, 1, 2, 9, 4, END, 6, 2, 1, 8], [END, END, 3, 1, 4, 1, 5, 9, 2, 6, 5, END], list(range(8, 20))], np.int32
)
# A scale of its own for every token: then nothing but attention and positions joins the documents of a window.
BY_TOKEN = StaticPrecision(
    tuple((name, StaticQuantizer(parse("int4").kind, "channel" if name == "w" else "token")) for name in "waqkvp")
)


def pieces(row):
    """Slices of a window that are documents, each from its end of text on."""
    cuts = [*sorted({0, *np.flatnonzero(row == END).tolist()}), len(row)]
    return [slice(first, stop) for first, stop in itertools.pairwise(cuts)]


def alone(compute, tokens=TOKENS):
    """What `compute` of tokens (N, S) gives for each document by itself, put together: (B, S, ...)."""
    documents_of = [[row[piece] for piece in pieces(row)] for row in tokens]
    flat = [one for of_row in documents_of for one in of_row]
    found = iter(compute(np.stack([np.pad(one, (0, len(tokens[0]) - len(one)), constant_values=8) for one in flat])))
    # What follows a document does not reach it.
    return np.stack([np.concatenate([next(found)[: len(one)] for one in of_row]) for of_row in documents_of])


@functools.partial(jax.jit, static_argnames=("config", "static"))
def logits(config, params, tokens, static=UNQUANTIZED, grids=None):
    return Decoder(config, static).apply({"params": params}, tokens, grids)


def test_an_end_of_text_opens_the_document_after_it():
    starts = np.asarray(documents.starts(WITHIN, jnp.asarray(TOKENS)))
    assert starts[0].tolist() == [0, 0, 2, 2, 2, 2, 2, 7, 7, 7, 7, 7]
    assert starts[1].tolist() == [0, 1, *[1] * 9, 11]
    assert not starts[2].any()
    assert documents.positions(starts)[0].tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert documents.starts(CONFIG, TOKENS) is None
    seen = np.asarray(documents.visible(12, 2, starts))  # two queries a position
    for row, of_row in enumerate(pieces(TOKENS[row]) for row in range(3)):
        expected = np.zeros((12, 12), bool)
        for piece in of_row:
            expected[piece, piece] = np.tril(np.ones((piece.stop - piece.start,) * 2, bool))
        assert np.array_equal(seen[row, 0], np.repeat(expected, 2, axis=0))


@pytest.mark.parametrize(
    "name", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("grouped_queries", "biases"))]
)
def test_logits_are_those_of_every_document_alone_by_an_independent_decoder(name):
    config = CONFIG if name is None else variant(name)
    params = initial(config)
    found = logits(dataclasses.replace(config, document_token=END), params, TOKENS)
    np.testing.assert_allclose(found, alone(lambda one: numpy_decoder(params, one, config)), rtol=1e-5, atol=1e-5)
    whole = logits(config, params, TOKENS)
    assert np.abs(found - whole)[:2].max() > 1e-2
    np.testing.assert_allclose(found[2], whole[2], rtol=1e-5, atol=1e-5)  # one document


@pytest.mark.slow
def test_quantized_queries_and_keys_are_those_of_the_document_alone():
    """Which needs positions that begin anew: rounding follows the rotary embedding."""
    params, grids = initial(CONFIG), grids_of(w=4, a=5, q=4, k=4, v=4, p=5)
    found = logits(WITHIN, params, TOKENS, BY_TOKEN, grids)
    expected = alone(lambda one: logits(CONFIG, params, one, BY_TOKEN, grids))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_loss_and_gradients_are_those_of_the_documents_alone(remat):
    config, params = dataclasses.replace(WITHIN, remat=remat), initial(CONFIG)
    tokens = np.concatenate([TOKENS, [[4], [END], [2]]], axis=1).astype(np.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def losses(config, params, tokens):
        logits_BxSxV = Decoder(config).apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxSxV, tokens[:, 1:])

    def by_documents(params):
        """The mean over documents alone, each with the token after it, and shorter ones filled up."""
        total = 0.0
        for row in tokens:
            for piece in pieces(row[:-1]):
                one = np.resize(row[piece.start : piece.stop + 1], 13)
                total += losses(CONFIG, params, one[None])[0, : piece.stop - piece.start].sum()
        return total / TOKENS.size

    step_config = lambda model: StepConfig(model, UNQUANTIZED, OPTIMIZER)
    loss = lambda params: step.loss_fn(params, step_config(config), {}, tokens)
    found, expected = (jax.jit(jax.value_and_grad(each))(params) for each in (loss, by_documents))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found[1], expected[1])


def test_the_option_sets_the_token_and_other_ways_of_attention_are_refused():
    config = base.get_config()
    model = lambda: experiment.resolve(config, experiment.vocab_size(config.data.tokenizer)).runs[0].shape.model
    assert model().document_token == -1
    config.data.within_documents = True
    assert model().document_token == 256
    config.data.tokenizer = "bpe:300"
    assert model().document_token == 0
    config.model.attention = "blocks"
    with pytest.raises(ConfigError, match=r"model\.attention = 'blocks': allowed is auto or whole with data\.within_"):
        model()
    assert attention.way(WITHIN, UNQUANTIZED, 4096) == "whole"
    assert attention.described(WITHIN, UNQUANTIZED) == "attention with all scores at once (within documents)"


@pytest.mark.slow
def test_layer_statistics_are_those_of_the_documents_alone():
    params, grids = initial(CONFIG), grids_of(w=4, a=5, q=4, k=4, v=4, p=5)
    tokens = np.random.default_rng(0).integers(8, 31, (2, 12)).astype(np.int32)
    tokens[:, ::4] = END
    found = measure(WITHIN, BY_TOKEN, params, grids, tokens[None])
    expected = measure(CONFIG, BY_TOKEN, params, grids, tokens.reshape(1, 6, 4))
    for place in found:
        np.testing.assert_allclose(found[place].error, expected[place].error, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration_sees_the_documents_alone(method):
    """A window of three documents gives the codes of three windows of one."""
    params, scheme = initial(CONFIG), scheme_of(method)
    tokens = np.random.default_rng(0).integers(8, 31, (16, 12)).astype(np.int32)
    tokens[:, ::4] = END

    def quantized(config, tokens, batch_size):
        static = scheme.static(UNQUANTIZED)
        options = {"scheme": scheme, "batch_size": batch_size, "layout": local_layout()}
        step_config = StepConfig(config, static, OPTIMIZER)
        (model,), report = apply.quantize_model(step_config, params, {}, tokens, (3,), 0.01, **options)
        return codes.parameters(model)["layers"]["block"], report

    found, report = quantized(WITHIN, tokens, 8)
    expected, _ = quantized(dataclasses.replace(CONFIG, sequence_length=4), tokens.reshape(48, 4), 24)
    other, _ = quantized(CONFIG, tokens, 8)
    kernels = [np.asarray(each["attention"]["out"]["kernel"]) for each in (found, expected, other)]
    assert np.mean(np.isclose(kernels[0], kernels[1], atol=1e-5)) > 0.99
    assert np.mean(np.isclose(kernels[0], kernels[2], atol=1e-5)) < 0.99
    assert np.isfinite(report.error).all()

"""Runs trained together against the same runs alone, against a plain training loop, and beside a run that diverges."""

import contextlib
import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from precision_scaling.data.loader import Loader
from precision_scaling.model import decoder
from precision_scaling.model.decoder import Decoder
from precision_scaling.numerics import formats
from precision_scaling.quantize.parsing import parse
from precision_scaling.runtime import paths
from precision_scaling.runtime.stopping import Stop, Stopped
from precision_scaling.training import checkpoint, cohort, metrics_log
from precision_scaling.training import feed as feed_lib
from precision_scaling.training import step as step_lib
from precision_scaling.training.cohort import Options
from precision_scaling.training.compiled import compiled_cohort
from precision_scaling.training.feed import Chunk
from precision_scaling.training.lanes import Lane

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIONS = Options(lanes=2, log_every=1, checkpoint_seconds=1e9, steps_per_dispatch=4)


def losses_of(workdir, run):
    lines = (paths.run(workdir, run.id) / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def train(finished_study):
    """Trains runs of the shared study's cohort together; returns {run: Finished} in the order in which they ended."""
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts

    def train_together(
        runs, workdir, stop=None, ended=None, loader=None, then=lambda finished: None, optimizer=None, **options
    ):
        ended = {} if ended is None else ended
        cohort.train_cohort(
            dataclasses.replace(group, runs=tuple(runs)),
            loader or workspace.loader(group.shape),
            cohort.Context(
                optimizer or workspace.experiment.optimizer,
                workspace.layout,
                workdir,
                "0of1",
                dataclasses.replace(OPTIONS, **options),
                tqdm(disable=True, total=0),
                stop or Stop(),
            ),
            lambda finished: ended.update({finished.run: finished}) or then(finished),
        )
        return ended

    return train_together


def by_name(runs, part):
    (run,) = (run for run in runs if part in run.id)
    return run


@pytest.mark.slow
def test_bf16_member_equals_a_plain_model_trained_by_a_plain_loop(finished_study):
    workspace, workdir = finished_study
    run = by_name(workspace.experiment.runs, "D768-bf16")
    config = run.shape.model
    params = jax.jit(lambda: decoder.init(config, jax.random.key(run.seed)))()
    first = jax.tree.map(np.zeros_like, params)
    second = first

    @jax.jit
    def loss_and_grads(params, tokens):
        def loss(params):
            logits = Decoder(config).apply({"params": params}, tokens[:, :-1])
            log_p = jax.nn.log_softmax(logits)
            return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

        return jax.value_and_grad(loss)(params)

    decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)
    in_block = jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "layers" and path[-1].key == "kernel", params
    )
    multiplier = (16 / 32) ** -1  # base size 25k: width 32, depth 2; rate times decay is free of the width
    losses, loader = [], workspace.loader(run.shape)
    for t in range(12):
        loss, grads = loss_and_grads(params, loader.windows(loader.window_indices(run.seed, t, 1)[0]).astype(np.int32))
        losses.append(float(loss))
        grads = jax.tree.map(np.asarray, grads)
        norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in jax.tree.leaves(grads)))
        grads = jax.tree.map(lambda g, norm=norm: g * min(1.0, 1.0 / norm), grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g**2, second, grads)
        # 12 steps, warm-up of one, peak 4e-3, final fraction 0.1.
        rate = 4e-3 if t == 0 else 4e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (t - 1) / 11)))

        def apply(p, m, v, decay, block, rate=rate, t=t):
            direction = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-15)
            of_width = multiplier if block else 1.0
            return p - np.float32(rate * of_width) * (direction + 0.1 / of_width * decay * p)

        params = jax.tree.map(apply, params, first, second, decays, in_block)
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    np.testing.assert_allclose(losses_of(workdir, run), losses, rtol=2e-4)
    assert losses[-1] < losses[0] - 0.3


def test_precision_changes_the_losses_and_nothing_else_does(finished_study):
    workspace, workdir = finished_study
    losses = {run.id: losses_of(workdir, run) for run in workspace.experiment.runs}
    long, short = (losses[by_name(workspace.experiment.runs, f"{name}-bf16").id] for name in ("D768", "D448"))
    assert len(long) == 12 and len(short) == 7
    assert long[:2] == pytest.approx(short[:2], rel=1e-6) and long[6] != short[6]  # the schedules part after warm-up
    first_losses = {run.id: losses[run.id][0] for run in workspace.experiment.runs}
    assert len({round(loss, 6) for loss in first_losses.values()}) == 3  # bf16 twice, and two low precisions


def test_one_compilation_serves_all_precisions_lengths_rates_and_seeds(finished_study, train, tmp_path):
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts
    step_config = step_lib.StepConfig(group.shape.model, group.static, workspace.experiment.optimizer, 1)
    programs = compiled_cohort(step_config, workspace.layout, OPTIONS.lanes)
    compiled = (programs.initialize, programs.train, programs.parameters, programs.put)
    for program in compiled:
        program.clear_cache()  # other tests, which may run before, dispatch other numbers of steps
    w4 = by_name(group.runs, "wint4-s0")
    train([dataclasses.replace(w4, steps=2)], tmp_path)
    before = [program._cache_size() for program in compiled]
    # Other lengths, rates, seeds and formats than those it was compiled for.
    runs = [
        dataclasses.replace(w4, steps=3, peak_lr=1e-4, seed=7),
        dataclasses.replace(w4, steps=5, warmup_steps=2, precision=by_name(group.runs, "kint4").precision),
        dataclasses.replace(w4, precision=parse("w3_a6 first:1=bf16 *.down=w8", workspace.experiment.config.precision)),
        dataclasses.replace(w4, precision=parse("w8@0.25_w4@0.5_kv6@.75", workspace.experiment.config.precision)),
    ]
    assert len(train(runs, tmp_path)) == 4
    assert [program._cache_size() for program in compiled] == before
    assert before[1] == 1


def test_a_run_that_diverges_ends_alone(finished_study, train, tmp_path):
    workspace, workdir = finished_study
    bf16, w4 = (by_name(workspace.experiment.runs, f"D768-{name}") for name in ("bf16", "wint4-s0"))
    bad = dataclasses.replace(w4, peak_lr=1e38)
    late = dataclasses.replace(by_name(workspace.experiment.runs, "D448"), steps=5)
    ended = train([bad, bf16, late], tmp_path)
    assert list(ended) == [bad, bf16, late] or list(ended) == [bad, late, bf16]
    assert 1 <= ended[bad].diverged_step < 12
    assert ended[bf16].diverged_step is ended[late].diverged_step is None
    # The run beside it, and the one that took over its lane, have the numbers they have without it.
    assert losses_of(tmp_path, bf16) == losses_of(workdir, bf16)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ended[late].params))
    assert losses_of(tmp_path, bad)[ended[bad].diverged_step] is None  # a JSON null


@dataclasses.dataclass(frozen=True)
class Without(Loader):
    """A stream of batches in which one of a seed's was never."""

    seed: int
    batch_left_out: int

    def window_indices(self, seed, first_step, n_steps):
        steps = np.arange(first_step, first_step + n_steps)
        steps += (seed == self.seed) & (steps >= self.batch_left_out)
        return np.concatenate([super(Without, self).window_indices(seed, int(step), 1) for step in steps])


@pytest.mark.parametrize("stops", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in ("often", "and loses"))])
def test_a_run_goes_back_and_on_without_the_batch_that_is_not_finite(finished_study, train, tmp_path, stops, caplog):
    workspace, _ = finished_study
    w4 = by_name(workspace.experiment.runs, "D768-wint4-s0")
    other = dataclasses.replace(by_name(workspace.experiment.runs, "D768-bf16"), seed=1)
    good = workspace.loader(w4.shape)
    # A token that is none of the vocabulary's: its embedding is NaN.
    tokens = np.array(good.corpus.train)
    tokens[good.window_indices(w4.seed, 5, 1)[0, 0] * good.seq_len + 3] = 60_000
    bad = dataclasses.replace(good, corpus=dataclasses.replace(good.corpus, train=tokens))
    ended = {}
    while set(ended) != {w4, other}:
        with contextlib.suppress(Stopped):
            left = [run for run in (w4, other) if run not in ended]
            train(left, tmp_path / "bad", Stop(minutes=1e-6 if stops else 0), ended, bad, rewinds=1)
        record = paths.run(tmp_path / "bad", w4.id) / "rewinds.json"
        if stops == "and loses" and record.exists() and "is lost" not in caplog.text:
            record.unlink()
    assert (
        f"not finite at step 6; back to step {5 if stops else 0}, and on without batch 5 (rewind 1 of 1)" in caplog.text
    )
    assert ("rewinds.json is lost" in caplog.text) == (stops == "and loses")
    wanted = train(
        [w4, other], tmp_path / "good", loader=Without(good.corpus, good.seq_len, good.batch_size, w4.seed, 5)
    )
    for run in (w4, other):
        assert ended[run].diverged_step is None and ended[run].left_out == (run == w4)
        assert losses_of(tmp_path / "bad", run) == losses_of(tmp_path / "good", run)
        jax.tree.map(np.testing.assert_array_equal, ended[run].params, wanted[run].params)


def test_a_run_that_no_rewind_helps_ends_there(finished_study, train, tmp_path):
    workspace, _ = finished_study
    bad = dataclasses.replace(by_name(workspace.experiment.runs, "D768-wint4-s0"), peak_lr=1e38)
    (found,) = train([bad], tmp_path, rewinds=2).values()
    assert found.left_out == 2 and 1 <= found.diverged_step < 12
    rewinds = json.loads((paths.run(tmp_path, bad.id) / "rewinds.json").read_text())["rewinds"]
    assert len({one["batch"] for one in rewinds}) == len(rewinds) == 2


@pytest.mark.slow
def test_a_cohort_equals_its_runs_trained_one_by_one_whatever_the_lanes(finished_study, train, tmp_path):
    workspace, workdir = finished_study
    runs = [*workspace.experiment.runs]
    runs.append(dataclasses.replace(runs[0], seed=3, steps=9, peak_lr=1e-3))
    for lanes in (1, 2, 4):
        ended = train(runs, tmp_path / str(lanes), lanes=lanes)
        assert set(ended) == set(runs)
    for run in runs:
        alone = losses_of(tmp_path / "1", run)
        assert len(alone) == run.steps
        for lanes in ("2", "4"):
            together = losses_of(tmp_path / lanes, run)
            # Programs for other numbers of lanes sum in another order. With quantized operands such a difference grows
            # as soon as it carries one value over a rounding boundary; without, it stays a float's.
            exact = 3 if run.bits("a", "q", "k", "v", "p") < 16 else 5 if run.bits("w") < 16 else run.steps
            np.testing.assert_allclose(together[:exact], alone[:exact], rtol=2e-4, err_msg=run.id)
            np.testing.assert_allclose(together, alone, rtol=0.05, err_msg=run.id)
    for run in workspace.experiment.runs:
        assert losses_of(tmp_path / "2", run) == losses_of(workdir, run)


@pytest.mark.slow
def test_a_cohort_that_is_stopped_goes_on_to_the_same_bits(finished_study, train, tmp_path):
    workspace, workdir = finished_study
    runs = [by_name(workspace.experiment.runs, f"D768-{name}") for name in ("bf16", "wint4-s0")]
    # A limit that has passed: every call stops after its first dispatch, of one step.
    for steps in (1, 2):
        with pytest.raises(Stopped, match="before the time limit"):
            train(runs, tmp_path, stop=Stop(minutes=1e-6))
        assert [len(losses_of(tmp_path, run)) for run in runs] == [steps, steps]
    # In chunks of another number of steps, too, as larger batches have them.
    ended = train(runs, tmp_path, steps_per_dispatch=3)
    assert set(ended) == set(runs)
    for run in runs:
        assert losses_of(tmp_path, run) == losses_of(workdir, run)
        kept = checkpoint.restore(workspace.directory(run) / "checkpoint", ended[run].params)
        jax.tree.map(np.testing.assert_array_equal, ended[run].params, kept)


@pytest.mark.slow
def test_muon_with_averages_in_lanes_is_muon_alone_and_goes_on_to_the_same_bits(finished_study, train, tmp_path):
    workspace, workdir = finished_study
    runs = [by_name(workspace.experiment.runs, f"D768-{name}") for name in ("bf16", "wint4-s0")]
    muon = dataclasses.replace(workspace.experiment.optimizer, name="muon", ema=(0.5, 0.9))
    whole = train(runs, tmp_path / "whole", optimizer=muon)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(runs, tmp_path / "stopped", optimizer=muon, stop=Stop(minutes=1e-6))
    ended = train(runs, tmp_path / "stopped", optimizer=muon)
    without = dataclasses.replace(muon, ema=())
    alone = train(runs[:1], tmp_path / "alone", optimizer=without, lanes=1)
    for run in runs:
        assert losses_of(tmp_path / "stopped", run) == losses_of(tmp_path / "whole", run) != losses_of(workdir, run)
        jax.tree.map(np.testing.assert_array_equal, ended[run].params, whole[run].params)
        jax.tree.map(np.testing.assert_array_equal, ended[run].averages, whole[run].averages)
    losses = losses_of(tmp_path / "alone", runs[0])
    np.testing.assert_allclose(losses, losses_of(tmp_path / "whole", runs[0]), rtol=2e-4)
    assert losses[-1] < losses[0] and len(ended[runs[0]].averages) == 2 and alone[runs[0]].averages == ()


def test_a_dispatch_is_as_long_as_its_steps_allow(finished_study, train, tmp_path, monkeypatch):
    workspace, workdir = finished_study
    run = by_name(workspace.experiment.runs, "D768-bf16")

    def lengths(name, seconds):
        monkeypatch.setattr("precision_scaling.training.lanes.DISPATCH_SECONDS", seconds)
        train([run], tmp_path / name)
        # Lines of one dispatch have one speed.
        lines = (tmp_path / name / "runs" / run.id / "metrics.jsonl").read_text().splitlines()
        speeds = [json.loads(line)["tokens_per_second"] for line in lines]
        assert losses_of(tmp_path / name, run) == losses_of(workdir, run)
        return [len(list(group)) for _, group in itertools.groupby(speeds)]

    assert lengths("slow", 1e-6) == [1] * 12
    assert lengths("fast", 1e6) == [1, 4, 4, 3]


@pytest.fixture(scope="module")
def sweep(finished_study):
    """Four runs of one trunk, which differ in length and in how their rate ends, and one of its own."""
    workspace, _ = finished_study
    w4 = dataclasses.replace(by_name(workspace.experiment.runs, "wint4-s0"), warmup_steps=2)
    wsd = [
        dataclasses.replace(w4, schedule_name="wsd", steps=steps, decay_steps=decay)
        for steps, decay in ((12, 3), (8, 2), (6, 2))
    ]
    constant = dataclasses.replace(w4, schedule_name="constant", steps=6)
    return [*wsd, constant, by_name(workspace.experiment.runs, "D448")]


@pytest.fixture(scope="module")
def one_by_one(sweep, train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    return workdir, {run: finished for alone in sweep for run, finished in train([alone], workdir).items()}


def test_runs_that_share_their_first_steps_train_them_once(sweep, one_by_one, train, tmp_path, monkeypatch):
    trained = []
    take = feed_lib.Prefetcher.take

    def count(feed, chunk):
        trained.append(chunk.steps * sum(lane is not None for lane in chunk.lanes))
        return take(feed, chunk)

    monkeypatch.setattr(feed_lib.Prefetcher, "take", count)
    ended = train(sweep, tmp_path)
    # The trunk, two and two steps of decay, the last constant one, and the seven of the run that shares nothing.
    assert sum(trained) == 12 + 2 + 2 + 1 + 7
    workdir, alone = one_by_one
    assert set(ended) == set(sweep)
    for run in sweep:
        assert losses_of(tmp_path, run) == losses_of(workdir, run)
        jax.tree.map(np.testing.assert_array_equal, ended[run].params, alone[run].params)
    assert not list(tmp_path.glob("runs/*/branch"))


@pytest.mark.slow
def test_branches_outlive_a_stop_and_one_that_is_damaged_is_trained_anew(sweep, one_by_one, train, tmp_path, caplog):
    ended, kept = {}, []
    for _ in range(60):
        with contextlib.suppress(Stopped):
            train([run for run in sweep if run not in ended], tmp_path, Stop(minutes=1e-6), ended)
        if not kept and (kept := list(tmp_path.glob("runs/*/branch"))):  # no lane has taken it yet
            for file in kept[0].rglob("*"):
                if file.is_file() and file.stat().st_size > 500:
                    file.write_bytes(b"")
        if set(ended) == set(sweep):
            break
    assert "from its first step" in caplog.text
    for run in sweep:
        assert losses_of(tmp_path, run) == losses_of(one_by_one[0], run)


@pytest.fixture(scope="module")
def switching(finished_study):
    """(a run of which the precision changes twice, the runs that have its three precisions all the time)."""
    workspace, _ = finished_study
    w4 = by_name(workspace.experiment.runs, "D768-wint4-s0")
    of = lambda text: dataclasses.replace(w4, precision=parse(text, workspace.experiment.config.precision))
    stages = ("a6 last:1=bf16", "a6_w8 last:1=bf16", "a6_w3 last:1=bf16")
    return of("a6_w8@0.25_w3@0.5 last:1=bf16"), tuple(map(of, stages))


def test_a_switch_of_precision_equals_runs_joined_by_a_checkpoint(finished_study, switching, train, tmp_path):
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts
    run, parts = switching
    assert run.switch_steps == (3, 6) and [run.precision_at(step) for step in (2, 3, 5, 6)] == [
        parts[0].precision,
        *[parts[1].precision] * 2,
        parts[2].precision,
    ]
    found = train([run], tmp_path)[run]

    programs = compiled_cohort(
        step_lib.StepConfig(group.shape.model, group.static, workspace.experiment.optimizer, 1), workspace.layout, 2
    )
    feed = feed_lib.Prefetcher(workspace.loader(run.shape), workspace.layout, 2, 1, OPTIONS.steps_per_dispatch)
    state = programs.initialize(run.seed)
    for part, chunks in zip(parts, ([(0, 3)], [(3, 3)], [(6, 4), (10, 2)]), strict=True):
        lanes = programs.put(programs.spread(programs.initialize(9)), 0, state)
        for step, steps in chunks:
            inputs = cohort._inputs(group, [Lane(part, step), None])
            lanes, _ = programs.train(lanes, inputs, feed.take(Chunk(((run.seed, step), None), steps)), steps)
        checkpoint.save(tmp_path / "joint", programs.pick(lanes, 0))
        state = checkpoint.restore(tmp_path / "joint", workspace.layout.abstract(programs.one))
    feed.close()
    jax.tree.map(np.testing.assert_array_equal, found.params, state.params)


@pytest.mark.slow
def test_runs_share_the_steps_before_they_switch_and_go_on_to_the_same_bits(
    finished_study, switching, train, tmp_path, monkeypatch
):
    run, (plain, *_) = switching
    late = dataclasses.replace(run, precision=dataclasses.replace(run.precision, before=run.precision.before[:1]))
    trained = []
    take = feed_lib.Prefetcher.take

    def count(feed, chunk):
        trained.append(chunk.steps * sum(lane is not None for lane in chunk.lanes))
        return take(feed, chunk)

    monkeypatch.setattr(feed_lib.Prefetcher, "take", count)
    wanted = train([plain, run, late], tmp_path / "together")
    assert sum(trained) == 12 + 2 * 9
    ended = {}
    while set(ended) != set(wanted):  # every call stops after its first dispatch
        with contextlib.suppress(Stopped):
            left = [one for one in wanted if one not in ended]
            train(left, tmp_path / "stopped", Stop(minutes=1e-6), ended)
    for one in wanted:
        alone = train([one], tmp_path / "alone")[one]
        assert losses_of(tmp_path / "together", one) == losses_of(tmp_path / "alone", one)
        assert losses_of(tmp_path / "together", one) == losses_of(tmp_path / "stopped", one)
        jax.tree.map(np.testing.assert_array_equal, alone.params, ended[one].params)
    assert len({tuple(losses_of(tmp_path / "alone", one)) for one in wanted}) == 3


def test_what_is_left_of_an_end_is_done_after_the_next_steps_and_whatever_comes(finished_study, train, tmp_path):
    workspace, _ = finished_study
    long, short = (by_name(workspace.experiment.runs, f"{name}-bf16") for name in ("D768", "D448"))
    steps_then = {}

    def then(finished):
        return lambda: steps_then.update({finished.run: len(losses_of(tmp_path, long))})

    train([short, long], tmp_path, then=then)
    assert steps_then == {short: short.steps + OPTIONS.steps_per_dispatch, long: long.steps}
    steps_then.clear()

    def fails(finished):
        if finished.run is long:
            raise OSError("the disk is full")
        return then(finished)

    with pytest.raises(OSError, match="disk"):
        train([short, long], tmp_path / "other", then=fails)
    assert list(steps_then) == [short]


def test_too_little_memory_means_fewer_lanes_and_the_same_runs(finished_study, train, tmp_path, monkeypatch, caplog):
    workspace, _ = finished_study
    runs = workspace.experiment.runs[:2]
    monkeypatch.setattr(cohort, "lanes_that_fit", lambda step_config, layout, lanes, arguments: 2)
    ended = train(runs, tmp_path, lanes=3)
    assert "2 runs at a time; the devices have too little memory for 3" in caplog.text
    assert set(ended) == set(runs)


def test_metrics_are_cut_back_to_a_step_and_of_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    path.write_text("".join(lines) + '{"step": 8, "lo')
    metrics_log.MetricsLog().truncate(path, 8)
    assert path.read_text() == "".join(lines)
    metrics_log.MetricsLog().truncate(path, 5)
    assert path.read_text() == "".join(lines[:2])
    metrics_log.MetricsLog().truncate(path, 0)
    assert path.read_text() == ""
    metrics_log.MetricsLog().truncate(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_table_holds_the_grids_of_the_operands_that_the_program_quantizes(finished_study):
    workspace, _ = finished_study
    (group,) = workspace.experiment.cohorts
    run = by_name(group.runs, "kint4")
    grids = group.static.grids(run.precision, 2)
    assert {name: np.unique(grid.max_value).tolist() for name, grid in grids.items()} == {
        name: [bits] for name, bits in (("w", 3), ("a", 7), ("k", 7), ("v", 7))
    }
    high = group.static.grids(run.precision, 2, w=formats.parse("bf16"))
    assert (high["w"].passthrough == 1).all()
    np.testing.assert_array_equal(high["a"], grids["a"])

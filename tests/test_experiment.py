"""Resolving a config: the runs of a grid, their names and cohorts, and one clear line for each thing that cannot be."""

import dataclasses

import ml_collections
import pytest

from precision_scaling.config import base, experiment
from precision_scaling.errors import UserError
from precision_scaling.study.workspace import open_workspace


def resolve(**options):
    config = base.get_config()
    grid = options.pop("grid", {})
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in options.items()})
    for part, entries in grid.items():
        config.study.grid[part] = base.grid(**entries)
    return experiment.resolve(config, 257)


GRID = {
    "one": {"sizes": ("14k", "25k"), "tokens": (10_000, 20_000), "precisions": ("bf16", "w4", "a6_kv3")},
    "two": {"sizes": ("25k",), "tokens": (20_000,), "precisions": ("w4", "e2m1".join(("w", ""))), "seeds": (0, 5)},
}


def test_a_grid_is_the_product_of_its_lists_with_equal_points_once():
    runs = resolve(grid=GRID).runs
    # 2·2·3 and 1·1·2·2, of which 25k at 20 000 tokens with w4 and seed 0 is in both.
    assert len(runs) == 12 + 4 - 1
    points = {(run.shape.size, run.tokens, run.bits("w"), run.bits("a"), run.bits("k", "v"), run.seed) for run in runs}
    assert ("25k", 19 * 1024, 4, 16, 16, 5) in points  # 20 000 tokens are 19 whole batches of 16 × 64
    assert ("14k", 9 * 1024, 16, 6, 3, 0) in points


def test_a_config_without_a_grid_is_one_run_of_its_options():
    (run,) = resolve(train__tokens=2500, train__seed=7, precision__weights="int3", precision__k="e2m1").runs
    assert (run.steps, run.tokens, run.seed, run.warmup_steps, run.peak_lr) == (2, 2048, 7, 1, 4e-3)
    assert run.ptq
    names = {name: fmt.name for name, ((fmt, _),) in run.formats}
    assert names == {"w": "int3", "a": "bf16", "q": "bf16", "k": "e2m1", "v": "bf16", "p": "bf16"}
    assert run.bits("k", "v") == 4  # the fewest


def test_run_names_are_distinct_and_depend_on_the_run_alone():
    ids = {run.id for run in resolve(grid=GRID).runs}
    assert len(ids) == 15
    for number in ids:
        assert number == number.strip() and "/" not in number and " " not in number
    # Other order, other parts, other lanes and PTQ: the same names.
    reordered = {name: {**GRID[name], "ptq": True} for name in ("two", "one")}
    reordered["three"] = {"sizes": ("7k",), "tokens": (5_000,)}
    again = {run.id for run in resolve(grid=reordered, study__lanes=1, ptq__bits=(8,)).runs}
    assert ids < again
    # What changes a run changes its name.
    (plain,) = resolve().runs
    for options in (
        {"train__batch_size": 8},
        {"optimizer__peak_lr": 1e-3},
        {"optimizer__warmup_fraction": 0.2},
        {"model__rope_theta": 500.0},
        {"train__seed": 1},
        {"precision__activations_granularity": "token", "precision__activations": "int8"},
    ):
        (other,) = resolve(**options).runs
        assert other.id != plain.id, options
    assert plain.id == resolve().runs[0].id == dataclasses.replace(plain).id


def test_a_shape_without_a_name_is_called_by_its_parameters_and_is_its_own_base():
    shape = {"model__width": 128, "model__depth": 4, "model__heads": 4, "model__mlp_width": 352}
    (run,) = resolve(model__size="", model__base_size="", **shape).runs
    # 4 layers of 4·128² + 3·128·352 + 2·128, and 128: 803,968.
    assert run.shape.size == "804k" and run.id.startswith("804k-")
    assert run.shape.model.residual_scale == run.shape.model.logit_scale == 1
    # Saying what is so anyway changes nothing; more rows than the tokenizer needs do.
    (said,) = resolve(model__size="", model__base_size="", model__kv_heads=4, model__head_width=32, **shape).runs
    assert said.id == run.id
    (padded,) = resolve(model__size="", model__base_size="", model__vocab_size=512, **shape).runs
    assert padded.id != run.id and padded.shape.model.vocab_size == 512


def test_a_shape_that_is_not_its_sizes_is_called_by_its_parameters():
    """The named sizes keep their names; so do shapes with as many parameters, whatever else is changed."""
    (named,) = resolve().runs
    assert named.shape.size == "25k" and named.id == "25k-D999424-bf16-s0-2bf48d"
    # Two layers of 4·64² + 3·64·176 + 2·64, and 64: 100,672; the width alone sets 8/3 of it as the hidden width.
    (wide,) = resolve(model__width=64).runs
    assert wide.shape.size == "101k" and wide.id.startswith("101k-")
    # With the 88 hidden units of size 25k two layers have 2·(4·64² + 3·64·88 + 2·64) + 64 = 66,880 parameters.
    (narrow,) = resolve(model__width=64, model__mlp_width=88).runs
    assert narrow.shape.size == "66.9k"
    for changed, size in (
        ({"model__heads": 4}, "25k"),
        ({"model__head_width": 16}, "25k"),
        ({"model__qk_norm": "head"}, "25k"),
        ({"model__tie_embeddings": True}, "25k"),
        ({"model__depth": 1}, "12.6k"),
        ({"model__kv_heads": 1}, "23.2k"),
    ):
        (run,) = resolve(**changed).runs
        assert run.shape.size == size, changed
    part = {"sizes": ("14k", "25k"), "tokens": (10_000,)}
    runs = resolve(grid={"one": part}, model__width=64).runs  # they differ in their heads alone
    assert [run.shape.size for run in runs] == ["101k", "101k"] and len({run.id for run in runs}) == 2


def test_a_config_read_back_from_json_gives_the_same_runs():
    config = base.get_config()
    config.study.grid.one = base.grid(**GRID["one"])
    again = ml_collections.ConfigDict(experiment.describe(config))
    assert [run.id for run in experiment.resolve(again, 257).runs] == [
        run.id for run in experiment.resolve(config, 257).runs
    ]


def test_every_run_is_in_one_cohort_with_all_of_its_shape_longest_first():
    resolved = resolve(grid=GRID)
    members = [run for cohort in resolved.cohorts for run in cohort.runs]
    assert sorted(run.id for run in members) == sorted(run.id for run in resolved.runs)
    for cohort in resolved.cohorts:
        assert {run.shape for run in cohort.runs} == {cohort.shape}
        steps = [run.steps for run in cohort.runs]
        assert steps == sorted(steps, reverse=True)
    assert len(resolved.cohorts) == 2  # integers, floats and bf16 of one size share a program


def test_a_study_that_mixes_kinds_of_formats_still_resolves():
    precisions = ("bf16", "w4", "wmxfp4", "wternary", "a8/token", "a8")
    part = {"sizes": ("25k",), "tokens": (10_000,), "precisions": precisions}
    resolved = resolve(grid={"one": part}, model__width=32, model__mlp_width=96)
    assert len(resolved.runs) == 6
    assert sorted(run.id for cohort in resolved.cohorts for run in cohort.runs) == sorted(
        run.id for run in resolved.runs
    )


def grid_of(**entries):
    return {"grid": {"one": {"sizes": ("25k",), "tokens": (10_000,), **entries}}}


BAD = [
    ({"precision__weights": "int1"}, "precision.weights", "int1"),
    ({"precision__weights": "1"}, "precision.weights", "bits"),
    ({"precision__activations": "e9m9"}, "precision.activations", "e9m9"),
    ({"precision__k": "nonsense"}, "precision.k", "nonsense"),
    ({"precision__weights_granularity": "row"}, "weights_granularity", "row"),
    ({"model__heads": 3}, "model.heads", "divisor"),
    ({"model__width": 34, "model__heads": 34}, "model.heads", "even"),
    ({"model__heads": -1}, "model.heads", "-1"),
    ({"model__size": "31k"}, "model.size", "25k"),
    ({"model__base_size": "huge"}, "size", "huge"),
    ({"model__size": "", "model__width": 32, "model__heads": 2, "model__mlp_width": 8}, "model.depth", "size is empty"),
    ({"model__kv_heads": 3}, "model.kv_heads", "divisor"),
    ({"model__kv_heads": -1}, "model.kv_heads", "-1"),
    ({"model__head_width": 7}, "model.head_width", "even"),
    ({"model__vocab_size": 256}, "model.vocab_size", "257"),
    ({"model__norm_placement": "sandwich"}, "model.norm_placement", "pre, post"),
    ({"model__norm_type": "batch"}, "model.norm_type", "rms, layer"),
    ({"model__qk_norm": "on"}, "model.qk_norm", "none, projection, head"),
    ({"model__imported": "olmo@1", "precision__weights": "int4"}, "precision", "bf16"),
    ({"model__dtype": "float16"}, "model.dtype", "bfloat16"),
    ({"model__sequence_length": 0}, "model.sequence_length", "from 1"),
    ({"train__tokens": 1023}, "train.tokens", "1024"),
    ({"train__batch_size": 0}, "train.batch_size", "from 1"),
    ({"train__microbatches": 3}, "train.microbatches", "divisor"),
    ({"train__steps_per_dispatch": 0}, "train.steps_per_dispatch", "from 1"),
    ({"evaluate__sequences": 100}, "evaluate.sequences", "multiple"),
    ({"optimizer__peak_lr": 0.0}, "optimizer.peak_lr", "above 0"),
    ({"optimizer__peak_lr": float("nan")}, "optimizer.peak_lr", "above 0"),
    ({"optimizer__beta2": 1.0}, "optimizer.beta2", "not, 1"),
    ({"optimizer__warmup_fraction": 1.5}, "optimizer.warmup_fraction", "0 to 1"),
    ({"optimizer__clip_norm": -1.0}, "optimizer.clip_norm", "from 0"),
    ({"ptq__methods": ("gptq", "magic")}, "ptq.methods", "magic"),
    ({"ptq__bits": (3, 1)}, "ptq.bits", "2 to 8"),
    ({"ptq__bits": (3, 4.5)}, "ptq.bits", "4.5"),
    ({"ptq__bits": ("3",)}, "ptq.bits", "whole"),
    ({"study__lanes": 0}, "study.lanes", "from 1"),
    (grid_of(precisions=("w4_b8",)), "precisions", "w4_b8"),
    (grid_of(precisions=("w1",)), "precisions", "w1"),
    (grid_of(precisions=("w",)), "precisions", "'w'"),
    (grid_of(precisions=()), "study.grid.one.precisions", "not empty"),
    (grid_of(tokens=(100,)), "tokens", "1024"),
    (grid_of(tokens=("many",)), "tokens", "many"),
    (grid_of(sizes=("25k", "26k")), "size", "26k"),
    (grid_of(seeds=("a",)), "seeds", "'a'"),
    (grid_of(seeds=(2**40,)), "seeds", str(2**40)),
]


@pytest.mark.parametrize(("options", "key", "said"), BAD, ids=[f"{key}-{i}" for i, (_, key, _) in enumerate(BAD)])
def test_what_cannot_be_is_one_line_that_names_key_and_value(options, key, said):
    with pytest.raises(UserError) as error:
        resolve(**options)
    message = str(error.value)
    assert key in message and said in message and "\n" not in message and len(message) < 600


def test_parts_of_a_grid_with_unknown_entries_are_refused():
    config = base.get_config()
    part = base.grid(("25k",), (10_000,)).to_dict()
    config.study.grid.one = ml_collections.ConfigDict({**part, "precision": ("w4",)})
    with pytest.raises(UserError, match=r"did you mean config\.study\.grid\.one\.precisions"):
        experiment.resolve(config, 257)


def test_bad_data_and_sizes_are_refused_before_the_workdir_is_touched(tiny_config, tmp_path):
    workdir = tmp_path / "w"
    for options, said in (
        ({"data__root": str(tmp_path / "nowhere")}, "data.root"),
        ({"data__tokenizer": "words"}, "data.tokenizer"),
        ({"data__validation_fraction": 0.0}, "data.validation_fraction"),
        ({"data__validation_fraction": 1e-9}, "no validation document"),
        ({"evaluate__sequences": 40_000}, "evaluate.sequences"),
        ({"ptq__calibration_sequences": 10**6}, "ptq.calibration_sequences"),
        ({"model__sequence_length": 50_000, "train__tokens": 10**6}, "seq_len"),
    ):
        with pytest.raises(UserError, match=said) as error:
            open_workspace(tiny_config(**options), workdir)
        assert "\n" not in str(error.value)
        assert not workdir.exists()

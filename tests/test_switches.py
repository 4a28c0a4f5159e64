"""Precisions that change in training: as they are written, at which steps, and which runs share their beginning."""

import dataclasses

import pytest

from precision_scaling.config import base, experiment
from precision_scaling.errors import ConfigError
from precision_scaling.quantize.parsing import from_options, parse
from precision_scaling.study import results
from precision_scaling.training import lanes
from precision_scaling.training.lanes import Lane


def options(**leaves):
    config = base.get_config().precision
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in leaves.items()})
    return config


def told(precision):
    """[(until, what)], the last until the end."""
    ends = [*(end for end, _ in precision.before), "end"]
    return [(end, stage.describe()) for end, stage in zip(ends, precision.stages, strict=True)]


def runs(*texts, tokens=(64_000,), **leaves):
    config = base.get_config()
    config.update_from_flattened_dict({"model.sequence_length": 64, "train.batch_size": 10, **leaves})
    config.study.grid.some = base.grid(("25k",), tokens, texts)
    return experiment.resolve(config, 257)


W4, W8, A8 = "w=int4/channel/nearest", "w=int8/channel/nearest", "a=int8/tensor/nearest"


def test_parts_begin_at_shares_of_the_steps_or_at_the_decay():
    default = options()
    assert told(parse("w4@0.8", default)) == [("0.8", "bf16"), ("end", W4)]
    assert told(parse("w8_w4@decay", default)) == [("decay", W8), ("end", W4)]
    assert told(parse("w4@.80_a8@0.25", default)) == [("0.25", "bf16"), ("0.8", A8), ("end", f"{W4} {A8}")]
    assert told(parse("w4_w16@0.5", default)) == [("0.5", W4), ("end", "bf16")]
    assert told(parse("w4@0.5_w4@0.7", default)) == [("0.5", "bf16"), ("end", W4)]  # which changes nothing
    fp8 = parse("fp8_kv8@0.7 @.5 last:1=bf16", default)
    assert [end for end, _ in told(fp8)] == ["0.5", "0.7", "end"]
    assert fp8.stages[1] == parse("fp8 last:1=bf16", default) and fp8.stages[2] == parse("fp8_kv8 last:1=bf16", default)
    assert parse("w4_a8 @decay", default) == parse("w4@decay_a8@decay", default)
    assert from_options(options(weights="int8", switches="0.5=bf16, decay=w4")) == parse("w8_w16@.5_w4@decay", default)
    # Rotated for the sake of a part of it, rotated from the beginning.
    rotated = options(rotation="hadamard")
    assert all(stage.rotated for text in ("w4@0.8", "w4_w16@0.8") for stage in parse(text, rotated).stages)


@pytest.mark.parametrize(
    ("text", "words"),
    (
        ("w4@1.5", ("4@1.5", "above 0 and below 1")),
        ("w4 @0", ("'@0'", "decay")),
        ("bf16 @0.5", ("'bf16 @0.5'", "none after bf16")),
        ("w4 @0.5 @0.6", ("'w4 @0.5 @0.6'", "one @SHARE")),
        ("w4@0.8_w5@0.8", ("each part once", "w is there twice")),
        ("w4/group:32@0.5_w4", ("precision.switches", "same kinds of formats, granularity")),
        ("w4_wmxfp4@0.5", ("precision.switches", "kinds of formats")),
        ("w8_a8 @0.5", ("precision.switches", "mode")),
    ),
)
def test_mistakes_are_one_line(text, words):
    with pytest.raises(ConfigError) as caught:
        parse(text, options(mode="native") if "mode" in words else options())
    message = str(caught.value)
    assert "\n" not in message and "allowed is" in message and all(word in message for word in words), message


@pytest.mark.parametrize("text", ["0.5", "1.2=w4", "0.5=", "0.5=w4@0.8", "x=w4"])
def test_switches_that_say_nothing_are_refused(text):
    with pytest.raises(ConfigError, match=r"precision\.switches"):
        from_options(options(switches=text))


def test_switches_are_at_steps_of_the_run():
    (run,) = runs("w8_w4@0.25_w3@decay", **{"optimizer.schedule": "wsd"}).runs
    assert run.steps == 100 and run.switch_steps == (25, 80)
    row = results.setting_columns(base.get_config(), run)
    assert row["P_w"] == 3 and row["switched_share"] == 0.8 and row["switches"] == "wint8 until 0.25; wint4 until decay"
    assert run.id.startswith("25k-D64000-wint8_to0.25_then_wint4_todecay_then_wint3-wsd-s0-")
    assert results.setting_columns(base.get_config(), *runs("w4").runs)["switches"] == ""
    (often,) = runs("_".join(f"w{n}@0.{n}_a{n}@0.{n}_kv{n}@0.{n}" for n in range(2, 10))).runs
    assert len(often.precision.short) > 250 > len(often.id)
    # A cosine decays from the end of the warm-up on.
    assert runs("w4@decay").runs[0].switch_steps == (10,)
    for text, leaves in (
        ("w4@decay", {"optimizer.schedule": "constant"}),
        ("w4@0.999", {}),
        ("w8@0.9_w4@decay", {"optimizer.schedule": "wsd"}),
    ):
        with pytest.raises(ConfigError, match=r"precision.switches = .*at steps 1 to 99"):
            runs(text, **leaves)


def test_one_cohort_serves_all_switches_of_a_family():
    texts = ("bf16", "w4", "w4@0.5", "w8_w4@0.8", "w4_a8 @0.25 first:1=bf16", "w8@0.1_w6@0.2_w4@0.3_w3@0.4")
    assert len(runs(*texts).cohorts) == 1 and len(runs("w4@0.5", "wternary@0.5").cohorts) == 2


def test_runs_share_their_steps_before_the_switch():
    (cohort,) = runs("bf16", "w4@0.5", "w4@0.8", "w8_w4@0.8").cohorts
    plain, late, early = cohort.runs[0], cohort.runs[1], cohort.runs[-1]
    by_text = {run.precision.short: run for run in cohort.runs}
    plain, other = by_text["bf16"], by_text["wint8_to0.8_then_wint4"]
    late, early = by_text["bf16_to0.8_then_wint4"], by_text["bf16_to0.5_then_wint4"]
    assert cohort.runs[0] == plain and cohort.runs[-1] == early  # what leads to others is first
    assert (plain.branch_step, late.branch_step, early.branch_step) == (99, 80, 50)
    assert Lane(plain, 0).leads_to(late) and Lane(plain, 50).leads_to(early) and Lane(late, 50).leads_to(early)
    assert not Lane(early, 0).leads_to(late) and not Lane(plain, 51).leads_to(early)
    assert not Lane(plain, 0).leads_to(other) and not Lane(plain, 0).leads_to(dataclasses.replace(late, seed=1))
    # Of runs of different lengths those whose rate does not depend on it.
    for schedule, shared in (("wsd", True), ("cosine", False)):
        found = runs("w4@0.5", tokens=(64_000, 32_000), **{"optimizer.schedule": schedule, "optimizer.warmup_steps": 5})
        long, short = found.runs
        assert (long.branch_step, short.branch_step) == (50, 25) and Lane(long, 0).leads_to(short) == shared


def test_a_dispatch_ends_where_a_precision_changes():
    switching, plain = runs("w8_w4@0.25_w3@0.5", "w4").runs
    chunk = lambda *held: lanes.next_chunk(held, [], 1000).steps
    assert [chunk(Lane(switching, step), Lane(plain, 0)) for step in (0, 20, 25, 50)] == [25, 5, 25, 50]

"""Every wrong input is one clear line and an exit status, before anything is compiled or written: `bad_inputs`."""

import functools
import re
import time
from pathlib import Path

import numpy as np
import pytest

from precision_scaling import quantize
from precision_scaling.config import base, experiment, options
from precision_scaling.errors import UserError
from precision_scaling.numerics.formats import FormatError
from tests import forked
from tests.bad_inputs import CASES, FAKE_QUANT, OPTIONS, RIGHT, STUDIED, TRAIN, ZERO_IS_RIGHT, Case, wrong_values
from tests.test_bad_tables import good_table

ROOT = Path(__file__).parent.parent
SECONDS = 60.0  # a command that takes longer hangs, on a machine with much else to do, too


def refuse(case: Case, tmp: Path, study: Path | None = None) -> None:
    for name, content in case.files.items():
        if content is None:
            (tmp / name).mkdir()
        else:
            (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp.rglob("*"))
    places = {"tmp": str(tmp), "workdir": str(tmp / "new"), "study": str(study)}
    argv = [_filled(argument, places) for argument in case.argv]
    done = forked.run(case.module, argv, ROOT, timeout=SECONDS)
    line = forked.refusal(done)
    missing = [words for words in case.said if words not in line]
    assert not missing, f"{missing} not in: {line}"
    assert done.code == 2 and len(line) < 900
    assert [path for path in sorted(tmp.rglob("*")) if "__pycache__" not in str(path)] == before


def _filled(argument: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        argument = argument.replace(f"{{{name}}}", place)
    return argument


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_command_refuses(case, tmp_path):
    refuse(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", STUDIED, ids=str)
def test_a_command_refuses_for_a_workdir_with_runs(case, tmp_path, finished_study):
    refuse(case, tmp_path, finished_study[1])


@pytest.mark.slow
@pytest.mark.parametrize("workdir", ["/proc/nothing", "/dev/null/x", "/proc/self/x/y"])
def test_a_workdir_that_cannot_be_written_is_one_line(workdir, data_options):
    data = [f"--config.data.{name}={value}" for name, value in data_options.items()]
    data += ["--config.evaluate.sequences=8", "--config.evaluate.batch_size=8", "--config.ptq.calibration_sequences=8"]
    done = forked.run(TRAIN, ["--config=configs/base.py", f"--workdir={workdir}", *data], ROOT, timeout=120)
    line = forked.refusal(done)
    assert "--workdir" in line and "allowed is" in line


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_refuses_what_it_cannot_be(name):
    for value in wrong_values(name, OPTIONS[name]):
        config = base.get_config()
        *sections, leaf = name.split(".")
        with config.unlocked(), config.ignore_type():
            functools.reduce(getattr, sections, config)[leaf] = value
        with pytest.raises(UserError) as error:
            experiment.resolve(config, 257)
        said = str(error.value)
        assert f"config.{name}" in said and "allowed is" in said and "\n" not in said, (value, said)


def test_zero_is_a_value_of_the_options_that_have_it():
    for name in ZERO_IS_RIGHT:
        options.check_option(name, type(OPTIONS[name])(0))


def test_every_number_has_a_rule():
    numbers = {name for name, default in OPTIONS.items() if type(default) in (int, float, tuple)}
    assert numbers <= set(options.RULES), "add the option's values to options.RULES"
    assert set(options.RULES) <= set(OPTIONS)


@pytest.mark.parametrize(("override", "line"), RIGHT, ids=[override for override, _ in RIGHT])
def test_values_may_be_written_as_people_write_them(override, line):
    done = forked.run("tests.print_config", ["--config=configs/base.py", f"--config.{override}"], ROOT)
    assert done.code == 0, done.stderr
    assert line in done.stdout.splitlines()


def test_an_option_that_is_given_twice_counts_as_the_last_and_a_list_is_joined():
    argv = ["--config=configs/base.py", "--config.model.width=-1", "--config.model.width=64"]
    done = forked.run("tests.print_config", [*argv, "--config.ptq.methods=gptq", "--config.ptq.methods=awq,rtn"], ROOT)
    assert done.code == 0, done.stderr
    assert {"model.width = 64", "ptq.methods = ('gptq', 'awq', 'rtn')"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(("arguments", "said"), FAKE_QUANT, ids=[str(arguments)[:50] for arguments, _ in FAKE_QUANT])
def test_fake_quant_refuses(arguments, said):
    with pytest.raises(FormatError) as error:
        quantize.fake_quant(**{"x": np.ones((12, 64), np.float32), "fmt": 4} | arguments)
    message = str(error.value)
    assert said in message and "allowed" in message and "\n" not in message


S3 = "s3://bucket/x"
CONFIG = "--config={root}/configs/base.py"
STUDY = "--config={root}/configs/study_cpu.py"
FOREIGN = [
    ("precision_scaling.train", [CONFIG, f"--workdir={S3}"]),
    ("precision_scaling.train", [CONFIG, "--workdir=w", f"--config.compilation_cache={S3}"]),
    ("precision_scaling.study", [STUDY, f"--workdir={S3}"]),
    ("precision_scaling.study", [STUDY, "--workdir=w", f"--rows={S3}"]),
    ("precision_scaling.study", [STUDY, "--workdir=w", "--dry_run", f"--settings={S3}"]),
    ("precision_scaling.ptq", [f"--workdir={S3}", "--method=rtn", "--bits=4"]),
    ("precision_scaling.layer_stats", [f"--workdir={S3}"]),
    ("precision_scaling.sample", [f"--workdir={S3}"]),
    ("precision_scaling.loss", [f"--workdir={S3}"]),
    ("precision_scaling.huggingface", ["export", f"--workdir={S3}", "--out=out"]),
    ("precision_scaling.huggingface", ["export", "--workdir=w", f"--out={S3}"]),
    ("precision_scaling.huggingface", ["import", f"--model={S3}", "--workdir=w"]),
    ("precision_scaling.huggingface", ["import", "--model=m", f"--workdir={S3}"]),
    ("analysis.fit", [f"--runs={S3}", "--law=chinchilla", "--out=fit.json"]),
    ("analysis.fit", ["--runs={tmp}/runs.csv", "--law=chinchilla", f"--out={S3}"]),
    ("analysis.compare", ["--runs={tmp}/runs.csv", f"--out={S3}"]),
    ("analysis.compare", [f"--runs={S3}", "--out=out"]),
    ("analysis.report", ["--runs={tmp}/runs.csv", f"--out={S3}"]),
    ("analysis.report", [f"--runs={S3}", "--out=out"]),
    ("analysis.plan", [f"--fit={S3}", "--flops=1e21", "--out=plan.json"]),
    ("analysis.plan", ["--fit=paper", "--flops=1e21", f"--out={S3}"]),
    ("analysis.predict", ["--fit=fit.json", "--runs={tmp}/runs.csv", f"--out={S3}"]),
    ("analysis.predict", [f"--fit={S3}", "--runs={tmp}/runs.csv", "--out=out.csv"]),
]


@pytest.mark.parametrize(("module", "argv"), FOREIGN, ids=[f"{m}-{'-'.join(a)}".replace("/", "") for m, a in FOREIGN])
def test_a_bucket_that_is_not_known_is_refused_before_anything_is_made(module, argv, tmp_path):
    (tmp_path / "runs.csv").write_text(good_table())
    done = forked.run(module, [_filled(a, {"root": str(ROOT), "tmp": str(tmp_path)}) for a in argv], tmp_path)
    line = forked.refusal(done)
    assert done.code == 2 and S3 in line and "allowed" in line and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


HELP = {
    "precision_scaling.train": "config workdir time_limit profile coordinator_address num_processes distributed",
    "precision_scaling.study": "config workdir shard only dry_run rows settings time_limit profile process_id",
    "precision_scaling.ptq": (
        "workdir method bits save group_size asymmetric full_range act_order clip smoothing granularity"
    ),
    "precision_scaling.layer_stats": "workdir run precision sequences",
    "precision_scaling.huggingface": "config workdir model tokens sequence_length run out",
}


@pytest.mark.parametrize("module", HELP)
def test_help_shows_every_flag_of_its_command(module):
    done = forked.run(module, ["--help"], ROOT)
    assert done.code == 0 and not done.stderr
    shown = set(re.findall(r"^ +--(?:\[no\])?(\w+):", done.stdout, re.MULTILINE))
    assert set(HELP[module].split()) <= shown
    assert forked.run(module, ["--helpfull"], ROOT)[:3] == done[:3]


def test_the_harness_is_of_the_size_it_should_be_and_fast(tmp_path):
    assert len(CASES) + len(STUDIED) + len(FAKE_QUANT) >= 200
    started = time.monotonic()
    for case in CASES[:10]:
        refuse(case, tmp_path)
    assert time.monotonic() - started < SECONDS

"""The commands loss and sample: the loss of any text, window by window; packed models; text as it is made."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_scaling.errors import UserError
from precision_scaling.model.decoder import Decoder
from precision_scaling.study import text_loss
from precision_scaling.study.generate import trained_run

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def chosen(finished_study):
    workspace, workdir = finished_study
    run = next(run for run in workspace.experiment.runs if not run.precision.quantizers)
    cohort, run = trained_run(workspace, run.id)
    return workspace, workdir, cohort, run


@pytest.mark.slow
def test_the_loss_of_a_text_is_that_of_its_windows(chosen, tmp_path):
    workspace, _, cohort, run = chosen
    texts = ["def alpha(beta):\n    return beta + 1\n" * 3, "import graph\n" * 9]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    model = text_loss.model_of(workspace, cohort, run)
    found = text_loss.on_text(workspace, model, str(tmp_path / "a.jsonl"), "body")
    end, length = 256, run.shape.model.sequence_length
    stream = np.array([end, *texts[0].encode(), end, *texts[1].encode(), end])
    windows = (len(stream) - 1) // length
    losses, apply = [], jax.jit(Decoder(run.shape.model).apply)
    for i in range(windows):
        part = stream[i * length : (i + 1) * length + 1]
        logits = apply({"params": model.params}, jnp.asarray(part[None, :-1]))
        log_p = np.asarray(jax.nn.log_softmax(logits[0]))
        losses.append(-log_p[np.arange(length), part[1:]].mean())
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert (found.tokens, found.documents) == (windows * length, 2)
    assert found.perplexity == pytest.approx(np.exp(found.loss))
    # A byte is a token, but for the two ends of text.
    assert found.bits_per_byte == pytest.approx(found.loss / np.log(2), rel=0.02)
    first = text_loss.on_text(workspace, model, str(tmp_path / "a.jsonl"), "body", tokens=length)
    assert first.tokens == length and first.loss == pytest.approx(losses[0], rel=1e-4)


def test_what_cannot_be_evaluated_is_one_line(chosen, tmp_path):
    workspace, _, cohort, run = chosen
    model = text_loss.model_of(workspace, cohort, run)
    (tmp_path / "short.txt").write_text("x")
    for root, said in (("short.txt", "2 tokens in 1 documents"), ("none.txt", "--text="), ("*.pdf", "--text=")):
        with pytest.raises(UserError, match=said) as error:
            text_loss.on_text(workspace, model, str(tmp_path / root))
        assert "allowed" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--quantized=gptq-9: allowed is"):
        text_loss.model_of(workspace, cohort, run, "gptq-9")


@pytest.mark.slow
def test_the_commands(chosen, tmp_path, run_command):
    import shutil

    _, trained, _, run = chosen
    workdir = tmp_path / "study"
    shutil.copytree(trained, workdir)
    done = run_command("precision_scaling.ptq", f"--workdir={workdir}", "--method=rtn", "--bits=3", "--save")
    assert done.returncode == 0, done.stderr[-2000:]
    own = (f"--workdir={workdir}", f"--run={run.id}")
    rows = [line.split(",") for line in (workdir / "runs.csv").read_text().splitlines()]
    column = {name: i for i, name in enumerate(rows[0])}
    of_run = {(row[column["method"]], row[column["P_post"]]): row[column["loss"]] for row in rows if row[0] == run.id}
    for options, loss in (((), of_run["", ""]), (("--quantized=rtn-3",), of_run["rtn", "3"])):
        done = run_command("precision_scaling.loss", *own, *options)
        assert done.returncode == 0, done.stderr[-2000:]
        assert f": {float(loss):.4f} nats per token on its held-out text" in done.stdout
    (tmp_path / "a.txt").write_text("def alpha(beta):\n    return beta + 1\n" * 9)
    done = run_command("precision_scaling.loss", *own, "--quantized=rtn-3", f"--text={tmp_path / 'a.txt'}")
    assert "bits per byte, over" in done.stdout and "of 1 documents" in done.stdout
    done = run_command("precision_scaling.loss", *own, "--tokens=9")
    assert done.returncode == 2 and "--text" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run_command("precision_scaling.sample", *own, "--prompt=def alpha(", "--tokens=12")
    assert done.returncode == 0 and done.stdout.startswith("def alpha(") and len(done.stdout) > len("def alpha(\n")
    assert done.stdout == run_command("precision_scaling.sample", *own, "--prompt=def alpha(", "--tokens=12").stdout
    done = run_command("precision_scaling.sample", f"--workdir={workdir}")
    assert done.returncode == 2 and "--run=: allowed is one of" in done.stderr

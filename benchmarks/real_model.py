"""GPTQ of a real model: what it loses, how long it takes and what memory, beside llm-compressor in its own environment.

    python -m benchmarks.real_model --model=smollm2 --text=DIR --tokens=2e12 [--peer=PEER/bin/python]

Each step is a process of its own, so its peak memory is that of the step. Both are calibrated on the same tokens, and
both results are evaluated here, on the same held-out text: the peer's directory is imported as a model of its own.
The checkpoint and its conversion are described in docs/models.md.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from precision_scaling.errors import UserError
from precision_scaling.runtime import cli, paths
from precision_scaling.study import results
from precision_scaling.study.generate import trained_run
from precision_scaling.study.workspace import reopen_workspace

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", None, "A Hugging Face directory.", flag_values=FLAGS)
_TEXT = flags.DEFINE_string("text", None, "Files of text, for calibration and evaluation.", flag_values=FLAGS)
_TOKENS = flags.DEFINE_float("tokens", None, "That the model was trained on.", flag_values=FLAGS)
_BITS = flags.DEFINE_list("bits", ["4", "3"], "Bit-widths.", flag_values=FLAGS)
_GROUP_SIZE = flags.DEFINE_integer("group_size", 32, "Inputs that share a scale; 0: a channel.", flag_values=FLAGS)
_SEQUENCES = flags.DEFINE_integer("sequences", 16, "Of 512 tokens, for each of the two texts.", flag_values=FLAGS)
_PEER = flags.DEFINE_string("peer", "", "Python of an environment with llmcompressor; empty: none.", flag_values=FLAGS)

SIZES = ("evaluate.sequences", "ptq.calibration_sequences")
# What the peer's own documentation does for GPTQ: its default order and levels.
PEER = """
import sys
import numpy, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

directory, tokens, out, bits, group_size = sys.argv[1:]
rows = numpy.load(tokens).tolist()
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
grid = {"num_bits": int(bits), "type": "int", "symmetric": True, "strategy": "group", "group_size": int(group_size)}
if grid["group_size"] == 0:
    grid |= {"strategy": "channel", "group_size": None}
groups = {"group_0": {"targets": ["Linear"], "weights": grid}}
text = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
oneshot(
    model=model,
    dataset=text,
    recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
    max_seq_length=len(rows[0]),
    num_calibration_samples=len(rows),
)
model.save_pretrained(out, save_compressed=True)
"""


def run(*command: object) -> tuple[float, float]:
    """(seconds, peak memory in GB) of a process. Its output is shown where it fails, which ends this one."""
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        print(output.decode(errors="replace")[-3000:], file=sys.stderr)
        raise UserError(f"{' '.join(map(str, command))[:200]}: ended with status {status}; allowed is 0")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def line(name: str, bits: object, loss: float, whole: float, seconds: float, peak: float) -> None:
    """A row of the table."""
    print(f"{name:<24} {bits:>4} {loss:8.4f} {loss - whole:8.4f} {seconds:8.1f} {peak:8.2f}", flush=True)


def main() -> None:
    """Prints the table."""
    python, package = sys.executable, "precision_scaling"
    with tempfile.TemporaryDirectory() as scratch:

        def imported(model: Path, name: str):
            """The workspace of a model, and what its import took."""
            text = (
                "--config.data.name=text",
                f"--config.data.root={Path(_TEXT.value).resolve()}",
                "--sequence_length=512",
            )
            sizes = (f"--config.{part}={_SEQUENCES.value}" for part in SIZES)
            workdir = Path(scratch) / name
            what = (f"--model={model}", f"--tokens={_TOKENS.value}", f"--workdir={workdir}")
            took = run(python, "-m", f"{package}.huggingface", "import", *what, *text, *sizes)
            return reopen_workspace(workdir), took

        workspace, took = imported(Path(_MODEL.value), "ours")
        cohort, trained = trained_run(workspace)
        (row,) = results.read_rows(workspace.directory(trained), "trained")
        whole = row["loss"]
        print(f"{'':<24} {'bits':>4} {'loss':>8} {'delta':>8} {'seconds':>8} {'peak GB':>8}")
        line("unquantized", 32, whole, whole, *took)
        calibration = Path(scratch) / "calibration.npy"
        loader = workspace.loader(cohort.shape)
        np.save(calibration, loader.calibration_windows(_SEQUENCES.value, seed=trained.seed)[:, :-1])
        for bits in _BITS.value:
            flags = ("--method=gptq", f"--bits={bits}", f"--group_size={_GROUP_SIZE.value}")
            took = run(python, "-m", f"{package}.ptq", f"--workdir={workspace.workdir}", *flags)
            (file,) = (path for path in paths.all_rows(workspace.workdir) if "gptq" in path.name)
            rows = results.read_rows(workspace.directory(trained), paths.measurement(file))
            (loss,) = (row["loss"] for row in rows if row["P_post"] == int(bits))
            line(paths.measurement(file), bits, loss, whole, *took)
            if _PEER.value:
                out = Path(scratch) / f"peer-{bits}"
                took = run(_PEER.value, "-c", PEER, Path(_MODEL.value), calibration, out, bits, _GROUP_SIZE.value)
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    (out / name).write_bytes((Path(_MODEL.value) / name).read_bytes())
                theirs, _ = imported(out, f"of-peer-{bits}")
                _, run_of_peer = trained_run(theirs)
                (row,) = results.read_rows(theirs.directory(run_of_peer), "trained")
                line("llm-compressor", bits, row["loss"], whole, *took)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, required=("model", "text", "tokens")))

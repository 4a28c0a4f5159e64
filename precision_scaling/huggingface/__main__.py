"""Models from and for Hugging Face, directories on disk: OLMo, Llama, Mistral and Qwen decoders.

python -m precision_scaling.huggingface import --model=DIR --tokens=4e12 --workdir=DIR [--config.data.name=c4 ...]
python -m precision_scaling.huggingface export --workdir=DIR [--run=ID] [--quantized=gptq-4] --out=DIR
"""

import sys
from pathlib import Path

from absl import flags

from precision_scaling.config import command_line, pretrained
from precision_scaling.errors import UserError
from precision_scaling.huggingface import workdir as workdir_lib
from precision_scaling.runtime import cli, files, paths
from precision_scaling.study import results

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string(
    "model", "", "import: a model directory, config.json, safetensors and tokenizer.json.", flag_values=FLAGS
)
_TOKENS = flags.DEFINE_float(
    "tokens", None, "import: tokens that the model was trained on (D).", lower_bound=1, flag_values=FLAGS
)
_CONFIG = command_line.define_config(
    FLAGS, "import: corpus and evaluation, config/pretrained.py if not given; its model section gives dtype and remat."
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length",
    0,
    "import: of evaluation and calibration; 0: the model's, at most 1024.",
    lower_bound=0,
    flag_values=FLAGS,
)
_END_OF_TEXT = flags.DEFINE_string(
    "end_of_text",
    "",
    "import: name or id of the token between documents; empty: the one that config.json names.",
    flag_values=FLAGS,
)
_WORKDIR = flags.DEFINE_string("workdir", "", "import: a new workdir; export: one with the run.", flag_values=FLAGS)
_RUN = flags.DEFINE_string("run", "", "export: id of the run; may be left out where there is one.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "export: a new directory, for `transformers` to load.", flag_values=FLAGS)
_QUANTIZED = flags.DEFINE_string(
    "quantized",
    "",
    "export: a packed model of the run (runs/ID/quantized/NAME, of ptq --save), as compressed-tensors: integers, fp8 "
    "(e4m3), nvfp4, mxfp4, mxfp6, mxfp8.",
    flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_string(
    "dtype", "float32", "export: float32 or bfloat16, of what is not quantized and of scales.", flag_values=FLAGS
)


def _directory(flag: flags.FlagHolder[str]) -> Path:
    """The value of a flag that the command requires."""
    if not flag.value:
        raise UserError(f"--{flag.name} is missing; `python -m precision_scaling.huggingface --help` lists all flags")
    # Of these only a workdir may be in a bucket: models are mapped into memory.
    return (files.place if flag is _WORKDIR else files.expanded)(flag.value, f"--{flag.name}")


def _import() -> str:
    directory, workdir = _directory(_MODEL), _directory(_WORKDIR)
    if _TOKENS.value is None:
        raise UserError("--tokens is missing: the tokens that the model was trained on (D), which its files do not say")
    run = workdir_lib.import_model(
        directory, workdir, _TOKENS.value, _CONFIG.value, _SEQUENCE_LENGTH.value, _END_OF_TEXT.value
    )
    (row,) = results.read_rows(paths.run(workdir, run.id), "trained")
    return (
        f"{run.id}: validation loss {row['loss']:.4f} nats per token; quantize it with\n"
        f"  python -m precision_scaling.ptq --workdir={workdir} --method=gptq --bits=3,4,5,6"
    )


def _export() -> str:
    workdir, out = _directory(_WORKDIR), _directory(_OUT)
    run = workdir_lib.export_run(workdir, out, _RUN.value, _QUANTIZED.value, _DTYPE.value)
    return f"{run.id}: written to {out}"


def command() -> int:
    """Runs the command line, whose first word says what to do; returns the exit status."""
    commands = {"import": _import, "export": _export}
    word = sys.argv.pop(1) if sys.argv[1:] and not sys.argv[1].startswith("-") else ""  # absl would call it stray

    def main() -> None:
        if word not in commands:
            raise UserError(f"command {word or 'missing'}: allowed is {' or '.join(commands)}")
        print(commands[word]())

    return cli.run(main, FLAGS, defaults=(f"--config={pretrained.__file__}",))


if __name__ == "__main__":
    sys.exit(command())

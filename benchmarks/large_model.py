"""A random Llama of a billion parameters: memory and time to import and quantize it, and what a kill costs.

    python -m benchmarks.large_model --out=DIR [--width=2048 --depth=16] [--kill_after=60]

Writes the model in bfloat16 (2.1 GB at the defaults, a layer in memory at a time), imports it, quantizes it by GPTQ at
4 bits with the defaults of imported models, and prints seconds and peak memory of each process. With --kill_after the
command is killed after so many seconds and started again, and its packed model must be that of the whole run, bit for
bit. Losses of random weights say nothing.
"""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags

from benchmarks.real_model import run
from precision_scaling.data import tokenizer
from precision_scaling.errors import UserError
from precision_scaling.huggingface import safetensors
from precision_scaling.ptq import packed
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", None, "A new directory.", flag_values=FLAGS)
_WIDTH = flags.DEFINE_integer("width", 2048, "Of the residual stream, in heads of 64.", flag_values=FLAGS)
_DEPTH = flags.DEFINE_integer("depth", 16, "Layers.", flag_values=FLAGS)
_SEQUENCES = flags.DEFINE_integer("sequences", 16, "Of 512 tokens, for each of the two texts.", flag_values=FLAGS)
_KILL = flags.DEFINE_float("kill_after", 0.0, "Seconds until the first attempt is killed; 0: never.", flag_values=FLAGS)

VOCABULARY = 32_000
PTQ = ("--method=gptq", "--bits=4", "--group_size=128", "--save")


def write(out: Path, width: int, depth: int) -> int:
    """A Llama directory of random weights, a file for each layer; the number of parameters."""
    out.mkdir(parents=True)
    mlp = -(-8 * width // 3 // 256) * 256
    rng, places, total = np.random.default_rng(0), {}, 0

    def keep(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        tensors = {}
        for name, shape in shapes.items():
            values = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.02
            tensors[name] = values.astype(ml_dtypes.bfloat16)
            places[name] = file
            total += values.size
        safetensors.write(out / file, tensors)

    keep("top.safetensors", {"model.embed_tokens.weight": (VOCABULARY, width), "model.norm.weight": (width,)})
    for layer in range(depth):
        shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
        shapes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,))
        named = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        keep(f"layer-{layer:02}.safetensors", named)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config))
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    learned = tokenizer.build("bpe:1000", lambda: texts)
    (out / "tokenizer.json").write_text(learned.text())
    return total


def digest(workdir: Path) -> str:
    """Of all arrays of the one packed model in a workdir."""
    (path,) = workdir.glob("runs/*/quantized/*")
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(packed.load(path)):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Prints the table."""
    out = Path(_OUT.value)
    if out.exists():
        raise UserError(f"--out={out}: is there already; allowed is a new directory")
    parameters = write(out / "model", _WIDTH.value, _DEPTH.value)
    print(f"{parameters / 1e9:.2f}B parameters, {2 * parameters / 1e9:.2f} GB in bfloat16", flush=True)
    python, package = sys.executable, "precision_scaling"
    sizes = (f"--config.{part}={_SEQUENCES.value}" for part in ("evaluate.sequences", "ptq.calibration_sequences"))
    what = (
        f"--model={out / 'model'}",
        "--tokens=1e9",
        "--sequence_length=512",
        "--config.model.dtype=bfloat16",
        *sizes,
    )
    print(f"{'':<24} {'seconds':>8} {'peak GB':>8}", flush=True)

    def measured(name: str, *command: object) -> None:
        print("{:<24} {:8.1f} {:8.2f}".format(name, *run(python, "-m", *command)), flush=True)

    for name in ("whole", "killed")[: 2 if _KILL.value else 1]:
        workdir = out / name
        measured(f"import ({name})", f"{package}.huggingface", "import", *what, f"--workdir={workdir}")
        command = (f"{package}.ptq", f"--workdir={workdir}", *PTQ)
        if name == "killed":
            process = subprocess.Popen([python, "-m", *command], stderr=subprocess.DEVNULL)
            time.sleep(_KILL.value)
            process.kill()
            if process.wait() == 0:
                raise UserError(f"--kill_after={_KILL.value}: the command was done before; allowed is less")
            done = len(list(workdir.rglob("*.npz")))
            print(f"killed after {_KILL.value:g} s, {done} blocks are kept", flush=True)
        measured(f"ptq, 4 bits ({name})", *command)
    if _KILL.value:
        digests = [digest(out / name) for name in ("whole", "killed")]
        if len(set(digests)) > 1:
            raise UserError(f"packed models differ, {' and '.join(digests)}; allowed are the same bits")
        print("both packed models are the same bits")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, required=("out",)))

"""What the data pipeline costs: preparing the embedded corpus, finding it again, ordering windows, reading batches.

python -m benchmarks.data            # about a minute; --tokenizer=bpe:4096 to time a trained BPE as well
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from absl import app, flags

_TOKENIZER = flags.DEFINE_string("tokenizer", "bytes", "Tokenizer of the corpus: bytes, bpe:VOCAB or file:PATH.")
_SEQ_LEN = flags.DEFINE_integer("seq_len", 128, "Tokens in a window.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Windows in a batch.", lower_bound=1)

_PREPARE = """
import sys, time, resource
start = time.perf_counter()
from precision_scaling.data import tokens
tokens.prepare(**{options!r})
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
used = "tensorflow_datasets" in sys.modules
print(f"{{seconds:.2f}} s with imports, peak memory {{peak:.0f}} MiB, TFDS used: {{used}}")
"""


def seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Best of `repeats` calls after a first one."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def main(_) -> None:
    with tempfile.TemporaryDirectory() as cache:
        options = {
            "name": "python_stdlib",
            "root": "",
            "split": "train",
            "validation_split": "",
            "feature": "text",
            "tokenizer": _TOKENIZER.value,
            "validation_fraction": 0.05,
            "split_seed": 0,
            "cache_dir": cache,
            "tfds_dir": "",
        }
        program = _PREPARE.format(options=options)
        for name in ("cold prepare", "second call"):
            run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            print(f"{name}: {run.stdout.strip()}", flush=True)
        measure_batches(options)


def measure_batches(options: dict) -> None:
    from precision_scaling.data import loader, tokens

    corpus = tokens.prepare(**options)
    batches = loader.Loader(corpus, _SEQ_LEN.value, _BATCH.value)
    print(f"{len(corpus.train)} training tokens, {batches.n_windows} windows of {_SEQ_LEN.value}")

    import grain  # noqa: F401  (its import, about a second, is not what is measured)

    start = time.perf_counter()
    steps = 2000
    index = batches.window_indices(0, 0, steps)
    first = time.perf_counter() - start
    print(f"order, {index.size} indices: {first:.2f} s first ({first / index.size * 1e6:.1f} us an index)", end=", ")
    print(f"{seconds(lambda: batches.window_indices(0, 0, steps)) * 1e3:.2f} ms again")

    numbers = iter(range(10**6))
    per_batch = seconds(lambda: [batches.batch(0, next(numbers)) for _ in range(100)]) / 100
    batch_tokens = _BATCH.value * _SEQ_LEN.value
    print(f"host batch: {per_batch * 1e6:.0f} us, {batch_tokens / per_batch / 1e6:.0f} M tokens/s")
    stream = batches.batches(0, 0)
    per_batch = seconds(lambda: [next(stream) for _ in range(100)]) / 100
    print(f"host stream with read-ahead: {per_batch * 1e6:.0f} us, {batch_tokens / per_batch / 1e6:.0f} M tokens/s")

    windows = seconds(lambda: batches.windows(index[:100]), repeats=50) / 100
    print(f"windows by number, 100 batches at a time: {windows * 1e6:.0f} us a batch")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    app.run(main)

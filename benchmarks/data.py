"""What the data pipeline costs: tokenizing, preparing a corpus and finding it again, ordering and reading windows.

python -m benchmarks.data            # about two minutes; --tokenizer=file:PATH to time a given tokenizer.json

Tokenizing is timed in processor seconds of one process, by words (as the project does it) and by the library alone, in
turns. Preparing is timed in wall-clock seconds of a new process, on the sources of the standard library.
"""

import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from precision_scaling.config import base
from precision_scaling.data import python_sources, tokens
from precision_scaling.data import tokenizer as tokenizers
from precision_scaling.data.loader import Loader
from precision_scaling.data.parts import TokenParts, digests
from precision_scaling.runtime import cli

FLAGS = flags.FlagValues()
_TOKENIZER = flags.DEFINE_string("tokenizer", "bpe:8192", "bpe:VOCAB or file:PATH.", flag_values=FLAGS)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 1024, "Tokens in a window.", lower_bound=1, flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Windows in a batch.", lower_bound=1, flag_values=FLAGS)
_WORKERS = flags.DEFINE_integer(
    "workers", 0, "Processes that tokenize; 0: one per core.", lower_bound=0, flag_values=FLAGS
)

_PREPARE = """
import sys, time, resource
start = time.perf_counter()
from precision_scaling.data import tokens
meta = tokens.prepare(**{options!r}).meta
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
count, size = (sum(meta[key].values()) for key in ("tokens", "bytes"))
print(f"{{seconds:.2f}} s with imports, {{size / seconds / 1e6:.1f}} MB/s, {{count / seconds / 1e6:.2f}} M tokens/s,",
      f"peak memory {{peak:.0f}} MiB, TFDS used: {{'tensorflow_datasets' in sys.modules}}")
"""


def seconds(function: Callable[[], object], repeats: int = 5, clock=time.perf_counter) -> float:
    """Best of `repeats` calls after a first one."""
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        data = {**base.get_config().data, "cache_dir": cache, "workers": _WORKERS.value}
        for spec in ("bytes", _TOKENIZER.value):
            program = _PREPARE.format(options={**data, "tokenizer": spec})
            for name in ("prepare", "second call"):
                run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
                print(f"{name}, {spec}: {run.stdout.strip()}", flush=True)
        corpus = tokens.prepare(**{**data, "tokenizer": _TOKENIZER.value})
        measure_tokenizer(corpus.load_tokenizer())
        measure_check(corpus)
        measure_batches(corpus)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def measure_tokenizer(tokenizer: tokenizers.LearnedTokenizer) -> None:
    """Every eighth source of the standard library, by words and by the library."""
    documents = [content for _, content in python_sources.source_files(sysconfig.get_path("stdlib"))][::8]
    documents = [document for document in documents if document.decode("utf-8", "replace").encode() == document]
    size = sum(map(len, documents)) / 1e6
    texts = [document.decode() for document in documents]
    library = tokenizer._tokenizer
    alone = lambda: [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]
    rates = {"by words": lambda: tokenizer.encode(documents), "by the library": alone}
    for name, function in rates.items():
        rate = size / seconds(function, repeats=3, clock=time.process_time)
        print(f"tokenizing {size:.1f} MB {name}: {rate:.1f} MB per processor second", flush=True)


def measure_check(corpus: tokens.Corpus) -> None:
    """What every open of the token files takes."""
    contents = tokens.contents(corpus.directory, corpus.meta)
    size = sum(one.count * one.dtype.itemsize for one in contents) / 1e9
    check = lambda: digests(contents, corpus.vocab_size, corpus.directory / "none")
    print(f"checking {size * 1e3:.0f} MB: {seconds(check, clock=time.process_time) / size:.2f} processor seconds a GB")


def measure_batches(corpus: tokens.Corpus) -> None:
    """Order and batches, from the token file and from the same tokens in 64 parts."""
    import grain  # noqa: F401  (its import, about a second, is not what is measured)

    loader = Loader(corpus, _SEQ_LEN.value, _BATCH.value)
    print(f"{len(corpus.train)} training tokens, {loader.n_windows} windows of {_SEQ_LEN.value}")
    steps = 2000
    start = time.perf_counter()
    count = loader.window_indices(0, 0, steps).size
    first = time.perf_counter() - start
    print(f"order, {count} indices: {first:.2f} s first ({first / count * 1e6:.1f} us an index)", end=", ")
    print(f"{seconds(lambda: loader.window_indices(0, 0, steps)) * 1e3:.2f} ms again")
    stream = np.asarray(corpus.train)
    with tempfile.TemporaryDirectory() as directory:
        one = _mapped(f"{directory}/one", stream)
        parts = [_mapped(f"{directory}/{i}", part) for i, part in enumerate(np.array_split(stream, 64))]
        for name, each in (("one file", one), ("64 parts", TokenParts(parts))):
            same = tokens.Corpus(each, corpus.validation, 0, 0, corpus.directory, {})
            source = Loader(same, loader.seq_len, loader.batch_size)
            numbers = iter(range(10**6))
            order = lambda source=source, numbers=numbers: source.window_indices(0, next(numbers) % 1900, 1)
            per_batch = seconds(lambda source=source, order=order: source.windows(order()), 500)
            rate = _BATCH.value * _SEQ_LEN.value / per_batch / 1e6
            print(f"batch from {name}: {per_batch * 1e6:.0f} us, {rate:.0f} M tokens/s", flush=True)


def _mapped(path: str, stream: np.ndarray) -> np.memmap:
    stream.tofile(path)
    return np.memmap(path, stream.dtype, mode="r")


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

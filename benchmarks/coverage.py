"""How often the 95 % bootstrap interval of each constant covers the true value: `python -m benchmarks.coverage
--laws=ptq,chinchilla`.

Each repeat draws a table of the law's own grid (analysis/laws/synthetic.py) with fresh noise, fits it and resamples its
runs. With 200 repeats a true 95 % comes out between 91.5 and 98 % nineteen times in twenty. Tables of a law share
their shape, so that only its first repeat compiles; with --out every repeat is written at once, and a second call
continues where the first stopped.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from analysis import laws
from analysis.fitting.multistart import bootstrap, search
from analysis.fitting.options import Options
from analysis.fitting.setup import set_up
from analysis.laws import synthetic
from precision_scaling.runtime import cli, files
from precision_scaling.runtime.progress import progress_bar

FLAGS = flags.FlagValues()
_LAWS = flags.DEFINE_list("laws", list(laws.LAWS), "Laws to test.", flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 200, "Tables per law.", lower_bound=1, flag_values=FLAGS)
_RESAMPLES = flags.DEFINE_integer("resamples", 256, "Bootstrap resamples per table.", lower_bound=20, flag_values=FLAGS)
_STARTS = flags.DEFINE_integer("starts", 4, "Starts per fit.", lower_bound=1, flag_values=FLAGS)
_NOISE = flags.DEFINE_float("noise", 0.005, "Standard deviation of log L (and of log delta).", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", None, "File of the numbers as JSON.", flag_values=FLAGS)


def repeat(name: str, seed: int) -> dict:
    """One table of the law: per parameter the ends of its interval, and whether they cover the true value."""
    truth = synthetic.constants(name)
    setup = set_up(name, synthetic.table(name, _NOISE.value, seed=1000 + seed), Options())
    best = search(setup, _STARTS.value, seed=seed)
    draws = [setup.values(theta_F) for theta_F in bootstrap(setup, best.theta_F, _RESAMPLES.value, seed=seed)]
    out = {}
    for parameter in setup.free:
        low, high = np.quantile([draw[parameter] for draw in draws], [0.025, 0.975])
        out[parameter] = (float(low), float(high), bool(low <= truth[parameter] <= high))
    return out


def summary(name: str, repeats: list[dict]) -> dict:
    """Share of repeats whose interval covers the true value, by parameter, with the median width of the interval."""
    truth = synthetic.constants(name)
    held, width = {}, {}
    for parameter in repeats[0]:
        ends = [one[parameter] for one in repeats]
        held[parameter] = float(np.mean([inside for *_, inside in ends]))
        width[parameter] = float(np.median([high - low for low, high, _ in ends]) / abs(truth[parameter]))
    return {"repeats": len(repeats), "coverage": held, "median_relative_width": width}


def main() -> None:
    out = Path(_OUT.value) if _OUT.value else None
    setting = {"resamples": _RESAMPLES.value, "starts": _STARTS.value, "noise": _NOISE.value}
    record = json.loads(out.read_text(encoding="utf-8")) if out and out.exists() else {"setting": setting}
    if record["setting"] != setting:
        raise SystemExit(f"{out} was made with {record['setting']}: give another --out")
    for name in _LAWS.value:
        repeats = record.get(name, {}).get("intervals", [])
        began = time.perf_counter()
        for seed in progress_bar(range(len(repeats), _REPEATS.value), desc=name, leave=False):
            repeats.append(repeat(name, seed))
            record[name] = {**summary(name, repeats), "intervals": repeats}
            if out:
                files.atomic_write(out, json.dumps(record) + "\n")
        shown = ", ".join(f"{k} {v:.1%}" for k, v in record[name]["coverage"].items())
        print(f"{name} ({len(repeats)} repeats, {time.perf_counter() - began:.0f} s): {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS))

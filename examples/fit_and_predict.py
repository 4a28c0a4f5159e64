"""Fits scaling laws to a table of measured losses, predicts runs that were never made, and plans one.

python examples/fit_and_predict.py      # five seconds on two CPU cores
"""

from pathlib import Path

import pandas as pd

import precision_scaling as ps

RUNS = Path(__file__).parent.parent / "results" / "overnight_cpu" / "runs.csv"


def main() -> None:
    # Any table with the columns N, D and loss will do; those of precision are P_w, P_a, P_kv and P_post, in bits.
    table = pd.read_csv(RUNS)
    table = table[table["status"] == "ok"]
    before = ps.fit("chinchilla", table)  # L(N, D) of the models as trained
    after = ps.fit("ptq", table[(table["method"] == "gptq") | table["P_post"].isna()])  # what quantization adds
    print(ps.summary(before))
    print(ps.summary(after))

    planned = pd.DataFrame({"N": [200_000, 200_000], "D": [20e6, 20e6], "P_post": [None, 4]})
    print(ps.predict([before, after], planned)[["N", "D", "P_post", "predicted"]])

    # The paper's constants, for a budget of 1e21 FLOPs and weights of 4 bits when served.
    best = ps.plan("paper", flops=1e21, serve_bits=4).best
    print(f"{best.n:.3g} parameters, {best.d:.3g} tokens, {best.p:.1f} bits of training: loss {best.loss:.3f}")


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# The predictions on record: fits every law to the first study and predicts each loss of study_decide.py before any of it
# is measured. Usage, from the root of the repository: bash results/decide/predict.sh OUT    (about five minutes)
set -euo pipefail
out="${1:?usage: predict.sh OUT}"
python="${PYTHON:-.venv/bin/python}"
mkdir -p "$out"
"$python" -m precision_scaling.study --config=configs/study_decide.py --workdir="$out" --dry_run --settings="$out/planned.csv"

fit_and_predict() { # NAME LAW OPTIONS...
  local name="$1" law="$2"
  shift 2
  "$python" -m analysis.fit --runs=results/overnight_cpu/runs.csv --law="$law" --out="$out/$name.json" --noprofile \
    --bootstrap=400 --where=schedule=cosine '--where=w_format=bf16|int2|int3|int4|int6|int8' "$@" >"$out/$name.txt"
  # What is served is judged as loss before PTQ (measured, when it is) plus predicted delta.
  "$python" -m analysis.predict --fit="$out/$name.json${BEFORE:+,$out/$BEFORE.json}" --runs="$out/planned.csv" \
    --out="$out/$name.csv" >>"$out/$name.txt"
  echo "$name"
}

for law in precision power_laws d_eff n_and_d_eff capacity_gmse chinchilla chinchilla_outer noise capacity_noise; do
  fit_and_predict "$law" "$law"
done
for method in gptq rtn awq; do
  for law in ptq qid ptq_noise; do
    # Residuals of the served loss: where delta is below the noise it must not weigh like a large one.
    BEFORE=capacity_noise fit_and_predict "$law-$method" "$law" --delta_residual=log_loss --where=method="$method"
  done
done
for law in unified unified_noise; do
  fit_and_predict "$law-gptq" "$law" --where=method=gptq
done

"$python" - "$out" <<'PYTHON'
"""All predictions in one table: a row per law and loss."""
import sys
from pathlib import Path

import pandas as pd

out = Path(sys.argv[1])
columns = ["run", "method", "P_post", "predicted", "low", "high", "predicted_delta", "outside"]
parts = []
for path in sorted(out.glob("*.csv")):
    if path.stem not in ("planned", "predictions"):
        rows = pd.read_csv(path, dtype={"outside": str, "method": str})
        rows = rows[rows.predicted.notna()][columns].round(6)
        # A law of delta speaks of the losses after PTQ, its companion of those before.
        if path.stem.split("-")[0] in ("ptq", "qid", "ptq_noise"):
            rows = rows[rows.P_post.notna()]
        parts.append(rows.assign(law=path.stem))
table = pd.concat(parts)[["law", *columns]].sort_values(["law", "run", "method", "P_post"], na_position="first")
table.to_csv(out / "predictions.csv", index=False)
print(f"{len(table)} predictions by {table.law.nunique()} fits in {out / 'predictions.csv'}")
PYTHON

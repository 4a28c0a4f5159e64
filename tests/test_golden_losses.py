"""Losses of the first steps of a tiny study, so that a change of what is computed shows as a diff.

After a change on purpose: python -m pytest tests/test_golden_losses.py, and take over what it prints.
"""

import json

import numpy as np

# By run, nats per token at steps 1 to 3. CPUs and compilers differ in the order of sums, and a rounding flip at 3 or
# 4 bits makes more of it.
GOLDEN = {
    "4.43k-D768-bf16-s0-124f6c": (6.02480, 6.31996, 5.86317),
    "4.43k-D448-bf16-s0-6af94c": (6.02480, 6.31996, 5.86317),
    "4.43k-D768-wint4-s0-483946": (6.03433, 6.29586, 5.87921),
    "4.43k-D768-wint3_aint4_kint4_vint4-s0-b07669": (6.01039, 6.28140, 5.93269),
}
TOLERANCE = 2e-3


def test_losses_are_those_of_the_golden_run(finished_study):
    workspace, _ = finished_study
    found = {}
    for run in workspace.experiment.runs:
        lines = (workspace.directory(run) / "metrics.jsonl").read_text().splitlines()
        found[run.id] = tuple(round(json.loads(line)["loss"], 5) for line in lines[:3])
    print(json.dumps(found, indent=1))
    assert found.keys() == GOLDEN.keys()
    for run, losses in GOLDEN.items():
        np.testing.assert_allclose(found[run], losses, rtol=TOLERANCE, err_msg=run)

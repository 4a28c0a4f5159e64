"""What a study, or a shard of it, would do."""

import re

from precision_scaling.config.experiment import Experiment
from precision_scaling.errors import UserError
from precision_scaling.model import attention
from precision_scaling.model.accounting import count_parameters, training_flops_per_token
from precision_scaling.runtime import patterns
from precision_scaling.training import optimizer
from precision_scaling.training.run import WHOLE, Shard


def plan_text(resolved: Experiment, shard: Shard = WHOLE) -> str:
    """What a study, or a share of it, would do: cohorts with their runs, parameters, tokens and FLOPs, and the bytes of
    a run's state, parameters and optimizer."""
    lines = [
        f"{'cohort':>8} {'runs':>5} {'N':>14} {'all params':>14} {'tokens':>18} {'FLOPs':>10} {'state/MB':>10}  "
        "quantized operands"
    ]
    cohorts = [(group, runs) for group in resolved.cohorts if (runs := shard.of(group.runs))]
    flops_total = of_updates = 0
    for group, runs in cohorts:
        non_embedding, parameters = count_parameters(group.shape.model)
        tokens = sum(run.tokens for run in runs)
        flops = tokens * training_flops_per_token(group.shape.model)
        flops_total += flops
        state, of_update = optimizer.cost(resolved.optimizer, group.shape.model)
        of_updates += sum(run.steps for run in runs) * of_update
        lines.append(
            f"{group.shape.size:>8} {len(runs):>5} {non_embedding:>14,} {parameters:>14,} {tokens:>18,} "
            f"{flops:>10.2e} {state / 1e6:>10,.3g}  {group.static.describe()}; "
            f"{attention.described(group.shape.model, group.static)}"
        )
    updates = f" and {of_updates:.2e} in updates" if of_updates else ""
    chosen = [run for _, runs in cohorts for run in runs]
    quantized = sum(run.ptq for run in resolved.models(chosen))
    lines.append(
        f"{len(chosen)} runs in {len(cohorts)} cohorts, {sum(run.tokens for run in chosen):,} tokens, "
        f"{flops_total:.2e} FLOPs{updates}; {quantized} runs are quantized after training"
    )
    return "\n".join(lines)


def parse_shard(shard: str, only: str = "") -> Shard:
    """The shard that `--shard` ("i/n") and `--only` (a regex) describe. UserError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard={shard}: allowed is i/n with 0 <= i < n")
    patterns.check("--only", only)
    return Shard(int(match[1]), int(match[2]), only)

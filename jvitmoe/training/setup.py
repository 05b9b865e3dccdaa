"""What the first lines of a run say."""

import textwrap
from pathlib import Path

from jvitmoe.machine import devices, processes
from jvitmoe.routing import Routing
from jvitmoe.runs.checkpoints import Meta, versions
from jvitmoe.runs.console import console
from jvitmoe.runs.safe_io import METRICS, checksums
from jvitmoe.training.build import Run

FEW_STEPS = 200


def print_setup(run: Run, workdir: Path, init_notes: list[str]) -> None:
    """Prints the first lines of a run. `init_notes` says what was loaded from `init.source`."""
    plan, counts = run.plan, run.data.counts
    optimizer, train, params = plan.optimizer, plan.train, plan.routing.shapes()
    active, everything = plan.routing.count_parameters()
    console.print(f"run         {workdir}")
    console.print(f"devices     {devices.describe(plan.mesh)}")
    console.print(f"parameters  {active:,} active, {everything:,} total ({plan.model.dtype.name} compute)")
    if (trained := optimizer.count_trained(params)) < everything:
        console.print(f"trained     {trained:,} of {everything:,} parameters")
    if plan.routing.experts > 1:
        console.print(f"routing     {describe(plan.routing)}")
    width = console.width if console.is_terminal else 1000  # a terminal would break lines inside numbers
    for number, group in enumerate(optimizer.groups(params)):
        first = "" if number else "optimizer"
        console.print(textwrap.fill(group, width, initial_indent=f"{first:12}", subsequent_indent=" " * 14))
    for note in init_notes:
        console.print(f"source      {note}")
    console.print(f"images      {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    console.print(f"steps       {plan.total:,} ({train.epochs} epochs of {plan.steps_per_epoch})")
    if plan.total < FEW_STEPS:
        remedy = "raise --config.train.epochs, or lower --config.train.batch_size"
        console.print(f"warning: {plan.total:,} steps are few to learn from; {remedy}")
    if (asked := optimizer.settings.warmup_epochs) > train.epochs / 2:
        warmup = optimizer.warmup_steps(plan.steps_per_epoch)
        console.print(f"warm-up     {warmup:,} steps: at most half of all; config.optim.warmup_epochs is {asked:g}")


def describe(routing: Routing) -> str:
    """Returns what the first lines of a run with experts say of its routing."""
    routed = routing.settings
    every = f" every {routed.pull_every} steps" if routed.pull_every > 1 else ""
    if routed.averages_every_step:
        pull = "averaged after every step, so all are equal"
    elif routed.pull:
        pull = f"pulled together by {routed.pull:g}{every}"
    else:
        pull = "never pulled together"
    what = "whole models" if routing.has_whole_models else "experts per MLP"
    return f"{routed.experts} {what}: {routing.meaning}; {pull}"


def print_resumed(workdir: Path, start: int, meta: Meta, epochs: int) -> None:
    """Prints the step that the run resumes from, whether it is trained longer, notes on other versions, and a warning
    if metrics.jsonl has lost lines since its save."""
    console.print(f"resuming    from step {start:,}")
    if meta["config"]["train"]["epochs"] < epochs:
        console.print(f"longer      the learning rate goes on as that of a run of {epochs} epochs from this step")
    installed, then = versions(), meta.get("versions", {})
    if changed := [f"{n} {then[n]} (now {installed.get(n)})" for n in then if then[n] != installed.get(n)]:
        console.print(f"note: this checkpoint was saved by {', '.join(changed)}")
    if processes.is_first():
        now = checksums(workdir, start).get(METRICS)
        if not now or now != meta.get("files", {}).get(METRICS, now):
            console.print(f"warning: {METRICS} does not hold all that was recorded up to step {start}")

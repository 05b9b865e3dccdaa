"""The bytes that a run reduces over devices, counted from its settings."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jvitmoe.experts import cost, trees
from jvitmoe.training import update
from jvitmoe.training.state import StepPlan


def bytes_reduced(plan: StepPlan) -> Callable[[int], int]:
    """Returns a function of the number of steps done: the bytes that each device has reduced with others until then, in
    gradients, pulls and the EMA, scalars apart.

    With routing.kind=sample each expert counts as alone on a device of the expert axis: its
    gradients stay there, a pull reduces its weights, and an EMA of the merged model reduces them at every step.
    Otherwise every device has all experts and reduces every gradient, and pulls and EMA move nothing.
    """
    params, routed = plan.routing.shapes(), plan.config.routing
    trunk, experts = (4 * cost.tree_size(tree) for tree in trees.split(params, trees.stacked(params)))
    one, ran = experts // routed.experts, plan.routing.reduced_experts
    if ran:
        return lambda done: done * (trunk + ran * one)
    qsr = np.flatnonzero(update.qsr_pulls(plan)) if routed.pull and routed.pull_schedule == "qsr" else None
    # A warm-up begins at learning rate 0, so a pull in proportion to it moves nothing after the first step.
    none_at_first = qsr is None and routed.pull_every == 1 and not update.pull_share(plan, jnp.int32(0))

    def pulls(done: int) -> int:
        if not routed.pull:
            return 0
        if qsr is not None:
            return int(np.searchsorted(qsr, done))
        return done // routed.pull_every - (none_at_first and done > 0)

    def so_far(done: int) -> int:
        averaged = pulls(done) + (done if plan.config.train.ema else 0)
        return done * trunk + averaged * one

    return so_far

"""The models of a run that are tested: merged, experts, random paths, ensemble, routed, EMA."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jvitmoe import routing
from jvitmoe.config import Config
from jvitmoe.data.batches import Batches
from jvitmoe.evaluation.metrics import Evaluator, Result, SplitImages
from jvitmoe.experts import merge
from jvitmoe.experts.cost import flops_per_image, tree_size
from jvitmoe.runs.checkpoints import versions
from jvitmoe.runtime import devices
from jvitmoe.runtime.addresses import Purpose, address


def facts(config: Config, step: int, mesh: Mesh) -> dict[str, Any]:
    """Returns what result.json says of a run and the machine, besides what was measured."""
    active, total = routing.find(config).count_parameters()
    return {
        "data": config.data.name,
        "step": step,
        "seed": config.train.seed,
        "active_parameters": active,
        "total_parameters": total,
        "hardware": devices.describe(mesh),
        "versions": versions(),
    }


def evaluate_main(config: Config, params: Any, evaluate: Evaluator, split: SplitImages, batches: Batches) -> Result:
    """Returns the Result of a run's main model: with its router if it has one, otherwise dense or merged."""
    if evaluate.routed:
        return evaluate.routed(params, split, batches)
    return evaluate(merge.dense_tree(config, params), split, batches)


def evaluate_run(
    config: Config, params: Any, ema: Any, evaluate: Evaluator, split: SplitImages, batches: Batches, paths: int = 1
) -> list[dict[str, Any]]:
    """Returns one row per tested model: the numbers of `Result`, parameters and FLOPs per image. The row of the dense
    or merged model also has the confusion matrix, if it was counted.

    A dense run has "dense". One with experts has "merged", "expert e" for each, `paths` random paths in one row (mean;
    of several, also the deviation as *_std) and the "ensemble" of the experts. "routed" and "EMA" if the run has them.
    """
    active, total = routing.find(config).count_parameters()
    experts, batch = config.routing.experts, batches.index_SB.shape[1]
    dense_size = tree_size(jax.eval_shape(merge.average_experts, params))
    cost = {"parameters": dense_size, "flops_per_image": flops_per_image(evaluate.net, batch)}

    def row(name: str, result: Result) -> dict[str, Any]:
        return {"model": name, **result.numbers(), **cost}

    rows = []
    if evaluate.routed:
        routed_cost = {"parameters": active, "flops_per_image": flops_per_image(evaluate.routed.net, batch)}
        rows.append(row("routed", evaluate.routed(params, split, batches)) | routed_cost)
    shipped = evaluate(merge.dense_tree(config, params), split, batches)
    confusion = {"confusion": shipped.confusion} if shipped.confusion else {}
    rows.append(row("dense" if experts == 1 else "merged", shipped) | confusion)
    if ema is not None:
        rows.append(row("EMA", evaluate(ema, split, batches)))
    if experts == 1:
        return rows
    results, ensemble = evaluate.paths(params, path_routes(config, paths), experts, split, batches)
    rows += [row(f"expert {e}", result) for e, result in enumerate(results[:experts])]
    if drawn := results[experts:]:
        several = {
            name: [result.numbers()[name] for result in drawn] for name in drawn[0].numbers() if name != "images"
        }
        mean = {name: statistics.fmean(values) for name, values in several.items()}
        spread = {f"{name}_std": statistics.stdev(values) for name, values in several.items() if paths > 1}
        rows.append(row("random path" if paths == 1 else f"{paths} random paths", drawn[0]) | mean | spread)
    ensemble_cost = {"parameters": total, "flops_per_image": experts * cost["flops_per_image"]}
    return [*rows, row("ensemble", ensemble) | ensemble_cost]


def path_routes(config: Config, paths: int) -> jax.Array:
    """Returns route_PL of the tested paths: each expert in all layers, then `paths` routes with an expert drawn per
    layer, fixed by the seed."""
    depth, experts, root = config.model.depth, config.routing.experts, jax.random.key(config.train.seed)
    drawn = [jax.random.randint(address(root, Purpose.PATH, p), (depth,), 0, experts) for p in range(paths)]
    return jnp.stack([*(jnp.full((depth,), e, jnp.int32) for e in range(experts)), *drawn])

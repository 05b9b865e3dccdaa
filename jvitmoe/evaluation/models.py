"""Which models of a run are tested: merged, experts, random paths, ensemble, routed, EMA."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp

from jvitmoe.config import Config
from jvitmoe.data.batches import Batches
from jvitmoe.evaluation.metrics import Evaluator, Result, Shown
from jvitmoe.experts import merge, routes
from jvitmoe.experts.cost import count_parameters, flops_per_image, tree_size
from jvitmoe.experts.routes import Purpose


def evaluate_main(config: Config, params: Any, evaluate: Evaluator, split: Shown, batches: Batches) -> Result:
    """Returns the Result of the model that a run is about: with its learned router, or else dense or merged."""
    if evaluate.routed:
        return evaluate.routed(params, split, batches)
    return evaluate(dense_tree(config, params), split, batches)


def evaluate_run(
    config: Config, params: Any, ema: Any, evaluate: Evaluator, split: Shown, batches: Batches, paths: int = 1
) -> list[dict[str, Any]]:
    """Returns one row per model that the run is tested as: the fields of `Result`, parameters and FLOPs per image.

    "routed" with a learned router. "dense" alone; or "merged", every "expert e" path, `paths` random ones (a fresh
    expert per layer, fixed by the seed; mean, and over several the deviation as *_std) and the "ensemble" of the expert
    paths. "EMA" if one was kept.
    """
    active, total = count_parameters(config)
    experts, batch = config.routing.experts, batches.index_SB.shape[1]
    dense_size = tree_size(jax.eval_shape(merge.average_experts, params))
    cost = {"parameters": dense_size, "flops_per_image": flops_per_image(evaluate.net, batch)}

    def row(name: str, result: Result) -> dict[str, Any]:
        return {"model": name, **result._asdict(), **cost}

    rows = []
    if evaluate.routed:
        routed_cost = {"parameters": active, "flops_per_image": flops_per_image(evaluate.routed.net, batch)}
        rows.append(row("routed", evaluate.routed(params, split, batches)) | routed_cost)
    rows.append(row("dense" if experts == 1 else "merged", evaluate(dense_tree(config, params), split, batches)))
    if ema is not None:
        rows.append(row("EMA", evaluate(ema, split, batches)))
    if experts == 1:
        return rows
    results, ensemble = evaluate.paths(params, path_routes(config, paths), experts, split, batches)
    rows += [row(f"expert {e}", result) for e, result in enumerate(results[:experts])]
    if drawn := results[experts:]:
        several = {name: [result._asdict()[name] for result in drawn] for name in ("accuracy", "nll", "ece")}
        mean = Result(**{name: statistics.fmean(values) for name, values in several.items()}, images=drawn[0].images)
        spread = {f"{name}_std": statistics.stdev(values) for name, values in several.items() if paths > 1}
        rows.append(row("random path" if paths == 1 else f"{paths} random paths", mean) | spread)
    every = {"parameters": total, "flops_per_image": experts * cost["flops_per_image"]}
    return [*rows, row("ensemble", ensemble) | every]


def path_routes(config: Config, paths: int) -> jax.Array:
    """Returns route_PL of the paths tested: each expert in every layer, then `paths` drawn with a fresh expert per
    layer, each by its number and the seed."""
    depth, experts, root = config.model.depth, config.routing.experts, jax.random.key(config.train.seed)
    drawn = [jax.random.randint(routes.address(root, Purpose.PATH, p), (depth,), 0, experts) for p in range(paths)]
    return jnp.stack([*(routes.constant_route(e, depth) for e in range(experts)), *drawn])


def dense_tree(config: Config, params: Any) -> Any:
    """Returns the tree that ships: the merged model, or the dense one as it is."""
    plain = config.routing.experts == 1 and not config.tuned
    return params if plain else jax.jit(merge.average_experts)(params)

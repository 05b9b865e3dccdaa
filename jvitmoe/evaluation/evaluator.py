"""Tests the models of a run: merged, experts, random paths, ensemble, routed, EMA.

Metrics are exact over a whole split, on any number of devices: every image counts once and is read once for all paths.

b images of a batch on one device · S batches · X layers that have experts · P paths · C classes · M bins
"""

import functools
import math
import statistics
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jvitmoe.config import DataConfig
from jvitmoe.data import augment
from jvitmoe.data.batches import Batch, EvalBatches
from jvitmoe.experts import merge
from jvitmoe.experts.cost import flops_per_image, tree_size
from jvitmoe.experts.params import Params, join_all
from jvitmoe.machine import compilation, devices
from jvitmoe.machine.addresses import Purpose, address
from jvitmoe.machine.devices import AXES, BY_DEVICE, REPLICATED, to_devices, wait_on_cpu
from jvitmoe.models import routers, vit
from jvitmoe.reports.results import deviation
from jvitmoe.routing import Routing
from jvitmoe.runs.checkpoints import versions

BINS = 15  # M, as in Guo et al., arXiv 1706.04599
TOP = 5  # classes that may hold the label; not reported for as few classes or fewer
MOST_CLASSES = 1000  # with more, a confusion matrix takes too much memory per path, and none is counted


class Sums(NamedTuple):
    """Sums over images, divided once at the end. Leading axis: the paths, then their ensemble."""

    correct: jax.Array  # int32
    nll: jax.Array  # float32, nats
    seen: jax.Array  # int32
    bin_correct_M: jax.Array  # int32, images by confidence: bin m holds (m/M, (m+1)/M]
    bin_confidence_M: jax.Array  # float32
    in_top: jax.Array  # int32, images whose label is among the TOP most probable classes
    confusion_CC: jax.Array  # int32, images by label and predicted class; [0, 0] for more than MOST_CLASSES


class Result(NamedTuple):
    accuracy: float  # share of images
    nll: float  # mean negative log-likelihood, nats
    ece: float  # expected calibration error: mean distance of accuracy and confidence over 15 bins, weighted by images
    images: int
    top5: float | None  # share of images whose label is among the TOP most probable classes; None for TOP or less
    confusion: list[list[int]]  # images by label and predicted class; [] for more than MOST_CLASSES

    def numbers(self) -> dict[str, float]:
        """Returns the fields that are one number."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, int | float)}


class Evaluator:
    """The compiled evaluation of a dense model, for merged trees and paths through experts, or of one with a router.

    Args:
        net: the model.
        mesh: of the devices that hold the batches.
        data: `mean` and `std` of the pixels.
        routed: the evaluation of the same run with its router, if it has one.
        progress: called after every batch.
    """

    def __init__(
        self,
        net: vit.ViT,
        mesh: Mesh,
        data: DataConfig,
        routed: "Evaluator | None" = None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.net, self.routed, self._mesh, self._replicated = net, routed, mesh, NamedSharding(mesh, REPLICATED)
        self._progress = progress
        self.normalize = functools.partial(augment.normalize, mean=data.mean, std=data.std)
        program = jax.shard_map(
            self._batch_sums, mesh=mesh, in_specs=(*[REPLICATED] * 4, BY_DEVICE), out_specs=REPLICATED
        )
        self._add = jax.jit(program, compiler_options=compilation.exact(mesh.devices.flat[0].platform))

    def __call__(self, tree: Any, batches: EvalBatches) -> Result:
        """Returns the Result of a dense tree. All trees use the same compiled program."""
        return self.whole(Params(tree, {}), batches)

    def whole(self, params: Params, batches: EvalBatches) -> Result:
        """Returns the Result of a dense run, or of a net with a router and all its experts."""
        return self.paths(params, jnp.zeros((1, 1), jnp.int32), 1, batches)[0][0]

    def paths(
        self, params: Params, route_PX: jax.Array, members: int, batches: EvalBatches
    ) -> tuple[list[Result], Result]:
        """Returns the Result of each path, and of the ensemble of the first `members`: the mean of their probabilities
        (Lakshminarayanan et al., arXiv 1612.01474). Paths run one after the other, to save memory."""
        log_weight_P = jnp.where(jnp.arange(len(route_PX)) < members, -np.log(members), -jnp.inf)
        shapes = (), (BINS,), (_confusion_side(self.net.config.classes),) * 2
        count, bins, confusion = (np.zeros((len(route_PX) + 1, *shape), np.int32) for shape in shapes)
        nll, confidence = count.astype(np.float32), bins.astype(np.float32)
        zeros: Any = (count, nll, count, bins, confidence, count, confusion)
        # On the mesh, as the step returns them; otherwise the second batch would compile a second program.
        sums = Sums(*(to_devices(x, self._replicated) for x in zeros))
        for batch in batches:
            sums = self._add(params, route_PX, log_weight_P, sums, batch)
            wait_on_cpu(self._mesh, sums)
            self._progress()
        rows = zip(*jax.device_get(sums), strict=True)
        *results, ensemble = (_result(Sums(*row), self.net.config.classes) for row in rows)
        return results, ensemble

    def _batch_sums(
        self, params: Params, route_PX: jax.Array, log_weight_P: jax.Array, sums: Sums, batch: Batch
    ) -> Sums:
        images = self.normalize(batch.images(self.net.config))

        def log_p(route_X: jax.Array) -> jax.Array:
            tree = join_all(params) if self.net.router else merge.take_path(params, route_X)
            return jax.nn.log_softmax(vit.logits(self.net, tree, images))

        log_p_PbC = jax.lax.map(log_p, route_PX)
        ensemble_bC = jax.nn.logsumexp(log_p_PbC + log_weight_P[:, None, None], axis=0)
        log_p_PbC = jnp.concatenate([log_p_PbC, ensemble_bC[None]])
        batch_sums = jax.vmap(_sums, (0, None))(log_p_PbC, batch.labels_B)
        return jax.tree.map(lambda total, of_batch: total + jax.lax.psum(of_batch, AXES), sums, batch_sums)


def make_evaluate(
    model: vit.ViT, mesh: Mesh, data: DataConfig, progress: Callable[[], None] = lambda: None
) -> Evaluator:
    """Returns the evaluation of the dense model of a run, with that of its router, if any, as `routed`. `progress` is
    called after every batch."""
    tested = model.router and routers.find(model.router.kind).is_tested
    routed = Evaluator(model, mesh, data, progress=progress) if tested else None
    return Evaluator(model.plain(), mesh, data, routed, progress)


def _sums(log_p_bC: jax.Array, labels_b: jax.Array) -> Sums:
    mask_b = labels_b >= 0
    predicted_b, classes = log_p_bC.argmax(-1), log_p_bC.shape[-1]
    right_b = (predicted_b == labels_b) & mask_b
    top_b5 = jax.lax.top_k(log_p_bC, min(TOP, classes))[1]  # of equal classes it takes the first, as argmax does
    confusion_CC = jnp.zeros((_confusion_side(classes),) * 2, jnp.int32)
    if confusion_CC.size:
        confusion_CC = confusion_CC.at[labels_b, predicted_b].add(mask_b.astype(jnp.int32))
    nll_b = -jnp.take_along_axis(log_p_bC, labels_b[:, None], axis=1)[:, 0]
    confidence_b = jnp.exp(log_p_bC.max(-1))
    bin_b = jnp.clip(jnp.ceil(confidence_b * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    in_bin_bM = (bin_b[:, None] == jnp.arange(BINS)[None]) & mask_b[:, None]
    return Sums(
        right_b.sum(),
        jnp.where(mask_b, nll_b, 0.0).sum(),
        mask_b.sum(),
        (in_bin_bM & right_b[:, None]).sum(0),
        jnp.where(in_bin_bM, confidence_b[:, None], 0.0).sum(0),
        ((top_b5 == labels_b[:, None]).any(-1) & mask_b).sum(),
        confusion_CC,
    )


def _confusion_side(classes: int) -> int:
    """Returns the number of rows of the confusion matrix: 0 if it is not counted."""
    return classes if classes <= MOST_CLASSES else 0


def _result(sums: Sums, classes: int) -> Result:
    seen = int(sums.seen)
    ece = float(np.abs(sums.bin_correct_M - sums.bin_confidence_M).sum()) / seen
    top5 = int(sums.in_top) / seen if classes > TOP else None
    confusion: Any = sums.confusion_CC.tolist()
    return Result(int(sums.correct) / seen, float(sums.nll) / seen, ece, seen, top5, confusion)


def facts(routing: Routing, mesh: Mesh, data: str, seed: int, step: int) -> dict[str, Any]:
    """Returns what result.json says of a run and the machine, besides what was measured."""
    active, total = routing.count_parameters()
    return {
        "data": data,
        "step": step,
        "seed": seed,
        "active_parameters": active,
        "total_parameters": total,
        "hardware": devices.describe(mesh),
        "versions": versions(),
    }


def not_above_guessing(confusion: list[list[int]]) -> str:
    """Returns a sentence if the accuracy of a confusion matrix is not above that of naming the largest class always,
    by the lower end of its 95 % interval (Wilson, 1927); otherwise, and where none was counted, ""."""
    if not confusion:
        return ""
    right, images, largest = (int(f(np.array(confusion))) for f in (np.trace, np.sum, lambda x: x.sum(1).max()))
    share, z = right / images, NormalDist().inv_cdf(0.975)
    middle, half = share + z**2 / (2 * images), z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    if (middle - half) / (1 + z**2 / images) > largest / images:
        return ""
    return (
        f"accuracy {share:.1%} of {images:,} images is not above guessing, "
        f"{largest / images:.1%} for naming the largest class"
    )


def evaluate_main(params: Params, evaluate: Evaluator, batches: EvalBatches) -> Result:
    """Returns the Result of a run's main model: with its router if it has one, otherwise dense or merged."""
    if evaluate.routed:
        return evaluate.routed.whole(params, batches)
    return evaluate(merge.dense_tree(params), batches)


def evaluate_run(
    routing: Routing,
    seed: int,
    params: Params,
    ema: Any,
    evaluate: Evaluator,
    batches: EvalBatches,
    paths: int = 1,
    gate_X: Any = None,
) -> list[dict[str, Any]]:
    """Returns one row per tested model: the numbers of `Result`, parameters and FLOPs per image. The row of the dense
    or merged model also has the confusion matrix, if it was counted.

    A dense run has "dense". One with experts has "merged", "expert e" for each, `paths` random paths in one row (mean;
    of several, also the deviation as *_std) and the "ensemble" of the experts. "routed" and "EMA" if the run has them.
    "merged, gated" is the merged model of a learned router with its experts' outputs scaled by gate_X, its mean gate
    in each layer.
    """
    active, total = routing.count_parameters()
    experts, batch = routing.experts, batches.batch_size
    dense_size = tree_size(jax.eval_shape(merge.average_experts, params))
    cost = {"parameters": dense_size, "flops_per_image": flops_per_image(evaluate.net, batch)}

    def row(name: str, result: Result) -> dict[str, Any]:
        return {"model": name, **result.numbers(), **cost}

    rows = []
    if evaluate.routed:
        routed_cost = {"parameters": active, "flops_per_image": flops_per_image(evaluate.routed.net, batch)}
        rows.append(row("routed", evaluate.routed.whole(params, batches)) | routed_cost)
    shipped = evaluate(merge.dense_tree(params), batches)
    confusion = {"confusion": shipped.confusion} if shipped.confusion else {}
    rows.append(row("dense" if experts == 1 else "merged", shipped) | confusion)
    if gate_X is not None:
        gated = merge.average_experts(merge.scale_by_gate(params, gate_X))
        rows.append(row("merged, gated", evaluate(gated, batches)))
    if ema is not None:
        rows.append(row("EMA", evaluate(ema, batches)))
    if experts == 1:
        return rows
    results, ensemble = evaluate.paths(params, path_routes(routing, seed, paths), experts, batches)
    rows += [row(f"expert {e}", result) for e, result in enumerate(results[:experts])]
    if drawn := results[experts:]:
        several = {
            name: [result.numbers()[name] for result in drawn] for name in drawn[0].numbers() if name != "images"
        }
        mean = {name: statistics.fmean(values) for name, values in several.items()}
        spread = {f"{name}_std": deviation(values) for name, values in several.items() if paths > 1}
        rows.append(row("random path" if paths == 1 else f"{paths} random paths", drawn[0]) | mean | spread)
    ensemble_cost = {"parameters": total, "flops_per_image": experts * cost["flops_per_image"]}
    return [*rows, row("ensemble", ensemble) | ensemble_cost]


def path_routes(routing: Routing, seed: int, paths: int) -> jax.Array:
    """Returns route_PX of the tested paths: each expert in all layers, then `paths` routes with an expert drawn per
    layer, fixed by the seed. Those of whole models are [P, 1]."""
    depth, experts, root = routing.model_settings.depth, routing.experts, jax.random.key(seed)
    if routing.has_whole_models:  # layers of two whole models do not fit together
        return jnp.arange(experts, dtype=jnp.int32)[:, None]
    drawn = [jax.random.randint(address(root, Purpose.PATH, p), (depth,), 0, experts) for p in range(paths)]
    route_PL = jnp.stack([*(jnp.full((depth,), e, jnp.int32) for e in range(experts)), *drawn])
    return route_PL[:, jnp.array(routing.layers_with_experts)]

"""Exact metrics over a whole split, on any number of devices: every image counts once, and is read once for all paths.

B batch, b the share of one device · S batches · N images · E experts · L layers · P paths · C classes · M bins
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jvitmoe import compilation, merging, optim, routing
from jvitmoe.config import Config
from jvitmoe.data import augment, feed
from jvitmoe.data.feed import Batches, Images
from jvitmoe.models import vit
from jvitmoe.routing import Purpose
from jvitmoe.step import AXES, REPLICATED, make_model, settle

Shown = Images | Iterable[Images]  # a split on the devices, or its batches one after the other
BINS = 15  # M, as Guo et al., arXiv 1706.04599


class Sums(NamedTuple):
    """Sums over the images seen: divided once, at the end. Leading axis: the paths, then their ensemble."""

    correct: jax.Array  # int32
    nll: jax.Array  # float32, nats
    seen: jax.Array  # int32
    bin_seen_M: jax.Array  # int32, images by confidence: bin m holds (m/M, (m+1)/M]
    bin_correct_M: jax.Array  # int32
    bin_confidence_M: jax.Array  # float32


class Result(NamedTuple):
    accuracy: float  # share of images
    nll: float  # mean negative log-likelihood, nats
    ece: float  # expected calibration error: mean distance of accuracy and confidence over 15 bins, weighted by images
    images: int


class Evaluator:
    """The compiled evaluation of dense trees and of paths through the experts, or of a model with a router.

    Args:
        net: what runs: a dense model, or one with a router and all its experts.
        mesh: where the batches lie.
        routed: the evaluation of the same run with its router, where it has one.
    """

    def __init__(self, net: vit.ViT, mesh: Mesh, routed: "Evaluator | None" = None) -> None:
        self.net, self.routed, self._mesh, self._replicated = net, routed, mesh, NamedSharding(mesh, REPLICATED)

        def compiled(streamed: bool) -> Any:
            images = PartitionSpec(AXES) if streamed else REPLICATED
            return jax.jit(
                jax.shard_map(
                    functools.partial(self._batch_sums, streamed),
                    mesh=mesh,
                    in_specs=(*[REPLICATED] * 4, images, PartitionSpec(None, AXES), REPLICATED),
                    out_specs=REPLICATED,
                )
            )

        self._step, self._streamed_step = compiled(False), compiled(True)

    def __call__(self, params: Any, split: Shown, batches: Batches) -> Result:
        """Returns the Result of a tree of the net; one program serves them all."""
        nowhere_PL = jnp.zeros((1, self.net.config.depth), jnp.int32)  # such a tree has no expert to pick
        return self.paths(params, nowhere_PL, 1, split, batches)[0][0]

    def paths(
        self, params: Any, route_PL: jax.Array, members: int, split: Shown, batches: Batches
    ) -> tuple[list[Result], Result]:
        """Returns the Result of each path, and of the ensemble of the first `members`: the mean of their probabilities
        (Lakshminarayanan et al., arXiv 1612.01474). Images are read once; one path at a time is in memory."""
        log_weight_P = jnp.where(jnp.arange(len(route_PL)) < members, -np.log(members), -jnp.inf)
        # Put on the mesh at once, because sums that come back from it would otherwise compile a second program.
        rows = len(route_PL) + 1
        number, bins = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, BINS), jnp.int32)
        sums = Sums(number, number.astype(float), number, bins, bins, bins.astype(float))
        sums = jax.tree.map(lambda x: feed.place(np.asarray(x), self._replicated), sums)
        whole = isinstance(split, Images)
        step = self._step if whole else self._streamed_step
        for s, images in enumerate([split] * len(batches.index_SB) if whole else split):
            sums = step(params, route_PL, log_weight_P, sums, images, batches, jnp.int32(s))
            settle(self._mesh, sums)
        *results, ensemble = (_result(Sums(*row)) for row in zip(*jax.device_get(sums), strict=True))
        return results, ensemble

    def _batch_sums(
        self,
        streamed: bool,
        params: Any,
        route_PL: jax.Array,
        log_weight_P: jax.Array,
        sums: Sums,
        split: Images,
        batches: Batches,
        s: jax.Array,
    ) -> Sums:
        mask_b = batches.mask_SB[s]
        index_b = jnp.arange(len(mask_b)) if streamed else batches.index_SB[s]
        labels_b, images = split.labels_N[index_b], augment.normalize(split.images_NHWC[index_b])

        def log_p(route_L: jax.Array) -> jax.Array:
            tree = params if self.net.router else merging.take_path(params, route_L)
            return jax.nn.log_softmax(vit.logits(self.net, tree, images))

        log_p_PbC = jax.lax.map(log_p, route_PL)
        ensemble_bC = jax.nn.logsumexp(log_p_PbC + log_weight_P[:, None, None], axis=0)
        log_p_PbC = jnp.concatenate([log_p_PbC, ensemble_bC[None]])
        here = jax.vmap(_sums, (0, None, None))(log_p_PbC, labels_b, mask_b)
        return jax.tree.map(lambda total, part: total + jax.lax.psum(part, AXES), sums, here)


def make_evaluate(model: vit.ViT, mesh: Mesh) -> Evaluator:
    """Returns the evaluation of every tree of a run: (dense params, images, batches) -> Result, and its `paths`."""
    routed = Evaluator(model, mesh) if model.router else None
    return Evaluator(model.plain(), mesh, routed)


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
    dense_size = _size(jax.eval_shape(merging.average_experts, params))
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
    drawn = [jax.random.randint(routing.address(root, Purpose.PATH, p), (depth,), 0, experts) for p in range(paths)]
    return jnp.stack([*(routing.constant_route(e, depth) for e in range(experts)), *drawn])


def dense_tree(config: Config, params: Any) -> Any:
    """Returns the tree that ships: the merged model, or the dense one as it is."""
    plain = config.routing.experts == 1 and not config.tuned
    return params if plain else jax.jit(merging.average_experts)(params)


def flops_per_image(net: vit.ViT, batch: int) -> float:
    """Returns the floating-point operations (a multiply-add is two) that XLA counts in the compiled forward pass of a
    batch, per image.

    Layers are unrolled, because XLA counts the body of a loop once; and the program is compiled for the CPU, if JAX
    has one here, because elsewhere products become library calls that XLA does not look into.
    """
    config = dataclasses.replace(net.config, unroll=net.config.depth)
    model = net.clone(config=config, attention="xla")
    params = jax.eval_shape(lambda: vit.init(model, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((batch, config.image_size, config.image_size, config.channels), jnp.float32)
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    with jax.default_device(device):
        compiled = compilation.for_reading(jax.jit(lambda p, x: vit.logits(model, p, x)).lower(params, images))
    cost = compiled.cost_analysis()
    assert cost is not None, "XLA analyses programs of the CPU, GPU and TPU"
    return float(cost["flops"]) / batch


def count_parameters(config: Config) -> tuple[int, int]:
    """Returns (active, total): what one token passes through, its router included, and all experts together.

    With top-k a token passes through K experts, with a frozen router, as tested, through all, otherwise through one, or
    on average one. Nothing is allocated.
    """
    model, routed = make_model(config, "cpu"), config.routing
    params = jax.eval_shape(lambda: vit.init(model, jax.random.key(0)))
    trunk, experts = merging.split(params, merging.stacked(params))
    chosen = {"topk": routed.top_k, "frozen": routed.experts}.get(routed.router, 1)
    return _size(trunk) + chosen * _size(experts) // routed.experts, _size(params)


def count_trained(config: Config) -> int:
    """Returns the number of parameters that training may change, all experts together. Nothing is allocated."""
    model, frozen = make_model(config, "cpu"), optim.frozen(config)
    leaves = jax.tree.leaves_with_path(jax.eval_shape(lambda: vit.init(model, jax.random.key(0))))
    return sum(leaf.size for path, leaf in leaves if frozen is None or not frozen(path))


def _sums(log_p_bC: jax.Array, labels_b: jax.Array, mask_b: jax.Array) -> Sums:
    right_b = (log_p_bC.argmax(-1) == labels_b) & mask_b
    nll_b = -jnp.take_along_axis(log_p_bC, labels_b[:, None], axis=1)[:, 0]
    confidence_b = jnp.exp(log_p_bC.max(-1))
    bin_b = jnp.clip(jnp.ceil(confidence_b * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    in_bin_bM = (bin_b[:, None] == jnp.arange(BINS)[None]) & mask_b[:, None]
    return Sums(
        right_b.sum(),
        jnp.where(mask_b, nll_b, 0.0).sum(),
        mask_b.sum(),
        in_bin_bM.sum(0),
        (in_bin_bM & right_b[:, None]).sum(0),
        jnp.where(in_bin_bM, confidence_b[:, None], 0.0).sum(0),
    )


def _result(sums: Sums) -> Result:
    seen = int(sums.seen)
    ece = float(np.abs(sums.bin_correct_M - sums.bin_confidence_M).sum()) / seen
    return Result(int(sums.correct) / seen, float(sums.nll) / seen, ece, seen)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

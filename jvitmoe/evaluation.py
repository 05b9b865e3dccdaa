"""Exact metrics of dense trees over a whole split: every image counts once, on any number of devices.

B batch, b the share of one device · S batches · N images · E experts · L layers
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jvitmoe import merging, routing
from jvitmoe.config import Config
from jvitmoe.data import augment
from jvitmoe.data.feed import Batches, Images
from jvitmoe.models import vit
from jvitmoe.routing import Purpose
from jvitmoe.step import AXIS, BY_COLUMN, REPLICATED, make_model, settle


class Sums(NamedTuple):
    """Sums over the images seen: divided once, at the end."""

    correct: jax.Array  # int32
    nll: jax.Array  # float32, nats
    seen: jax.Array  # int32


class Result(NamedTuple):
    accuracy: float  # share of images
    nll: float  # mean negative log-likelihood, nats
    images: int


Evaluate = Callable[[Any, Images, Batches], Result]


def make_evaluate(model: vit.ViT, mesh: Mesh) -> Evaluate:
    """Returns (dense params, images, batches) -> Result; one program serves every dense tree."""
    dense = vit.ViT(model.config, dtype=model.dtype)

    def batch_sums(params: Any, sums: Sums, split: Images, batches: Batches, s: jax.Array) -> Sums:
        index_b, mask_b = batches.index_SB[s], batches.mask_SB[s]
        labels_b = split.labels_N[index_b]
        logits_bC = vit.logits(dense, params, augment.normalize(split.images_NHWC[index_b]))
        nll_b = optax.softmax_cross_entropy_with_integer_labels(logits_bC, labels_b)
        here = Sums(
            jnp.sum((logits_bC.argmax(-1) == labels_b) & mask_b),
            jnp.sum(jnp.where(mask_b, nll_b, 0.0)),
            jnp.sum(mask_b),
        )
        return jax.tree.map(lambda total, part: total + jax.lax.psum(part, AXIS), sums, here)

    step = jax.jit(
        jax.shard_map(
            batch_sums,
            mesh=mesh,
            in_specs=(REPLICATED, REPLICATED, REPLICATED, BY_COLUMN, REPLICATED),
            out_specs=REPLICATED,
        )
    )

    def evaluate(params: Any, split: Images, batches: Batches) -> Result:
        sums = Sums(jnp.int32(0), jnp.float32(0), jnp.int32(0))
        for s in range(len(batches.index_SB)):
            sums = step(params, sums, split, batches, jnp.int32(s))
            settle(mesh, sums)
        correct, nll, seen = jax.device_get(sums)
        return Result(int(correct) / int(seen), float(nll) / int(seen), int(seen))

    return evaluate


def evaluate_run(config: Config, params: Any, ema: Any, test: Callable[[Any], Result]) -> list[dict[str, Any]]:
    """Returns one row {"model", "accuracy", "nll", "images"} per dense tree that the run is tested as."""
    return [{"model": name, **test(make())._asdict()} for name, make in dense_trees(config, params, ema).items()]


def dense_trees(config: Config, params: Any, ema: Any = None) -> dict[str, Callable[[], Any]]:
    """Returns name -> maker of each dense tree a run is tested as: "dense" alone, or "merged", every "expert e" path
    and one "random path" (a fresh expert per layer, fixed by the seed); and "EMA" of the first of them, if one was
    kept. Makers keep one tree in memory at a time."""
    average: dict[str, Callable[[], Any]] = {} if ema is None else {"EMA": lambda: ema}
    if config.routing.experts == 1:
        return {"dense": lambda: params} | average
    depth, experts = config.model.depth, config.routing.experts
    take = jax.jit(merging.take_path)
    key = routing.address(jax.random.key(config.train.seed), Purpose.PATH, 0)
    random_L = jax.random.randint(key, (depth,), 0, experts)
    paths = {f"expert {e}": routing.constant_route(e, depth) for e in range(experts)} | {"random path": random_L}
    merged: dict[str, Callable[[], Any]] = {"merged": lambda: jax.jit(merging.average_experts)(params)}
    return merged | average | {name: functools.partial(take, params, route_L) for name, route_L in paths.items()}


def dense_tree(config: Config, params: Any) -> Any:
    """Returns the tree that ships: the merged model, or the dense one as it is."""
    return next(iter(dense_trees(config, params).values()))()


def count_parameters(config: Config) -> tuple[int, int]:
    """Returns (active, total): what one image passes through, and all experts together. Nothing is allocated."""
    model = make_model(config, "cpu")
    params = jax.eval_shape(lambda: vit.init(model, jax.random.key(0)))
    return _size(jax.eval_shape(merging.average_experts, params)), _size(params)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

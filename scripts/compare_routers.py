"""Trains random and learned routers beside dense, several seeds each, and writes one table with pictures.

    python scripts/compare_routers.py --config configs/digits_dense.py --runs runs/routers --out results/digits
    python scripts/compare_routers.py --config configs/cifar10_small.py --seeds 1 --only dense switch … \
        --runs runs/routers_cifar10 --out results/cifar10_small -- --config.data.dir=DIR

Repeat the command to resume: see scripts/sweep.py. On a GPU: --jobs 1.
"""

import itertools

from sweep import Variant, main

EMA = {"train.ema": 0.99}
FIGURES = ("sample_independent", "sample_shared")  # what averaging breaks, and what it does not
STACK = {"routing.experts": 4}


def variants() -> dict[str, Variant]:
    """Returns name -> what differs from the dense config."""
    routers = {
        "switch": {"routing.kind": "switch"},
        "top2": {"routing.kind": "topk", "routing.top_k": 2},
        "expert_choice": {"routing.kind": "expert_choice"},
        "soft": {"routing.kind": "soft"},
    }
    found: dict[str, dict[str, object]] = {"dense": {}, "dense_ema": {**EMA}}
    found |= {name: STACK | {"routing.init": "shared"} | settings for name, settings in routers.items()}
    for kind, init, pull in itertools.product(("batch", "layer", "sample"), ("shared", "independent"), (0.0, 0.1)):
        settings = {"routing.kind": kind, "routing.init": init, "routing.pull": pull}
        found[f"{kind}_{init}" + ("_pull" if pull else "")] = STACK | settings
    return {name: Variant(settings) for name, settings in found.items()}


if __name__ == "__main__":
    main(__doc__, variants(), figures=FIGURES)

"""Trains every router beside dense, several seeds each, and writes one table, its pictures, configs and versions.

    python scripts/compare_routers.py --config configs/digits_dense.py --runs runs/routers --out results/digits
    python scripts/compare_routers.py --config configs/cifar10_small.py --seeds 1 --only dense switch … \
        --runs runs/routers_cifar10 --out results/cifar10_small -- --config.data.dir=DIR

Repeat the command to resume: see scripts/sweep.py. On a GPU: --jobs 1.
"""

from sweep import Variant, main

EMA = {"train.ema": 0.99}
FIGURES = ("sample_shared_independent", "sample_shared_shared")  # what averaging breaks, and what it does not
STACK = {"routing.experts": 4}


def variants() -> dict[str, Variant]:
    """Returns name -> what differs from the dense config."""
    routers = {
        "switch": {"routing.router": "switch"},
        "top2": {"routing.router": "topk", "routing.top_k": 2},
        "expert_choice": {"routing.router": "expert_choice"},
        "soft": {"routing.router": "soft"},
    }
    found: dict[str, dict[str, object]] = {"dense": {}, "dense_ema": {**EMA}}
    found |= {name: STACK | {"routing.init": "shared"} | settings for name, settings in routers.items()}
    for granularity in ("batch", "sample"):
        for scope in ("shared", "layer"):
            for init in ("shared", "independent"):
                for pull in (0.0, 0.1):
                    name = f"{granularity}_{scope}_{init}" + ("_pull" if pull else "")
                    settings = {"granularity": granularity, "scope": scope, "init": init, "pull": pull}
                    found[name] = STACK | {f"routing.{key}": value for key, value in settings.items()}
    return {name: Variant(settings) for name, settings in found.items()}


if __name__ == "__main__":
    main(__doc__, variants(), figures=FIGURES)

"""Writes tests/models/torch_vit_golden.npz: what the original's ViT, in PyTorch, computes at a small size.

Needs PyTorch and NumPy; of jvitmoe only `torch_vit.py` beside it, no JAX. The same arrays come out every time:

    python scripts/make_torch_golden.py

The file holds `images` (NHWC, float32) and, for each variant, `VARIANT/settings` (JSON: the fields of ModelConfig and
the experts), `VARIANT/route` (expert of each layer, with several experts), `VARIANT/logits` and
`VARIANT/params/...`: the parameters under jvitmoe's names and in its layout. Logits are computed in float64 from
float32 parameters. Dropout is left out: evaluation does not use it.

B batch · T tokens · D width · H heads · K head width · F hidden width · L layers · P patch side · c channels
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_vit import Layer, ViT

TARGET = Path(__file__).parents[1] / "tests" / "models" / "torch_vit_golden.npz"
ORIGINAL: dict[str, Any] = {
    **{"image_size": 8, "channels": 3, "classes": 5, "patch": 2, "width": 12, "hidden": 14, "depth": 3, "heads": 3},
    **{"pool": "cls", "init": "original", "head_hidden": 16},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "mean": {"pool": "mean", "head_hidden": 0, "init": "independent"},
    "experts": {"experts": 2, "route": (0, 1, 1)},
}


def fill(model: nn.Module, rng: np.random.Generator) -> None:
    """Draws every parameter, none left at 0 or 1: NumPy's generator, because its stream is kept across versions."""
    for name, parameter in sorted(model.named_parameters()):
        value = rng.normal(size=tuple(parameter.shape))
        if name.endswith("weight") and parameter.ndim == 1:  # the scale of a norm
            value = 1 + 0.3 * value
        elif name.endswith("weight"):
            value = value / np.prod(parameter.shape[1:]) ** 0.5
        elif name.endswith("bias"):
            value = 0.3 * value
        if name.startswith(("patches", "positions", "cls")):
            value = 0.1 * value  # small tokens, so that the epsilon of the first norm shows in the logits
        parameter.data = torch.from_numpy(value.astype(np.float32))


def convert(model: ViT) -> dict[str, np.ndarray]:
    """Returns {name in jvitmoe: array in its layout}. A PyTorch Linear holds [out, in], a jvitmoe kernel [in, out]."""
    ours = {
        "patches/kernel": array(model.patches.weight).transpose(2, 3, 1, 0),  # DcPP -> PPcD
        "patches/bias": array(model.patches.bias),
        "positions": array(model.positions),
        **norm("norm", model.norm),
        **linear("head/logits", model.logits),
    }
    if model.cls is not None:
        ours["cls"] = array(model.cls)
    if model.hidden is not None:
        ours |= linear("head/hidden", model.hidden)
    layers = [convert_layer(layer) for layer in model.layers]
    return ours | {f"blocks/{name}": np.stack([layer[name] for layer in layers]) for name in layers[0]}


def convert_layer(layer: Layer) -> dict[str, np.ndarray]:
    attention, heads = layer.attention, layer.attention.heads
    ours = {**norm("norm1", layer.norm1), **norm("norm2", layer.norm2)}
    for name in ("query", "key", "value"):
        split = linear(f"attention/{name}", getattr(attention, name))
        ours |= {key: x.reshape(*x.shape[:-1], heads, -1) for key, x in split.items()}  # D(HK) -> DHK, (HK) -> HK
    out = linear("attention/out", attention.out)
    kernel = out["attention/out/kernel"]
    ours |= out | {"attention/out/kernel": kernel.reshape(heads, -1, kernel.shape[-1])}  # (HK)D -> HKD
    experts = [
        {
            "mlp/up": array(up.weight).T,
            "mlp/up_bias": array(up.bias),
            "mlp/down": array(down.weight).T,
            "mlp/down_bias": array(down.bias),
        }
        for up, _, _, down in layer.experts
    ]
    if len(experts) == 1:
        return ours | experts[0]
    return ours | {name: np.stack([expert[name] for expert in experts]) for name in experts[0]}


def linear(name: str, layer: nn.Linear) -> dict[str, np.ndarray]:
    return {f"{name}/kernel": array(layer.weight).T, f"{name}/bias": array(layer.bias)}


def norm(name: str, layer: nn.LayerNorm) -> dict[str, np.ndarray]:
    return {f"{name}/scale": array(layer.weight), f"{name}/bias": array(layer.bias)}


def array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy()


def main() -> None:
    rng = np.random.default_rng(0)
    images_BHWc = rng.uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    arrays: dict[str, np.ndarray] = {"images": images_BHWc}
    for variant, changes in VARIANTS.items():
        settings = ORIGINAL | changes
        route = settings.pop("route", (0,) * settings["depth"])
        experts = settings.setdefault("experts", 1)
        model = ViT(settings, experts).eval()
        fill(model, rng)
        arrays |= {f"{variant}/params/{name}": np.ascontiguousarray(x) for name, x in convert(model).items()}
        with torch.no_grad():
            logits_BC = model.double()(torch.from_numpy(images_BHWc).double().permute(0, 3, 1, 2), route)
        arrays[f"{variant}/logits"] = logits_BC.numpy().astype(np.float32)
        arrays[f"{variant}/settings"] = np.array(json.dumps(settings))
        if experts > 1:
            arrays[f"{variant}/route"] = np.array(route, np.int32)
    np.savez_compressed(TARGET, allow_pickle=False, **arrays)
    print(f"{TARGET.name}: {len(arrays)} arrays, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

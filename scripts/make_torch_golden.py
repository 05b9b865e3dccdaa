"""Writes tests/models/torch_vit_golden.npz: what the original's ViT, written here in PyTorch, computes at a small size.

Needs PyTorch and NumPy only (no JAX, no jvitmoe). Run it from anywhere; the same arrays come out every time:

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

TARGET = Path(__file__).parents[1] / "tests" / "models" / "torch_vit_golden.npz"
ORIGINAL = {
    **{"image_size": 8, "channels": 3, "classes": 5, "patch": 2, "width": 12, "hidden": 14, "depth": 3, "heads": 3},
    **{"norm": "pre", "pool": "cls", "position_rows": 20, "head_hidden": 16},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre": {},
    "post": {"norm": "post"},
    "mean": {"pool": "mean", "head_hidden": 0, "position_rows": 16},
    "experts": {"experts": 2, "route": (0, 1, 1)},
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        b, t, d = x_BTD.shape
        query, key, value = (
            layer(x_BTD).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(-2, -1) / (d // self.heads) ** 0.5, dim=-1)
        return self.out((weights @ value).transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    """The original's TransformerLayer (pre-norm) and Block (post-norm), with one MLP or several."""

    def __init__(self, width: int, hidden: int, heads: int, norm: str, experts: int):
        super().__init__()
        self.norm = norm
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, heads)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x_BTD: torch.Tensor, expert: int) -> torch.Tensor:
        mlp = self.experts[expert]
        if self.norm == "pre":
            x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
            return x_BTD + mlp(self.norm2(x_BTD))
        x_BTD = self.norm1(x_BTD + self.attention(x_BTD))
        return self.norm2(x_BTD + mlp(x_BTD))


class ViT(nn.Module):
    def __init__(self, settings: dict[str, Any], experts: int):
        super().__init__()
        width, head_hidden, classes = settings["width"], settings["head_hidden"], settings["classes"]
        self.pool = settings["pool"]
        self.patches = nn.Conv2d(settings["channels"], width, settings["patch"], stride=settings["patch"])
        self.positions = nn.Parameter(torch.zeros(settings["position_rows"], width))
        self.cls = nn.Parameter(torch.zeros(width)) if self.pool == "cls" else None
        self.layers = nn.ModuleList(
            Layer(width, settings["hidden"], settings["heads"], settings["norm"], experts)
            for _ in range(settings["depth"])
        )
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.hidden = nn.Linear(width, head_hidden) if head_hidden else None
        self.logits = nn.Linear(head_hidden or width, classes)

    def forward(self, images_BcHW: torch.Tensor, route: tuple[int, ...]) -> torch.Tensor:
        x_BTD = self.patches(images_BcHW).flatten(2).transpose(1, 2)
        x_BTD = x_BTD + self.positions[: x_BTD.shape[1]]
        if self.cls is not None:  # after the positions: it has none
            x_BTD = torch.cat([self.cls.expand(len(x_BTD), 1, -1), x_BTD], dim=1)
        for layer, expert in zip(self.layers, route, strict=True):
            x_BTD = layer(x_BTD, expert)
        x_BD = self.norm(x_BTD[:, 0] if self.cls is not None else x_BTD.mean(dim=1))
        if self.hidden is not None:
            x_BD = nn.functional.gelu(self.hidden(x_BD))
        return self.logits(x_BD)


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
        for up, _, down in layer.experts
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
    np.savez_compressed(TARGET, **arrays)
    print(f"{TARGET.name}: {len(arrays)} arrays, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

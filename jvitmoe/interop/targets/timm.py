"""timm's VisionTransformer: model.safetensors and the config.json that `timm.create_model` reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvitmoe.config import Config, ModelConfig
from jvitmoe.interop import load, weight_names
from jvitmoe.interop.targets import base

# timm's config.json cannot set the epsilon of LayerNorm: the architecture implies it. So we name an architecture with
# our epsilon and replace its other arguments.
NORMS = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}


@base.register
class Timm(base.TorchTarget):
    name = library = "timm"
    fields = base.TorchTarget.fields | {"pool", "registers", "layer_scale", "qk_norm"}
    use = """```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

or, with the arguments in sight:

```python
import functools, json, timm, torch
from pathlib import Path
from safetensors.torch import load_file

about = json.loads(Path("config.json").read_text())
norm = functools.partial(torch.nn.LayerNorm, eps={epsilon})
arguments = {{**about["model_args"], "norm_layer": norm}}
model = timm.create_model(about["architecture"], num_classes=about["num_classes"], **arguments).eval()
model.load_state_dict(load_file("model.safetensors"), strict=True)
```"""
    check = 'model(torch.from_numpy(sample["inputs"])).detach().numpy()'

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        arrays = weight_names.write(source.params, weight_names.TIMM, _cls_row(model), model.pool != "cls")
        about = config_json(model, source.classes, source.crop, source.mean, source.std)
        return base.save_weights(out, arrays, about)

    def unsupported(self, model: ModelConfig) -> list[str]:
        return super().unsupported(model) + (["pool"] if model.pool == "seq" else [])

    def remarks(self, config: Config) -> list[str]:
        found = super().remarks(config)
        if config.model.has_cls and not config.model.cls_position:
            found.append(
                "CLS has no position: timm's argument no_embed_class=True says so (model.cls_position=True has one)"
            )
        return found

    def differences(self, model: ModelConfig) -> list[str]:
        if model.norm_epsilon in NORMS:
            return []
        known = " and ".join(f"{epsilon:g}" for epsilon in NORMS)
        ours = f"model.norm_epsilon={model.norm_epsilon:g}"
        return [f"timm's config.json can express LayerNorm epsilons {known}, not {ours}"]


def config_json(
    model: ModelConfig,
    classes: Sequence[str],
    crop: str,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
) -> dict[str, Any]:
    """Returns timm's config.json: the architecture whose LayerNorm epsilon is nearest to ours, with our arguments;
    `crop`, `mean` and `std` are those of the run's `data`."""
    pool = "token" if model.pool == "cls" else "avg"
    parts = {"reg_tokens": model.registers, "init_values": model.layer_scale, "qk_norm": model.qk_norm}
    args = {
        **{"img_size": model.image_size, "patch_size": model.patch, "in_chans": model.channels},
        **{"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads},
        **{"mlp_ratio": _ratio(model.hidden, model.width), "pre_norm": False},
        **{"class_token": model.has_cls, "no_embed_class": not _cls_row(model), "global_pool": pool},
        **{name: value for name, value in parts.items() if value},
    }
    pixels = {"mean": base.per_channel(mean, model), "std": base.per_channel(std, model)}
    cfg = {
        **{"num_classes": model.classes, "input_size": [model.channels, model.image_size, model.image_size], **pixels},
        **{"interpolation": "bilinear" if crop == "resized" else "bicubic", "crop_mode": "center"},
        **{"crop_pct": 7 / 8 if crop == "resized" else 1.0, "fixed_input_size": True, "pool_size": None},
        **{"first_conv": "patch_embed.proj", "classifier": "head"},
    }
    return {
        "architecture": NORMS[min(NORMS, key=lambda epsilon: abs(epsilon - model.norm_epsilon))],
        **{"num_classes": model.classes, "num_features": model.width, "global_pool": args["global_pool"]},
        **{"model_args": args, "pretrained_cfg": cfg, **({"label_names": list(classes)} if classes else {})},
    }


def _cls_row(model: ModelConfig) -> bool:
    """True if timm's table of positions has a row for CLS; with registers it would then need rows for them too."""
    return model.cls_position and not model.registers


def _ratio(hidden: int, width: int) -> float:
    """Returns the ratio r with int(width * r) = hidden, which is timm's formula."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width

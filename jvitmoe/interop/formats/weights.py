"""Weights as model.safetensors with a config.json: our own names, Hugging Face's and timm's."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jvitmoe import config as config_lib
from jvitmoe.config import Config, ModelConfig
from jvitmoe.interop import classifier, load, weight_names
from jvitmoe.interop.formats import base
from jvitmoe.runs import safe_io

SIZES = ("image_size", "channels", "classes", "patch", "width", "hidden", "depth", "heads")
# timm's config.json cannot set the epsilon of LayerNorm: the architecture implies it. So we name an architecture with
# our epsilon and replace its other arguments.
NORMS = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}


def _save(out: Path, arrays: weight_names.Dict, about: dict[str, Any]) -> base.Run:
    """Writes model.safetensors and config.json, reads them back, and returns the function that they compute."""
    (out / load.WEIGHTS).write_bytes(save(arrays, metadata={"format": "pt"}))
    safe_io.write_text(out / load.CONFIG, json.dumps(about, indent=2) + "\n")
    again = load.read(out)
    read_back = classifier.Classifier(again)

    def run(inputs: np.ndarray) -> np.ndarray:
        images = inputs if again.kind == load.OURS else inputs.transpose(0, 2, 3, 1)
        pixels = 255 * (images * np.asarray(again.std) + np.asarray(again.mean))
        return read_back.logits(np.rint(pixels).astype(np.uint8))

    return run


@base.register
class Safetensors(base.Target):
    """Our own names of arrays, in a folder that `jvitmoe.load` reads."""

    name = "safetensors"
    library = "jvitmoe"
    use = """```python
import jvitmoe

model = jvitmoe.load(".")
print(model(["picture.png"]))
```"""
    check = 'model.logits(sample["images"])'

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        arrays = {name: np.ascontiguousarray(leaf) for name, leaf in classifier.dense_arrays(source).items()}
        about = {"mean": list(source.mean), "std": list(source.std), "start": source.start, "images": source.images}
        if source.averaged:
            about["averaged"] = source.averaged
        if source.kind == load.OURS and source.config:  # a start
            about["settings"] = config_lib.to_dict(source.config)
        return _save(out, arrays, our_config(model, source.classes, source.crop) | about)


def our_config(model: ModelConfig, classes: Sequence[str], crop: str) -> dict[str, Any]:
    """Returns the config.json of our own export; `crop` is the run's `data.crop`."""
    return {"format": load.OURS, "model": dataclasses.asdict(model), "classes": list(classes), "crop": crop}


class TorchTarget(base.Target):
    """A format of PyTorch's pre-norm ViTs."""

    torch = True
    fields = frozenset((*SIZES, "positions", "cls_position", "norm_epsilon"))

    def remarks(self, config: Config) -> list[str]:
        found = self.differences(config.model)
        if config.model.positions == "sincos2d":
            found.append("positions are computed here and a table there: the same numbers, but there they would train")
        if config.data.crop == "whole":
            there = "timm's transform pads with the mean of pixels, Hugging Face's crops: pad pictures before it"
            found.append(f"predict pads pictures to squares with grey; {there}")
        transform = "the transform there does neither"
        return [*found, f"predict turns pictures as their EXIF says and puts transparency on white; {transform}"]


@base.register
class HuggingFace(TorchTarget):
    """Hugging Face's ViTForImageClassification: model.safetensors, config.json and preprocessor_config.json."""

    name = "hf"
    library = "transformers"
    use = """```python
from transformers import AutoImageProcessor, ViTForImageClassification

model = ViTForImageClassification.from_pretrained(".").eval()
processor = AutoImageProcessor.from_pretrained(".", backend="pil")
```"""
    check = 'model(torch.from_numpy(sample["inputs"])).logits.detach().numpy()'

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        arrays = weight_names.write(source.params, weight_names.HF, cls_row=True)
        safe_io.write_text(out / load.PROCESSOR, json.dumps(_preprocessor(model, source), indent=2) + "\n")
        return _save(out, arrays, hf_config(model, source.classes))

    def remarks(self, config: Config) -> list[str]:
        found = super().remarks(config)
        if not config.model.cls_position:
            found.append("CLS has no position here and must have one there: it is zeros, which computes the same")
        shifted = f"shifted by one where (resized long side - {config.model.image_size}) % 4 is 3"
        found.append(f'the processor with backend="pil" gives the pixels of predict, but {shifted}')
        found.append("its default backend was measured up to 2 of 255 levels off besides")
        return found


def hf_config(model: ModelConfig, classes: Sequence[str]) -> dict[str, Any]:
    """Returns Hugging Face's config.json of a ViTForImageClassification."""
    names = list(classes) or [str(label) for label in range(model.classes)]
    return {
        **{"architectures": ["ViTForImageClassification"], "model_type": "vit", "dtype": "float32"},
        **{"image_size": model.image_size, "patch_size": model.patch, "num_channels": model.channels},
        **{"hidden_size": model.width, "intermediate_size": model.hidden, "num_hidden_layers": model.depth},
        **{"num_attention_heads": model.heads, "hidden_act": "gelu", "layer_norm_eps": model.norm_epsilon},
        **{"qkv_bias": True, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
        "id2label": {str(label): name for label, name in enumerate(names)},
        "label2id": {name: label for label, name in enumerate(names)},
    }


def _preprocessor(model: ModelConfig, source: load.Source) -> dict[str, Any]:
    """Returns Hugging Face's preprocessor_config.json, with the crop, mean and deviation of the source.

    The processor is DINOv2's: transformers 4's slow ViTImageProcessor can neither keep the aspect ratio nor crop.
    """
    side, crop = model.image_size, source.crop
    return {
        **{"image_processor_type": "BitImageProcessor", "do_convert_rgb": model.channels == 3, "do_resize": True},
        **{"size": {"shortest_edge": side * 8 // 7 if crop == "resized" else side}},
        **{"resample": 2 if crop == "resized" else 3},  # Pillow's bilinear, bicubic
        **{"do_center_crop": True, "crop_size": {"height": side, "width": side}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        "image_mean": np.broadcast_to(source.mean, model.channels).tolist(),
        "image_std": np.broadcast_to(source.std, model.channels).tolist(),
    }


@base.register
class Timm(TorchTarget):
    """timm's VisionTransformer: model.safetensors and the config.json that `timm.create_model` reads."""

    name = library = "timm"
    fields = TorchTarget.fields | {"pool", "registers", "layer_scale", "qk_norm"}
    use = """```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```"""
    check = 'model(torch.from_numpy(sample["inputs"])).detach().numpy()'

    def write(self, out: Path, source: load.Source, model: ModelConfig) -> base.Run:
        arrays = weight_names.write(source.params, weight_names.TIMM, _cls_row(model), model.pool != "cls")
        return _save(out, arrays, timm_config(model, source.classes, source.crop, source.mean, source.std))

    def unsupported(self, model: ModelConfig) -> list[str]:
        return super().unsupported(model) + (["pool"] if model.pool == "seq" else [])

    def remarks(self, config: Config) -> list[str]:
        found = super().remarks(config)
        if config.model.has_cls and not config.model.cls_position:
            found.append("CLS has no position (model.cls_position=False): timm's no_embed_class=True says so")
        return found

    def differences(self, model: ModelConfig) -> list[str]:
        known, ours = " and ".join(f"{epsilon:g}" for epsilon in NORMS), f"model.norm_epsilon={model.norm_epsilon:g}"
        there = f"timm's config.json can express LayerNorm epsilons {known}, not {ours}"
        return [] if model.norm_epsilon in NORMS else [there]


def timm_config(
    model: ModelConfig, classes: Sequence[str], crop: str, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,)
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
    pixels = {name: np.broadcast_to(v, model.channels).tolist() for name, v in (("mean", mean), ("std", std))}
    cfg = {
        **{"num_classes": model.classes, "input_size": [model.channels, model.image_size, model.image_size], **pixels},
        **{
            "interpolation": "bilinear" if crop == "resized" else "bicubic",
            "crop_mode": "border" if crop == "whole" else "center",
        },
        **{"crop_pct": 7 / 8 if crop == "resized" else 1.0, "fixed_input_size": True, "pool_size": None},
        # timm fits the named convolution to other channels; older versions drop one of four channels.
        **{"first_conv": "patch_embed.proj" if model.channels == 3 else None, "classifier": "head"},
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

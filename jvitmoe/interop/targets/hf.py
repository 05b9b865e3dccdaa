"""Hugging Face's ViTForImageClassification: model.safetensors, config.json and preprocessor_config.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jvitmoe.config import Config, ModelConfig
from jvitmoe.interop import load, weight_names
from jvitmoe.interop.targets import base
from jvitmoe.runs import files


@base.register
class HuggingFace(base.TorchTarget):
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
        files.write_text(out / load.PROCESSOR, json.dumps(_preprocessor(model, source), indent=2) + "\n")
        return base.save_weights(out, arrays, config_json(model, source.classes))

    def remarks(self, config: Config) -> list[str]:
        found = super().remarks(config)
        if not config.model.cls_position:
            found.append("CLS has no position here and must have one there: it is zeros, which computes the same")
        found.append(
            'the processor with backend="pil" gives the pixels of predict, but shifted by one where (resized long '
            f"side - {config.model.image_size}) % 4 is 3; the default backend was measured up to 2 of 255 levels off "
            "besides"
        )
        return found


def config_json(model: ModelConfig, classes: Sequence[str]) -> dict[str, Any]:
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
        "image_mean": base.per_channel(source.mean, model),
        "image_std": base.per_channel(source.std, model),
    }

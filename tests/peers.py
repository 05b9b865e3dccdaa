"""Answers questions about ViTs with the real libraries: PyTorch, timm, transformers. Run by the Python that has them.

One JSON request per line on standard input, one answer per line on standard output; arrays travel in .npz files.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import huggingface_hub
import numpy as np
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from timm.data import Mixup, random_erasing
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed
from timm.optim import param_groups_layer_decay


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model with every parameter, also those that start as zeros or ones, moved at random."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, inputs: np.ndarray) -> np.ndarray:
    out = model(torch.from_numpy(inputs))
    return getattr(out, "logits", out).numpy()


def make_timm(
    folder: str, inputs: str, architecture: str = "vit_tiny_patch16_224", shift: float = 0.0, **arguments: object
) -> dict:
    """Saves a model as timm saves them, and what it says of the inputs; `shift` is added to its positions."""
    model = shaken(timm.create_model(architecture, **arguments))
    if shift:
        model.pos_embed.data += shift
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    np.savez(Path(folder) / "expected.npz", logits=logits_of(model, np.load(inputs)["inputs"]))
    return {"files": sorted(p.name for p in Path(folder).iterdir())}


def make_hf(folder: str, inputs: str, **arguments: object) -> dict:
    """Saves a model as transformers saves them, and what it says of the inputs."""
    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**arguments)))
    model.save_pretrained(folder)
    np.savez(Path(folder) / "expected.npz", logits=logits_of(model, np.load(inputs)["inputs"]))
    return {}


def timm_logits(folder: str, inputs: str, out: str, epsilon: float) -> dict:
    """Loads an export both ways: by its config alone, and argument by argument with strict=True."""
    images = np.load(inputs)["inputs"]
    by_config = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    about = json.loads((Path(folder) / "config.json").read_text())
    norm = functools.partial(torch.nn.LayerNorm, eps=epsilon)
    strict = timm.create_model(
        about["architecture"], num_classes=about["num_classes"], **{**about["model_args"], "norm_layer": norm}
    ).eval()
    strict.load_state_dict(load_file(str(Path(folder) / "model.safetensors")), strict=True)
    np.savez(out, by_config=logits_of(by_config, images), strict=logits_of(strict, images))
    return {}


def hf_logits(folder: str, inputs: str, out: str) -> dict:
    model, info = transformers.ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    np.savez(out, logits=logits_of(model.eval(), np.load(inputs)["inputs"]))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    return {
        "labels": [model.config.id2label[label] for label in sorted(model.config.id2label)],
        "odd": [str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]],
        "mean": processor.image_mean,
    }


def hf_from_pixels(folder: str, pixels: str, out: str, **arguments: object) -> dict:
    """Saves a processor beside a model, and the logits of both on pixels [b, H, W, c]."""
    processor = transformers.ViTImageProcessor(do_resize=False, **arguments)
    processor.save_pretrained(folder)
    inputs = processor(list(np.load(pixels)), return_tensors="np")["pixel_values"]
    model = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    np.savez(out, logits=logits_of(model, np.asarray(inputs, np.float32)))
    return {}


def resample(arrays: str, out: str, grid: int, patch: int) -> dict:
    """Resizes positions [T, D] and kernels [D, c, P, P] as timm does."""
    with np.load(arrays) as file:
        positions, kernel = torch.from_numpy(file["positions"])[None], torch.from_numpy(file["kernel"])
    moved = resample_abs_pos_embed(positions, [grid, grid], num_prefix_tokens=0)[0]
    np.savez(out, positions=moved.numpy(), kernel=resample_patch_embed(kernel, [patch, patch]).numpy())
    return {}


def layer_scales(decay: float, **arguments: object) -> dict:
    """Returns name -> what timm multiplies the learning rate of a parameter by."""
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = param_groups_layer_decay(model, layer_decay=decay)
    return {names[id(parameter)]: group["lr_scale"] for group in found for parameter in group["params"]}


def pictures(timm_folder: str, hf_folder: str, files: list[str], out: str) -> dict:
    """Saves what the transforms of two exports make of pictures: of timm, and of transformers with both backends."""
    config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{timm_folder}"))
    transform = timm.data.create_transform(**config)
    images = [Image.open(file) for file in files]
    found = {"timm": [transform(image).numpy() for image in images]}
    for name in ("pil", "torchvision"):
        processor = transformers.AutoImageProcessor.from_pretrained(hf_folder, backend=name)
        found[name] = [np.asarray(processor(image, return_tensors="pt")["pixel_values"][0]) for image in images]
    np.savez(out, **found)
    return {}


def erasing(arrays: str, out: str) -> dict:
    """Erases images [b, c, H, W] as timm does if it draws numbers [b, 4, tries]: area, ratio, top and left of a try."""

    def drawn(rest: list[list[float]]) -> SimpleNamespace:
        left_of_try: list[float] = []

        def uniform(low: float, high: float) -> float:
            if len(left_of_try) != 3:  # not the ratio: the next try
                left_of_try[:] = rest.pop(0)
            return low + (high - low) * left_of_try.pop(0)

        def randint(low: int, high: int) -> int:
            return low + int((high + 1 - low) * left_of_try.pop(0))

        return SimpleNamespace(random=lambda: 0.0, uniform=uniform, randint=randint)

    with np.load(arrays) as file:
        images, draws = torch.from_numpy(file["images"]), file["draws"]
    for image, tries in zip(images, draws, strict=True):
        with mock.patch.object(random_erasing, "random", drawn(tries.T.tolist())):
            random_erasing.RandomErasing(probability=1, device="cpu")(image)
    np.savez(out, images=images.numpy())
    return {}


def mixing(arrays: str, out: str, cuts: bool, share: float, centre: list[float], **arguments: object) -> dict:
    """Mixes images [b, c, H, W] as timm does if it draws this share, and this centre of the box in [0, 1)."""
    with np.load(arrays) as file:
        images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    rest = list(centre)
    draws: dict[str, Callable] = {
        "rand": lambda: 0.0 if cuts else 0.75,
        "beta": lambda *_: share,
        "randint": lambda low, high, size: low + int((high - low) * rest.pop(0)),
    }
    with mock.patch.multiple(np.random, **draws):
        images, targets = Mixup(**arguments)(images, labels)
    np.savez(out, images=images.numpy(), targets=targets.numpy())
    return {}


def card(folder: str) -> dict:
    """Returns the metadata that the hub reads from a card."""
    return huggingface_hub.ModelCard.load(Path(folder) / "README.md").data.to_dict()


def change_folder(folder: str) -> dict:
    os.chdir(folder)
    return {}


def run_code(code: str) -> dict:
    """Runs the code of a model card."""
    exec(code, {})
    return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    transformers.utils.logging.disable_progress_bar()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": globals()[request.pop("action")](**request)}  # asked by tests only
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

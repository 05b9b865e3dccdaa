"""The original in PyTorch, written here from its description: what `benchmark.py --peer` is measured beside.

As a program it is a worker that another process drives by lines, so that the two never compute at the same time: it
reads {"settings", "batch", "dropout"} (JSON), then lines "EXPERTS eager DTYPE STEPS" or "EXPERTS compiled DTYPE STEPS",
and answers each with the mean seconds of a training step. `compiled` runs the model under torch.compile.

B batch · T tokens · D width · H heads · K head width · c channels
"""

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention; dropout after its weights."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        b, t, d = x_BTD.shape
        query, key, value = (
            layer(x_BTD).view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        rate = self.dropout if self.training else 0.0
        mixed_BHTK = nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        return self.out(mixed_BHTK.transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    """The original's TransformerLayer, with one MLP or several."""

    def __init__(self, settings: Mapping[str, Any], experts: int, dropout: float):
        super().__init__()
        width, hidden = settings["width"], settings["hidden"]
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attention = Attention(width, settings["heads"], dropout)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
            for _ in range(experts)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BTD: torch.Tensor, expert: int) -> torch.Tensor:
        mlp = self.experts[expert]
        x_BTD = x_BTD + self.drop(self.attention(self.norm1(x_BTD)))
        return x_BTD + self.drop(mlp(self.norm2(x_BTD)))


class ViT(nn.Module):
    """The original's ViT; `settings` are the fields of jvitmoe's ModelConfig."""

    def __init__(self, settings: Mapping[str, Any], experts: int, dropout: float = 0.0):
        super().__init__()
        width, head_hidden, classes = settings["width"], settings["head_hidden"], settings["classes"]
        self.pool = settings["pool"]
        self.patches = nn.Conv2d(settings["channels"], width, settings["patch"], stride=settings["patch"])
        tokens = (settings["image_size"] // settings["patch"]) ** 2
        rows = max(tokens, 300) if settings["init"] == "original" else tokens
        self.positions = nn.Parameter(torch.zeros(rows, width))
        self.cls = nn.Parameter(torch.randn(width)) if self.pool == "cls" else None
        self.layers = nn.ModuleList(Layer(settings, experts, dropout) for _ in range(settings["depth"]))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.hidden = nn.Linear(width, head_hidden) if head_hidden else None
        self.logits = nn.Linear(head_hidden or width, classes)

    def forward(self, images_BcHW: torch.Tensor, route: Sequence[int]) -> torch.Tensor:
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


class Trainer:
    """Trains on one batch that is already on the device and normalised, with the original's Adam."""

    def __init__(self, settings: Mapping[str, Any], batch: int, dropout: float, experts: int, compiled: bool):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.experts, self.depth = experts, settings["depth"]
        self.model = ViT(settings, experts, dropout).to(self.device)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.adam = torch.optim.Adam(self.model.parameters(), lr=2.5e-4, weight_decay=1e-4)
        side = settings["image_size"]
        self.images = torch.rand(batch, settings["channels"], side, side, device=self.device) * 2 - 1
        self.labels = torch.randint(settings["classes"], (batch,), device=self.device)

    def step(self, dtype: str) -> None:
        """One update through one expert, the same in all layers; idle experts get no gradient and are left alone."""
        route = [random.randrange(self.experts)] * self.depth
        with torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = nn.functional.cross_entropy(self.forward(self.images, route), self.labels)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()

    def seconds(self, dtype: str, steps: int) -> float:
        """Returns the mean seconds of a step."""
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.step(dtype)
        self._wait()
        return (time.perf_counter() - began) / steps

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    job = json.loads(sys.stdin.readline())
    trainers: dict[tuple[str, str, str], Trainer] = {}
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        experts, mode, dtype, steps = line.split()
        if (experts, mode, dtype) not in trainers:
            arguments = job["settings"], job["batch"], job["dropout"], int(experts), mode == "compiled"
            trainers[experts, mode, dtype] = Trainer(*arguments)
        print(trainers[experts, mode, dtype].seconds(dtype, int(steps)), flush=True)


if __name__ == "__main__":
    main()

"""Draws the idea of the project, docs/idea.svg: `python scripts/draw_idea.py docs/idea.svg`.

SVG by hand: a page scales it, and it follows the reader's light or dark colours.
"""

import sys
from pathlib import Path

EXPERTS, CHOSEN = 4, 2
BOX, GAP, HIGH = 62, 10, 40
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1a1a1a; text-anchor: middle; dominant-baseline: central; }
  .title { font-weight: 600; } .small { font-size: 12px; fill: #555; }
  rect { fill: #fff; stroke: #888; rx: 5; } .idle { stroke-dasharray: 4 3; } .idle + text { fill: #888; }
  .runs { fill: #0072B2; stroke: #0072B2; } .runs + text { fill: #fff; font-weight: 600; }
  path { stroke: #555; fill: none; marker-end: url(#head); } marker path { fill: #555; marker-end: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #eee; } .small { fill: #bbb; } rect { fill: #222; stroke: #999; } .idle + text { fill: #999; }
    .runs { fill: #56B4E9; stroke: #56B4E9; } .runs + text { fill: #111; } path, marker path { stroke: #bbb; }
    marker path { fill: #bbb; }
  }
"""


def box(x: float, y: float, text: str, kind: str = "", width: float = BOX) -> str:
    rect = f'<rect x="{x}" y="{y - HIGH / 2}" width="{width}" height="{HIGH}" class="{kind}"/>'
    return rect + label(x + width / 2, y, text)


def label(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{text}</text>'


def arrow(x: float, y: float, end: tuple[float, float]) -> str:
    return f'<path d="M{x} {y} L{end[0]} {end[1]}"/>'


def drawing() -> str:
    """Returns the SVG: left a layer while it trains, right the same layer of the shipped model."""
    middle, attention, stack = 162, 100, 250
    tops = [middle + (n - (EXPERTS - 1) / 2) * (HIGH + GAP) for n in range(EXPERTS)]
    parts = [
        label(205, 24, "While training", "title"),
        label(205, 44, "chance picks the expert for each image", "small"),
    ]
    parts += [label(40, middle, "images"), arrow(68, middle, (attention - 4, middle))]
    parts += [box(attention, middle, "attention", width=90)]
    for number, y in enumerate(tops):
        kind = "runs" if number == CHOSEN else "idle"
        parts.append(box(stack, y, f"MLP {number + 1}", kind))
    parts.append(arrow(attention + 90, middle, (stack - 4, tops[CHOSEN])))
    parts += [arrow(stack + BOX, tops[CHOSEN], (stack + BOX + 44, middle)), label(stack + BOX + 62, middle, "…")]
    second = 430
    parts += [label(second + 165, 24, "Afterwards", "title")]
    parts += [label(second + 165, 44, "the experts' weights are averaged: one plain ViT", "small")]
    parts += [label(second + 40, middle, "images"), arrow(second + 68, middle, (second + attention - 4, middle))]
    parts += [box(second + attention, middle, "attention", width=90)]
    parts += [arrow(second + attention + 90, middle, (second + stack - 4, middle))]
    parts += [box(second + stack, middle, "mean", "runs")]
    parts += [arrow(second + stack + BOX, middle, (second + stack + BOX + 40, middle))]
    parts += [label(second + stack + BOX + 58, middle, "…")]
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head += '<path d="M0 0 L8 4 L0 8 z"/></marker>'
    title = "While training, one of four MLPs runs for each image; afterwards one MLP has the mean of their weights."
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 830 272" role="img"><title>{title}</title>'
    return f"{opening}\n<style>{STYLE}</style>\n<defs>{head}</defs>\n" + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawing())

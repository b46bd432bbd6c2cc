"""Draw docs/architecture.svg, the picture in the README: ``python docs/architecture.py``."""

from __future__ import annotations

from pathlib import Path

_WIDTH, _HEIGHT = 940, 390
_STYLE = """
    svg { --ground: #ffffff; --text: #24292f; --faint: #6e7781; --line: #8c959f; --frozen: #eaeef2; --one: #2f6feb;
          --two: #bc4c00; }
    @media (prefers-color-scheme: dark) {
      svg { --ground: #161b22; --text: #e6edf3; --faint: #9198a1; --line: #6e7681; --frozen: #2d333b; --one: #58a6ff;
            --two: #f0883e; }
    }
    text { font: 14px system-ui, sans-serif; fill: var(--text); text-anchor: middle; }
    .small { font-size: 12px; fill: var(--faint); }
    .left { text-anchor: start; }
    .ground { fill: var(--ground); stroke: var(--line); }
    .frozen { fill: var(--frozen); stroke: var(--line); }
    .one { fill: var(--one); } .two { fill: var(--two); }
    .off { fill: var(--ground); stroke: var(--line); }
    .line { fill: none; stroke: var(--line); stroke-width: 1.5; }
    .read { stroke: var(--one); }
"""


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def _line(*points: tuple[float, float], kind: str = "line") -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def _backbone() -> list[str]:
    """Three frozen layers, each followed by the memories of two tasks, and the tasks' heads."""
    parts = [_text(225, 34, "One frozen backbone, a small file for each task")]
    for index, layer in enumerate(("layer 1", "layer 2", "layer L")):
        y = 285 - 85 * index
        parts += [_line((135, y), (135, y - 41)), _line((220, y + 22), (250, y + 22))]
        parts += [_box(50, y, 170, 44, "frozen"), _text(135, y + 27, layer)]
        parts += [_box(250, y, 60, 44, "one"), _box(320, y, 60, 44, "two")]
    parts += [_line((135, 329), (135, 345)), _text(135, 360, "texts of both tasks, in one batch", "small")]
    parts += [_text(135, 66, "hidden states", "small"), _line((180, 62), (250, 62))]
    parts += [_box(250, 50, 60, 26, "one"), _box(320, 50, 60, 26, "two")]
    parts += [_text(395, 67, "heads", "small left"), _text(395, 226, "memories", "small left")]
    parts += [_text(280, 360, "task 1", "small"), _text(350, 360, "task 2", "small")]
    return parts


def _memory() -> list[str]:
    """One memory: a position keeps the best two of five parents and reads their three children."""
    parts = [_text(705, 34, "One memory: a sparse read in two levels"), _box(490, 50, 430, 312, "ground")]
    for parent in range(5):
        x = 525 + 60 * parent
        kept = parent in (1, 3)
        fill, line = ("one", "line read") if kept else ("off", "line")
        parts.append(_line((645, 316), (x, 262), kind=line))
        for child in range(3):
            parts.append(_line((x, 240), (x - 18 + 18 * child, 187), kind=line))
            parts.append(_box(x - 25 + 18 * child, 172, 14, 14, fill))
        parts.append(f'<circle class="{fill}" cx="{x}" cy="250" r="12"/>')
        if kept:
            parts.append(_line((x, 170), (645, 120), kind=line))
    parts += [
        _text(645, 108, "v + the children&#8217;s values, weighted"),
        _text(645, 76, "to the next layer", "small"),
    ]
    parts += [_text(645, 336, "v: one position of the layer&#8217;s output", "small")]
    parts += [_text(800, 184, "C children of each:", "small left"), _text(800, 200, "read where kept", "small left")]
    parts += [_text(800, 250, "P parents:", "small left"), _text(800, 266, "the best K are kept", "small left")]
    return parts


def draw() -> str:
    """The picture as SVG; its colours follow the reader's light or dark scheme."""
    frame = f'<rect class="ground" x="1" y="1" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" rx="8"/>'
    pointer = [_line((380, 222), (390, 222)), _line((455, 222), (490, 222))]
    body = "\n  ".join([frame, *_backbone(), *pointer, *_memory()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="A frozen backbone with small memories of two tasks; one memory reads a few of its cells">\n'
        f"  <style>{_STYLE}  </style>\n  {body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")

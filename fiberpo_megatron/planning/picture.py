"""This module draws plans as SVG: the roofline of a plan's phases with what they are spent on, and curves over GPUs."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

from fiberpo_megatron.planning.estimate import Plan
from fiberpo_megatron.planning.hardware import Assumptions
from fiberpo_megatron.planning.roofline import attained, bounds

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
_FONT = 'font-family="sans-serif" font-size="12"'


def roofline_svg(plan: Plan, assumptions: Assumptions) -> str:
    """Return a picture of a plan: above, the arithmetic that each phase reaches over its operations per byte, below the
    peaks of the GPU; below it, a bar for each phase of what its seconds are spent on."""
    found = bounds(plan, assumptions)
    gpu = plan.gpu
    ridge = gpu.tflops * 1e3 / gpu.memory_gb_per_s
    shown = [b for b in found if b.operations and b.memory_bytes]
    intensities = [b.operations / b.memory_bytes for b in shown]
    low, high = min([1.0, *intensities]) / 2, max([4 * ridge, *intensities]) * 2
    floor_ = min([attained(b) for b in shown] + [gpu.tflops / 100]) / 2
    plot = _Log((low, high), (floor_, gpu.tflops * 2), (70, 40, 560, 260))
    out = [
        _text(70, 22, f"{plan.architecture.model_type} on {gpu.name}: a step of {plan.time.total:.1f} s", bold=True),
        *plot.frame("operations per byte of GPU memory", "TFLOP/s of a GPU"),
        plot.line([(low, low * gpu.memory_gb_per_s / 1e3), (ridge, gpu.tflops), (high, gpu.tflops)], "#555", floor_),
    ]
    for index, bound in enumerate(shown):
        x, y = plot.at(intensities[index], attained(bound))
        out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{COLOURS[index]}"/>')
        out.append(_text(x + 8, y + 4 + 14 * (index % 2), f"{bound.phase} {attained(bound):.3g}"))
    longest = max(b.seconds for b in found)
    words = list(dict.fromkeys(name for b in found for name, _ in b.parts))
    top = 370
    for row, bound in enumerate(found):
        y, x = top + 26 * row, 130.0
        out.append(_text(8, y + 13, bound.phase))
        for name, seconds in bound.parts:
            width = 430 * seconds / longest
            colour = COLOURS[words.index(name) % len(COLOURS)]
            title = f"<title>{escape(name)}: {seconds:.1f} s</title>"
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" fill="{colour}">{title}</rect>')
            x += width
        out.append(_text(x + 6, y + 13, f"{bound.seconds:.1f} s"))
    legend = top + 26 * len(found) + 16
    for index, name in enumerate(words):
        y = legend + 17 * index
        out.append(f'<rect x="130" y="{y}" width="12" height="12" fill="{COLOURS[index % len(COLOURS)]}"/>')
        out.append(_text(148, y + 11, name))
    return _svg(660, legend + 17 * len(words) + 12, out)


def curves_svg(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return curves over numbers of GPUs, both axes logarithmic."""
    points = [point for curve in curves.values() for point in curve]
    across = min(x for x, _ in points) / 1.3, max(x for x, _ in points) * 1.3
    up = min(y for _, y in points) / 1.5, max(y for _, y in points) * 1.5
    plot = _Log(across, up, (70, 40, 560, 320))
    out = [_text(70, 22, title, bold=True), *plot.frame("GPUs", unit)]
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        out.append(plot.line(curve, colour, up[0]))
        for x, y in (plot.at(*point) for point in curve):
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        out.append(f'<rect x="640" y="{48 + 20 * index}" width="12" height="12" fill="{colour}"/>')
        out.append(_text(658, 59 + 20 * index, name))
    return _svg(860, 410, out)


class _Log:
    """Is a plot with two logarithmic axes in a rectangle (left, top, width, height)."""

    def __init__(
        self, across: tuple[float, float], up: tuple[float, float], box: tuple[float, float, float, float]
    ) -> None:
        self._across, self._up, self._box = across, up, box

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the place of a point in the picture."""
        left, top, width, height = self._box
        along = log10(x / self._across[0]) / log10(self._across[1] / self._across[0])
        above = log10(y / self._up[0]) / log10(self._up[1] / self._up[0])
        return left + width * along, top + height * (1 - above)

    def line(self, points: Sequence[tuple[float, float]], colour: str, least: float) -> str:
        """Return a line through points; values below `least` are drawn there."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(x, max(y, least)) for x, y in points))
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>'

    def frame(self, across: str, up: str) -> list[str]:
        """Return the frame, a grid at the powers of ten, and the names of the axes."""
        left, top, width, height = self._box
        out = [f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>']
        for power in range(ceil(log10(self._across[0])), floor(log10(self._across[1])) + 1):
            x, _ = self.at(10.0**power, self._up[0])
            out.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + height}" stroke="#ddd"/>')
            out.append(_text(x - 10, top + height + 16, f"{10.0**power:g}"))
        for power in range(ceil(log10(self._up[0])), floor(log10(self._up[1])) + 1):
            _, y = self.at(self._across[0], 10.0**power)
            out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#ddd"/>')
            out.append(_text(left - 48, y + 4, f"{10.0**power:g}"))
        out.append(_text(left + width / 2 - 60, top + height + 34, across))
        out.append(_text(left - 62, top - 8, up))
        return out


def _text(x: float, y: float, words: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" {_FONT}{weight}>{escape(words)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    body = "\n".join(parts)
    white = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{white}\n{body}\n</svg>\n'

"""The plots of docs/performance.md, as SVG written by hand: bars of medians, and lines over time."""

from __future__ import annotations

from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 720, 260, 60
_COLOURS = ("#1f77b4", "#d62728")
_NAMES = {
    "bare": "bare python3 -c",
    "bwrap": "bwrap, command line",
    "bubblewrap": "Nox, bubblewrap, HTTP",
    "tls": "Nox, zygote, Caddy and TLS",
    "zygote": "Nox, zygote, HTTP",
}


def plots(figures: dict[str, Any]) -> dict[str, str]:
    """By file name what can be drawn from these figures."""
    drawn = {}
    if latency := figures.get("latency"):
        values = {label: latency[name]["p50_ms"] for name, label in _NAMES.items() if name in latency}
        drawn["performance-latency.svg"] = bars("hello world, p50 in ms", values)
    if throughput := figures.get("throughput"):
        values = {label: throughput[name] for name, label in _NAMES.items() if name in throughput}
        drawn["performance-throughput.svg"] = bars("hello world, 8 clients, runs per second", values)
    if flood := figures.get("flood"):
        front, runner = ([pair[index] for pair in flood["line"]] for index in (0, 1))
        title = f"resident MiB while programs print without end, {flood['seconds']:g} s"
        drawn["performance-flood.svg"] = lines(title, {"front": front, "runner": runner})
    if endurance := figures.get("endurance"):
        title = f"p50 in ms, over {endurance['runs']} runs in a row"
        drawn["performance-endurance.svg"] = lines(title, {"run": endurance["line"]})
    return drawn


def bars(title: str, values: dict[str, float]) -> str:
    """Horizontal bars, each with its value."""
    most = max(values.values())
    parts = []
    for index, (label, value) in enumerate(values.items()):
        y = 40 + index * 36
        width = value / most * 420
        parts.append(f'<text x="190" y="{y + 17}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="200" y="{y}" width="{width:.1f}" height="24" fill="{_COLOURS[0]}"/>')
        parts.append(f'<text x="{206 + width:.1f}" y="{y + 17}">{value:g}</text>')
    return _document(title, parts, 50 + len(values) * 36)


def lines(title: str, series: dict[str, list[float]]) -> str:
    """Lines over one axis from zero."""
    most = max(max(values) for values in series.values()) * 1.1
    parts = []
    for tick in range(5):
        value = most * tick / 4
        y = _HEIGHT - 30 - (_HEIGHT - 70) * tick / 4
        parts.append(f'<line x1="{_MARGIN}" y1="{y:.1f}" x2="{_WIDTH - 20}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for index, (label, values) in enumerate(series.items()):
        step = (_WIDTH - _MARGIN - 20) / max(1, len(values) - 1)
        points = " ".join(
            f"{_MARGIN + i * step:.1f},{_HEIGHT - 30 - (_HEIGHT - 70) * value / most:.1f}"
            for i, value in enumerate(values)
        )
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>')
        parts.append(f'<text x="{_MARGIN + 10 + index * 90}" y="{_HEIGHT - 8}" fill="{colour}">{label}</text>')
    return _document(title, parts, _HEIGHT)


def _document(title: str, parts: list[str], height: int) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif"'
        f' font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="20" y="22" font-size="14">{title}</text>\n{body}\n</svg>\n'
    )

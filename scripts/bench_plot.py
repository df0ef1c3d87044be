"""The plot of `scripts/bench turns`: turns per second of each row, by history length, as SVG without a library."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, LABEL, BAR, GAP, HEAD = 880, 300, 16, 14, 64
COLOURS = ("#2f6fed", "#7aa5f7", "#bfd3fb")
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1d2433}.dim{fill:#5b6472}.head{font-size:16px;font-weight:600}"
    "@media(prefers-color-scheme:dark){.ground{fill:#12161d}text{fill:#e6e9ef}.dim{fill:#9aa4b2}}"
)


def plot(title: str, groups: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """Horizontal bars: `groups` has for each row its (series, value) pairs, the longest first in the legend."""
    series = list(dict.fromkeys(name for bars in groups.values() for name, _ in bars))
    top = max((value for bars in groups.values() for _, value in bars), default=1) or 1
    scale = (WIDTH - LABEL - 90) / top
    parts, y = [], HEAD
    for row, bars in groups.items():
        middle = y + len(bars) * BAR / 2 + 4
        parts.append(f'<text x="{LABEL - 12}" y="{middle:.0f}" text-anchor="end">{escape(row)}</text>')
        for name, value in bars:
            colour = COLOURS[series.index(name) % len(COLOURS)]
            parts.append(
                f'<rect x="{LABEL}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" rx="2" fill="{colour}"/>'
            )
            parts.append(f'<text class="dim" x="{LABEL + value * scale + 6:.1f}" y="{y + BAR - 4}">{value:,.0f}</text>')
            y += BAR
        y += GAP
    legend = "".join(
        f'<rect x="{LABEL + 130 * i}" y="38" width="12" height="12" rx="2" fill="{COLOURS[i % len(COLOURS)]}"/>'
        f'<text class="dim" x="{LABEL + 130 * i + 18}" y="49">{escape(name)}</text>'
        for i, name in enumerate(series)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" viewBox="0 0 {WIDTH} {y + 10}"'
        f' role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
        f'<rect class="ground" width="100%" height="100%" fill="#fff"/>'
        f'<text class="head" x="16" y="26">{escape(title)}</text>{legend}{"".join(parts)}</svg>\n'
    )

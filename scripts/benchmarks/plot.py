"""The plot of `scripts/bench turns`: turns per second of each row, by history length, as SVG without a library."""

from collections.abc import Collection, Mapping, Sequence
from html import escape

WIDTH, LABEL, BAR, GAP, HEAD = 880, 300, 16, 14, 72
# Each with its colour on a dark ground. The first is of rows that have no history.
COLOURS = (
    ("#8a94a3", "#7c8796"),
    ("#16429c", "#9dbdfa"),
    ("#2f6fed", "#5b8ff5"),
    ("#7aa5f7", "#2f5fc4"),
    ("#0d8a6a", "#3fbf9c"),
)
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1d2433}.dim{fill:#5b6472}.head{font-size:16px}.strong{font-weight:600}"
    ".ground{fill:#fff}"
    + "".join(f".s{number}{{fill:{light}}}" for number, (light, _) in enumerate(COLOURS))
    + "@media(prefers-color-scheme:dark){.ground{fill:#12161d}text{fill:#e6e9ef}.dim{fill:#9aa4b2}"
    + "".join(f".s{number}{{fill:{dark}}}" for number, (_, dark) in enumerate(COLOURS))
    + "}"
)


def plot(title: str, groups: Mapping[str, Sequence[tuple[str, float]]], strong: Collection[str] = ()) -> str:
    """Horizontal bars: `groups` has for each row its (series, value) pairs; the names in `strong` stand out."""
    series = list(dict.fromkeys(name for bars in groups.values() for name, _ in bars))
    top = max((value for bars in groups.values() for _, value in bars), default=1) or 1
    scale = (WIDTH - LABEL - 90) / top
    parts, y = [], HEAD
    for row, bars in groups.items():
        middle = y + len(bars) * BAR / 2 + 4
        weight = ' class="strong"' if row in strong else ""
        parts.append(f'<text x="{LABEL - 12}" y="{middle:.0f}" text-anchor="end"{weight}>{escape(row)}</text>')
        for name, value in bars:
            colour = series.index(name) % len(COLOURS)
            parts.append(
                f'<rect class="s{colour}" x="{LABEL}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" rx="2"/>'
            )
            parts.append(f'<text class="dim" x="{LABEL + value * scale + 6:.1f}" y="{y + BAR - 4}">{value:,.0f}</text>')
            y += BAR
        y += GAP
    legend = "".join(
        f'<rect class="s{i % len(COLOURS)}" x="{LABEL + 130 * i}" y="40" width="12" height="12" rx="2"/>'
        f'<text class="dim" x="{LABEL + 130 * i + 18}" y="51">{escape(name)}</text>'
        for i, name in enumerate(series)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 10}" viewBox="0 0 {WIDTH} {y + 10}"'
        f' role="img"><title>{escape(title)}</title><style>{STYLE}</style><rect class="ground" width="100%" height="100%"/>'
        f'<text class="head strong" x="16" y="26">{escape(title)}</text>{legend}{"".join(parts)}</svg>\n'
    )

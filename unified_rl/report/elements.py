"""What report pages are made of: elements of HTML, as text.

Everything that a run, its prompts or its model wrote is untrusted: text is escaped, pictures are decoded and encoded
again, and the page forbids scripts and requests even if something slipped through.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unified_rl.plain_text import clean
from unified_rl.report.charts import Series, line_chart
from unified_rl.report.style import STYLE

Row = Mapping[str, Any]

MAX_FRAMES = 4
MAX_SIDE = 384
"""Larger pictures are scaled down, to keep the page small."""
PIXEL_SIDE = 128
"""Pictures up to this size are scaled up without smoothing."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)} - unified_rl</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def text(value: object) -> str:
    return html.escape(clean(str(value)), quote=True)


def section(title: str, body: str, *, anchor: str = "") -> str:
    place = f' id="{anchor}"' if anchor else ""
    return f"<section{place}><h2>{title}</h2>\n{body}\n</section>"


def note(text: str) -> str:
    return f'<p class="note">{text}</p>'


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def reward_keys(rows: Iterable[Row]) -> list[str]:
    """`reward` and every `rewards/<name>/mean`, in the order in which they appear."""
    keys = {key: None for row in rows for key in row if key == "reward" or is_reward_mean(key)}
    return list(keys)


def is_reward_mean(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")


def reward_label(key: str) -> str:
    return "reward (trained sum)" if key == "reward" else key.removeprefix("rewards/").removesuffix("/mean")


def figure(title: str, series: Sequence[Series], caption: str, *, x_label: str = "step") -> str:
    keys = "".join(
        f'<span><svg viewBox="0 0 16 8"><path class="key s{index}" d="M0 4H16"/></svg>{text(one.label)}</span>'
        for index, one in enumerate(series)
    )
    legend = f'<div class="legend">{keys}</div>' if len(series) > 1 else ""
    told = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{text(title)}</h3>{legend}{line_chart(series, x_label=x_label)}{told}</figure>"


def table(titles: Sequence[str], rows: Sequence[str], *, numeric: bool = False) -> str:
    """`numeric`: the titles stand over numbers, but for the first one."""
    kind = ' class="number"' if numeric else ""
    head = "".join(f"<th{kind if index else ''}>{text(title)}</th>" for index, title in enumerate(titles))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def rewards(row: Row) -> str:
    items = "".join(f"<li>{text(name)} <b>{number(value)}</b></li>" for name, value in row["rewards"].items())
    return f'<ul class="rewards">{items}</ul>'


def pictures(folder: Path, row: Row, key: str) -> str:
    names = row[key][:MAX_FRAMES]
    several = " several" if len(row[key]) > 1 else ""
    return f'<div class="pictures{several}">{"".join(picture(folder, name) for name in names)}</div>' if names else ""


def picture(folder: Path, name: str) -> str:
    """One picture as a data: URI. Of its path only the name counts: samples.jsonl may not point out of its folder."""
    try:
        with Image.open(folder / Path(name).name, formats=("PNG",)) as image:
            kind = ' class="pixel"' if max(image.size) <= PIXEL_SIDE else ""
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            stream = io.BytesIO()
            image.save(stream, "PNG")
    except (OSError, ValueError, Image.DecompressionBombError):
        return f'<span class="soft">{text(Path(name).name)} cannot be read</span>'
    return f'<img{kind} alt="" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'

"""Write what becomes of one site's channels and tokens in every basis: sentences and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from app.view import cards, texts
from app.view import texts_bases as words
from app.view.figure import number
from core.options import MASSIVE

LISTED = 8


def words_of(reports: Mapping[str, Any], site: str, noise: Mapping[str, Any], bits: int) -> list[str]:
    """Say what scaling and rotating do to a site's channels, and what they leave of its tokens.

    Args: reports: RangesReport by basis, with `peaks`. noise: GridNoise of the site by basis, at `bits`.
    """
    ratios = {name: number(report.sites[site].outlier_ratio) for name, report in reports.items()}
    grids = {name: number(found.tensor) for name, found in noise.items()}
    peaks = reports["rotated"].peaks[site]
    facts = {"tokens": f"{peaks.tokens:,}", "times": number(peaks.ratio(peaks.largest[0])), "limit": f"{MASSIVE:g}"}
    stay = words.STAY.format(count=f"{peaks.massive:,}", **facts) if peaks.massive else words.GONE.format(**facts)
    return [words.RATIO.format(**ratios), words.NOISE.format(bits=bits, **grids), stay]


def basis_rows(reports: Mapping[str, Any], site: str, noise: Mapping[str, Any]) -> list[list[str]]:
    """Make the rows of the table of bases. Args: as `words_of`."""
    rows = []
    for name, report in reports.items():
        peaks, found = report.peaks[site], noise[name]
        grids = [number(value) for value in (found.tensor, found.clusters, found.channels)]
        largest = [number(peaks.ratio(peaks.largest[0])), f"{peaks.massive:,}"]
        rows.append([words.VIEWS[name], number(report.sites[site].outlier_ratio), *grids, *largest])
    return rows


def token_rows(tokens: Sequence[tuple[Any, Any, float]]) -> list[list[str]]:
    """Make the rows of a table of tokens. Args: tokens: as `RangesReport.massive_tokens` gives them."""
    return [
        [
            str(site.layer),
            texts.SITE_LABELS[site.kind],
            f"“{token.token_text}”".replace("\n", "⏎"),
            f"{token.position:,}",
            number(token.value),
            number(ratio),
        ]
        for site, token, ratio in tokens
    ]


def card(reports: Mapping[str, Any], site: str, noise: Mapping[str, Any], *, bits: int, clusters: int, listed: str) -> str:
    """Write sentences, the table of bases, and the largest tokens in the basis `listed`. Args: as `words_of`."""
    said = "".join(f'<p class="qs-verdict">{escape(line)}</p>' for line in words_of(reports, site, noise, bits))
    headers = [header.format(clusters) for header in words.HEADERS]
    table = cards.table(headers, basis_rows(reports, site, noise), caption=words.TABLE.format(bits=bits))
    report, name = reports[listed], words.VIEWS[listed]
    entry, peaks = report.sites[site], report.peaks[site]
    here = token_rows([(entry, token, peaks.ratio(token)) for token in peaks.largest])
    everywhere = token_rows(report.massive_tokens(LISTED))
    columns = "".join(
        f"<div>{cards.table(words.TOKEN_HEADERS, rows, caption=caption.format(name))}</div>"
        for rows, caption in ((here, words.TOKENS_HERE), (everywhere, words.TOKENS_ALL))
    )
    return f'{said}{table}<div class="qs-columns">{columns}</div>'

"""Write costs by number of clusters, and the differences of two calibrations: sentences, tables, charts."""

from __future__ import annotations

from typing import Any

from app.view import texts_groups as texts
from app.view.figure import number


def knee_words(curve: Any, costs: Any) -> str:
    """Say where the knees lie, of the squared error and, once it is known, of the divergence.

    Args: curve: `core.methods.rptq.explore.ErrorCurve`. costs: `core.probe.report.CostCurve`, or None.
    """
    if curve.knee is None:
        said = [texts.NO_KNEE_ERROR]
    else:
        most, least = curve.kmeans[0], curve.per_channel
        share = (most - curve.kmeans[curve.g.index(curve.knee)]) / (most - least)
        said = [texts.KNEE_ERROR.format(g=curve.knee, share=f"{100 * share:.0f}")]
    if costs is None:
        return said[0]
    if costs.knee is None:
        said.append(texts.NO_KNEE_NATS)
    else:
        cost = costs.kmeans[costs.g.index(costs.knee)]
        enough = next((g for g, other in zip(costs.g, costs.equal, strict=True) if other <= cost), None)
        said.append(texts.KNEE_NATS.format(g=costs.knee, cost=number(cost)))
        said.append(texts.EQUAL_NEVER.format(g=costs.g[-1]) if enough is None else texts.EQUAL_NEEDS.format(g=enough))
    said.append(texts.LEVELS.format(tensor=number(costs.per_tensor), channel=number(costs.per_channel)))
    if costs.per_tensor < costs.noise_floor:
        said.append(texts.BELOW_FLOOR.format(floor=number(costs.noise_floor)))
    return " ".join(said)


def curve_rows(curve: Any, costs: Any) -> list[list[str]]:
    """Make the rows of both curves: g, squared error and predicted divergence of both groupings; "…" where it is not known yet.

    Args: as in `knee_words`.
    """
    points = [(texts.WHOLE, 1.0, 1.0), *zip(map(str, curve.g), curve.kmeans, curve.equal, strict=True)]
    points.append((texts.CHANNEL, curve.per_channel, curve.per_channel))
    if costs is None:
        return [[g, number(kmeans), number(equal), "…", "…"] for g, kmeans, equal in points]
    nats = [(costs.per_tensor,) * 2, *zip(costs.kmeans, costs.equal, strict=True), (costs.per_channel,) * 2]
    return [[point[0], *map(number, (*point[1:], *pair))] for point, pair in zip(points, nats, strict=True)]

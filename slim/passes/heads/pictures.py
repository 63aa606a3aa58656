"""What merging kv heads lost, as charts for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slim.compiler.charts import Chart


def losses_chart(losses: Mapping[str, Mapping[str, float]]) -> Chart:
    """Predicted and measured losses.

    Args:
        losses: layer -> what is lost -> the share; the same names for every layer.
    """
    names = list(next(iter(losses.values())))
    series = {name: [each[name] for each in losses.values()] for name in names}
    return Chart("What merging kv heads loses", "layer", "share of the energy", series, list(losses), style=".2%")


def spectra_chart(spectra: Mapping[str, Sequence[float]], kept: Mapping[str, int]) -> Chart:
    """How much of all values a layer's best shared heads hold: the first, the second, ...; the last one kept is marked.

    Args:
        spectra: layer -> the share of the first head, the second, ...
        kept: layer -> how many it keeps.
    """
    series = {f"layer {name}": list(values) for name, values in spectra.items()}
    marks = {f"layer {name}": number for name, number in kept.items()}
    title = "Values of all kv heads, in a basis shared by all"
    return Chart(title, "heads kept", "share of the energy", series, marks=marks, kind="lines", style=".2%")

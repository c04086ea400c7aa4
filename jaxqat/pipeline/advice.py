"""What to try when a quantized network is less accurate than its float one.

The layers that cost most are those without which the quantized network gains most accuracy. For
each there is one rule, for the first cause that fits: outliers in its input, few bits, one scale
for all weights, clipping.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from jaxqat.analysis import Analysis, analyze
from jaxqat.analysis._text import percent
from jaxqat.analysis.result import LayerAnalysis, Sensitivity, TensorAnalysis
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.progress import Work
from jaxqat.pipeline.run.snapshots import Model
from jaxqat.pipeline.terminal import say
from jaxqat.quant import Recipe, Rule

POINT = 0.01  # A loss of accuracy that calls for advice.
IMAGES, BATCH = 200, 100
MOST_LAYERS = 3
# An input has outliers if all but a thousandth of its values lie in a quarter of its range.
OUTLIER_SHARE, OUTLIER_WIDTH = 1e-3, 0.25
CLIPPED = 0.01


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to try.

    Attributes:
        layers: Path of each layer that costs most, and the reason for its rule.
        recipe: The recipe with a rule for each, before the rules that it had.
    """

    layers: dict[str, str]
    recipe: Recipe

    def yaml(self) -> str:
        """Return the settings that differ from the defaults, as the section `quant` of a config."""
        return yaml.safe_dump({"quant": _changed(self.recipe)}, sort_keys=False)


def advise(analysis: Analysis, recipe: Recipe) -> Advice:
    """Return what to try for the layers that cost most.

    Args:
        analysis: The network's analysis, with labels.
        recipe: Its recipe.
    """
    layers = {layer.path: layer for layer in analysis.layers}
    tensors = {tensor.name: tensor for tensor in analysis.tensors}
    found: dict[str, str] = {}
    rules: list[Rule] = []
    for path in _worst(analysis):
        layer = layers[path]
        settings = recipe.settings(path, layer.kind) or recipe
        reason, change = _change(layer, tensors.get(layer.input or ""), settings)
        matching = next((r for r in recipe.rules if r.matches(path, layer.kind)), Rule())
        kind = "attention" if layer.kind == "attention" else "any"
        rules.append(dataclasses.replace(matching, path=_escaped(path), kind=kind, **change))
        found[path] = reason
    kept = [rule for rule in recipe.rules if not _is_replaced(rule, recipe, analysis, found)]
    return Advice(found, dataclasses.replace(recipe, rules=(*rules, *kept)))


def print_advice(analysis: Analysis, recipe: Recipe, console: Console, command: str) -> None:
    """Print which layers cost most, and the recipe to try.

    Args:
        analysis: The network's analysis, with labels.
        recipe: Its recipe.
        console: Where it is printed.
        command: The command that takes the recipe, before `--recipe`.
    """
    advice, without = advise(analysis, recipe), {s.path: s.without for s in analysis.sensitivity}
    say("advice: these layers cost most:", console)
    for path, reason in advice.layers.items():
        accuracy = percent(without[path].accuracy)
        say(f"  {path}: {accuracy} % with this layer alone in float; {reason}", console)
    say(f"Save this as advice.yaml and run `{command} --recipe advice.yaml`:\n", console)
    say(advice.yaml(), console)


def is_worse(real: float, quantized: float) -> bool:
    """Return whether a quantized network is worse than float by more than a point."""
    return real - quantized > POINT + 1e-9


def analyze_for_advice(networks: Networks, model: Model, console: Console) -> Analysis:
    """Analyze a quantized network on images of the validation split, or of the training split.

    The test split is for the final test only.
    """
    split = networks.dataset.validation or networks.dataset.train
    split = split.take(np.arange(min(IMAGES, len(split))))
    parts = np.array_split(np.arange(len(split)), -(-len(split) // BATCH))
    what = f"advice: analyzing {len(split):,} images, layer by layer"
    with Work(console, what, len(split)) as work:
        return analyze(
            networks.quantized,
            model.tree(),
            batches=work.track(split.images[indices] for indices in parts),
            labels=(split.labels[indices] for indices in parts),
            preprocess=networks.normalize,
            train=False,
        )


def _worst(analysis: Analysis) -> list[str]:
    """Return the layers with at least half of the largest gain, or the noisiest one."""

    def gain(each: Sensitivity) -> float:
        return (each.without.accuracy or 0.0) - (analysis.quantized.accuracy or 0.0)

    ranked = sorted(analysis.sensitivity, key=gain, reverse=True)  # Of equal ones, the noisiest.
    least = max(gain(ranked[0]) / 2, 1 / analysis.examples)
    return [s.path for s in ranked[:MOST_LAYERS] if gain(s) >= least - 1e-9] or [
        analysis.sensitivity[0].path
    ]


def _is_replaced(rule: Rule, recipe: Recipe, analysis: Analysis, advised: Collection[str]) -> bool:
    """Return whether a rule decided about advised layers only; it would match none any more."""
    decided = [
        layer.path
        for layer in analysis.layers
        if next((r for r in recipe.rules if r.matches(layer.path, layer.kind)), None) is rule
    ]
    return bool(decided) and set(decided) <= set(advised)


def _change(
    layer: LayerAnalysis, read: TensorAnalysis | None, settings: Any
) -> tuple[str, dict[str, Any]]:
    """Return the reason and the fields of a layer's rule."""
    if read is not None and settings.act_range in ("ema", "minmax"):
        width = _bulk(read)
        if width < OUTLIER_WIDTH:
            reason = (
                f"99.9 % of its input's values lie in {percent(width)} % of their range, which "
                "outliers widen"
            )
            return reason, {"act_range": "percentile"}
    few = {
        name: 8
        for name in ("weight_bits", "act_bits")
        if (bits := getattr(layer, name)) is not None and bits < 8
    }
    if few:
        return f"it has {layer.weight_bits}-bit weights and {layer.act_bits}-bit input", few
    if settings.weight_granularity == "per_tensor":
        return "all its weights share one scale", {"weight_granularity": "per_channel"}
    if read is not None and read.clipped > CLIPPED:
        return f"{percent(read.clipped)} % of its input is clipped", {"act_range": "minmax"}
    return "its noise has no single cause", {"act_range": "mse", "weight_range": "mse"}


def _bulk(read: TensorAnalysis) -> float:
    """Return the smallest part of a tensor's range that holds all but `OUTLIER_SHARE` of it."""
    counts, edges = np.asarray(read.counts), np.asarray(read.edges)
    sums = np.concatenate([[0], np.cumsum(counts)])
    wanted = (1 - OUTLIER_SHARE) * sums[-1]
    ends = np.searchsorted(sums, sums + wanted - 1e-6)
    widths = [edges[e] - edges[s] for s, e in enumerate(ends) if e < len(edges)]
    return float(min(widths) / (read.high - read.low)) if read.high > read.low else 1.0


def _escaped(path: str) -> str:
    """Return a regular expression for exactly this path, without needless backslashes."""
    return "".join(f"\\{c}" if c in r"\.^$*+?{}[]|()" else c for c in path)


def _changed(settings: Any) -> dict[str, Any]:
    """Return the fields that differ from their defaults, in their order."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "rules":
            if value:
                found["rules"] = [_changed(rule) for rule in value]
        elif value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found

"""The table of models in the README: what of each becomes integer, and how well.

    PYTHONPATH=tests python -m zoo.table

measures each model, writes configs/results/zoo.json, and prints the table.

Each model has its first weights and is calibrated on its 20 inputs: the table shows what converts,
not what a trained network loses.
"""

import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from references import sqnr
from zoo import more_models as models
from zoo.cases import ZOO
from zoo.harness import BATCH, IMAGES, Quantized, linen, squared_error

import jaxqat
from jaxqat.integer import graph as g
from jaxqat.integer._results import flat
from jaxqat.pipeline.machine import processor

RESULTS = Path(__file__).parents[2] / "configs" / "results" / "zoo.json"
RNG = np.random.default_rng(2)
PIXELS = np.round(128 + 60 * IMAGES).clip(0, 255).astype(np.float32)
SOUND = np.repeat(IMAGES.reshape(BATCH, 64, 1), 2, 1)
NOISE = RNG.normal(size=(BATCH, 6)).astype(np.float32) + IMAGES[:, 0, :6, 0]

Case = Callable[[], Quantized]


def case(
    module: nn.Module, inputs: np.ndarray = IMAGES, *, modes: bool = True, scores: bool = True
) -> Case:
    """A model; with `modes` it takes `train`, with `scores` it classifies."""
    options: dict[str, Any] = {} if scores else {"objective": squared_error}
    return functools.partial(linen, module, inputs, modes=modes, **options)


MORE: Mapping[str, Case] = {
    "ResNet v2": case(models.ResNetV2()),
    "ResNet-D": case(models.ResNetD()),
    "ResNeXt": case(models.ResNetD(groups=4)),
    "SE-ResNet": case(models.SEResNet()),
    "ResNeSt": case(models.ResNeSt()),
    "Inception": case(models.Inception(), modes=False),
    "VGG, normalization inside": case(models.VGG(), PIXELS, modes=False),
    "DenseNet": case(models.DenseNet()),
    "MobileNetV2": case(models.MobileNets()),
    "MobileNetV3": case(models.MobileNets(nn.hard_swish, nn.hard_sigmoid)),
    "EfficientNet": case(models.MobileNets(nn.swish, nn.sigmoid)),
    "ConvNeXt": case(models.ConvNeXt(), modes=False),
    "ConvMixer": case(models.ConvMixer()),
    "MLP-Mixer": case(models.MLPMixer(), modes=False),
    "hybrid ViT": case(models.HybridViT(), modes=False),
    "U-Net, transposed": case(models.UNet(), modes=False, scores=False),
    "U-Net, nearest": case(models.UNet("nearest"), modes=False, scores=False),
    "U-Net, bilinear": case(models.UNet("bilinear"), modes=False, scores=False),
    "pixel shuffle": case(models.PixelShuffle(), modes=False, scores=False),
    "actor-critic": case(models.ActorCritic(), PIXELS, modes=False, scores=False),
    "autoencoder": case(models.Autoencoder(), modes=False, scores=False),
    "audio CNN": case(models.AudioNet(), SOUND),
    "GAN generator": case(models.Generator(), NOISE, scores=False),
    "GAN discriminator": case(models.Discriminator(), scores=False),
    "backbone of features": case(models.Backbone(), scores=False),
    "PReLU": case(models.PReLUNet(), modes=False),
    "gated MLP": case(models.GatedMLP(), modes=False),
}
# Models of other hands, under the names of their cases.
OF_OTHERS = {
    "CNN": "cnn",
    "MobileNet": "mobilenet",
    "ViT": "vit",
    "LSTM": "lstm",
    "transformer encoder": "encoder",
    "shared encoder": "shared module",
    "scan and remat": "scan and remat",
    "ResNet in bfloat16": "bfloat16",
    "NNX CNN": "nnx cnn",
    "NNX MobileNetV2": "nnx mobilenet",
    "NNX ViT": "nnx vit",
    "NNX LSTM": "nnx lstm",
    "Equinox CNN": "equinox cnn",
    "function": "function",
}
ATTENTION = jaxqat.Recipe(rules=(jaxqat.Rule(kind="attention"),))
MODELS: Mapping[str, Case] = {
    **MORE,
    **{name: functools.partial(ZOO[case].make, "int8") for name, case in OF_OTHERS.items()},
    "ViT, attention by rule": functools.partial(ZOO["vit"].make, ATTENTION),
}


def first_weights(name: str) -> dict[str, Any]:
    """Return the row of a model with its first weights."""
    return row(MODELS[name]())


def row(quantized: Quantized) -> dict[str, Any]:
    """Return what the table says of a model."""
    from jaxqat.export import run_onnx

    graph = quantized.convert()
    check = quantized.verify(graph)
    layers = [each.layer for each in quantized.describe().layers]
    macs = sum(layer.macs for layer in layers)
    integer = sum(layer.macs for layer in layers if layer.float_reason is None)
    own = flat(graph.outputs, jaxqat.make_executor(graph)(quantized.inputs))
    with tempfile.TemporaryDirectory() as folder:
        path = jaxqat.export_onnx(graph, Path(folder) / "network.onnx")
        result, _ = run_onnx(path, quantized.inputs.astype(graph.input_type))
    onnx = [
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(a).max())
        for a, b in zip(own, flat(graph.outputs, result), strict=True)
    ]
    in_float = Counter(op.operation for op in graph.float_ops)
    products = sum(isinstance(node, g.Product | g.MatMul) for node in graph.nodes)
    return {
        "products": products + in_float["dot"] + in_float["conv"],
        "integer_products": products,
        "integer_macs_percent": round(100 * integer / macs, 1),
        "islands": [str(island) for island in graph.islands],
        "sqnr_db": round(min(map(_decibels, _float(quantized), own)), 1),
        "codes": check.codes,
        "differing_codes": check.differing,
        "island_codes": check.island_codes,
        "differing_island_codes": check.island_differing,
        "largest_onnx_difference": max(onnx),
        "failures": list(check.failures),
        "bytes": graph.size_bytes(),
        "float32_bytes": 4 * sum(x.size for x in jax.tree.leaves(quantized.before)),
    }


def _float(quantized: Quantized) -> list[Any]:
    model, before = quantized.in_inference()
    return model.observe(*before, quantized.inputs, **quantized.kwargs).results


def _decibels(real: Any, values: Any) -> float:
    return sqnr.decibels(real, values)


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as it stands in the README."""
    lines = [
        "| model | integer products | integer MACs | float islands | SQNR | differing codes "
        "| difference in ONNX Runtime | bytes, of float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        codes, island = r["codes"] + r["island_codes"], r["differing_island_codes"]
        share = 100 * r["bytes"] / r["float32_bytes"]
        cells = [
            name,
            f"{r['integer_products']} of {r['products']}",
            f"{r['integer_macs_percent']:.0f} %",
            str(len(r["islands"])),
            f"{r['sqnr_db']:.0f} dB",
            f"{r['differing_codes'] + island} of {codes:,}",
            f"{r['largest_onnx_difference']:.0e}" if r["largest_onnx_difference"] else "0",
            f"{r['bytes']:,} ({share:.0f} %)",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every model, and write the results."""
    rows: dict[str, Any] = {}
    for name in MODELS:
        rows[name] = first_weights(name)
        print(f"measured {name}", file=sys.stderr)
    content = {
        "jax": jax.__version__,
        "processor": processor(),
        "inputs": BATCH,
        "models": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()

"""Models of others, as they are, and what is known of each by hand."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from zoo import equinox_models, models, nnx_models
from zoo.harness import IMAGES, TOKENS, Quantized, function, linen, nnx_module

from jaxqat import Recipe


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the zoo.

    Attributes:
        make: Quantizes and calibrates it by a recipe.
        products: Its layers by kind, in the order of computation.
        refused: What stands in the way of an integer network, as patterns; none if it becomes one.
        float_pairs: How many products of two activations it has.
        learning_rate: Of Adam.
    """

    make: Callable[[Recipe | str], Quantized]
    products: dict[str, str]
    refused: tuple[str, ...] = ()
    float_pairs: int = 0
    learning_rate: float = 5e-3


def function_parameters() -> list[Any]:
    rng = np.random.default_rng(0)
    return [
        (rng.normal(0, 0.2, shape).astype(np.float32), np.zeros(shape[1], np.float32))
        for shape in ((64, 12), (12, 5))
    ]


def equinox_cnn(recipe: Recipe | str) -> Quantized:
    module = equinox_models.CNN(jax.random.key(0))
    return function(module, module, IMAGES, recipe)


def kinds(kind: str, *paths: str) -> dict[str, str]:
    return dict.fromkeys(paths, kind)


def encoder_block(name: str, attention: str, *mlp: str) -> dict[str, str]:
    heads = [f"{name}/{attention}/{part}" for part in ("query", "key", "value", "out")]
    return kinds("dense", *heads, *(f"{name}/{layer}" for layer in mlp))


PAIRS = r"/dot_general\d+ \(dense\): both operands depend on the data"
ENCODER = Case(
    lambda recipe: linen(models.TransformerEncoder(num_layers=1), TOKENS, recipe, modes=True),
    kinds("embed", "Embed_0")
    | encoder_block("layer_0", "SelfAttention_0", "MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1")
    | kinds("dense", "Dense_0"),
    refused=(
        r"layer_0/SelfAttention_0/.*" + PAIRS,
        r"layer_0/SelfAttention_0/query/input: a look-up in Embed_0 before it",
        r"layer_0/SelfAttention_0/out/input: .* before it has no integer form",
        r"layer_0/MlpBlock_0/Dense_0/input: .*layer_0/LayerNorm_1 before it",
        r"Dense_0/input: .*TransformerEncoder/LayerNorm_0 before it",
    ),
    float_pairs=2,
)
VIT = Case(
    lambda recipe: linen(models.ViT(num_layers=1), IMAGES, recipe, modes=False),
    kinds("conv", "embedding")
    | encoder_block(
        "encoderblock_0",
        "MultiHeadDotProductAttention_0",
        "MlpBlock_0/Dense_0",
        "MlpBlock_0/Dense_1",
    )
    | kinds("dense", "head"),
    refused=(
        r"encoderblock_0/MultiHeadDotProductAttention_0/.*" + PAIRS,
        r"encoderblock_0/MultiHeadDotProductAttention_0/query/input: 'add' in ViT before it",
        r"encoderblock_0/MlpBlock_0/Dense_0/input: .*encoderblock_0/LayerNorm_1 before it",
        r"head/input: .*ViT/encoder_norm before it",
    ),
    float_pairs=2,
)
CNN = Case(
    lambda recipe: linen(models.CNN(), IMAGES, recipe, modes=False),
    kinds("conv", "Conv_0", "Conv_1") | kinds("dense", "Dense_0", "Dense_1"),
)
HALF = kinds("conv", "conv_init", *(f"ResidualBlock_0/{n}" for n in ("Conv_0", "Conv_1")))
HALF |= kinds("conv", "ResidualBlock_0/conv_proj") | kinds("dense", "Dense_0")
GATES = [f"{side}{gate}" for gate in ("i", "f", "g", "o") for side in "ih"]

LINEN = {
    "cnn": CNN,
    "mobilenet": Case(
        lambda recipe: linen(models.MobileNet(), IMAGES, recipe, modes=True),
        kinds("conv", "stem")
        | kinds("conv", *(f"DepthwiseSeparable_{n}/Conv_{i}" for n in range(3) for i in range(2)))
        | kinds("dense", "head"),
    ),
    "vit": VIT,
    "lstm": Case(
        lambda recipe: linen(
            models.LSTMClassifier(cell=nn.OptimizedLSTMCell), TOKENS, recipe, modes=False
        ),
        kinds("embed", "embedder")
        | kinds("dense", *(f"OptimizedLSTMCell_0/{n}" for n in ("hi", "ii")), "output_layer"),
        refused=(
            r"OptimizedLSTMCell_0/ii/input: a look-up in embedder before it",
            r"OptimizedLSTMCell_0/hi/input: .*OptimizedLSTMCell_0 before it has no integer form",
        ),
        learning_rate=3e-2,
    ),
    "encoder": ENCODER,
    "shared module": Case(
        lambda recipe: linen(models.Siamese(), IMAGES, recipe, modes=False),
        # Twice in the table: it multiplies twice, and its results are two tensors.
        kinds("conv", "encoder/layers_0", "encoder/layers_2") | kinds("dense", "classifier"),
    ),
    "scan and remat": Case(
        lambda recipe: linen(models.DeepMLP(), IMAGES, recipe, modes=False),
        kinds("dense", "Dense_0")
        | kinds("dense", *(f"layers/Dense_{i}/{n}" for n in range(3) for i in range(2)))
        | kinds("dense", "Dense_1"),
        refused=(r"layers/Dense_0/2/input: .*DeepMLP/layers/LayerNorm_0 before it",),
    ),
    "bfloat16": Case(lambda recipe: linen(models.HalfResNet(), IMAGES, recipe, modes=True), HALF),
    "bfloat16 parameters": Case(
        lambda recipe: linen(
            models.HalfResNet(param_dtype=jnp.bfloat16), IMAGES, recipe, modes=True
        ),
        HALF,
        # A bfloat16 has 8 bits: smaller steps than 2**-9 of a weight are lost.
        learning_rate=2e-2,
    ),
}
OTHERS = {
    "nnx cnn": Case(
        lambda recipe: nnx_module(nnx_models.CNN(rngs=nnx.Rngs(0)), IMAGES, recipe),
        kinds("conv", "conv1", "conv2") | kinds("dense", "linear1", "linear2"),
    ),
    "nnx mobilenet": Case(
        lambda recipe: nnx_module(nnx_models.MobileNetV2(rngs=nnx.Rngs(0)), IMAGES, recipe),
        kinds("conv", "stem")
        | kinds(
            "conv",
            *(f"blocks/{n}/{c}" for n in range(2) for c in ("expand", "depthwise", "project")),
        )
        | kinds("dense", "head"),
    ),
    "nnx vit": Case(
        lambda recipe: nnx_module(
            nnx_models.VisionTransformer(num_layers=1, rngs=nnx.Rngs(0)), IMAGES, recipe
        ),
        kinds("conv", "patch_embeddings")
        | encoder_block("encoder/layers/0", "attn", "mlp/layers/0", "mlp/layers/3")
        | kinds("dense", "classifier"),
        refused=(
            r"encoder/layers/0/attn/\.\.\.qhd,\.\.\.khd->\.\.\.hqk" + PAIRS,
            r"encoder/layers/0/attn/query/input: .* before it has no integer form",
            r"classifier/input: the normalization final_norm before it has no integer form",
        ),
        float_pairs=2,
    ),
    "nnx lstm": Case(
        lambda recipe: nnx_module(nnx_models.LSTMClassifier(rngs=nnx.Rngs(0)), TOKENS, recipe),
        kinds("embed", "embed")
        # 'if' is a keyword of Python.
        | kinds("dense", *(f"rnn/cell/{'if_' if gate == 'if' else gate}" for gate in GATES))
        | kinds("dense", "head"),
        refused=(
            r"rnn/cell/ii/input: a look-up in embed before it",
            r"rnn/cell/hi/input: 'logistic' in rnn/cell before it",
        ),
        learning_rate=3e-2,
    ),
    "equinox cnn": Case(
        equinox_cnn,
        kinds("conv", "layers/0") | kinds("dense", "layers/4", "layers/6"),
        learning_rate=2e-2,
    ),
    "function": Case(
        lambda recipe: function(models.function_mlp, function_parameters(), IMAGES, recipe),
        kinds("dense", "0", "1"),
    ),
}
ZOO = LINEN | OTHERS

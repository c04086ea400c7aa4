"""A sentinel of training: compare integer products with NumPy, a few layers in each epoch.

Compilers have computed integer convolutions wrongly, some only for one shape on one processor. A
network that trains on wrong sums learns them, and nothing else shows it.
"""

from typing import Any

import jax
import numpy as np

from jaxqat.errors import RunError
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.training import Compilation, TrainState
from jaxqat.quant import _forms as forms
from jaxqat.quant._numerics import by_numpy
from jaxqat.quant._numerics.products import Convolution, Dot

LAYERS = 2  # In each epoch; the next ones in the next epoch.
IMAGES = 2  # Whose sums are compared, of a whole batch.


class WrongSumsError(RunError):
    """A compiled integer product of the network in training is not NumPy's."""


class Sentinel:
    """Computes the network of the QAT stage on one batch, as it is trained, and checks its sums.

    The program is the training step's forward pass with frozen ranges: the same products of the
    same shapes, compiled by the same options.

    Args:
        networks: The networks and the data.
        compilation: How training steps are compiled.
        state: A state of the stage; others have the same shapes.
    """

    def __init__(self, networks: Networks, compilation: Compilation, state: TrainState):
        self._networks = networks
        self._sources: dict[str, forms.Multiplied] = {}
        self._run = compilation.compile(jax.jit(self._sums), *self._arguments(state, 0))

    def check(self, state: TrainState, epoch: int) -> None:
        """Check some layers of the network after an epoch.

        Raises:
            WrongSumsError: If a sum is wrong; names the layer.
        """
        found = self._run(*self._arguments(state, epoch))
        paths = sorted(self._sources)
        chosen = {paths[(epoch * LAYERS + i) % len(paths)] for i in range(min(LAYERS, len(paths)))}
        for path in sorted(chosen):
            codes, weights, total = jax.device_get(found[path])
            source = self._sources[path]
            wanted = by_numpy.accumulate(source.product, codes, weights)
            wrong = wanted != total
            if wrong.any():
                raise WrongSumsError(
                    f"qat: {path}: {int(wrong.sum()):,} of {wrong.size:,} integer sums of the "
                    f"compiled network are not those of NumPy, after epoch {epoch}, which was not "
                    "saved. `jaxqat doctor` tests this version of jaxlib on this device; "
                    "qat.sentinel: false trains without this check."
                )

    def _arguments(self, state: TrainState, epoch: int) -> tuple[Any, Any]:
        """Return the variables, and a batch that differs from epoch to epoch."""
        train, size = self._networks.dataset.train, self._networks.experiment.qat.batch_size
        images = train.images[np.arange(epoch * size, (epoch + 1) * size) % len(train)]
        return {"params": state.params, **state.collections}, images

    def _sums(self, variables: Any, images: Any) -> dict[str, tuple[Any, Any, Any]]:
        """Return codes, weights and sums of each layer, of a few images of the batch."""
        networks = self._networks
        evaluator = networks.quantized.record(variables, networks.normalize(images), train=False)
        found: dict[str, tuple[Any, Any, Any]] = {}
        for path, accumulator in evaluator.products.items():
            source = accumulator.source
            assert isinstance(source, forms.Multiplied)
            self._sources[path] = source
            some = slice(IMAGES) if _has_rows(source) else slice(None)
            # Whole batches are multiplied, as in training, and cut afterwards.
            codes, total = jax.lax.optimization_barrier((source.codes.codes, accumulator.total))
            found[path] = codes[some], source.weight_codes, total[some]
        return found


def _has_rows(source: forms.Multiplied) -> bool:
    """Return whether each row of the codes gives the same row of the sums."""
    product = source.product
    assert isinstance(product, Convolution | Dot)
    numbers = product.params["dimension_numbers"]
    if isinstance(product, Convolution):
        return numbers.lhs_spec[0] == numbers.out_spec[0] == 0
    (summed, _), (batch, _) = numbers
    return product.weight_side == 1 and 0 not in summed and not batch

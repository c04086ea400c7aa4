"""Observe ranges on two devices and on one, in a process that has two.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python two_devices.py RESULT.npz

`quant/test_devices.py` runs it.
"""

import dataclasses
import functools
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import jaxqat
from jaxqat.quant._models.state import flat_state

MODES = ("calibrate", "train")
MAPS = ("shard_map", "pmap")
# Range, mode and map.
CASES = (
    *itertools.product(("ema", "lsq"), MODES, MAPS),
    # The map is the same to them.
    *itertools.product(("minmax", "percentile", "mse", "snr", "pact"), MODES, ("shard_map",)),
)
AXIS = "data"
EXAMPLES = 8


def model(params: Any, x: jax.Array) -> jax.Array:
    """A convolution, batch norm with fixed statistics, a residual addition and a dense layer."""
    y = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = y * params["norm"]["scale"] + params["norm"]["bias"]
    x = jax.nn.relu(x + y)
    return x.mean((1, 2)) @ params["head"]["kernel"]


def parameters() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 4, 4)},
        "norm": {"scale": (4,), "bias": (4,)},
        "head": {"kernel": (4, 3)},
    }
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def batches() -> list[np.ndarray]:
    """Two batches; the last example, on the second device, has the largest values."""
    size = np.linspace(1, 3, EXAMPLES, dtype=np.float32).reshape(-1, 1, 1, 1)
    rng = np.random.default_rng(1)
    return [rng.normal(size=(EXAMPLES, 4, 4, 4)).astype(np.float32) * size for _ in range(2)]


def quantized(act_range: Any, axis: str | None) -> Any:
    # At 4 bits, 'mse' and 'snr' clip.
    recipe = jaxqat.Recipe(act_bits=4, act_range=act_range, range_axis=axis)
    return jaxqat.quantize(model, recipe)


def step(network: Any, mode: str, variables: Any, x: Any) -> Any:
    """Return the variables after one more batch."""
    if mode == "calibrate":
        return network.calibrate(variables, x)
    _, updates = network.apply(variables, x, mutable=["quant", "quant_params"])
    return {**variables, **updates}


def state(act_range: str, mode: str) -> dict[str, np.ndarray]:
    """Return the state after all batches on one device, by 'key/leaf'."""
    network = quantized(act_range, None)
    return _observed(network, jax.jit(functools.partial(step, network, mode)))


def mapped_state(act_range: str, mode: str, kind: str) -> dict[str, np.ndarray]:
    """Return the state after all batches on two devices."""
    network = quantized(act_range, AXIS)
    one = functools.partial(step, network, mode)
    if kind == "shard_map":
        mesh = jax.make_mesh((2,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
        specs = (PartitionSpec(), PartitionSpec(AXIS))
        mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
        return _observed(network, jax.jit(mapped))
    mapped = jax.pmap(one, axis_name=AXIS, in_axes=(None, 0))

    def on_both(variables: Any, x: Any) -> Any:
        return jax.tree.map(_same_on_both, mapped(variables, x.reshape(2, -1, *x.shape[1:])))

    return _observed(network, on_both)


def _same_on_both(values: jax.Array) -> np.ndarray:
    first, second = np.asarray(values)
    np.testing.assert_array_equal(first, second)
    return first


def _observed(network: Any, one: Any) -> dict[str, np.ndarray]:
    variables = network.init_quant({"params": parameters()}, batches()[0])
    for batch in batches():
        variables = one(variables, jnp.asarray(batch))
    flat = flat_state(variables)
    return {
        f"{'/'.join(key)}/{leaf}": np.asarray(value)
        for key, values in flat.items()
        for leaf, value in values.items()
    }


def check_conversion() -> None:
    """Check that variables on two devices convert to the network of those on one."""
    network, inputs = quantized("ema", None), jnp.asarray(batches()[0])
    variables = network.calibrate(network.init_quant({"params": parameters()}, inputs), inputs)
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    on_both = jax.device_put(variables, jax.NamedSharding(mesh, PartitionSpec()))
    one, other = (jaxqat.convert(network, each, inputs) for each in (variables, on_both))
    assert len(jax.tree.leaves(on_both)[0].devices()) == 2
    for a, b in zip(one.nodes, other.nodes, strict=True):
        jax.tree.map(np.testing.assert_array_equal, dataclasses.asdict(a), dataclasses.asdict(b))


def main(path: str) -> None:
    """Write every state to one file, by 'range mode map key/leaf'; the map 'one' is one device."""
    states = {(*case, "one"): state(*case) for case in {case[:2] for case in CASES}}
    states |= {case: mapped_state(*case) for case in CASES}
    arrays: dict[str, Any] = {
        " ".join((*case, name)): value for case, of in states.items() for name, value in of.items()
    }
    check_conversion()
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])

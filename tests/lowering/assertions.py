"""Assertions that the compiled program of an integer network is integer, and what they count."""

from collections.abc import Callable, Iterable
from typing import Any

from jaxqat.lowering import Compiled, CompiledProduct, Kernel, compile_for, kernels
from jaxqat.lowering import products as products_of
from jaxqat.lowering.hlo import Shape
from jaxqat.lowering.targets import Target

INTEGER_ENGINES = ("cuDNN", "cuBLAS", "Triton", "Pallas", "YNNPACK", "MXU")


def assert_products_are_integer(compiled: Compiled, *, products: int) -> None:
    """Assert that every convolution and dense layer multiplies s8 codes on an 8-bit unit.

    Args:
        compiled: The compiled network.
        products: Number of convolutions and dense layers of the network. A compiler may split one;
            fewer mean that `kernels` does not find all of them.
    """
    found = products_of(kernels(compiled.text))
    others = [f"{p.kind} {p.op_name}: {p.types} by {p.engine}" for p in found if not is_proper(p)]
    assert not others, f"{compiled.target.name}: not on integer kernels: {others}"
    assert len(found) >= products, f"{compiled.target.name}: {len(found)} of {products} products"


def is_proper(product: Any) -> bool:
    codes = all(operand.is_code for operand in product.operands)
    return product.is_integer and codes and product.engine in INTEGER_ENGINES


def is_backward(product: CompiledProduct) -> bool:
    """Whether a product's name belongs to a gradient; compilers may drop names."""
    return "transpose(" in product.op_name


def wide_activations(kernels: Iterable[Kernel], *, at_least: int) -> list[tuple[Kernel, Shape]]:
    """List tensors of more than 8 bits per value that one kernel writes and another reads.

    Results of the module are left out; tensors in a TPU's on-chip memory are included.

    Args:
        kernels: Kernels of one module.
        at_least: Smallest number of elements to list: at most the size of the batch's smallest
            activation, and more than the sizes of biases and logits.
    """
    return [
        (kernel, shape)
        for kernel in kernels
        for number, shape in enumerate(kernel.writes)
        if shape.bits > 8 and shape.elements >= at_least and number not in kernel.outputs
    ]


def float_activations(kernels: Iterable[Kernel], *, at_least: int) -> list[tuple[Kernel, Shape]]:
    """List the floating-point tensors among the `wide_activations`."""
    wide = wide_activations(kernels, at_least=at_least)
    return [(kernel, shape) for kernel, shape in wide if shape.is_float]


def assert_activations_are_codes(compiled: Compiled, *, smallest: int) -> None:
    """Assert that nothing wider than int8 is written between layers: epilogues are fused.

    Args:
        compiled: The compiled network.
        smallest: Number of elements of the batch's smallest activation.
    """
    wide = wide_activations(kernels(compiled.text), at_least=smallest)
    written = [f"{kernel.name}: {shape}" for kernel, shape in wide]
    assert not written, f"{compiled.target.name}: written between layers: {written}"


def assert_integer_network(
    target: Target,
    function: Callable[..., Any],
    *shapes: Any,
    products: int,
    smallest: int,
    fused: bool,
) -> Compiled:
    """Compile a network and assert both; the second only if `fused`."""
    compiled = compile_for(target, function, *shapes)
    assert_products_are_integer(compiled, products=products)
    if fused:
        assert_activations_are_codes(compiled, smallest=smallest)
    return compiled

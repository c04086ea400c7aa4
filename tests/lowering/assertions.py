"""What makes the compiled form of an integer network integer."""

from collections.abc import Callable
from typing import Any

from jaxqat.lowering import INTEGER_ENGINES, Compiled, compile_for, kernels, wide_activations
from jaxqat.lowering import products as products_of
from jaxqat.lowering.targets import Target


def assert_products_are_integer(compiled: Compiled, *, products: int) -> None:
    """Every convolution and dense layer multiplies s8 codes on a unit for them.

    Args:
        compiled: The network.
        products: Convolutions and dense layers that the network has. A compiler may split one;
            if there are fewer, they are hidden where `kernels` does not find them.
    """
    found = products_of(kernels(compiled.text))
    others = [f"{p.kind} {p.op_name}: {p.types} by {p.engine}" for p in found if not is_proper(p)]
    assert not others, f"{compiled.target.name}: not on integer kernels: {others}"
    assert len(found) >= products, f"{compiled.target.name}: {len(found)} of {products} products"


def is_proper(product: Any) -> bool:
    codes = all(operand.is_code for operand in product.operands)
    return product.is_integer and codes and product.engine in INTEGER_ENGINES


def assert_activations_are_codes(compiled: Compiled, *, smallest: int) -> None:
    """Nothing wider than int8 is written between layers: epilogues are fused.

    Args:
        compiled: The network.
        smallest: Elements of its smallest activation, for the batch.
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
    """Compile a network and assert both; the second only where the idiom allows s8 output."""
    compiled = compile_for(target, function, *shapes)
    assert_products_are_integer(compiled, products=products)
    if fused:
        assert_activations_are_codes(compiled, smallest=smallest)
    return compiled

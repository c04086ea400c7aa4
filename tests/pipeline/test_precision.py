"""Float products have the configured precision, and the results record it."""

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import tiny

from jaxqat.commands import train
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.networks import Networks, matmul_precision

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console = tiny_run.console


def test_bfloat16_trains_both_stages_and_is_recorded(tmp_path, monkeypatch, small_network, console):
    monkeypatch.setattr(train, "write_report", lambda path: path)
    changes = {"precision": "bfloat16", "fp32__epochs": 1, "qat__epochs": 1}
    results = train.train(tiny(**changes), tmp_path, console=console)
    assert results.precision == "bfloat16"


def test_products_have_the_configured_precision(small_network):
    texts = {}
    for precision in ("float32", "tf32", "bfloat16"):
        settings = tiny(precision=precision)
        networks = Networks.build(settings, load_dataset(settings.data))
        params, collections = networks.shapes("fp32")
        with matmul_precision(settings):
            lowered = networks.predictor("fp32").lower(
                {"params": params, **collections},
                jax.ShapeDtypeStruct((2, 8, 8, 1), np.uint8),
            )
        texts[precision] = [
            line for line in lowered.as_text().splitlines() if "stablehlo.convolution" in line
        ]
    assert all("HIGHEST" in line for line in texts["float32"])
    assert not any("HIGHEST" in line for line in texts["tf32"] + texts["bfloat16"])
    assert all("bf16" in line for line in texts["bfloat16"])
    assert len(texts["float32"]) == 2

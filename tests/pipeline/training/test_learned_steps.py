"""Learned step sizes in the whole pipeline: trained, saved, resumed, converted."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from tiny_run import STEPS, STEPS_PER_EPOCH, files, signal_at, tiny

import jaxqat
from jaxqat.commands import train
from jaxqat.pipeline.training import (
    Data,
    OptimizerConfig,
    Stopped,
    init_state,
    make_optimizer,
    make_step,
)

pytestmark = pytest.mark.slow

small_network = tiny_run.small_network
console, no_report = tiny_run.console, tiny_run.no_report

LOW_BITS = {
    "quant__weight_bits": 3,
    "quant__act_bits": 3,
    "quant__weight_range": "lsq",
    "quant__act_range": "lsq",
    "quant__first_last_bits": 8,
}


@pytest.fixture
def learned(tmp_path, small_network, no_report, console) -> Path:
    run = tmp_path / "run"
    train.train(tiny(**LOW_BITS), run, command="jaxqat train", console=console)
    return run


def test_a_run_with_learned_step_sizes_gives_an_integer_network_of_its_bits(learned):
    results = json.loads((learned / "results.json").read_text())
    assert results["verify"]["differing"] == 0
    graph = jaxqat.load(learned / "integer")
    bits = {p.name: int(np.abs(p.weights).max()) for p in graph.products()}
    assert bits["block_conv"] <= 3 < bits["stem_conv"] <= 127
    layers = {layer["path"]: layer["weight_bits"] for layer in results["layers"]}
    assert layers == {"stem_conv": 8, "block_conv": 3, "head": 8}


def test_a_stopped_run_with_learned_step_sizes_ends_as_an_uninterrupted_one(
    learned, tmp_path, small_network, no_report, console, monkeypatch
):
    again = tmp_path / "again"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, STEPS + STEPS_PER_EPOCH + 2)  # Within the second epoch of QAT.
        train.train(tiny(**LOW_BITS), again, command="jaxqat train", console=console)
    train.train(tiny(**LOW_BITS), again, command="jaxqat train", console=console)
    assert files(again / "integer") == files(learned / "integer")


def test_a_step_updates_parameters_and_step_sizes_but_decays_only_parameters():
    config = OptimizerConfig(learning_rate=0.5, momentum=0.0, weight_decay=0.1, schedule="constant")
    optimizer = make_optimizer(config, total_steps=10, steps_per_epoch=1)

    def forward(params, collections, images, key):
        logits = params["w"] * collections["quant_params"]["step"] * images.reshape(2, 2)
        return logits, {**collections, "seen": collections["seen"] + 1}

    step = make_step(
        forward=forward,
        prepare=lambda key, images: images.astype(jnp.float32),
        optimizer=optimizer,
        batch_size=2,
        steps_per_epoch=1,
        label_smoothing=0.0,
    )
    params = {"w": jnp.asarray([0.3, -0.2])}
    collections = {"quant_params": {"step": jnp.float32(0.7)}, "seen": jnp.int32(0)}
    data = (np.asarray([[1, 2], [3, 4]]).reshape(2, 1, 2, 1), np.asarray([0, 1]))
    state, _ = step(
        init_state(params, collections, optimizer),
        Data(jnp.asarray(data[0], jnp.uint8), jnp.asarray(data[1])),
        jnp.arange(2),
        jax.random.key(0),
    )

    def loss(w, s):
        logits = w * s * data[0].reshape(2, 2)
        return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

    of_w, of_s = jax.grad(loss, argnums=(0, 1))(params["w"], 0.7)
    # The same sums of two terms, with another order of operations.
    np.testing.assert_allclose(
        state.params["w"], params["w"] - 0.5 * (of_w + 0.1 * params["w"]), rtol=2**-20
    )
    step_size = state.collections["quant_params"]["step"]
    np.testing.assert_allclose(step_size, 0.7 - 0.5 * of_s, rtol=2**-20)
    assert int(state.collections["seen"]) == 1

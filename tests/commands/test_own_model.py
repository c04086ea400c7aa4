"""The whole command on networks of the user's own: Linen and NNX, with and without state."""

import hashlib
import html
import re
from pathlib import Path

import jax
import numpy as np
import own_models
import pytest
import tiny_run
import yaml
from PIL import Image
from plain import others_long
from tiny_run import SETTINGS, STEPS_PER_EPOCH, files, run_command, signal_at

import jaxqat
from jaxqat.pipeline import advice
from jaxqat.pipeline.models import ModelConfig, source_sha256
from jaxqat.pipeline.recipes import read_recipe
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import SourceWarning

pytestmark = pytest.mark.slow

no_report = tiny_run.no_report

MODELS = {
    "LinenDropout": {"features": [4]},
    "NNXBatchNorm": {"features": 4},
    "Stateless": {"classes": 10},
}


# Without state is the simplest case.
RUNS = others_long(MODELS, ["LinenDropout", "NNXBatchNorm"])


def write_config(folder: Path, name: str) -> Path:
    model = {"target": f"own_models:{name}", "arguments": MODELS[name]}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "model": model}))
    return path


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> Path:
    """A finished run of each network."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder, request.param)
    assert run_command("train", "--config", config, "--workdir", folder / "run") == 0
    return folder / "run"


def test_every_command_works_on_the_run(run, tmp_path, capfd):
    results = RunFolder(run).read_results()
    assert results.verify is not None and results.qat is not None and results.integer is not None
    assert results.verify.differing == 0 and results.verify.codes > 0
    assert results.integer.test.accuracy == results.qat.test.accuracy
    image = tmp_path / "image.png"
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(image)
    name = run.parent.name.rstrip("0123456789")
    given = ", ".join(f"{k}={v!r}" for k, v in MODELS[name].items())
    page = html.unescape((run / "report.html").read_text())
    assert f"own_models:{name}({given})" in page
    for command in (
        ("evaluate", run, "--stage", "fp32"),
        ("evaluate", run),
        ("analyze", run, "--images", 20),
        ("export", run, "--format", "onnx", "--output", tmp_path / "n.onnx"),
        ("verify", run, "--format", "onnx"),
        ("quantize", run, "--recipe", "w4a8"),
        ("predict", run, image),
        ("report", run),
    ):
        assert run_command(*command) == 0, capfd.readouterr()
    before = files(run)
    assert run_command("train", "--config", run / "config.yaml", "--workdir", run) == 0
    assert files(run) == before


@pytest.mark.parametrize("run", ["LinenDropout"], indirect=True)
def test_a_changed_file_of_the_network_is_told(run, monkeypatch, recwarn):
    evaluated = ("evaluate", run, "--stage", "fp32")
    assert run_command(*evaluated) == 0
    assert not [w for w in recwarn if w.category is SourceWarning]
    source = Path(own_models.__file__).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: source + b"# changed")
        changed = source_sha256(ModelConfig(target="own_models:LinenDropout"))
    assert changed != hashlib.sha256(source).hexdigest()
    monkeypatch.setattr("jaxqat.pipeline.networks.source_sha256", lambda config: changed)
    with pytest.warns(SourceWarning, match="before the file of model.target .* was changed"):
        assert run_command(*evaluated) == 0


def test_quiet_commands_print_results_only(run, capfd):
    assert run_command("evaluate", run, "--quiet") == 0
    quiet = capfd.readouterr()
    assert run_command("evaluate", run) == 0
    shown = capfd.readouterr().out
    extra = [line for line in shown.splitlines() if line not in quiet.out.splitlines()]
    # Only the speed of the last line differs, too.
    assert [line.split(" ")[0] for line in extra[:-1]] == ["data:", "integer:", "integer:"]
    assert "accuracy" in quiet.out and quiet.err == ""


def test_load_run_gives_the_users_variables(run):
    opened = jaxqat.load_run(run)
    images = np.zeros((2, 8, 8, 1), np.uint8)
    logits = opened.model.apply(opened.variables, opened.normalize(images), train=False)
    # The same codes; the last layer's float product by scale and bias may fuse differently.
    np.testing.assert_allclose(opened.predict(images), logits, rtol=1e-5, atol=1e-6)
    assert "head" in opened.variables["params"]


@pytest.mark.parametrize("run", ["NNXBatchNorm"], indirect=True)
def test_a_run_with_another_recipe_starts_from_the_float_network(
    run, tmp_path, no_report, monkeypatch, capfd
):
    config, other = run / "config.yaml", tmp_path / "other"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("weight_bits: 4\nrules: [{path: head, weight_bits: 8}]\n")
    arguments = ("--config", config, "--workdir", other, "--from", run, "--recipe", recipe)
    monkeypatch.setattr(advice, "POINT", -1.0)  # As if each network were worse by a point.
    for command in (("train", *arguments), ("quantize", other), ("analyze", other, "--images", 9)):
        capfd.readouterr()
        assert run_command(*command) == 0
        shown = capfd.readouterr().out
        assert f"run `jaxqat quantize {other} --recipe advice.yaml`" in " ".join(shown.split())
        (tmp_path / "advice.yaml").write_text(shown[shown.index("quant:\n") :].split("\n\n")[0])
        rules = read_recipe(str(tmp_path / "advice.yaml")).rules
        named = re.findall(r"^  (\S+): \S+ % with this layer alone in float", shown, re.MULTILINE)
        assert named and [rule.path for rule in rules][: len(named)] == named
    assert run_command("quantize", other, "--recipe", tmp_path / "advice.yaml") == 0
    assert "advice" in RunFolder(other).read_results().ptq
    layers = {layer.path: layer.weight_bits for layer in RunFolder(other).read_results().layers}
    assert layers.pop("head") == 8 and set(layers.values()) == {4}
    assert RunFolder(other).read_origin() is not None


@pytest.mark.parametrize("run", ["NNXBatchNorm"], indirect=True)
def test_a_stopped_run_with_dropout_resumes_to_the_same_bits(run, tmp_path, monkeypatch, no_report):
    arguments = ("--config", run / "config.yaml", "--workdir", tmp_path / "stopped")
    with monkeypatch.context() as patch:
        signal_at(patch, STEPS_PER_EPOCH + 2)
        assert run_command("train", *arguments) == 143
    assert run_command("train", *arguments) == 0
    for one, other in zip(
        *(jax.tree.leaves(jaxqat.load_run(path).variables) for path in (run, arguments[-1])),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("w4a9", None, "recipe must be one of int8, .* The path of a YAML file is right, too."),
        ("missing.yaml", None, "missing.yaml: cannot be read"),
        ("mine.yaml", "weight_bit: 4", "unknown key 'quant.weight_bit'"),
        (
            "mine.yaml",
            "weight_bits: 40",
            r"mine.yaml: quant.weight_bits must be an integer in 2\.\.8",
        ),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_it(
    option, text, message, tmp_path, monkeypatch, capfd
):
    config = write_config(tmp_path, "Stateless")
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(option).write_text(text)
    assert run_command("train", "--config", config, "--workdir", "run", "--recipe", option) == 2
    assert re.search(message, capfd.readouterr().err)
    assert not Path("run").exists()


def test_a_recipe_beside_single_settings_is_an_error(tmp_path, capfd):
    arguments = ("--config", write_config(tmp_path, "Stateless"), "--workdir", tmp_path / "run")
    assert run_command("train", *arguments, "--recipe", "w4a8", "--quant.act_bits", 4) == 2
    assert "--quant.act_bits would have no effect" in capfd.readouterr().err

"""How training steps are compiled on a CPU: measured once, kept for the whole run."""

import json

import pytest
import tiny_run
from tiny_run import tiny

from jaxqat.errors import InputError
from jaxqat.pipeline import compilation_choice as choice
from jaxqat.pipeline.compilation_choice import fastest, find_compilation
from jaxqat.pipeline.data import load_dataset
from jaxqat.pipeline.networks import Networks
from jaxqat.pipeline.run.folder import RunFolder, RunFolderError
from jaxqat.pipeline.training import COMPILATIONS, DEFAULT

small_network = tiny_run.small_network
console = tiny_run.console
finished = tiny_run.finished

SECONDS = {"default": 3.0, "fast": 1.0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxqat" / "compilation.json"


@pytest.fixture
def measured(cache, monkeypatch):
    """Counts the measurements, which find 'fast' the fastest."""
    calls = []

    def measure(networks):
        calls.append(networks)
        return dict(SECONDS)

    monkeypatch.setattr(choice, "measure", measure)
    monkeypatch.setattr(choice, "LEAST_VALUES", 0)
    return calls


def folder(tmp_path, name="run"):
    (tmp_path / name).mkdir()
    return RunFolder(tmp_path / name)


def networks(**changes):
    experiment = tiny(compilation="auto", **changes)
    return Networks.build(experiment, load_dataset(experiment.data))


def test_the_default_stays_unless_another_is_clearly_faster():
    assert fastest({"default": 1.05, "fast": 1.0}) == "default"
    assert fastest({"default": 1.2, "fast": 1.0}) == "fast"
    assert fastest({"default": 1.0, "fast": 2.0}) == "default"


def test_the_measurement_times_every_compilation(small_network):
    seconds = choice.measure(networks())
    assert set(seconds) == set(COMPILATIONS)
    assert all(0 < s < 60 for s in seconds.values())


def test_the_choice_is_measured_once_for_a_machine_and_a_shape(
    measured, small_network, tmp_path, console, cache
):
    first, second = (folder(tmp_path, name) for name in "ab")
    assert find_compilation(networks(), first, console).name == "fast"
    assert find_compilation(networks(seed=1), second, console).name == "fast"
    assert len(measured) == 1
    assert json.loads(second.compilation.read_text())["seconds"] == SECONDS
    other = folder(tmp_path, "c")
    assert find_compilation(networks(fp32__batch_size=8), other, console).name == "fast"
    assert len(measured) == 2
    cache.write_text("{")  # A damaged cache is measured again.
    assert find_compilation(networks(), folder(tmp_path, "d"), console).name == "fast"
    assert len(measured) == 3


def test_small_steps_are_not_measured(measured, small_network, tmp_path, console, monkeypatch):
    monkeypatch.setattr(choice, "LEAST_VALUES", 2**18)
    run = folder(tmp_path)
    assert find_compilation(networks(), run, console) is DEFAULT
    assert not measured
    assert run.read_compilation() == "default"


def test_a_way_that_this_jaxlib_lacks_is_not_chosen_and_not_accepted(
    measured, small_network, tmp_path, console, monkeypatch
):
    monkeypatch.setattr(choice, "is_supported", lambda: False)
    run = folder(tmp_path)
    assert find_compilation(networks(), run, console) is DEFAULT
    assert not measured
    run.compilation.write_text('{"compilation": "fast"}')
    with pytest.raises(InputError, match=r"compilation\.json: 'fast' needs compiler options"):
        find_compilation(networks(), run, console)
    experiment = tiny(compilation="fast")
    named = Networks.build(experiment, load_dataset(experiment.data))
    with pytest.raises(InputError, match=r"^compilation: 'fast' needs compiler options"):
        find_compilation(named, run, console)


def test_a_run_keeps_its_choice(measured, small_network, tmp_path, console):
    run = folder(tmp_path)
    run.compilation.write_text('{"compilation": "fast"}')
    assert find_compilation(networks(), run, console) is COMPILATIONS["fast"]
    assert not measured
    run.compilation.write_text('{"compilation": "other"}')
    with pytest.raises(RunFolderError, match=r"compilation\.json: compilation must be one of"):
        find_compilation(networks(), run, console)


def test_a_config_may_name_the_compilation(measured, small_network, tmp_path, console):
    experiment = tiny(compilation="fast")
    named = Networks.build(experiment, load_dataset(experiment.data))
    assert find_compilation(named, folder(tmp_path), console).name == "fast"
    assert not measured


def test_a_cache_that_cannot_be_written_costs_a_measurement_only(
    measured, small_network, tmp_path, console, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert find_compilation(networks(), folder(tmp_path), console).name == "fast"

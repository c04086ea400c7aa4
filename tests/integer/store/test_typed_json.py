"""Dataclasses survive JSON unchanged; errors name the key of the wrong value."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pytest

from jaxqat.integer._store.typed_json import CodecError, Encoding, TypedJson, wrong


@dataclasses.dataclass(frozen=True)
class Score:
    accuracy: float
    images: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    name: str
    stage: Literal["fp32", "int8", 3]
    scores: dict[str, Score]
    shape: tuple[int, ...] = ()
    window: tuple[int, str] = (1, "a")
    steps: list[float] = dataclasses.field(default_factory=list)
    best: Score | None = None
    seed: int | str | None = None
    environment: Any = None
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)


SCORE = Score(0.5, 10)
FULL = Result(
    name="run",
    stage=3,
    scores={"test": SCORE, "train": Score(1.0, 2, False)},
    shape=(1, 2, 3),
    window=(2, "b"),
    steps=[1.5, 2.0],
    best=SCORE,
    seed="random",
    environment={"devices": [1, None, True, "cpu", 0.5]},
    metadata={"labels": ["cat", "dog"]},
    times={"fp32": 1.5},
)
SMALL = Result(name="run", stage="fp32", scores={})


@pytest.mark.parametrize("value", [FULL, SMALL], ids=["full", "small"])
@pytest.mark.parametrize("defaults", [False, True])
def test_decoding_returns_the_encoded_value(value, defaults):
    codec = TypedJson(defaults=defaults)
    text = json.dumps(codec.encode(value, Result), allow_nan=False)
    found = codec.decode(json.loads(text), Result)
    assert found == value
    assert type(found.shape) is tuple and type(found.steps) is list


def test_every_field_is_written_unless_defaults_may_be_left_out():
    names = {field.name for field in dataclasses.fields(Result)}
    assert TypedJson().encode(SMALL, Result).keys() == names
    assert TypedJson(defaults=True).encode(SMALL, Result) == {
        "name": "run",
        "stage": "fp32",
        "scores": {},
    }


def test_absent_fields_have_their_defaults_only_if_that_is_allowed():
    content = {"name": "run", "stage": "fp32", "scores": {}}
    assert TypedJson(defaults=True).decode(content, Result) == SMALL
    with pytest.raises(CodecError, match=r"^shape: is missing\.$"):
        TypedJson().decode(content, Result)
    del content["name"]
    with pytest.raises(CodecError, match=r"^name: is missing\.$"):
        TypedJson(defaults=True).decode(content, Result)


def test_a_value_that_only_equals_its_default_is_written():
    @dataclasses.dataclass
    class Setting:
        value: object = True

    codec = TypedJson(defaults=True)
    assert codec.encode(Setting(1), Setting) == {"value": 1}
    assert codec.encode(Setting(True), Setting) == {}


def test_a_whole_number_is_a_float_where_one_is_declared():
    for value in (TypedJson().encode(2, float), TypedJson().decode(2, float)):
        assert value == 2.0 and type(value) is float


def with_change(*path, value):
    """Return the JSON of FULL with one value changed."""
    content = parent = TypedJson().encode(FULL, Result)
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"the content: must be an object with the fields of Result, got \[\]\."),
        (with_change("best", value=1), "best: must be an object with the fields of Score, got 1."),
        (with_change("nam", value=1), "nam: Result has no such field; the closest is 'name'."),
        (
            with_change("scores", "test", "acuracy", value=1),
            "scores.test.acuracy: Score has no such field; the closest is 'accuracy'.",
        ),
        (with_change("scores", value=[]), r"scores: must be an object, got \[\]\."),
        (with_change("scores", "test", value={}), "scores.test.accuracy: is missing."),
        (with_change("name", value=1), "name: must be a string, got 1."),
        (with_change("stage", value="qat"), "stage: must be one of fp32, int8, 3, got 'qat'."),
        (with_change("stage", value=3.0), "stage: must be one of fp32, int8, 3, got 3.0."),
        (with_change("stage", value=[]), r"stage: must be one of fp32, int8, 3, got \[\]\."),
        (with_change("shape", value="12"), "shape: must be a list, got '12'."),
        (with_change("shape", 1, value=True), r"shape\[1\]: must be a whole number, got True."),
        (with_change("shape", 1, value=1.0), r"shape\[1\]: must be a whole number, got 1.0."),
        (with_change("window", value=[1]), r"window: must be a list of 2, got \[1\]."),
        (with_change("window", 1, value=2), r"window\[1\]: must be a string, got 2."),
        (with_change("steps", value={}), "steps: must be a list, got {}."),
        (with_change("steps", 0, value="1"), r"steps\[0\]: must be a number, got '1'."),
        (with_change("steps", 0, value=True), r"steps\[0\]: must be a number, got True."),
        (with_change("steps", 0, value=math.inf), r"steps\[0\]: must be a finite number, got inf."),
        (with_change("steps", 0, value=10**400), r"steps\[0\]: must be a number within the range"),
        (with_change("seed", value=0.5), "seed: must be a whole number or a string or null, got"),
        (with_change("metadata", value=[]), r"metadata: must be an object, got \[\]\."),
        (with_change("metadata", value={"a": math.nan}), "metadata.a: must be a JSON value"),
        (with_change("times", "fp32", value=None), "times.fp32: must be a number, got None."),
        (
            with_change("scores", "test", "exact", value=1),
            "scores.test.exact: must be true or false, got 1.",
        ),
    ],
)
def test_decoding_a_wrong_value_raises_an_error_that_names_its_key(content, message):
    with pytest.raises(CodecError, match=f"^{message}"):
        TypedJson().decode(content, Result)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": np.str_("run")}, "name: must be a string"),
        ({"best": {"accuracy": 1}}, "best: must be a Score, got {"),
        ({"shape": [1]}, r"shape: must be a tuple, got \[1\]"),
        ({"shape": (np.int64(1),)}, r"shape\[0\]: must be a whole number"),
        ({"window": (1,)}, r"window: must be a tuple of 2"),
        ({"steps": (1.0,)}, r"steps: must be a list"),
        ({"steps": [math.nan]}, r"steps\[0\]: must be a finite number"),
        ({"scores": {1: SCORE}}, "scores: the key 1 must be a string"),
        ({"environment": {1: 2}}, "environment: the key 1 must be a string"),
        ({"environment": [object()]}, r"environment\[0\]: must be a JSON value"),
        ({"metadata": {"a": {"b": np.float32(1)}}}, "metadata.a.b: must be a JSON value"),
    ],
)
def test_a_value_of_another_type_is_not_written(change, message):
    with pytest.raises(CodecError, match=f"^{message}"):
        TypedJson().encode(dataclasses.replace(FULL, **change), Result)


def test_nan_and_infinity_are_written_only_if_that_is_allowed():
    codec = TypedJson(allow_nan=True)
    for hint in (float, Any):
        found = [codec.decode(codec.encode(v, hint), hint) for v in (math.nan, math.inf)]
        assert math.isnan(found[0]) and found[1] == math.inf


def test_an_encoding_overrides_the_supported_types_and_can_use_their_fields():
    def encode(score: Score, key: str):
        return {"kind": "score", **codec.encode_fields(score, key)}

    def decode(content: Any, key: str) -> Score:
        fields = dict(content)
        if fields.pop("kind") != "score":
            raise wrong(f"{key}.kind", content["kind"], "score")
        return Score(**codec.decode_fields(fields, Score, key))

    codec = TypedJson(encodings={Score: Encoding(encode, decode)})
    content = codec.encode({"test": SCORE}, dict[str, Score])
    assert content["test"] == {"kind": "score", "accuracy": 0.5, "images": 10, "exact": True}
    assert codec.decode(content, dict[str, Score]) == {"test": SCORE}
    content["test"]["kind"] = "time"
    with pytest.raises(CodecError, match=r"^test\.kind: must be score, got 'time'\.$"):
        codec.decode(content, dict[str, Score])


def test_long_values_are_cut_in_the_message():
    with pytest.raises(CodecError, match=r"^name: must be a string, got \[0, .{70,80}…\.$"):
        TypedJson().decode(with_change("name", value=list(range(100))), Result)

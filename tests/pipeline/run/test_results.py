"""Entries of results.json hold all that was measured, and the committed files can be read."""

import dataclasses
from pathlib import Path

import pytest

from jaxqat.integer._compare import TensorCheck, Verification
from jaxqat.pipeline.measurements import Comparison
from jaxqat.pipeline.results import Results, TensorDifferences, VerificationResult, read, to_json
from jaxqat.pipeline.run.folder import RunFolderError
from jaxqat.pipeline.run.results import verification_result

COMMITTED = Path(__file__).parents[3] / "configs/results"


def names(cls):
    return {field.name for field in dataclasses.fields(cls)}


def test_every_field_of_a_verification_is_in_the_results_with_the_totals():
    assert names(TensorDifferences) == names(TensorCheck)
    totals = {"codes", "differing", "largest", "failures"}
    assert names(VerificationResult) == names(Verification) | totals
    checks = (TensorCheck("a", 40, 1, 1, 30.0), TensorCheck("b", 10, 3, 2, None, of_island=True))
    found = Verification(checks, 5, 1, None, end_to_end=7)
    kept = verification_result(found)
    for name in names(VerificationResult) - {"tensors"}:
        assert getattr(kept, name) == getattr(found, name)
    assert [vars(tensor) for tensor in kept.tensors] == [vars(check) for check in checks]
    content = to_json(kept)
    assert (content["codes"], content["end_to_end"]) == (40, 7)
    assert [t.get("of_island", False) for t in content["tensors"]] == [False, True]


FILES = [
    *((path, Results) for path in sorted(COMMITTED.glob("*/results.json"))),
    *((path, Comparison) for path in sorted(COMMITTED.glob("*/evaluations/verify_*.json"))),
]


@pytest.mark.parametrize(("path", "of"), FILES, ids=lambda x: getattr(x, "stem", None))
def test_committed_results_can_be_read(path, of):
    found = read(path, of, error=RunFolderError)
    verify = found if isinstance(found, Comparison) else found.verify
    assert verify is not None and verify.images == 10_000
    if not verify.logits_only:  # OpenVINO gives no codes.
        assert (verify.codes > 10**9, verify.differing, verify.differing_results) == (True, 0, 0)

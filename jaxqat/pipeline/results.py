"""The results of a run: the content of results.json as typed data.

All parts of the pipeline access this file and those of `measurements` by `write` and `read`. Keys
missing from a file have their default.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from jaxqat.errors import JaxqatError
from jaxqat.integer._store.files import read_regular, write_json
from jaxqat.integer._store.typed_json import CodecError, TypedJson
from jaxqat.pipeline.bounded_json import BOUNDS, Amount, Count, Real
from jaxqat.pipeline.scores import Scores

MAX_BYTES = 2**28  # Of a file; the tensors of a large network take megabytes.

TRAINED_STAGES = ("fp32", "qat")
"""Stages that are trained, in order; each has checkpoints."""

_JSON = TypedJson(encodings=BOUNDS, defaults=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The other run that trained an FP32 stage."""

    name: str
    config_hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """A trained stage.

    Attributes:
        test: Scores on the test split.
        train_seconds: Time of its epochs.
        epochs: Number of epochs.
        bits: Bits of weights and activations, such as 'W4A4'; None for a float network.
        from_run: The other run that trained it; None if this run did.
    """

    test: Scores
    train_seconds: Amount
    epochs: Count
    bits: str | None = None
    from_run: Origin | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifferences:
    """Codes of one tensor in two networks.

    Attributes:
        name: Name of the tensor.
        codes: Number of codes that were compared.
        differing: Number of codes that differ.
        largest: Largest difference, in codes.
        sqnr_db: Signal to quantization noise against the float network, in dB; None without one.
        of_island: Whether a float island makes the tensor.
        island: The module of that island; empty if it is no result of one.
    """

    name: str
    codes: Count
    differing: Count
    largest: Count
    sqnr_db: Real | None
    of_island: bool = False
    island: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """An integer network compared with the quantized network it was converted from.

    Attributes:
        tensors: Differences of each tensor.
        images: Number of images.
        codes: Number of codes, without those that float islands make; so many are `differing`.
        largest: Largest difference, in codes.
        top1_flips: Images whose class differs between the two.
        top1_flips_fp32: Likewise, against the same weights in float; None if not compared.
        logits_only: Whether one of the two gives no codes, so that only classes are compared.
        failures: Conditions of the comparison that do not hold; empty if it passes.
        results: Number of the results' values that were compared; `differing_results` differ.
        largest_result_difference: Largest difference of two of them.
        nan_inputs: Input values that are NaN, and got the code of zero.
        unexplained_results: Number of differing results of images without a differing code.
        end_to_end: With float islands, number of codes that differ end to end; None without.
    """

    tensors: tuple[TensorDifferences, ...]
    images: Count
    codes: Count
    differing: Count
    largest: Count
    top1_flips: Count
    top1_flips_fp32: Count | None
    logits_only: bool
    failures: tuple[str, ...]
    results: Count
    differing_results: Count
    largest_result_difference: Amount
    nan_inputs: Count
    unexplained_results: Count
    end_to_end: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerResult:
    """The integer network of QAT.

    Attributes:
        test: Scores on the test split.
        requantization: How accumulators become codes: 'float' or 'fixed_point'.
        step: Training step of the checkpoint that was converted.
        bits: Bits of weights and activations, such as 'W4A4'.
    """

    test: Scores
    requantization: str
    step: Count
    bits: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtqResult(IntegerResult):
    """An integer network of post-training quantization.

    Attributes:
        calibration_batches: Number of training batches used for calibration.
        calibration_images: Number of images in these batches.
        recipe: The recipe.
        size_bytes: Bytes of the network's saved arrays.
        verify: The comparison with the quantized network; None if there was none.
    """

    calibration_batches: Count
    calibration_images: Count
    recipe: dict[str, Any]
    size_bytes: Count
    verify: VerificationResult | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of a network; those of training are None if nothing was trained."""

    evaluate_images_per_s: Amount
    train_images_per_s: Amount | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeBytes:
    """Bytes of the weights.

    Attributes:
        fp32: All parameters, four bytes each.
        integer: The saved arrays of QAT's integer network; None if there is none.
    """

    fp32: Count
    integer: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerResult:
    """A product of the network and how it is quantized.

    Attributes:
        path: Path of its module.
        kind: 'conv', 'dense', 'embed' or 'attention'.
        weight_shape: Shape of its weights.
        weight_bits, act_bits: Bits of the codes of its weights and its input; None in float.
        macs: Multiply-accumulate operations for one image.
        weight_min, weight_max: Smallest and largest weight.
        act_min, act_max: Ends of the activation range; None if there is none.
        float_reason: Why it stays in float; None if it is quantized.
    """

    path: str
    kind: str
    weight_shape: tuple[Count, ...]
    weight_bits: Count | None
    act_bits: Count | None
    macs: Count
    weight_min: Real
    weight_max: Real
    act_min: Real | None
    act_max: Real | None
    float_reason: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions of the packages, the device and the date."""

    python: str
    jax: str
    jaxlib: str
    flax: str
    optax: str
    aqtp: str
    orbax: str
    numpy: str
    device: str
    platform: str
    devices: Count
    cpu_count: Count | None
    processor: str
    date: str

    @property
    def arithmetic(self) -> str:
        """What decides how float32 operations are rounded: the device, and XLA's version."""
        device = self.processor if self.platform == "cpu" else self.device
        return f"{device} with jaxlib {self.jaxlib}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What identifies a run; each file of measurements begins with it.

    Attributes:
        WRITTEN_BY: Command that writes the file.
        name: Name of the experiment.
        seed: Its seed.
        precision: Precision of products in float.
        config_hash: SHA-256 of its config.
        data: Fingerprint of the data.
        environment: Software and device.
        command: The command line.
    """

    WRITTEN_BY: ClassVar[str] = "jaxqat train"

    name: str
    seed: Count
    precision: str
    config_hash: str
    data: dict[str, Any]
    environment: Environment
    command: str | None = None


Measurement = TypeVar("Measurement", bound=RunInfo)


class Tested(NamedTuple):
    """A tested network: its key in results.json, its displayed name, its scores."""

    key: str
    name: str
    test: Scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results(RunInfo):
    """The content of results.json.

    Attributes:
        fp32: The FP32 stage.
        parameters: Number of parameters.
        macs: Multiply-accumulate operations for one image.
        size_bytes: Bytes of the weights.
        layers: Every product of the network.
        speed: Speed of each tested network.
        ptq: Post-training quantization, by the name of the recipe.
        qat: The QAT stage; None if it is not finished.
        integer: QAT's integer network; None if there is none.
        conversion_error: Why QAT's network could not be converted; None if it was.
        verify: The integer network compared with QAT's quantized network.
    """

    fp32: StageResult
    parameters: Count
    macs: Count
    size_bytes: SizeBytes
    layers: tuple[LayerResult, ...]
    speed: dict[str, Speed]
    ptq: dict[str, PtqResult] = dataclasses.field(default_factory=dict)
    qat: StageResult | None = None
    integer: IntegerResult | None = None
    conversion_error: str | None = None
    verify: VerificationResult | None = None

    def __post_init__(self):
        if not isinstance(name := self.data.get("name"), str):
            raise ValueError(f"data.name must be the name of the data set, got {name!r}.")
        counts = {len(network.test.per_class) for network in self.tested()}
        if len(counts) > 1:
            raise ValueError(f"the networks have different numbers of classes: {sorted(counts)}.")

    def tested(self) -> Iterator[Tested]:
        """Yield the tested networks, in the order in which a run makes them."""
        yield Tested("fp32", "FP32", self.fp32.test)
        for key, ptq in self.ptq.items():
            yield Tested(f"ptq_{key}", f"PTQ {ptq.bits} ({key}), integer", ptq.test)
        if self.qat is not None:
            yield Tested("qat", f"QAT {self.qat.bits}, quantized", self.qat.test)
        if self.integer is not None:
            yield Tested("integer", f"QAT {self.integer.bits}, integer", self.integer.test)

    def with_network(self, network: str, result: Any, speed: Speed, **more: Any) -> "Results":
        """Return these results with a network added or replaced."""
        more["speed"] = {**self.speed, network: speed}
        return dataclasses.replace(self, **{network: result}, **more)

    def with_ptq(self, name: str, result: PtqResult, speed: Speed) -> "Results":
        """Return these results with PTQ by a recipe added or replaced."""
        speeds, ptq = {**self.speed, f"ptq_{name}": speed}, {**self.ptq, name: result}
        return dataclasses.replace(self, ptq=ptq, speed=speeds)


def to_json(value: Any) -> dict[str, Any]:
    """Return one of the dataclasses above as plain JSON values."""
    return _JSON.encode(value, type(value))


def write(path: Path, measurement: RunInfo, *, error: type[JaxqatError]) -> None:
    """Write a file atomically.

    Raises:
        error: If it cannot be written, or a value is not of its declared type; names the file and
            the key.
    """
    try:
        content = to_json(measurement)
    except CodecError as problem:
        raise error(f"{path}: cannot be written: {problem}") from problem
    write_json(path, content, error=error)


def read(path: Path, of: type[Measurement], *, error: type[JaxqatError]) -> Measurement:
    """Read a file that `write` wrote.

    Args:
        path: The file.
        of: Class of its content.
        error: Exception to raise.

    Raises:
        error: If the file is missing or its content invalid; names the file and the key.
    """
    try:
        content = json.loads(read_regular(path, limit=MAX_BYTES).decode())
    except FileNotFoundError as problem:
        raise error(f"{path} is missing: `{of.WRITTEN_BY}` writes it.") from problem
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path} cannot be read: {problem}.") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is not JSON ({problem}); `{of.WRITTEN_BY}` writes it.") from problem
    try:
        return _JSON.decode(content, of)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is broken: {problem}") from problem

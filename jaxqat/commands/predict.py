"""`jaxqat predict`: classify image files by a run, an exported file or a saved network."""

import dataclasses
import functools
import json as json_format
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxqat.analysis._text import counted, percent
from jaxqat.errors import InputError
from jaxqat.integer._execute.executor import make_executor
from jaxqat.integer._store.folder import load
from jaxqat.integer.graph import IntegerGraph
from jaxqat.pipeline.data import DataError, load_dataset, normalize
from jaxqat.pipeline.data.arrays import Encoded, decode_image
from jaxqat.pipeline.data.sources import IMAGE_SUFFIXES
from jaxqat.pipeline.display import console_for
from jaxqat.pipeline.integer_networks import load_network
from jaxqat.pipeline.networks import Networks, matmul_precision
from jaxqat.pipeline.run.folder import RunFolder
from jaxqat.pipeline.run.snapshots import restore_model
from jaxqat.pipeline.terminal import print_table, tell

BATCH_SIZE = 100

# From uint8 images to logits.
Logits = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
    """The most probable class of an image, and its probability (softmax of the logits)."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the networks make of an image.

    Attributes:
        image: The file.
        integer: By the integer network.
        float: By the FP32 network of the run; None without one.
    """

    image: str
    integer: Guess
    float: Guess | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """Networks to predict with.

    Attributes:
        shape: Height, width and channels of an image.
        classes: Names of the classes; empty if they are unknown.
        integer: The integer network.
        float: The FP32 network; None without one.
        resizes: Whether the images it was trained on were resized.
    """

    shape: tuple[int, ...]
    classes: Sequence[str]
    integer: Logits
    float: Logits | None = None
    resizes: bool = False


def predict(
    network: Path,
    paths: Sequence[Path],
    *,
    resize: bool = False,
    json: bool = False,
    console: Console | None = None,
) -> tuple[Prediction, ...]:
    """Classify image files, by the integer network and, in a run, by the FP32 network beside it.

    An image of another size than the network's is resized as the training images were, if they
    were (data.image_size); otherwise it is refused unless --resize is given. For a network of grey
    images, images in colour become grey.

    Args:
        network: Run folder, ONNX file of `jaxqat export`, or folder of a saved integer network.
        paths: Image files, or folders of them.
        resize: Resize images of another size: scale the shorter side and crop the middle.
        json: Print the predictions as JSON on standard output.
        console: Where the table is printed; None for standard output.

    Returns:
        A prediction for each image, in the order of the paths.

    Raises:
        InputError: There is no such network, or no image.
        DataError: An image cannot be decoded, or has another size.
        CheckpointError: The checkpoint of the FP32 network is damaged.
        ArtifactError: The integer network is damaged.
        MissingPackageError: A package is not installed.
    """
    console = console_for(console, as_json=json)
    files = list(_image_files(paths))
    tell(f"loading {network}", console)
    source = _open(Path(network))
    images = np.stack([_decode(path, source, resize) for path in files])
    tell(f"classifying {counted(len(files), 'image')}", console)
    integer = _guesses(source, source.integer, images)
    real = [None] * len(files) if source.float is None else _guesses(source, source.float, images)
    found = tuple(
        Prediction(image=str(path), integer=i, float=f)
        for path, i, f in zip(files, integer, real, strict=True)
    )
    if json:
        print(json_format.dumps([dataclasses.asdict(each) for each in found], indent=1))
    else:
        _print(str(network), found, console)
    return found


def _image_files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}).")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{path}: there is no such image or folder.")


def _open(path: Path) -> _Source:
    if (path / "config.yaml").is_file():
        return _of_run(RunFolder(path))
    if path.is_dir():
        return _of_graph(load(path))
    if path.suffix == ".onnx":
        return _of_onnx(path)
    raise InputError(
        f"{path}: is neither a run folder, nor an .onnx file, nor the folder of a saved network."
    )


def _of_graph(graph: IntegerGraph) -> _Source:
    if not graph.takes_uint8:
        raise InputError(
            "the network takes no uint8 images: convert it with `preprocess`, the normalization."
        )
    labels: Any = graph.metadata.get("labels", ())
    executor = make_executor(graph)
    return _Source(
        shape=graph.input_shape, classes=labels, integer=lambda images: np.asarray(executor(images))
    )


def _of_run(folder: RunFolder) -> _Source:
    experiment = folder.load_config()
    source = _of_graph(load_network(folder))
    resizes = experiment.data.image_size is not None
    if not folder.has_checkpoints("fp32"):
        return dataclasses.replace(source, resizes=resizes)
    with matmul_precision(experiment):
        networks = Networks.build(experiment, load_dataset(experiment.data))
        variables = restore_model(networks, folder, "fp32").tree()
        run = networks.predictor("fp32")

    def real(images: np.ndarray) -> np.ndarray:
        with matmul_precision(experiment):
            return np.asarray(run(variables, jnp.asarray(images)))

    return dataclasses.replace(source, float=real, resizes=resizes)


def _of_onnx(path: Path) -> _Source:
    from jaxqat.export._onnx.runtime import load_onnx, make_runner

    model = load_onnx(path)
    described = {entry.key: entry.value for entry in model.metadata_props}
    tensor = model.graph.input[0].type.tensor_type
    shape = tuple(dimension.dim_value for dimension in tensor.shape.dim)[1:]
    run = make_runner(path)
    if tensor.elem_type == 2:  # TensorProto.UINT8.
        prepare = lambda images: images  # noqa: E731
    else:
        scale = json_format.loads(described["metadata"])["normalization"]
        prepare = lambda x: np.asarray(normalize(x, scale["mean"], scale["std"]))  # noqa: E731
    labels = json_format.loads(described["labels"]) if "labels" in described else ()
    return _Source(shape=shape, classes=labels, integer=lambda images: run(prepare(images))[0])


def _decode(path: Path, source: _Source, resize: bool) -> np.ndarray:
    height, width, channels = source.shape
    record = Encoded(str(path), path.read_bytes(), 0)
    decode = functools.partial(decode_image, record, channels=channels, grey_from_colour=True)
    pixels = decode(image_size=None)
    if pixels.shape == source.shape:
        return pixels
    if height == width and (resize or source.resizes):
        return decode(image_size=height)
    hint = " Pass --resize to scale its shorter side and crop the middle." * (height == width)
    raise DataError(
        f"{path}: {pixels.shape[0]}x{pixels.shape[1]} pixels, and the network takes "
        f"{height}x{width}.{hint}"
    )


def _guesses(source: _Source, logits: Logits, images: np.ndarray) -> list[Guess]:
    starts = range(0, len(images), BATCH_SIZE)
    values = np.concatenate([logits(images[i : i + BATCH_SIZE]) for i in starts]).astype(np.float64)
    powers = np.exp(values - values.max(-1, keepdims=True))
    shares = powers / powers.sum(-1, keepdims=True)
    return [
        Guess(label=str(source.classes[i]) if len(source.classes) else str(i), probability=p)
        for i, p in zip(shares.argmax(-1), shares.max(-1).tolist(), strict=True)
    ]


def _print(title: str, found: Sequence[Prediction], console: Console) -> None:
    beside = any(each.float for each in found)
    header = ("image", "integer", *(("float",) if beside else ()), "integer (%)")
    rows = [
        (
            each.image,
            each.integer.label,
            *((each.float.label,) if each.float else ()),
            percent(each.integer.probability),
            *((percent(each.float.probability),) if each.float else ()),
        )
        for each in found
    ]
    header = (*header, *(("float (%)",) if beside else ()))
    red = [each.float is not None and each.float.label != each.integer.label for each in found]
    print_table(title, header, rows, console, texts=3 if beside else 2, red=red)

"""Replay a certificate: run a network on its golden inputs and name the first tensor that differs.

    python replay.py                            the certified file, in ONNX Runtime if it is .onnx
    python replay.py --runner openvino          the same in OpenVINO
    python replay.py --runner my_module:run     by a function of yours
    python replay.py other.onnx --json          another file, findings as JSON

This file needs Python, NumPy and the runtime that is tested, and nothing of jaxqat. A function of
yours gets the golden inputs, one array, and returns a dictionary of arrays: int8 codes by name of
the tensor, (batch, *shape) as certificate.json says, and results by the names there ('result').
What it does not return is not compared.

Each tensor is compared in the order of the network. A difference is judged where it arises: images
in which a tensor before it differs already do not count. Two runtimes round floats differently, so
a tensor that a float island makes may differ by one code in a small share of places, and results in
their last digits; the limits are in certificate.json. All other codes must be equal.

Exit status: 0 if nothing differs, 1 if something does, 2 if the replay cannot run.
"""

import argparse
import hashlib
import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np

FORMAT = 1
UINT8 = b"\x08\x02"  # Of ONNX's TypeProto.Tensor: field 1, elem_type, is UINT8.


class ReplayError(Exception):
    """A replay cannot run; the message says why."""


def sha256(array):
    """Return the SHA-256 of an array's bytes in C order, little-endian."""
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(array.tobytes()).hexdigest()


def read(folder):
    """Return the certificate in a folder and its golden arrays, after their digests are checked."""
    try:
        certificate = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
        if certificate.get("format") != FORMAT:
            raise ReplayError(f"{folder}: format {certificate.get('format')!r} is not {FORMAT}.")
        with np.load(folder / "golden.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        entries = [certificate["input"], *certificate["tensors"], *certificate["results"]]
        for entry in entries:
            if entry.get("array") and sha256(arrays[entry["array"]]) != entry["sha256"]:
                raise ReplayError(f"{folder}: golden.npz is damaged: {entry['name']}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReplayError(f"{folder}: holds no readable certificate: {error!r}.") from error
    return certificate, arrays


def compare(certificate, arrays, found):
    """Return a row for each array that is found, in the order of the network.

    A row has name, verdict ('equal', 'differs', 'rounding' within the limits of floats, or 'behind'
    where only what is before it differs), and what is known of the differences.
    """
    count = certificate["input"]["shape"][0]
    unlike = {}  # By tensor, the images in which it or a tensor before it differs.
    rows = []
    for entry in (*certificate["tensors"], *certificate["results"]):
        name = entry["name"]
        before = np.zeros(count, bool)
        for source in entry["reads"]:
            before |= unlike.get(source, False)
        if name in found and entry["sha256"]:
            golden = arrays[entry["array"]] if entry.get("array") else None
            row, here = _row(entry, golden, np.asarray(found[name]), before, certificate["limits"])
            rows.append(row)
            before = before | here
        unlike[name] = before
    if not rows:
        raise ReplayError("the runner returned no tensor of the certificate.")
    return rows


def _row(entry, golden, array, before, limits):
    """Compare one array; return its row and the images in which it differs."""
    shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
    row = {"name": entry["name"], "verdict": "equal", "layer": entry["layer"]}
    everywhere = np.ones(len(before), bool)
    if array.shape != shape or array.dtype != dtype:
        row["verdict"] = "differs"
        row["reason"] = f"is {array.dtype} {array.shape}, not {dtype} {shape}"
        return row, everywhere
    if sha256(array) == entry["sha256"]:
        return row, ~everywhere
    if golden is None:  # Only the digest is known.
        row["verdict"] = "behind" if before.any() else "differs"
        row["reason"] = "its SHA-256 differs"
        return row, everywhere
    same = (array == golden) | ((array != array) & (golden != golden))
    difference = np.abs(array.astype(np.float64) - golden.astype(np.float64))
    difference = np.where(same, 0.0, np.where(np.isnan(difference), np.inf, difference))
    difference = difference.reshape(len(array), -1)
    row |= {
        "values": int(array.size),
        "differing": int((~same).sum()),
        "largest": float(difference.max()),
    }
    here = (~same).reshape(len(array), -1).any(1)  # Zeros of two signs differ in bytes only.
    fresh = here & ~before
    if not fresh.any():
        row["verdict"] = "behind" if here.any() else "equal"
        row["unjudged"] = bool(before.all())
    elif _is_rounding(entry, golden, difference[~before], limits):
        row["verdict"] = "rounding"
    else:
        row["verdict"] = "differs"
    return row, here


def _is_rounding(entry, golden, difference, limits):
    """Return whether differences are what two orders of float operations may make."""
    if entry["dtype"] == "int8":
        rare = (difference > 0).mean() < limits["share"]
        return entry["by_island"] and difference.max() <= 1 and rare
    if not np.issubdtype(np.dtype(entry["dtype"]), np.floating):
        return False
    limit = limits["island_result"] if entry["by_island"] else limits["result"]
    return difference.max() <= limit * np.abs(golden).max()


def with_outputs(model, names):
    """Return an ONNX file that also outputs uint8 tensors.

    A protobuf message may follow another one and is merged with it: here, a graph of outputs only.
    """
    tensor = _field(2, _field(1, UINT8))
    outputs = b"".join(_field(12, _field(1, name.encode()) + tensor) for name in names)
    return model + _field(7, outputs)


def _field(number, content):
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number):
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _exposed(path, certificate):
    """Return the ONNX file with all codes as outputs, and their names in it."""
    if not certificate.get("onnx"):
        raise ReplayError("the certificate is not one of an ONNX file: --runner MODULE:FUNCTION.")
    names = list(dict.fromkeys(entry["output"] for entry in certificate["onnx"].values()))
    return with_outputs(path.read_bytes(), names), names


def _named(certificate, names, values):
    """Return results and codes by the certificate's names; the values are in the file's order."""
    results = certificate["results"]
    found = {entry["name"]: x for entry, x in zip(results, values, strict=False)}
    exposed = dict(zip(names, values[len(results) :], strict=True))
    for tensor, entry in certificate["onnx"].items():
        numbers = np.asarray(exposed[entry["output"]])
        codes = (numbers.astype(np.int16) - entry["offset"]).astype(np.int8)
        found[tensor] = np.moveaxis(codes, 1, -1) if codes.ndim > 2 else codes
    return found


def run_onnxruntime(path, certificate, inputs):
    """Run an ONNX file in ONNX Runtime on the CPU."""
    import onnxruntime

    model, names = _exposed(path, certificate)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "vnni" not in cpuinfo.read_text():
        # Otherwise products can saturate on x86.
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    values = session.run(None, {session.get_inputs()[0].name: inputs})
    return _named(certificate, names, values)


def run_openvino(path, certificate, inputs):
    """Run an ONNX file in OpenVINO on the CPU."""
    import openvino

    model, names = _exposed(path, certificate)
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    found = compiled([inputs])
    return _named(certificate, names, [found[output] for output in compiled.outputs])


def run_stablehlo(path, certificate, inputs):
    """Run a StableHLO file in JAX; it shows its results only."""
    from jax import export

    content = path.read_bytes()
    magic = content.rfind(b"jaxqat.stablehlo")
    body = content[: magic - 32]
    program = body[: len(body) - 8 - int.from_bytes(body[-8:], "little")]
    result = export.deserialize(bytearray(program)).call(inputs)
    return _results(certificate, result)


def run_jaxqat(path, certificate, inputs):
    """Run a saved integer network in jaxqat."""
    import jaxqat

    executor = jaxqat.make_executor(jaxqat.load(path))
    return {**_results(certificate, executor(inputs)), **executor.codes(inputs)}


def _results(certificate, result):
    found = {}
    for entry in certificate["results"]:
        value = result
        for key in entry["path"]:
            value = value[key]
        found[entry["name"]] = np.asarray(value)
    return found


RUNNERS = {
    "onnxruntime": run_onnxruntime,
    "openvino": run_openvino,
    "stablehlo": run_stablehlo,
    "jaxqat": run_jaxqat,
}


def find_runner(name, path):
    """Return the runner of this name, or the one for a file, as a function of three arguments."""
    if name is None:
        if path is None:
            raise ReplayError("the certificate names no file: pass one, or --runner.")
        name = "jaxqat" if path.is_dir() else "stablehlo"
        name = "onnxruntime" if path.suffix == ".onnx" else name
    if name in RUNNERS:
        if path is None or not path.exists():
            raise ReplayError(f"{path}: there is no such file; give the network as an argument.")
        return RUNNERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(RUNNERS)
        raise ReplayError(f"--runner must be {known} or MODULE:FUNCTION, got {name!r}.")
    sys.path.insert(0, os.getcwd())
    own = getattr(importlib.import_module(module), function)
    return lambda path, certificate, inputs: own(inputs)


def replay(folder, path=None, runner=None):
    """Replay a certificate; return what was found, with 'first', the first row that differs."""
    certificate, arrays = read(folder)
    recorded = certificate["file"]
    if path is None and recorded is not None:
        path = folder / recorded["path"]
    run = find_runner(runner, path)
    changed = False
    if recorded is not None and path is not None and path.is_file():
        changed = hashlib.sha256(path.read_bytes()).hexdigest() != recorded["sha256"]
    rows = compare(certificate, arrays, run(path, certificate, arrays["input"]))
    first = next((row for row in rows if row["verdict"] == "differs"), None)
    names = {row["name"] for row in rows}
    shown = [x["name"] for x in certificate["tensors"] if x["sha256"]]
    missing = [name for name in shown if name not in names]
    return {"first": first, "rows": rows, "file_changed": changed, "not_compared": missing}


def describe(row):
    """Return a row in words."""
    counts = row.get("reason") or (
        f"{row['differing']:,} of {row['values']:,} values differ, by up to {row['largest']:.6g}"
    )
    return f"{row['name']} (made by {row['layer']}): {counts}"


def show(found):
    """Print what was found."""
    rows = found["rows"]
    if found["file_changed"]:
        print("note: the file is not the one that was certified: its SHA-256 differs")
    if found["not_compared"]:
        print(f"note: {len(found['not_compared'])} tensors were not shown and not compared")
    for row in rows:
        if row["verdict"] == "rounding":
            print(f"rounding of floats, within its limit: {describe(row)}")
    if behind := [row["name"] for row in rows if row["verdict"] == "behind"]:
        print(f"differ only where a tensor before them does: {', '.join(behind)}")
    if found["first"] is None:
        equal = sum(row["verdict"] == "equal" for row in rows)
        print(f"equal: {equal} of {len(rows)} tensors and results; nothing differs")
        if unknown := sum(row.get("unjudged", False) for row in rows):
            print(f"note: {unknown} of them are behind roundings in every image: not judged")
        return
    print(f"FIRST DIFFERENCE: {describe(found['first'])}")
    for row in rows:
        if row["verdict"] == "differs" and row is not found["first"]:
            print(f"differs too: {describe(row)}")


def main(arguments=None):
    """Replay a certificate from the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", nargs="?", type=Path, help="file; by default the certified one")
    parser.add_argument("--runner", help=f"{', '.join(RUNNERS)} or MODULE:FUNCTION")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="certificate")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    options = parser.parse_args(arguments)
    try:
        found = replay(options.folder, options.network, options.runner)
    except ModuleNotFoundError as error:
        print(f"replay: error: {error}: install it, or pass --runner.", file=sys.stderr)
        return 2
    except Exception as error:  # A runtime raises what it likes, and status 1 means a difference.
        print(f"replay: error: {error or repr(error)}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 0 if found["first"] is None else 1


if __name__ == "__main__":
    sys.exit(main())

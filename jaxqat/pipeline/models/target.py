"""A network of the user's own, by its import path (config key `model.target`).

Linen and NNX modules of any kind become Linen modules that are called as the ResNet is: with the
images and `train`. The variables are those of the module itself. In training, `train` becomes the
module's own argument (`training`, `deterministic`, ...), and for NNX `module.train()`.
"""

import difflib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxqat.errors import InputError
from jaxqat.pipeline.settings.model import ModelConfig

# Arguments that choose the mode of a call: their value in training.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
# Collections of NNX's usual variables; others have a collection of their own by the type's name.
_COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}
_KINDS = "a Linen module (flax.linen.Module) or an NNX module (flax.nnx.Module)"


class TargetError(InputError):
    """The network of `model.target` cannot be used; the message names the key and the reason."""


def build_target(config: ModelConfig, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """Return the network of `model.target` as a Linen module.

    Args:
        config: Target and arguments.
        num_classes: Passed on if the target takes `num_classes` and the arguments have none.
        dtype: Compute precision; other than float32, it is passed on as `dtype`.

    Returns:
        A Linen module, to be called with images and `train`.

    Raises:
        TargetError: There is no such target, it is of another kind, or does not take its arguments.
    """
    target = str(config.target)
    factory = _import(target)
    given = _arguments(factory, config, num_classes, dtype)
    if "rngs" in _parameters(factory) or _is_class(factory, nnx.Module):
        return _of_nnx(target, partial(factory, **given), takes_rngs="rngs" in _parameters(factory))
    made = _guarded(f"model.target {target!r}: calling it failed", factory, **given)
    if isinstance(made, nnx.Module):
        return _of_nnx(target, partial(factory, **given), takes_rngs=False)
    if not isinstance(made, nn.Module):
        raise TargetError(f"model.target {target!r} must make {_KINDS}, got {_kind(made)}.")
    modes = _modes(target, type(made).__call__)
    return made if tuple(modes) == ("train",) else OfLinen(made, tuple(modes))


def source_sha256(config: ModelConfig) -> str | None:
    """Return the SHA-256 of the file that defines `model.target`; None without one."""
    if config.target is None:
        return None
    module = sys.modules.get(config.target.partition(":")[0])
    path = Path(getattr(module, "__file__", None) or "")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def check_target(config: ModelConfig, module: nn.Module, image: jax.Array, classes: int) -> None:
    """Trace the network in both modes; check that it gives a logit for each class.

    Raises:
        TargetError: It cannot be called with images, or its result has another shape.
    """

    def call(key: jax.Array) -> tuple[Any, Any]:
        variables = module.init(key, image, train=False)
        collections = [name for name in variables if name != "params"]
        if "params" not in variables:
            raise TargetError(f"model.target {config.target!r} has no parameters to train.")
        trained, _ = module.apply(
            variables, image, train=True, mutable=collections, rngs={"params": key}
        )
        return module.apply(variables, image, train=False), trained

    size = "x".join(map(str, image.shape[1:]))
    found = _guarded(
        f"model.target {config.target!r}: calling the network with images of {size} failed",
        partial(jax.eval_shape, call),
        jax.random.key(0),
    )
    for result in found:
        shape = getattr(result, "shape", None)
        if shape != (len(image), classes) or not jnp.issubdtype(result.dtype, jnp.floating):
            got = _kind(result) if shape is None else f"{result.dtype}{list(shape)}"
            raise TargetError(
                f"model.target {config.target!r} must return float logits of shape (images, "
                f"classes), here [{len(image)}, {classes}], got {got}. The data has {classes} "
                "classes: give the target an argument `num_classes`, which is passed on, or set "
                "its own in model.arguments."
            )


class OfLinen(nn.Module):
    """A Linen module that is called with `train`, whatever its own argument; same variables.

    Attributes:
        module: The user's module.
        modes: Arguments of its call that choose the mode, of `MODES`.
    """

    module: nn.Module
    modes: tuple[str, ...]

    def setup(self):
        """Take the module's names: variables have no prefix."""
        nn.share_scope(self, self.module)

    def __call__(self, x: Any, train: bool) -> Any:
        """Return the module's result."""
        return self.module(x, **_values(self.modes, train))


class OfNNX(nn.Module):
    """An NNX module as a Linen module: parameters, batch statistics and other state as variables.

    Random streams, as of dropout, start anew at each call in training, from Linen's key.

    Attributes:
        make: Makes the NNX module from `nnx.Rngs`.
        graph: Its static part.
        paths: Path and collection of each variable, in the order of NNX; the collection is None
            for the state of random streams.
        modes: Arguments of its call that choose the mode, of `MODES`.
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    graph: Any
    paths: tuple[tuple[tuple[Any, ...], str | None], ...]
    modes: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the module's result; in training, its state is updated."""
        if self.is_initializing():
            module = self.make(nnx.Rngs(self.make_rng("params")))
            self._write(nnx.state(module))
        else:
            module = self._merged(train)
        (module.train if train else module.eval)()
        result: Any = module(x, **_values(self.modes, train))  # pyright: ignore[reportCallIssue]
        if not self.is_initializing():
            self._write(nnx.state(module))
        return result

    def _merged(self, train: bool) -> nnx.Module:
        key = self.make_rng("params") if train else jax.random.key(0)
        state = nnx.eval_shape(lambda: nnx.state(self.make(nnx.Rngs(0))))
        flat = []
        for number, (path, variable) in enumerate(nnx.to_flat_state(state)):
            collection = dict(self.paths)[path]
            if collection is not None:
                value = self.get_variable(collection, str(path[0]))
                for name in path[1:]:
                    value = value[str(name)]
            elif isinstance(variable, nnx.RngKey):
                value = jax.random.fold_in(key, number)
            else:
                value = jnp.zeros(variable.shape, variable.dtype)  # A stream's count.
            flat.append((path, variable.replace(value)))
        return nnx.merge(self.graph, nnx.from_flat_state(flat))

    def _write(self, state: Any) -> None:
        collections = dict(self.paths)
        trees: dict[tuple[str, str], Any] = {}
        for path, variable in nnx.to_flat_state(state):
            collection = collections.get(path)
            if collection is None or not self.is_mutable_collection(collection):
                continue
            first, *rest = map(str, path)
            if not rest:
                trees[collection, first] = variable.get_value()
                continue
            tree = trees.setdefault((collection, first), {})
            for name in rest[:-1]:
                tree = tree.setdefault(name, {})
            tree[rest[-1]] = variable.get_value()
        for (collection, name), tree in trees.items():
            self.put_variable(collection, name, tree)


def _of_nnx(target: str, factory: Callable[..., Any], *, takes_rngs: bool) -> OfNNX:
    make = partial(_call_nnx, factory) if takes_rngs else partial(_call_plain, factory)

    def split() -> Any:
        module = make(nnx.Rngs(0))
        if not isinstance(module, nnx.Module):
            raise TargetError(f"model.target {target!r} must make {_KINDS}, got {_kind(module)}.")
        return module

    module = _guarded(f"model.target {target!r}: calling it failed", partial(nnx.eval_shape, split))
    graph, state = nnx.split(module)
    paths = tuple((path, _collection(leaf)) for path, leaf in nnx.to_flat_state(state))
    return OfNNX(make, graph, paths, _modes(target, type(module).__call__))


def _call_nnx(factory: Callable[..., Any], rngs: nnx.Rngs) -> Any:
    return factory(rngs=rngs)


def _call_plain(factory: Callable[..., Any], rngs: nnx.Rngs) -> Any:
    del rngs
    return factory()


def _collection(variable: Any) -> str | None:
    if isinstance(variable, nnx.RngState):
        return None
    for kind, name in _COLLECTIONS.items():
        if isinstance(variable, kind):
            return name
    return type(variable).__name__.lower()


def _import(target: str) -> Any:
    """Return what an import path names; the current directory comes first, as in `python -m`."""
    name, _, attribute = target.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing != name and not name.startswith(f"{missing}."):
            raise _failed(f"model.target {target!r}: importing {name} failed", error) from error
        raise TargetError(
            f"model.target {target!r}: there is no module {missing!r} in {here} or among the "
            "installed packages. The form is 'package.module:Name'."
        ) from error
    except Exception as error:
        raise _failed(f"model.target {target!r}: importing {name} failed", error) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_")]
            near = difflib.get_close_matches(part, names, 1)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            owner = getattr(found, "__name__", name)
            raise TargetError(f"model.target {target!r}: {owner} has no {part!r}{hint}.")
        found = getattr(found, part)
    if isinstance(found, nn.Module | nnx.Module):
        raise TargetError(
            f"model.target {target!r} is a module that was already made; name its class, or a "
            "function that returns it."
        )
    is_other_class = isinstance(found, type) and not _is_class(found, nn.Module, nnx.Module)
    if is_other_class or not callable(found):
        raise TargetError(
            f"model.target {target!r} must be the class of {_KINDS}, or a function that returns "
            f"one, got {_kind(found)}."
        )
    return found


def _is_class(value: Any, *kinds: type) -> bool:
    return isinstance(value, type) and issubclass(value, kinds)


def _parameters(factory: Any) -> Mapping[str, inspect.Parameter]:
    # Of a class, `signature` would return that of NNX's metaclass.
    function = partial(factory.__init__, None) if isinstance(factory, type) else factory
    return inspect.signature(function).parameters


def _arguments(factory: Any, config: ModelConfig, num_classes: int, dtype: Any) -> dict[str, Any]:
    """Return the keyword arguments of the target; check their names."""
    parameters, target = _parameters(factory), config.target
    named = [
        name
        for name, p in parameters.items()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
        and not (_is_class(factory, nn.Module) and name in ("parent", "name"))
    ]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given: dict[str, Any] = {name: _frozen(value) for name, value in config.arguments.items()}
    for name in given:
        if (name not in named and not takes_any) or name == "rngs":
            others = [n for n in named if n != "rngs"]
            near = difflib.get_close_matches(name, others, 1)
            hint = f" The nearest right one is model.arguments.{near[0]}." if near else ""
            raise TargetError(
                f"model.arguments.{name}: {target} has no such argument; it takes "
                f"{', '.join(others) or 'none'}.{hint}"
            )
    if "num_classes" in named:
        given.setdefault("num_classes", num_classes)
    if dtype != jnp.float32 and "dtype" not in given:
        if "dtype" not in named:
            raise TargetError(
                f"precision {jnp.dtype(dtype).name} needs a model.target with an argument `dtype`, "
                f"and {target} has none."
            )
        given["dtype"] = dtype
    missing = [
        name
        for name in named
        if parameters[name].default is inspect.Parameter.empty and name not in (*given, "rngs")
    ]
    if missing:
        keys = ", ".join(f"model.arguments.{name}" for name in missing)
        raise TargetError(f"model.target {target!r} needs {keys}.")
    return given


def _frozen(value: Any) -> Any:
    """Return a list as a tuple: modules are compared and hashed."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _modes(target: str, call: Any) -> tuple[str, ...]:
    """Return the arguments of a module's call that choose the mode; the first is the images."""
    rest = list(inspect.signature(call).parameters.values())[2:]  # After `self` and the images.
    for p in rest:
        optional = p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name not in MODES and not optional:
            raise TargetError(
                f"model.target {target!r}: the call of the network must need the images and its "
                f"mode ({', '.join(MODES)}) only, and it needs {p.name!r} too."
            )
    return tuple(p.name for p in rest if p.name in MODES)


def _values(modes: tuple[str, ...], train: bool) -> dict[str, bool]:
    return {name: MODES[name] is train for name in modes}


def _guarded(doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the user's code; whatever it raises becomes one error with its place."""
    try:
        return function(*args, **kwargs)
    except TargetError:
        raise
    except Exception as error:
        raise _failed(doing, error) from error


def _failed(doing: str, error: Exception) -> TargetError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f[0]]
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    place = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    text = next(iter(str(error).strip().splitlines()), "")
    return TargetError(f"{doing}{place}: {type(error).__name__}: {text}")


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__module__}.{value.__qualname__}"
    return f"a {type(value).__name__}"

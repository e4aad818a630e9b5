"""A checkpoint folder: its config, its index and the headers of its files, each looked at before a single weight is read."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from moerunner.errors import CheckpointError, MoEError, UnsupportedError
from moerunner.models import registry
from moerunner.models.tensorfile import Stored, read_header

CONFIG, GENERATION, ONE_FILE = "config.json", "generation_config.json", "model.safetensors"
INDEX = ONE_FILE + ".index.json"
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSeq2SeqLM")
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Recipe:
    """What a config says: Transformers' own config object, the class that makes a model of it, the weights' dtype if named.

    quantised: the method, empty for plain weights.
    """

    config: Any
    auto_class: Any
    dtype: torch.dtype | None
    quantised: str = ""


def read_recipe(path: Path, *, quantised: bool = False) -> Recipe:
    """The config of a checkpoint folder. Nothing is downloaded, and no code from the folder is run.

    quantised: whether a config of quantised weights is wanted all the same.

    Raises:
        CheckpointError: the folder or its config is absent, damaged or impossible.
        UnsupportedError: Transformers does not know the model, or the weights are quantised.
    """
    try:
        import transformers
    except ImportError as error:
        step = "pip install 'moerunner[hf]'"
        raise UnsupportedError("Transformers is not installed", where="moerunner.load", next_step=step) from error
    check_folder(path)
    file = path / CONFIG
    raw = read_json(file, next_step="Give the folder that save_pretrained wrote, or a model's repository")
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise CheckpointError("names no model_type", where=str(file))
    kind = raw["model_type"]
    if not registry.transformers_knows(kind):
        own = "; code from a checkpoint is never run" if "auto_map" in raw else ""
        raise UnsupportedError(
            f"the model_type {kind!r} is not one that Transformers {transformers.__version__} knows{own}",
            where=str(file),
            next_step="moerunner families lists what runs, docs/add-a-family.md says how a package adds a model",
        )
    method = _quantised(raw)
    if method and not quantised:
        raise UnsupportedError(
            f"the weights are quantised ({method}), and such checkpoints are not read yet",
            where=str(file),
            next_step="Weights in float32, bfloat16 or float16 are: take the model's unquantised release",
        )
    config = guarded(
        lambda: transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False), file
    )
    auto_class = guarded(lambda: _auto_class(config), file)
    if auto_class is None:
        raise UnsupportedError(f"the model_type {kind!r} is not a language model in Transformers", where=str(file))
    dtype = getattr(config, "dtype", None)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"has the dtype {dtype!r}, which is none of torch", where=str(file))
    return Recipe(config, auto_class, dtype, method)


def read_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, by name, from the headers of its files.

    Raises:
        CheckpointError: a file is absent, damaged, or in contradiction to the index; a tensor is there twice.
    """
    check_folder(path)
    where: dict[str, str] | None = None
    if (path / ONE_FILE).exists():
        files = [path / ONE_FILE]
    elif (path / INDEX).exists():
        where = _weight_map(path / INDEX)
        files = [path / name for name in sorted(set(where.values()))]
    else:
        raise no_weights(path)
    tensors: dict[str, Stored] = {}
    doubled = []
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                doubled.append(f"{tensor.name} (in {tensors[tensor.name].file.name} and {file.name})")
            tensors[tensor.name] = tensor
    if doubled:
        raise CheckpointError(f"has tensors twice: {some(doubled)}", where=str(path))
    if where is not None:
        _check_index(path, where, tensors)
    if not tensors:
        raise CheckpointError("holds no tensor", where=some([str(file) for file in files]))
    return tensors


def read_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder, None where there is none: for some models Transformers makes up one that knows no word.

    Raises:
        CheckpointError: its files are damaged.
    """
    from transformers import AutoTokenizer

    def make() -> Any:
        try:
            found = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError):  # what Transformers raises for absent and for some broken files
            return None
        return found if found("a", add_special_tokens=False)["input_ids"] else None

    return guarded(make, Path(path), "has a tokenizer that cannot be read")


def check_folder(path: Path) -> None:
    """Raises a CheckpointError unless the path is a folder with something in it."""
    try:
        if not path.is_dir():
            what = "is not a folder" if path.exists() else "does not exist"
            raise CheckpointError(what, where=str(path), next_step=f"Give the folder that holds {CONFIG}")
        if not os.access(path, os.R_OK | os.X_OK):
            raise CheckpointError("may not be read", where=str(path), next_step="Change its permissions")
        if not any(path.iterdir()):
            raise CheckpointError("is an empty folder", where=str(path), next_step=f"Expected {CONFIG} and *.safetensors in it")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error


def read_json(file: Path, *, next_step: str = "") -> Any:
    """The data in a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("is missing", where=str(file), next_step=next_step) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not JSON: {one_line(error)}", where=str(file)) from error


def guarded(make: Callable[[], _T], where: str | Path, fault: str = "describes no model that can be made") -> _T:
    """Calls Transformers with what a config says. For values that it does not expect it may raise anything."""
    try:
        return make()
    except (MoEError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UnsupportedError(f"asks for a package that is not installed: {one_line(error)}", where=str(where)) from error
    except Exception as error:
        raise CheckpointError(f"{fault}: {type(error).__name__}: {one_line(error)}", where=str(where)) from error


def one_line(error: BaseException) -> str:
    """What a library says, on one line and not too long."""
    return textwrap.shorten(str(error) or type(error).__name__, 240)


def some(names: Iterable[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _auto_class(config: Any) -> Any:
    """What makes the class that the config names; for a multimodal model that may be another than its language part alone."""
    import transformers

    named = config.architectures or []
    able = []
    for name in _AUTO_CLASSES:
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            able.append(getattr(transformers, name))
            if any(kind.__name__ in named for kind in (found if isinstance(found, tuple) else (found,))):
                return able[-1]
    return able[0] if able else None


def _quantised(raw: dict[str, Any]) -> str:
    """The method by which the weights are quantised, empty if they are not."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key in ("quantization_config", "compression_config"):
            given = part.get(key)
            if given:
                return str(given.get("quant_method", "unnamed") if isinstance(given, dict) else given)
    return ""


def _weight_map(index: Path) -> dict[str, str]:
    """Which file each tensor is in, by the index."""
    data = read_json(index)
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError("has no weight_map from tensors to files", where=str(index))
    for name in sorted(set(found.values())):
        if not name.endswith(".safetensors") or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"names {name!r}, which is not a safetensors file beside it", where=str(index))
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"names the file {name}, which is missing", where=str(index), next_step="Copy or download it again"
            )
    return found


def _check_index(path: Path, where: dict[str, str], tensors: dict[str, Stored]) -> None:
    absent = [f"{name} (in {file})" for name, file in where.items() if name not in tensors]
    named = {name: path / file for name, file in where.items()}
    moved = [f"{n} (in {t.file.name}, not {where[n]})" for n, t in tensors.items() if named.get(n, t.file) != t.file]
    unnamed = [f"{name} (in {tensor.file.name})" for name, tensor in tensors.items() if name not in where]
    for fault, names in (
        ("names tensors that its files do not have", absent),
        ("names the wrong file for", moved),
        ("does not name tensors that its files have", unnamed),
    ):
        if names:
            raise CheckpointError(
                f"{fault}: {some(names)}", where=str(path / INDEX), next_step="Copy or download the index and the files again"
            )


def no_weights(path: Path) -> MoEError:
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    shards = [name for name in names if _SHARD.fullmatch(name)]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    other = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if shards:
        return CheckpointError(f"has {len(shards)} shards and no {INDEX}", where=str(path), next_step="Copy the index too")
    if pickled:
        return UnsupportedError(
            f"holds its weights as {some(pickled, 2)}, a format that can run code when it is read, and no {ONE_FILE}",
            where=str(path),
            next_step="Pickle is never read here: save the model again with save_pretrained",
        )
    if other:
        return UnsupportedError(
            f"holds {some(other, 2)}, and neither {ONE_FILE} nor {INDEX}",
            where=str(path),
            next_step=f"A single file must be called {ONE_FILE}; adapters and GGUF files are not read",
        )
    return CheckpointError("holds no weights", where=str(path), next_step=f"Expected {ONE_FILE}, or {INDEX} and its files")

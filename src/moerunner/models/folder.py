"""Reads a model from a folder through Transformers, after looking at the files: a damaged one is named."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moerunner.errors import CheckpointError, UnsupportedError
from moerunner.models.prepare import sites, spec_of


def read(path: Path, dtype: torch.dtype | None) -> Any:
    """The model as Transformers builds it, with every tensor from the folder.

    Raises:
        CheckpointError, UnsupportedError: see `load`.
    """
    from transformers import AutoModelForCausalLM

    config = _config(path)
    files = _weight_files(path)
    _check_blocks(config, path)
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype or "auto",
        "local_files_only": True,
        "trust_remote_code": False,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in info, and refused below by name
    }
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(_short(error), where=str(path)) from error
    model, info = loaded
    for keys, fault in (("missing_keys", "has no"), ("mismatched_keys", "has not the shape that the config asks for:")):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[keys])
        if names:
            raise CheckpointError(f"{fault} {_some(names)}", where=_some([str(f) for f in files]))
    return model


def _config(path: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise CheckpointError(what, where=str(path), next_step="Give the folder that holds config.json")
    data = _json(path / "config.json")
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError("names no model_type", where=str(path / "config.json"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(f"{kind!r} is not a language model of the installed Transformers", where=str(path))
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a config class may raise anything for values that it does not expect
        raise CheckpointError(_short(error), where=str(path / "config.json")) from error


def _weight_files(path: Path) -> list[Path]:
    """The files that hold the weights, each with a header that can be read, and no expert with a tensor less than others."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    if index.exists():
        data = _json(index)
        shards = data.get("weight_map") if isinstance(data, dict) else None
        if not isinstance(shards, dict):
            raise CheckpointError("has no weight_map", where=str(index))
        files = sorted({path / str(name) for name in shards.values()})
    else:
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise CheckpointError("holds no weights", where=str(path), next_step="Expected *.safetensors beside config.json")
    names: list[str] = []
    for file in files:
        if not file.is_file():
            raise CheckpointError("is missing", where=str(file), next_step=f"{index.name} says that it holds weights")
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    names += opened.keys()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"is damaged: {_short(error)}", where=str(file)) from error
    missing = _missing_of_experts(names)
    if missing:
        raise CheckpointError(f"has no {_some(missing)}", where=_some([str(f) for f in files]))
    return files


def _missing_of_experts(names: Iterable[str]) -> list[str]:
    """Where experts are stored one by one, the tensors that some have and others do not. Transformers does not name them."""
    groups: dict[str, dict[str, set[int]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        if match:
            groups.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    missing = []
    for before, found in groups.items():
        every = range(1 + max(max(numbers) for numbers in found.values()))
        missing += [f"{before}{e}{after}" for after, numbers in found.items() for e in every if e not in numbers]
    return sorted(missing)


def _check_blocks(config: Any, path: Path) -> None:
    """That moerunner can run the model's MoE blocks, on a model without data, before the weights are read."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            found = list(sites(AutoModelForCausalLM.from_config(config)))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"describes no model: {_short(error)}", where=str(path / "config.json")) from error
    reasons = []
    for site in found:
        try:
            spec_of(site)
            return
        except UnsupportedError as reason:
            reasons.append(str(reason))
    if reasons:
        raise UnsupportedError(f"no MoE block can be run: {reasons[0]}", where=str(path))


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError("is missing", where=str(file)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"is not JSON: {error}", where=str(file)) from error


def _short(error: Exception) -> str:
    """What Transformers says, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 200)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

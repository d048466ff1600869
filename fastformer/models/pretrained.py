"""Checkpoints in Hugging Face's layout: a folder with config.json and safetensors, in one file or in several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastformer.models.config import TransformerConfig
from fastformer.models.files import replacing, require
from fastformer.models.hf_config import KEPT
from fastformer.models.layouts import Layout, Piece, current_name, layout_to_read, layout_to_write

if TYPE_CHECKING:
    from fastformer.models.base import Transformer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load(model_class: type[Transformer], kind: type[TransformerConfig], folder: Path, dtype: torch.dtype | None) -> Any:
    """The model in the folder, of that class and kind of configuration; see GPT.from_pretrained."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype is a {type(dtype).__name__}, must be a torch.dtype or None")
    if dtype not in (None, *DTYPES.values()):
        raise ValueError(f"dtype is {dtype}, must be one of {', '.join(map(str, DTYPES.values()))}")
    settings = _read_json(folder / CONFIG_FILE)
    try:
        layout = layout_to_read(kind, settings.get("model_type"))
        with _Weights(folder, layout) as weights:
            config = layout.read_config(settings, weights.shapes)
            with torch.device("meta"):
                model = model_class(config)
            pieces = layout.pieces(config)
            parameters = dict(model.named_parameters())
            _check(layout, pieces, parameters, weights)
            model = model.to(weights.dtype(dtype)).to_empty(device="cpu").eval()
            parameters = dict(model.named_parameters())
            with torch.no_grad():
                for piece in pieces:
                    parts = [weights.read(name) for name in piece.theirs]
                    parameters[piece.ours].copy_(torch.cat([x.t() if piece.transposed else x for x in parts]))
            for name, ours in layout.copies.items():
                wanted = {theirs for piece in pieces for theirs in piece.theirs}
                if name in weights.shapes and name not in wanted:
                    _check_copy(name, weights.read(name), parameters[ours])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: {error}") from error
    model.kept_settings = {key: settings[key] for key in KEPT if key in settings}
    return model


def save(model: Transformer, folder: Path) -> None:
    """Write the model; see GPT.save_pretrained."""
    layout = layout_to_write(model.config)
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    for piece in layout.pieces(model.config):
        whole = parameters[piece.ours].detach()
        for name, part in zip(piece.theirs, whole.split(piece.sizes) if piece.sizes else [whole], strict=True):
            tensors[name] = (part.t() if piece.transposed else part).contiguous()
    dtype = str(model.token_embedding.weight.dtype).removeprefix("torch.")
    settings = {"model_type": layout.model_type, "dtype": dtype, **layout.write_config(model.config)}
    settings |= model.kept_settings
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_FILE) as config_file, replacing(folder / WEIGHTS_FILE) as weights_file:
        # Neither replaces an older file before both are written.
        config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        require("safetensors.torch").save_file(tensors, weights_file, {"format": "pt"})
    _remove_shards(folder)


def _remove_shards(folder: Path) -> None:
    """Remove the files of an older checkpoint in several, and its index; only the index where it is damaged."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return
    try:
        shards = _shards(folder)
    except ValueError:
        shards = []
    index.unlink()
    for path in shards:
        if path.suffix == ".safetensors" and path.name != WEIGHTS_FILE:
            path.unlink(missing_ok=True)


class _Weights:
    """The tensors of a checkpoint, by the names that transformers gives them today, with the heads' prefix."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, tuple[Any, str]] = {}  # (file, name in it)
        self._stack = ExitStack()
        found: dict[str, tuple[Any, str]] = {}
        try:
            for path in _weight_files(folder):
                file = self._open(path)
                for name in file.keys():  # noqa: SIM118 (not a dict: it can't be iterated)
                    if current_name(name) in found:
                        raise ValueError(f"tensor {name} is in the checkpoint twice")
                    found[current_name(name)] = (file, name)
            has_prefix = any(name.startswith(layout.prefix) for name in found)
            for name, stored in found.items():
                if not layout.ignored.search(name):
                    name = name if has_prefix else layout.prefix + name
                    self._stored[name] = stored
                    self.shapes[name] = tuple(self._slice(name).get_shape())
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def dtype(self, wanted: torch.dtype | None) -> torch.dtype:
        """The wanted one, or that of all tensors.

        Raises:
            ValueError: none is wanted and they have several, or one is none of DTYPES.
        """
        found = sorted({self._slice(name).get_dtype() for name in self.shapes})
        for name in found:
            if name not in DTYPES:
                raise ValueError(f"has a tensor of {name}, must be of {', '.join(DTYPES)}")
        if len(found) > 1 and wanted is None:
            raise ValueError(f"dtype is None, must be given for a checkpoint that has {', '.join(found)}")
        return DTYPES[found[0]] if wanted is None else wanted

    def read(self, name: str) -> Tensor:
        file, stored = self._stored[name]
        return file.get_tensor(stored)

    def _slice(self, name: str) -> Any:
        file, stored = self._stored[name]
        return file.get_slice(stored)

    def _open(self, path: Path) -> Any:
        safetensors = require("safetensors")
        try:
            return self._stack.enter_context(safetensors.safe_open(path, framework="pt"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path.name} is damaged, or no safetensors file ({error})") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the tensors: one, or those that an index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    files = _shards(folder)
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks {path.name}, which {INDEX_FILE} names")
    return files


def _shards(folder: Path) -> list[Path]:
    """The files that the index names.

    Raises:
        ValueError: the index is damaged, or names a file elsewhere.
    """
    names = _read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(x, str) for x in names.values()):
        raise ValueError(f"{INDEX_FILE} lacks its weight_map")
    files = sorted(set(names.values()))
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{INDEX_FILE} names the file {name!r}, must be one in the same folder")
    return [folder / name for name in files]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError too
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _check(layout: Layout, pieces: list[Piece], parameters: dict[str, Tensor], weights: _Weights) -> None:
    """ValueError that names a tensor that is missing, one too many or of the wrong shape."""
    if left := parameters.keys() - {piece.ours for piece in pieces}:
        raise ValueError(f"{min(left)} has no tensor in the layout of {layout.model_type}")
    expected: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        shape = tuple(parameters[piece.ours].shape)
        shape = shape[::-1] if piece.transposed else shape
        for name, rows in zip(piece.theirs, piece.sizes or shape[:1], strict=True):
            expected[name] = (rows, *shape[1:])
    if missing := sorted(expected.keys() - weights.shapes.keys()):
        raise ValueError(f"lacks the tensor {missing[0]}{_others(missing)}")
    if surplus := sorted(weights.shapes.keys() - expected.keys() - layout.copies.keys()):
        raise ValueError(f"has the tensor {surplus[0]}{_others(surplus)}, for which the model has no place")
    for name, shape in expected.items():
        if weights.shapes[name] != shape:
            raise ValueError(f"tensor {name} has shape {weights.shapes[name]}, must be {shape}")


def _others(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_copy(name: str, copy: Tensor, parameter: Tensor) -> None:
    if not torch.equal(copy.to(parameter.dtype), parameter):
        raise ValueError(f"tensor {name} differs from the one that it is tied to, must be equal")

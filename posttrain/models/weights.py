"""Load every weight of a model or refuse the folder: nothing that a folder lacks may stay random.

Example:
    >>> try:
    ...     check_folder("models/none")
    ... except ModelError as error:
    ...     print(error)
    no model folder at models/none; check the path, or run the stage that writes it
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

from posttrain.errors import ModelError
from posttrain.models.checkpointing import without_dropout
from posttrain.models.config_faults import config_faults
from posttrain.models.prefixes import check_spelling, named, wrappers
from posttrain.models.ties import settle_ties

FLOATING = ("F64", "F32", "F16", "BF16")
"""How safetensors files name the number formats that need no scale."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SHOWN = 4
_PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Settings of a configuration that change in which form a model returns its outputs, not their values."""
_MAPPINGS = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of settings next to config.json; those that are there hold a mapping."""
POINTER = b"version https://git-lfs"


def load_whole(kind: Any, source: str | Path, **options: Any) -> PreTrainedModel:
    """Load a model in float32 with dropout off.

    A known wrapper's prefix is stripped from the names of the weights if that makes the model whole; a line on stderr reports it.

    Raises:
        ModelError: weights are missing, left over, of a different shape or not finite, or the folder cannot be loaded.
    """
    check_folder(source)
    model, info = _loaded(kind, source, **options)
    found = wrappers(info["unexpected_keys"])
    pattern = rf"(^|(?<=\.))({'|'.join(re.escape(prefix) for prefix in sorted(found))})+"
    stored = _stored(source)
    if found and len({re.sub(pattern, "", name) for name in stored}) == len(stored):
        inner, again = _loaded(kind, source, key_mapping={pattern: ""}, **options)
        if not _faults(again):
            check_spelling(stored, pattern, inner, source)
            tqdm.write(f"{source}: read the weights without the prefix {named(found)}", file=sys.stderr)
            model, info = _without_renaming(inner, pattern), again
    if faults := _faults(info):
        raise ModelError(
            f"{source}: the weights do not make up a whole {type(model).__name__}: {faults}. Weights that a folder lacks would stay"
            " random. Save the model again with save_pretrained, unwrapped and with its head"
        )
    _check_floating(model, stored, pattern if found else None, source)
    _check_finite(model, source)
    settle_ties(model, source)
    for name, plain in _PLAIN_OUTPUTS.items():
        if getattr(model.config, name, plain) is not plain:
            setattr(model.config, name, plain)
    without_dropout(model)
    return model


def pretrained(kind: Any, source: str | Path, **options: Any) -> Any:
    """Call `from_pretrained`, which never runs code that comes with a model.

    Raises:
        ModelError: transformers cannot load it.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of weights is an error here, with the same names
    try:
        return kind.from_pretrained(str(source), trust_remote_code=False, **options)
    # configurations and files of strangers fail in any way; the type of the error says what transformers met
    except Exception as error:
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        if Path(source).is_dir():
            faults = config_faults(Path(source))
            raise ModelError(f"{source}: transformers cannot load this folder ({reason}){faults}") from error
        raise ModelError(
            f"{source}: there is no such folder here, and it could not be loaded as a hub id ({reason}). Check the path,"
            " or allow the download with HF_HUB_OFFLINE=0"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _instead(folder: Path) -> str:
    """Return the files of a folder without safetensors weights, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    found = f"(found {', '.join(names)})"
    if any(Path(name).suffix in PICKLED for name in names):
        return f"{found}; convert them, because pickled weights are not loaded (they can run code)"
    return f"{found}, so there is nothing to train; copy the model's *.safetensors files there. `posttrain plan` needs only config.json"


def check_folder(source: str | Path, weights: bool = True) -> None:
    """Raise ModelError unless `source` is a hub id or a folder with a configuration and whole safetensors files.

    Args:
        weights: False if a folder without files of weights is enough, as for a plan.
    """
    folder = Path(source)
    try:
        there = folder.is_dir() and any(folder.iterdir()) and (folder / "config.json").exists()
    except OSError as error:
        raise ModelError(
            f"{source}: cannot be read ({error.strerror}); give this user the right to read the folder"
        ) from error
    if not there and not folder.exists() and (folder.is_absolute() or str(source).startswith((".", "models/"))):
        raise ModelError(f"no model folder at {source}; check the path, or run the stage that writes it")
    if folder.is_file():
        if folder.suffix == ".gguf":
            raise ModelError(
                f"{source}: is a GGUF file. The pipeline reads it (model.source) and writes the folder models/base; give that one"
            )
        raise ModelError(f"{source}: is a file; give the folder that holds it: {folder.parent}")
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{source}: adapter_config.json says that this folder holds an adapter, which is a part of a model; merge it into its"
            " base model (peft: PeftModel.from_pretrained(…).merge_and_unload()) and save the whole model"
        )
    if not (folder / "config.json").exists():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        where = f"; models are in its subfolders: give {folder / inside[-1]}" if inside else ""
        raise ModelError(f"{source}: no config.json, so this is not a model folder{where}")
    _check_quantisation(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files and not weights:
        return
    if not files:
        raise ModelError(f"{source}: no safetensors weights {_instead(folder)}")
    if not any(path.name == "model.safetensors" for path in files) and not any(folder.glob("*.index.json")):
        _refuse_unread_files(folder, files)
    for path in files:
        _check_file(path)
    for path in sorted(folder.glob("*.json")):
        _check_text_file(path)
    for path in sorted(folder.glob("*.index.json")):
        _check_index(path)


def _refuse_unread_files(folder: Path, files: list[Path]) -> None:
    """Raise ModelError: there is neither model.safetensors nor an index, and transformers reads no other names."""
    listed = ", ".join(path.name for path in files[:SHOWN]) + (", …" if len(files) > SHOWN else "")
    other = sorted(path.name for path in folder.glob("*.safetensors.index.*.json"))
    if other:  # model.safetensors.index.fp16.json
        raise ModelError(
            f"{folder}: {other[0]} and the weights ({listed}) have a precision in their names, and transformers reads only"
            f" model.safetensors.index.json here; rename the index: mv {folder / other[0]} {folder / 'model.safetensors.index.json'}"
        )
    if len(files) > 1:
        raise ModelError(
            f"{folder}: holds {len(files)} files of weights ({listed}) without model.safetensors.index.json, which says what is in which,"
            " and without model.safetensors. Fetch the index, if they are parts of one model; if they are one model in several"
            f" precisions, rename one, for example: mv {files[0]} {folder / 'model.safetensors'}"
        )
    raise ModelError(
        f"{folder}: its weights are in {listed}, and transformers reads only model.safetensors, or the files that"
        f" model.safetensors.index.json names; rename the file: mv {files[0]} {folder / 'model.safetensors'}"
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers reads: model.safetensors, else those of its index, else all."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    return sorted(folder.glob("*.safetensors"))


def _check_index(path: Path) -> None:
    """Raise ModelError unless an index names only safetensors files next to it: transformers would unpickle any other."""
    try:
        names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{path}: not an index of weight files; copy the model again") from None
    for name in sorted(map(str, names)):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise ModelError(
                f"{path} names {name!r} as a file of weights. Only safetensors files in the same folder are loaded, because pickled"
                " weights can run code; convert them."
            )
        if not (path.parent / name).is_file():
            raise ModelError(f"{path} names {name!r}, and there is no such file; copy the model again")
    single = path.name.removesuffix(".index.json")
    if single.endswith(".safetensors") and single not in names and (path.parent / single).exists():
        raise ModelError(
            f"{path.parent}: holds two sets of weights: {single}, and the files that {path.name} names. Only one of them would be"
            " loaded; remove the other"
        )
    _check_shards([path.parent / name for name in sorted(names)])


def _check_shards(files: list[Path]) -> None:
    """Raise ModelError if two files hold different values of one weight: which is loaded depends on the order, not on the index."""
    holders: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, not a mapping
                first = holders.setdefault(name, path)
                if first != path and not torch.equal(_tensor(first, name), weights.get_tensor(name)):
                    raise ModelError(
                        f"{path.parent}: {first.name} and {path.name} hold different values of {name}, so it cannot be known which is the"
                        " model's; fetch the model again, without files of an earlier version"
                    )


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as weights:
        found: torch.Tensor = weights.get_tensor(name)
    return found


def _check_quantisation(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{folder}: config.json cannot be read ({error.strerror}); copy the model again") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder}: config.json is not valid JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder}: config.json holds no mapping, so this is not a model folder")
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
        raise ModelError(
            f"{folder}: its weights are quantised ({method}), and quantised weights cannot be trained here; give the folder of the"
            " original model, or save it dequantised in float32 or bfloat16"
        )


def _check_text_file(path: Path) -> None:
    """Raise ModelError if a file of settings or of the tokenizer is a git-lfs pointer, or cannot be read."""
    try:
        pointer = path.read_bytes()[: len(POINTER)] == POINTER
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the model again") from error
    if pointer:
        raise ModelError(f"{path}: a git-lfs pointer instead of the file; type: git lfs pull")
    if path.name in _MAPPINGS:
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path}: is not valid JSON ({error!s:.100}); fetch it again") from error
        if not isinstance(tree, dict):
            kind = "null" if tree is None else {list: "a list"}.get(type(tree), "a single value")
            raise ModelError(f"{path}: holds {kind} instead of a mapping of settings; fetch it again, or remove it")


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            pointer = file.read(len(POINTER)) == POINTER
    except OSError as error:  # a folder of that name, or a link into a cache that has been cleared
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}); copy the model again, with the files themselves instead of links"
        ) from error
    if pointer:
        raise ModelError(f"{path}: a git-lfs pointer instead of the weights; type: git lfs pull")
    try:
        with safe_open(path, "pt") as weights:
            weights.keys()
    except SafetensorError as error:
        raise ModelError(
            f"{path}: damaged or cut short ({error}), {path.stat().st_size:,} bytes; transformers cannot load this folder."
            " Fetch the file again"
        ) from error


def refuse_other_heads(config: Any, source: str | Path) -> None:
    """Raise ModelError if the folder was saved as a model without a language model's head."""
    for name in map(str, getattr(config, "architectures", None) or []):
        if re.search(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|RewardModel", name):
            raise ModelError(
                f"{source}: {name} is no language model (its head is a classifier or reward), so there is nothing to sample from;"
                " give the folder of the language model"
            )
        if name in _trunks(config.model_type):
            raise ModelError(
                f"{source}: {name} is a trunk without a language model's head, which would be random; save the model with its head"
                " (AutoModelForCausalLM)"
            )


def _trunks(model_type: str) -> tuple[str, ...]:
    names: Any = MODEL_MAPPING_NAMES.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _loaded(kind: Any, source: str | Path, **options: Any) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    model, info = pretrained(
        kind,
        source,
        dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    return model, info


def _stored(source: str | Path) -> dict[str, str]:
    """Return the names of the weights in a folder and how each is stored, such as BF16; nothing for a hub id."""
    found: dict[str, str] = {}
    for path in weight_files(Path(source)) if Path(source).is_dir() else ():
        with safe_open(path, "pt") as weights:
            found |= {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
    return found


def _without_renaming(model: PreTrainedModel, pattern: str) -> PreTrainedModel:
    """Return the model, which will be saved with its own names: transformers would put the prefix back."""
    # pyrefly: ignore[missing-attribute, not-iterable]
    kept = [one for one in getattr(model, "_weight_conversions", []) if pattern not in one.source_patterns]
    model._weight_conversions = kept  # type: ignore[assignment]
    return model


def _check_floating(model: PreTrainedModel, stored: Mapping[str, str], pattern: str | None, source: str | Path) -> None:
    names = dict(model.named_parameters())
    packed = {
        name: kind
        for name, kind in stored.items()
        if kind not in FLOATING and (re.sub(pattern, "", name) if pattern else name) in names
    }
    if packed:
        kinds = ", ".join(sorted(set(packed.values())))
        raise ModelError(
            f"{source}: {_some(sorted(packed))} {'is' if len(packed) == 1 else 'are'} stored as {kinds}, so the weights are quantised and"
            " would be read without their scales; give the folder of the original model, in float32 or bfloat16"
        )


def _faults(info: Mapping[str, Any]) -> str:
    mismatched = [
        f"{name} {_shape(saved)} instead of {_shape(wanted)}" for name, saved, wanted in info["mismatched_keys"]
    ]
    groups = {
        "missing": sorted(info["missing_keys"]),
        "not part of it": sorted(info["unexpected_keys"]),
        "of a different shape": sorted(mismatched),
        "unreadable": list(info["error_msgs"]),
    }
    return "; ".join(
        f"{_some(names)} {'is' if len(names) == 1 else 'are'} {fault}" for fault, names in groups.items() if names
    )


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def all_finite(values: torch.Tensor) -> bool:
    """Return True if no number is NaN or infinite. Unlike `isfinite` this allocates nothing: the extremes of NaN are NaN."""
    return values.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))


def broken_weights(model: torch.nn.Module) -> str:
    """Return "NAME holds NaN or infinity" for the weights, and the buffers that files hold, that are not finite; empty if all are."""
    saved = model.state_dict().keys()
    held = [*model.named_parameters(), *((name, each) for name, each in model.named_buffers() if name in saved)]
    broken = [name for name, weight in held if not all_finite(weight)]
    return f"{_some(broken)} {'holds' if len(broken) == 1 else 'hold'} NaN or infinity" if broken else ""


def _check_finite(model: PreTrainedModel, source: str | Path) -> None:
    if broken := broken_weights(model):
        raise ModelError(
            f"{source}: {broken}, so every output would be NaN; fetch the weights again, or take an earlier checkpoint"
        )

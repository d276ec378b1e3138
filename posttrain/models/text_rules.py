"""Keep the rules by which a folder's tokenizer.json splits a text into tokens; some classes of transformers replace them.

A class such as `Qwen2Tokenizer` takes only vocabulary and merges from the file, and makes the rule of normalisation, the rule of splitting
and the options of the model itself. `AutoTokenizer` gives every Qwen 2 model this class, whatever its files say. The file is how the
folder's publisher trained the model, so it counts.

Example:
    >>> rules({"normalizer": None, "pre_tokenizer": {"type": "Digits"}, "model": {"type": "BPE", "vocab": {}, "merges": []}})
    {'normalizer': None, 'pre_tokenizer': {'type': 'Digits'}, 'model': {'type': 'BPE'}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

PROBE = (
    "It is 5 ,\n\n  so B.",
    "In 2024, 1234567 + 89 = 1234656.",
    "I'll say: DON'T! We've 3.14 reasons (or 10%).",
    "def f(x):\n    return [x[0], -1]  # tab:\there",
    "na\u00efve cafe\u0301, \u00bd \u2460 \ufb01ne, x\u00b2",
    "\u6570\u5b57 12 \u548c\u6c49\u5b57\u3002\u7b54\u6848\u662f 42\uff01",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
    " \\boxed{42} <answer>7</answer> #### 9\r\n",
)
"""Texts on which rules of splitting differ: numbers, contractions, blanks, accents, other scripts, code."""


def rules(state: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a tokenizer's JSON that decide how a text is split, without vocabulary and merges."""
    model = {name: value for name, value in state["model"].items() if name not in ("vocab", "merges")}
    return {"normalizer": state.get("normalizer"), "pre_tokenizer": state.get("pre_tokenizer"), "model": model}


def as_written(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> tuple[PreTrainedTokenizerBase, str | None]:
    """Return a folder's tokenizer with the rules of its tokenizer.json, and a report if transformers had replaced them.

    Only byte-level tokenizers are read anew: the others have rules in tokenizer_config.json, too, so a difference is only reported.
    """
    file, backend = _file(source), getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or file is None:
        return tokenizer, None
    text = file.read_text(encoding="utf-8")
    state = json.loads(text)
    if rules(state) == rules(json.loads(backend.to_str())):
        return tokenizer, None
    written = Tokenizer.from_str(text)
    other = [probe for probe in PROBE if _ids(written, probe) != _ids(backend, probe)]
    if not other:
        return tokenizer, None
    found = f"transformers reads {len(other)} of {len(PROBE)} probe texts as other tokens than its tokenizer.json (first: {other[0]!r})"
    why = f"{source}: {found}, because {type(tokenizer).__name__} replaces the file's rules"
    if "ByteLevel" not in json.dumps(state.get("pre_tokenizer")):
        return tokenizer, f"{why}. Everything here reads texts as transformers does"
    kept: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(str(source))
    return kept, (
        f"{why}. Everything here keeps the file's rules. In other programs load this folder and models trained from it with"
        " PreTrainedTokenizerFast instead of AutoTokenizer"
    )


def _file(source: str | Path) -> Path | None:
    """Return the tokenizer.json of a folder, or of a hub id from the cache into which its tokenizer was loaded; None without one."""
    file = Path(source) / "tokenizer.json"
    if Path(source).exists():
        return file if file.is_file() else None
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(str(source), "tokenizer.json", local_files_only=True, **missing)
    return None if found is None else Path(found)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids

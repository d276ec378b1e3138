"""Check every argument of the public functions in one place: its type, its range, and the values to give instead.

Example:
    >>> checked("train", steps=3, learning_rate=0.01)
    >>> checked("train", seed=-1)
    Traceback (most recent call last):
    posttrain.errors.ConfigError: train: seed = -1; it must be a whole number from 0 to 4294967295
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any, NamedTuple, get_args

from posttrain.errors import ConfigError
from posttrain.settings import LARGEST_LEARNING_RATE, TEMPERATURES
from posttrain.text import nearest
from posttrain.text import shortened as shown


def is_finite(value: Any) -> bool:
    """Return True for a number that is finite as a float: not for booleans, and not for an infinity of numpy's narrow types.

    Example:
        >>> is_finite(3), is_finite(True), is_finite(float("inf")), is_finite(10**400)
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


LARGEST_WHOLE = 2**53
"""Floats hold every whole number up to here."""


@dataclass(frozen=True)
class _Number:
    """A number from `least` on, up to `greatest` if there is one; `above` leaves out `least` itself, `or_zero` adds 0."""

    whole: bool
    least: float
    greatest: float = math.inf
    above: bool = False
    or_zero: bool = False

    def allows(self, value: Any) -> bool:
        if not is_finite(value) or (self.whole and not isinstance(value, Integral)):
            return False
        number = int(value) if self.whole else float(value)
        if self.whole and number > LARGEST_WHOLE:
            return False
        if self.or_zero and number == 0:
            return True
        return self.least <= number <= self.greatest and not (self.above and number == self.least)

    def in_words(self) -> str:
        noun = "a whole number" if self.whole else "a finite number"
        zero = "0, or " if self.or_zero else ""
        if self.above and self.greatest < math.inf:
            return f"{noun} above {self.least:g}, and at most {self.greatest:g}"
        if self.greatest < math.inf:
            form = ".0f" if self.whole else "g"
            return f"{zero}{noun} from {self.least:{form}} to {self.greatest:{form}}"
        return f"{noun} {'above' if self.above else 'of at least'} {self.least:g}"


_COUNT = _Number(whole=True, least=1)
NUMBERS: dict[str, _Number] = {
    "steps": _COUNT,
    "learning_rate": _Number(whole=False, least=0, greatest=LARGEST_LEARNING_RATE, above=True),
    "batch_size": _COUNT,
    "samples": _COUNT,
    "max_new_tokens": _COUNT,
    "temperature": _Number(whole=False, least=TEMPERATURES[0], greatest=TEMPERATURES[1], or_zero=True),
    "training temperature": _Number(whole=False, least=TEMPERATURES[0], greatest=TEMPERATURES[1]),
    "seed": _Number(whole=True, least=0, greatest=2**32 - 1),
    "micro_batch_tokens": _COUNT,
    "limit": _Number(whole=True, least=1, greatest=2**31),
    "seconds": _Number(whole=False, least=0, above=True),
    "staleness": _Number(whole=True, least=0),
    "threads": _Number(whole=True, least=1, greatest=4096),
}
"""The range of every number that a public function takes."""


class _DefaultInt(int):
    """A default value, which differs from the same number given by the caller."""


class _DefaultFloat(float):
    """A default value, which differs from the same number given by the caller."""


class _Defaults(NamedTuple):
    samples: int = _DefaultInt(8)
    max_new_tokens: int = _DefaultInt(32)
    temperature: float = _DefaultFloat(1.0)


DEFAULTS = _Defaults()
"""Defaults of `train`; only on-policy algorithms sample."""
LARGEST_TINY = 10**9
"""Most parameters of a model that is built from a seed: 4 GB."""


def checked(function: str, **values: Any) -> None:
    """Raise ConfigError for the first number that is of a different type or out of its range."""
    for name, value in values.items():
        rule = NUMBERS[name]
        if not rule.allows(value):
            huge = " and at most 2^53" if rule.whole and is_finite(value) and value > LARGEST_WHOLE else ""
            raise ConfigError(f"{function}: {name.split()[-1]} = {shown(value)}; it must be {rule.in_words()}{huge}")


def refuse_given(**values: Any) -> None:
    """Raise ConfigError if `train` is given one of these arguments for an algorithm that does not sample."""
    given = [
        name.split()[-1] for name, value in values.items() if not isinstance(value, _DefaultInt | _DefaultFloat | None)
    ]
    if given:
        raise ConfigError(
            f"train: {', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect here: only on-policy algorithms, which sample"
            " answers, use such arguments. Remove them."
        )


def require(function: str, name: str, value: Any, kinds: type | tuple[type, ...], give: str) -> None:
    """Raise ConfigError unless the value is of one of the kinds. `give` names the right values."""
    if not isinstance(value, kinds):
        raise ConfigError(f"{function}: {name} is {shown(value)} ({type(value).__name__}); give {give}")


def require_methods(function: str, name: str, value: Any, methods: Sequence[str], give: str) -> None:
    """Raise ConfigError unless the value is None or has all the methods."""
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if value is not None and missing:
        raise ConfigError(f"{function}: {name} is {shown(value)}, which has no method {missing[0]}; give {give}")


def require_function(function: str, name: str, value: Any, give: str) -> None:
    """Raise ConfigError unless the value can be called."""
    if not callable(value):
        raise ConfigError(f"{function}: {name} is {shown(value)} ({type(value).__name__}); give {give}")


def require_path(function: str, name: str, value: Any, give: str) -> None:
    """Raise ConfigError unless the value is a path that is not empty."""
    require(function, name, value, (str, PathLike), give)
    if not str(value).strip() or "\0" in str(value):
        raise ConfigError(f"{function}: {name} is {shown(value)}, which names nothing; give {give}")


def require_list(function: str, name: str, value: Any, give: str) -> list[Any]:
    """Return the entries of a list. Raises ConfigError for a text, a mapping, a data frame and everything else that is no list of rows."""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        raise ConfigError(
            f"{function}: {name} is a {type(value).__name__}; give {name}.to_dict('records'), a list of rows"
        )
    if isinstance(value, Set):
        raise ConfigError(
            f"{function}: {name} is a {type(value).__name__}, whose order differs from run to run; give sorted({name}), a list"
        )
    if (
        isinstance(value, str | bytes | Mapping)
        or not isinstance(value, Iterable)
        or getattr(value, "shape", None) == ()
    ):
        raise ConfigError(f"{function}: {name} is {shown(value)} ({type(value).__name__}); give {give}")
    return list(value)


def check_train_on(train_on: Any, imitates: bool, demonstrates: bool) -> None:
    """Raise ConfigError if `train_on` is no such choice, or has no effect on this algorithm."""
    from posttrain.data.conversations import TrainOn  # imports posttrain.data, which steps without tokens do not use

    choices = get_args(TrainOn) if imitates else ("completion", "each") if demonstrates else ("completion",)
    if isinstance(train_on, str) and train_on in choices:
        return
    if not isinstance(train_on, str) or train_on not in get_args(TrainOn):
        raise ConfigError(f"train: train_on = {shown(train_on)}; it is one of {', '.join(get_args(TrainOn))}")
    if demonstrates:
        raise ConfigError(
            f"train: train_on = {train_on!r}: demonstrations train with {' or '.join(choices)}; the other values are for 'sft'"
        )
    raise ConfigError(
        f"train: train_on = {train_on!r} has no effect here: only 'sft' and demonstrations imitate answers. The probability of a pair's"
        " or a labelled answer is compared as a whole: put the turns before its last answer into the prompt. Remove train_on."
    )


def check_shape(sizes: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the sizes are those of a model that can be built."""
    from posttrain.models.tiny import TinyShape  # imports torch, which the other checks do not need

    valid = [field.name for field in fields(TinyShape)]
    for name, value in sizes.items():
        if name not in valid:
            raise ConfigError(f"tiny: no such size {name!r}{nearest(name, valid)}")
        rule = _Number(whole=True, least=0 if name == "experts" else 1)
        if not rule.allows(value):
            raise ConfigError(f"tiny: {name} = {shown(value)}; it must be {rule.in_words()}")
    shape = TinyShape(**sizes)
    if shape.hidden_size % shape.heads or (shape.hidden_size // shape.heads) % 2:
        raise ConfigError(f"tiny: hidden_size = {shape.hidden_size} must be an even multiple of heads = {shape.heads}")
    if shape.heads % shape.kv_heads:
        raise ConfigError(f"tiny: heads = {shape.heads} must be a multiple of kv_heads = {shape.kv_heads}")
    if shape.experts and shape.experts_per_token > shape.experts:
        raise ConfigError(
            f"tiny: experts_per_token = {shape.experts_per_token} must not exceed experts = {shape.experts}"
        )
    width = shape.intermediate_size * max(1, shape.experts)
    parameters = shape.layers * shape.hidden_size * (2 * shape.hidden_size + 3 * width)
    if parameters > LARGEST_TINY:
        raise ConfigError(
            f"tiny: these sizes make more than {LARGEST_TINY:,} parameters; lower hidden_size, intermediate_size, layers or experts"
        )


def check_reward(reward: Any) -> dict[str, Any]:
    """Return the reward functions by name. Raises ConfigError for an empty mapping, and for values that are no functions."""
    give = (
        "a function f(prompts, completions, **columns), a built-in's name such as 'answer', or several of them by name"
    )
    functions = dict(reward) if isinstance(reward, Mapping) else {} if reward is None else {"reward": reward}
    if reward is not None and not functions:
        raise ConfigError(f"train: reward is {shown(reward)}, so nothing would be learnt; give {give}")
    for name, function in functions.items():
        if not isinstance(name, str) or not name or name == "total":
            raise ConfigError(
                f"train: reward has the name {shown(name)}; give a text as its name, and not `total`, which is the sum of all"
            )
        if isinstance(function, str) and function in ("reward_model", "judge"):
            raise ConfigError(f"train: reward {name!r} is {function!r}, which only the pipeline has; {give}")
        if not isinstance(function, str) and not callable(function):
            own = " (an environment: give its .reward)" if hasattr(function, "reward") else ""
            raise ConfigError(f"train: reward {name!r} is {shown(function)}{own}; give {give}")
    return functions

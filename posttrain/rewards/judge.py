"""A language model as judge: grades, rubrics of yes-or-no criteria, and pairs in both orders (2306.05685).

- `grade`: a whole number from 1 to `scale`; the reward is (grade - 1) / (scale - 1).
- `rubric`: each criterion is asked by itself; the reward is the weighted share of the answers yes.
- `pairs`: an answer is compared with others to the same prompt, or with the text in the column `against`. Each pair is asked in both
  orders, because judges prefer a position; the reward is the mean of 1 for better, 1/2 for equal, and 0 for worse.

Example:
    >>> opponents([0, 0, 0, 1], count=1)
    [[1], [2], [0], []]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from posttrain.data.conversations import as_messages
from posttrain.errors import ConfigError, RewardError, RewardTimeoutError
from posttrain.judges.marks import Choice
from posttrain.rewards.calling import CallResult
from posttrain.rewards.judge_replies import agreed, grade, verdict
from posttrain.rewards.judge_server import FOLDER, TOKENS, JudgeServer, body, server_of_environment

Mode = Literal["grade", "rubric", "pairs"]
_INSTRUCTION = "A good answer is correct, follows the request, and is clear."
_GRADE = "{shown}\n\nGrade the answer with a whole number from 1 (worst) to {scale} (best). {instruction}\nWrite only the number."
_CRITERION = "{shown}\n\nIs this true of the answer: {criterion}\nWrite only yes or no."
_PAIR = (
    "<request>\n{prompt}\n</request>\n\n<answer A>\n{first}\n</answer A>\n\n<answer B>\n{second}\n</answer B>\n\n"
    "Which answer is better? {instruction}\nWrite only A, B or tie."
)
_SHOWN = "<request>\n{prompt}\n</request>\n\n<answer>\n{completion}\n</answer>"
Verdict = TypeVar("Verdict")


@dataclass(frozen=True)
class JudgeSettings:
    """Questions to the judge.

    Attributes:
        model: the name under which the server knows the judge.
        instruction: the properties of a good answer; for grades and pairs.
        criteria: sentence -> weight; for rubrics.
        against: column with the text that an answer is compared with; None: other answers to the same prompt.
        opponents: number of other answers to the prompt that each one is compared with.
        max_tokens: length of the judge's answer; one that reasons before it answers needs more.
        cache: keep the judge's answers on disk.
    """

    model: str
    mode: Mode = "grade"
    instruction: str = _INSTRUCTION
    criteria: Mapping[str, float] = field(default_factory=dict)
    scale: int = 10
    against: str | None = None
    opponents: int = 1
    max_tokens: int = 16
    cache: bool = True

    def __post_init__(self) -> None:
        wrong = {
            f"mode = {self.mode!r}: must be one of {', '.join(get_args(Mode))}": self.mode not in get_args(Mode),
            "model: the name of a model is missing": not self.model,
            "criteria: mode rubric needs sentences with weights above 0": self.mode == "rubric"
            and not (self.criteria and all(weight > 0 for weight in self.criteria.values())),
            "criteria: only mode rubric reads them": self.mode != "rubric" and bool(self.criteria),
            "against: only mode pairs reads it": self.mode != "pairs" and self.against is not None,
            f"scale = {self.scale}: must be at least 2": self.scale < 2,
            f"opponents = {self.opponents}: must be at least 1": self.opponents < 1,
            f"max_tokens = {self.max_tokens}: must be at least 1": self.max_tokens < 1,
        }
        if found := [message for message, holds in wrong.items() if holds]:
            raise ConfigError(f"{found[0]} (of the reward function 'judge')")


class Judge:
    """A judge that scores batches of answers; failures are reported by answer, and never become a score.

    Args:
        seconds: time for one batch.
        server: of a judge; None for the one that the environment names.
    """

    def __init__(self, settings: JudgeSettings, seconds: float, server: JudgeServer | None = None) -> None:
        self.settings, self.seconds = settings, seconds
        self.server = server or server_of_environment(FOLDER if settings.cache else None)

    def used(self) -> dict[str, float]:
        """Return counts since the last call: different questions, tokens, and the share of pairs whose verdict the order changed."""
        usage = self.server.usage
        pairs, changed = usage.pop("pairs", 0), usage.pop("order_changed", 0)
        counts: dict[str, float] = {name: float(usage[name]) for name in ("questions", *TOKENS)}
        usage.clear()
        return counts | ({"order_changed": changed / pairs} if pairs else {})

    def reward(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Score answers; this is a reward function for `posttrain.train`. Raises RewardError if an answer has no verdict."""
        result = self(prompts, completions, columns, {})
        if result.failures:
            raise RewardError(next(iter(result.failures.values())))
        return list(result.values)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        arguments: Mapping[str, Any],
    ) -> CallResult:
        """Score a batch as calling.call does; the arguments are in the settings already."""
        asked = [_text_of(prompt) for prompt in prompts]
        if self.settings.mode == "pairs":
            return self._pairs(asked, completions, columns)
        shown = [_SHOWN.format(prompt=p, completion=c) for p, c in zip(asked, completions, strict=True)]
        if self.settings.mode == "grade":
            scale, instruction = self.settings.scale, self.settings.instruction
            questions = [[_GRADE.format(shown=text, scale=scale, instruction=instruction)] for text in shown]
            return self._scored(questions, lambda text: grade(text, scale), lambda found: (found[0] - 1) / (scale - 1))
        criteria, weights = list(self.settings.criteria), list(self.settings.criteria.values())
        questions = [[_CRITERION.format(shown=text, criterion=one) for one in criteria] for text in shown]
        return self._scored(
            questions, agreed, lambda found: sum(w * v for w, v in zip(weights, found, strict=True)) / sum(weights)
        )

    def _pairs(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> CallResult:
        against, instruction = self.settings.against, self.settings.instruction
        if against is None:
            others = [[completions[j] for j in row] for row in opponents(prompts, self.settings.opponents)]
        elif against in columns:
            others = [[str(text)] for text in columns[against]]
        else:
            raise RewardError(
                f"the judge compares with the column {against!r}, and the rows have {', '.join(columns) or 'none'}"
            )
        questions = [
            [
                _PAIR.format(prompt=prompt, first=first, second=second, instruction=instruction)
                for other in row
                for first, second in ((own, other), (other, own))
            ]
            for prompt, own, row in zip(prompts, completions, others, strict=True)
        ]
        return self._scored(questions, verdict, self._both_orders)

    def _both_orders(self, verdicts: Sequence[Choice]) -> float | None:
        """Return the mean over both orders; the second of each two is asked with the answers swapped."""
        if not verdicts:
            return None
        worth = [{"A": 1.0, "tie": 0.5, "B": 0.0}[verdict] for verdict in verdicts]
        pairs = [(worth[i], 1 - worth[i + 1]) for i in range(0, len(worth), 2)]
        self.server.usage["pairs"] += len(pairs)
        self.server.usage["order_changed"] += sum(one != other for one, other in pairs)
        return sum(one + other for one, other in pairs) / len(verdicts)

    def _scored(
        self,
        questions: Sequence[Sequence[str]],
        read: Callable[[str], Verdict | None],
        reward: Callable[[Sequence[Verdict]], float | None],
    ) -> CallResult:
        """Ask all questions, each row's together, and return one reward per row."""
        requests = [body(self.settings.model, text, self.settings.max_tokens) for row in questions for text in row]
        answers = iter(self.server.answers(requests, self.seconds))
        values: list[float | None] = []
        failures: dict[int, str] = {}
        for place, row in enumerate(questions):
            given = [next(answers) for _ in row]
            errors = [answer for answer in given if isinstance(answer, RewardError)]
            timed_out = [error for error in errors if isinstance(error, RewardTimeoutError)]
            if timed_out:
                raise timed_out[0]
            found = [read(answer) for answer in given if isinstance(answer, str)]
            unread = [str(answer) for answer, value in zip(given, found, strict=False) if value is None]
            if errors or unread:
                failures[place] = (
                    str(errors[0]) if errors else f"the judge's answer {unread[0][:80]!r} holds no verdict"
                )
                values.append(None)
            else:
                values.append(reward([value for value in found if value is not None]))
        return CallResult(values, failures)


def opponents(prompts: Sequence[Any], count: int) -> list[list[int]]:
    """Return the places of the answers that each answer is compared with: the next ones to the same prompt, in a ring."""
    groups: dict[Any, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    found: list[list[int]] = [[] for _ in prompts]
    for members in groups.values():
        for at, place in enumerate(members):
            steps = range(1, min(count, len(members) - 1) + 1)
            found[place] = [members[(at + step) % len(members)] for step in steps]
    return found


def _text_of(prompt: Any) -> str:
    """Return a prompt as text; of several messages, each with its role."""
    if isinstance(prompt, str):
        return prompt
    messages = as_messages(prompt, "user")
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)

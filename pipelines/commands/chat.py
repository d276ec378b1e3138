"""Talk to a model in the terminal, or to two and say which answer is better.

    posttrain chat                          # the champion
    posttrain chat dpo-0 --temperature 0    # a model of dvc.lock, greedy
    posttrain chat champion --against challenger

With --against, both models answer every message from the same seed, in an order that does not show which is which. Your choice is
written to inbox/preferences, where `make retrain` takes it in. /new begins a new conversation, /quit ends. A model without a chat
template completes each line as it is.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.config.params import load_params
from pipelines.data import handover
from pipelines.data.inbox import location
from pipelines.data.tables import read_rows
from pipelines.promotion.named import find_model
from pipelines.runtime import environment
from pipelines.runtime.command_line import (
    SEED,
    TEMPERATURE,
    command_parser,
    ends_with_ctrl_c,
    print_text,
    reports_errors,
    whole,
)
from pipelines.runtime.redaction import printable
from posttrain.errors import DataError, ModelError

if TYPE_CHECKING:
    from posttrain.api import Model

Message = dict[str, str]
CHOICES = {"1": 0, "2": 1, "=": None, "s": None, "": None}
HELP = "type a message; /new begins a new conversation, /quit ends"


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled. At temperature 0, the answer is the most probable one."""

    temperature: float = 0.7
    max_new_tokens: int = 256
    seed: int = 0
    system: str | None = None


@dataclass
class Chat:
    """A conversation with one or two models. `write` receives pieces of text to show; `ask` returns the user's next line.

    `scores`: stored choices have scores, which a project whose preferences have them needs.
    """

    models: Sequence[tuple[str, Model]]
    settings: Sampling
    inbox: str
    ask: Callable[[str], str]
    write: Callable[[str], None]
    scores: bool = False
    history: list[Message] = field(default_factory=list)
    turns: int = 0

    def run(self) -> None:
        """Answer lines until the user ends."""
        self._begin()
        while (line := self.ask("you> ").strip()) != "/quit":
            if line == "/new":
                self._begin()
            elif line == "/help":
                self.write(HELP + "\n")
            elif any("\ud800" <= character <= "\udfff" for character in line):
                self.write(
                    "not sent: the line has bytes that are no UTF-8; set the terminal's encoding, or paste it again\n"
                )
            elif line:
                self._try(line)

    def _try(self, line: str) -> None:
        """Answer one message. One that does not fit the context, or its template refuses, is reported, and the chat goes on."""
        try:
            self.answer(line)
        except (DataError, ModelError) as error:
            self.write(f"{printable(str(error))}\n")

    def answer(self, line: str) -> None:
        """Let every model answer one message, and keep the choice between two answers."""
        templated = has_template(self.models[0][1])
        prompt: Any = [*self.history, {"role": "user", "content": line}] if templated else line
        order = list(range(len(self.models)))
        random.Random(f"{self.settings.seed}/{self.turns}").shuffle(order)
        answers = []
        for place, index in enumerate(order, start=1):
            self.write(f"{place}> " if len(order) > 1 else f"{self.models[index][0]}> ")
            answers.append(stream(self.models[index][1], prompt, self.settings, self.turns, self.write))
            self.write("\n")
        self.turns += 1
        chosen = self._choice(prompt, answers, order) if len(answers) > 1 else 0
        if templated:
            self.history = [*prompt, {"role": "assistant", "content": answers[chosen]}]

    def _choice(self, prompt: Any, answers: Sequence[str], order: Sequence[int]) -> int:
        """Ask which answer is better, and store the pair; return the place of the answer that the conversation goes on with.

        Raises EOFError if the user ends.
        """
        while (said := self.ask("better? 1, 2, = or s to skip> ").strip().lower()) not in CHOICES:
            if said == "/quit":
                raise EOFError
            self.write(f"{said!r} is none of: 1, 2, =, s\n")
        names = [self.models[index][0] for index in order]
        self.write(f"1 was {names[0]}, 2 was {names[1]}\n")
        chosen = CHOICES[said]
        if chosen is None or answers[0] == answers[1]:
            return 0
        path = store(self.inbox, prompt, answers[chosen], answers[1 - chosen], scores=self.scores)
        self.write(f"kept in {path}\n")
        return chosen

    def _begin(self) -> None:
        system = self.settings.system
        self.history = [{"role": "system", "content": system}] if system else []


def stream(model: Model, prompt: Any, settings: Sampling, turn: int, write: Callable[[str], None]) -> str:
    """Return the model's answer to a prompt, and write it piece by piece. Seed and turn decide it at any temperature above 0."""
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write("\n".join(map(printable, text.split("\n"))))

    encoder = model.encoder
    ids = encoder.prompt(prompt)
    room = encoder.max_length - len(ids)
    if room < 1:
        raise DataError(
            f"the conversation has {len(ids)} tokens and the model's context {encoder.max_length}; type /new"
        )
    torch.manual_seed(settings.seed * 1_000_003 + turn)
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    generate: Any = model.lm.generate
    out = generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), eos_token_id=list(encoder.ends),
        pad_token_id=encoder.eos_id, max_new_tokens=min(settings.max_new_tokens, room),
        streamer=Streamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling,
    )  # fmt: skip
    return encoder.text(out[0, len(ids) :].tolist())


def has_template(model: Model) -> bool:
    """Return True if the model answers chat messages, False if it continues plain text."""
    return bool(model.encoder.tokenizer.chat_template)


def plain_text_hint(project: Path, model: Model) -> list[str]:
    """Return a line about the prompts of a model without a chat template, with an example of the project's evaluation."""
    if has_template(model):
        return []
    path = project / "data/valid/evaluation.parquet"
    example = (
        next((f", e.g. {row['prompt']}" for row in read_rows(path) if isinstance(row["prompt"], str)), "")
        if path.is_file()
        else ""
    )
    return [f"the model continues plain text; begin as its training prompts do{printable(example)}"]


def store(inbox: str, prompt: Any, chosen: str, rejected: str, *, scores: bool = False) -> str:
    """Write one preference as a new file of the inbox and return its path."""
    row = handover.preference(prompt, chosen, rejected)
    return handover.put_new(inbox, "chat", [row], scores=scores)


def open_models(project: Path, names: Sequence[str]) -> list[tuple[str, Model]]:
    """Load the named models. Raises DataError for an unknown name, ModelError for a folder that cannot be used."""
    from transformers.utils import logging

    from posttrain.api import load

    logging.disable_progress_bar()  # it would appear between the question and the answer
    experiment = load_params(project / "params.yaml").project.experiment
    models = []
    for name in names:
        folder = (
            Path(name)
            if (Path(name) / "config.json").is_file()
            else find_model(project, name, experiment).folder(project)
        )
        models.append((name, load(folder)))
    if len({has_template(model) for _, model in models}) > 1:
        raise DataError(
            f"of {' and '.join(names)} only one has a chat template, so their answers are to different prompts"
        )
    return models


def read_line(prompt: str) -> str:
    """Return the user's next line. The prompt is only shown on a terminal: in a pipe it would stand between the answers."""
    return input(prompt if sys.stdin.isatty() else "")


@reports_errors
@ends_with_ctrl_c
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain chat", __doc__)
    parser.add_argument(
        "model", nargs="?", default="champion", help="alias, version number, model, or folder (default: champion)"
    )
    parser.add_argument("--against", metavar="MODEL", help="a second model, to compare answers")
    parser.add_argument("--system", help="system message of every conversation; needs a chat template")
    parser.add_argument(
        "--temperature", type=TEMPERATURE, default=Sampling.temperature, help="0 is greedy (default: 0.7)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1),
        default=Sampling.max_new_tokens,
        help="longest answer in tokens (default: 256)",
    )
    parser.add_argument("--seed", type=SEED, default=Sampling.seed)
    args = parser.parse_args(argv)
    if args.temperature < 0 or args.max_new_tokens < 1:
        parser.error("--temperature must be 0 or more, and --max-new-tokens 1 or more")
    environment.quiet()
    project = environment.root()
    os.chdir(project)
    inbox = location(project)
    if args.against:
        handover.refuse_store(inbox)  # before any model is loaded
    models = open_models(project, [args.model, *([args.against] if args.against else [])])
    if args.system and not has_template(models[0][1]):
        raise DataError(f"--system: {args.model} has no chat template, so it has no system message; leave it out")
    if sys.stdin.isatty():
        print_text("\n".join([HELP, *plain_text_hint(project, models[0][1])]))
    sampling = Sampling(args.temperature, args.max_new_tokens, args.seed, args.system)
    scores = bool(args.against) and handover.needs_scores(project)
    try:
        Chat(models, sampling, inbox, read_line, lambda text: print(text, end="", flush=True), scores).run()
    except EOFError:  # Ctrl-D, or the end of a file
        print("\n" if sys.stdin.isatty() else "", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

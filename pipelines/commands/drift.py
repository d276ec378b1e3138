"""Compare prompts that arrive with the training prompts: their lengths, and the words that training never had.

    posttrain drift               # prompts of answers that `posttrain serve` logged, and of the files that the inbox took in
    posttrain drift FILE …        # prompts of files, for example before they go to the inbox

Without FILE, the reward model also scores the answers that were served and those in the files, against training answers.
The limits are gate.drift in params.yaml. The page of the gate's decision shows the same; drift refuses no model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pipelines.config.params import Params, load_params
from pipelines.promotion.drift import Drift, ScoreDrift, arriving, of_file
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from pipelines.runtime.redaction import printable


def describe(drift: Drift) -> str:
    """Return the numbers and the result as text."""
    measured = drift.measured
    return (
        f"{drift.words}\n  stability index of the lengths {measured.length_psi:.3f} (by chance up to {measured.chance:.3f});"
        f" new words {100 * measured.new_words:.1f} %; prompts that training has too {100 * measured.known:.1f} %{_scores(drift.scores)}"
    )


def _scores(scores: ScoreDrift | None) -> str:
    """Return the drift of the reward model's scores as text; empty if none were compared."""
    if scores is None:
        return ""
    of = f"the reward model's scores of {scores.answers} answers"
    return f"\n  stability index of {of} {scores.psi:.3f} (by chance up to {scores.chance:.3f})"


def _arriving(project: Path, params: Params) -> list[Drift]:
    """Compare served prompts and accepted files; the model library is loaded only if there is a reward model to score with."""
    from pipelines.training.answer_scores import has_reward_model, reward_scores

    return arriving(project, params, _exceeded, (lambda: reward_scores(skip_long=True)) if has_reward_model() else None)


def _exceeded(measures: Mapping[str, tuple[float, float]]) -> list[str]:
    from pipelines.validation.drift import exceeded  # Great Expectations takes seconds to import

    return exceeded(measures)


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain drift", __doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="records with a `prompt`")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    files = [path.absolute() for path in args.files]
    environment.quiet()
    project = environment.root()
    os.chdir(project)
    params = load_params(project / "params.yaml")
    found = [of_file(project, params, path, _exceeded) for path in files] if files else _arriving(project, params)
    if args.json:
        print_text(json.dumps([drift.record() for drift in found], indent=1))
    elif found:
        print_text("\n".join(printable(line) for drift in found for line in describe(drift).split("\n")))
    else:
        few = params.gate.drift.min_prompts
        print(
            f"nothing to compare: fewer than {few} prompts were served or taken in (gate.drift.min_prompts). tracking.served in params.yaml"
            " logs served prompts; a file can be given."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

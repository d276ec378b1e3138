"""Export a model as merged weights, an adapter or a GGUF file, and prove that it is the one that was trained.

    posttrain export dpo-0 exported/dpo                           # a plain folder for transformers, vLLM and others
    posttrain export dpo-0 exported/adapter --form adapter        # only the adapter, for peft
    posttrain export champion model.gguf --form gguf              # llama.cpp, float16
    posttrain export champion model.gguf --form gguf --precision q8_0

MODEL is champion, challenger, a version number, a model of dvc.lock, or a folder. The export is loaded again, and its log-probabilities
are compared with the trained model's; the difference is printed in nats. An export that differs is removed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines.config.params import load_params
from pipelines.promotion.named import find_model
from pipelines.runtime import environment
from pipelines.runtime.command_line import command_parser, print_text, reports_errors
from posttrain.errors import ConfigError

FORMS = ("merged", "adapter", "gguf")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = command_parser("posttrain export", __doc__)
    parser.add_argument(
        "model", metavar="MODEL", help="champion, challenger, a version number, e.g. dpo-0, or a folder"
    )
    parser.add_argument("target", metavar="PATH", type=Path, help="the folder or file to write; it must not exist")
    parser.add_argument("--form", choices=FORMS, default="merged", help="default: merged")
    parser.add_argument("--precision", choices=("f32", "f16", "q8_0"), help="of a GGUF file; default: f16")
    args = parser.parse_args(argv)
    if args.precision and args.form != "gguf":
        raise ConfigError(
            f"--precision {args.precision} has no effect on --form {args.form}; remove it, or write --form gguf"
        )
    environment.quiet()
    project = environment.root()
    source = Path(args.model)
    if not (source / "config.json").is_file():
        experiment = load_params(project / "params.yaml").project.experiment
        source = find_model(project, args.model, experiment).folder(project)
    from posttrain.models import export

    if args.form == "gguf":
        drift = export.export_gguf(source, args.target, args.precision or "f16")
    elif args.form == "adapter":
        base = export.trained_on(source)
        drift = export.export_adapter(source, project / base if base else source, args.target)
    else:
        drift = export.export_merged(source, args.target)
    print_text(f"{args.target}: differs from {source} by {drift}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

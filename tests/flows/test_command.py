import pytest

from flows.command import main
from flows.compare import compare


def test_help_says_what_the_flow_does_and_what_the_environment_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(compare, "compare", "Compare algorithms.", ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in (
        "usage: python -m flows.compare",
        "Compare algorithms.",
        "POSTTRAIN_SLOTS",
        "PREFECT_API_URL",
        "STAGE",
    ):
        assert words in printed

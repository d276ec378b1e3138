import pytest

from flows.command import add_stages, main


def test_help_says_what_the_flow_does_and_what_the_environment_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main("compare", "Compare algorithms.", lambda _: None, add_stages, ["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in (
        "usage: python -m flows.compare",
        "Compare algorithms.",
        "POSTTRAIN_SLOTS",
        "PREFECT_API_URL",
        "STAGE",
        "POSTTRAIN_INBOX",
        "POSTTRAIN_WEBHOOK",
    ):
        assert words in printed

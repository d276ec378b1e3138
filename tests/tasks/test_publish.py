from tasks.publish import markdown_table


def test_the_table_shows_scalars_and_means_with_their_bounds() -> None:
    comparison = {
        "models": {
            "sft": {"accuracy": {"mean": 0.5, "low": 0.45, "high": 0.55}, "tokens": 100, "curve": [1, 2]},
            "grpo-0": {"accuracy": {"mean": 0.7512, "low": 0.7, "high": 0.8}, "tokens": 250},
        }
    }
    assert markdown_table(comparison).splitlines() == [
        "| model | accuracy | tokens |",
        "| --- | --- | --- |",
        "| sft | 0.5 (0.45 to 0.55) | 100 |",
        "| grpo-0 | 0.751 (0.7 to 0.8) | 250 |",
    ]

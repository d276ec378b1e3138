"""An algorithm has one colour, whatever it is compared with."""

from __future__ import annotations

from pathlib import Path

from pipelines.config.params import load_params
from pipelines.report.style import Look
from pipelines.runtime.palette import DARK, LIGHT, OWN, colour, position


def test_an_algorithm_of_the_demo_keeps_its_colour_in_every_comparison(root: Path) -> None:
    assert tuple(load_params(root / "params.yaml").project.algorithms) == OWN
    for compared in (OWN, ("grpo",), ("ppo", "grpo"), ("mine", "grpo", "dpo"), tuple(reversed(OWN))):
        assert colour("grpo", compared) == LIGHT[4]
        assert Look("dark", compared).colour("grpo") == DARK[4]
        assert Look("light", compared).marker("grpo") == Look("light", OWN).marker("grpo")


def test_no_two_algorithms_share_a_colour_while_there_are_enough() -> None:
    for compared in (("a", "b", "grpo"), ("grpo", *"abcdefghi"), (*OWN, "a", "b")):
        places = [position(name, compared) for name in compared]
        assert len(set(places)) == len(compared)
        assert max(places) < len(LIGHT)
    # an eleventh has the colour of another, and dashes
    crowd = (*OWN, "a", "b", "c")
    assert [position(name, crowd) for name in crowd] == list(range(11))
    look = Look("light", crowd)
    assert (look.colour("c"), look.dashes("c"), look.dashes("b")) == (look.colour("dpo"), "--", "-")
    assert colour("unknown", crowd) is None
    assert colour("sft", crowd) == "#4A4F55"

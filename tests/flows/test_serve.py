from pathlib import Path

import pytest

from flows.serve import deployments


def test_serve_runs_what_prefect_yaml_deploys(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    found = {f"{each.flow_name}/{each.name}": each for each in deployments(root / "prefect.yaml")}
    hours = {name: [s.schedule.cron for s in each.schedules or ()] for name, each in found.items()}  # type: ignore[union-attr]
    assert hours == {"retrain/nightly": ["0 2 * * *"], "compare/weekly": ["0 6 * * 0"], "promote/promote": []}
    nightly = found["retrain/nightly"]
    assert nightly.parameters == {"tracking": True, "approval": False}

"""Numbers in POSTTRAIN_ variables: every one that is no usable number is refused in words, and none is waited for without end."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from infra.topology import _first_port
from pipelines.data.inbox_folder import settle_seconds
from pipelines.data.size_limit import limit_megabytes
from pipelines.runtime.follower import _wait_seconds
from pipelines.training.reward_sources import _limit_seconds
from posttrain.errors import PosttrainError
from tasks.slots import _requested_slots
from tasks.stage import grace_seconds

READERS: dict[str, Callable[[], object]] = {
    "POSTTRAIN_FOLLOWER_SECONDS": _wait_seconds,
    "POSTTRAIN_GRACE_SECONDS": grace_seconds,
    "POSTTRAIN_INBOX_MB": limit_megabytes,
    "POSTTRAIN_PORTS": _first_port,
    "POSTTRAIN_REWARD_SECONDS": _limit_seconds,
    "POSTTRAIN_SETTLE_SECONDS": settle_seconds,
    "POSTTRAIN_SLOTS": lambda: _requested_slots(os.environ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_variable_that_is_no_usable_number_is_refused_in_words(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("-1", "nan", "inf", "1e400", "9" * 5000, "\u00b2", "\udcff", "0x10", "soon"):
        monkeypatch.setenv(name, text)
        with pytest.raises(PosttrainError, match=rf"{name} = .*: must be ") as error:
            READERS[name]()
        assert len(str(error.value)) < 300

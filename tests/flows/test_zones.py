"""A schedule in a time zone with daylight saving runs once a day, also in the nights in which an hour is missing or comes twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from prefect.server.schemas.schedules import CronSchedule


@pytest.mark.parametrize(
    ("zone", "night", "hour"),
    [
        ("Europe/Berlin", "2027-03-28", 2),  # 02:30 does not exist
        ("Europe/Berlin", "2027-10-31", 2),  # 02:30 comes twice
        ("America/New_York", "2027-11-07", 1),
        ("UTC", "2027-03-28", 2),
    ],
)
def test_every_local_day_has_one_run_whenever_the_server_plans(zone: str, night: str, hour: int) -> None:
    schedule = CronSchedule(cron=f"30 {hour} * * *", timezone=zone)
    local = ZoneInfo(zone)
    begin = (datetime.fromisoformat(night).replace(tzinfo=local) - timedelta(days=1)).astimezone(UTC)

    async def planned() -> set[datetime]:
        """Plan anew every half hour, also inside the odd hour, as the server does all the time."""
        starts = [begin + timedelta(minutes=minutes) for minutes in range(0, 48 * 60, 30)]
        return {date.astimezone(UTC) for start in starts for date in await schedule.get_dates(n=2, start=start)}

    days = Counter(date.astimezone(local).date().isoformat() for date in asyncio.run(planned()))
    assert set(days.values()) == {1}
    assert night in days
    assert len(days) == 4

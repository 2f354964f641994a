"""Stopping an App more than once."""

import asyncio

import pytest

from trunkline import App, Service


@pytest.mark.parametrize("url", ["memory:", "sqlite:///{}/stop.db"])
async def test_a_second_stop_does_nothing(url, tmp_path):
    async with App(Service("idle"), url.format(tmp_path)) as app:
        await asyncio.gather(app.stop(), app.stop())
        await app.stop()


async def test_stopping_what_never_started_does_nothing():
    await App(Service("idle"), "memory:").stop()

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


async def test_what_fails_while_it_starts_and_never_ends_starting_is_raised(monkeypatch):
    monkeypatch.setattr("trunkline.app.START_S", 0.01)
    app = App(Service("idle"), "memory:")

    async def start():
        app._fail(RuntimeError("the disk is gone"))
        await asyncio.Event().wait()

    app.start = start
    with pytest.raises(RuntimeError, match="the disk is gone"):
        await app.serve()

"""The soak command: a small run passes, and what goes wrong is in the verdict and the exit code."""

import pytest

from trunkline.testing import Entry, Kind, soak
from trunkline.testing.effects import EffectTable

SMALL = ["--messages", "400", "--kills", "3", "--keys", "4", "--pause", "0.01", "--seed", "7"]


@pytest.mark.timeout(200)
@pytest.mark.xdist_group("kill")
def test_a_small_soak_with_kills_passes(tmp_path, capsys):
    assert soak.main([f"sqlite:///{tmp_path}/s.db", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "seed 7: passed" in said
    assert "publishing: " in said


@pytest.mark.timeout(200)
@pytest.mark.xdist_group("kill")
def test_a_soak_whose_effects_are_spoilt_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "STALL_S", 2.0)
    read = EffectTable.read

    async def spoilt(self):
        effects = await read(self)
        return [*effects[1:], effects[-1], Entry(Kind.EFFECT, "nobody", "x", 1)] if effects else []

    monkeypatch.setattr(EffectTable, "read", spoilt)
    assert soak.main([f"sqlite:///{tmp_path}/s.db", "--messages", "64", "--kills", "0", "--keys", "4"]) == 1
    said = capsys.readouterr().out
    for finding in ("FAILED", "LOST: ", "UNEXPECTED: ", "DUP_EFFECT: "):
        assert finding in said


def test_growth_is_the_slope_of_memory():
    looks = [soak.Look(float(second), (100 + second) * soak.MIB, 0) for second in range(60)]
    assert soak.slope(looks) == pytest.approx(60.0)

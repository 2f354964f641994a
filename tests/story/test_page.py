"""The shop's page in a real browser: nothing is cut off, on a phone either."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from examples.shop.web import PAGE

ORDER = {
    "order_id": "web-8d3e01ab-4c1f", "status": "cancelled", "reason": "payment refused", "sku": "cd-sold-out",
    "quantity": 99, "amount_cents": 148_401, "placed": 0.0, "ended": 12.34,
}  # fmt: skip
OVERVIEW = {"tally": {"confirmed": {"orders": 6919, "cents": 24_409_194}}, "orders": [ORDER] * 25}
MEASURE = f"""<script>
show({json.dumps(OVERVIEW)});
const scroll = document.querySelector(".scroll"), root = document.documentElement;
document.title = JSON.stringify({{
  page: root.scrollWidth - root.clientWidth, table: scroll.scrollWidth - scroll.clientWidth,
  top: by("rows").getBoundingClientRect().top, width: innerWidth,
}});
</script></body>"""


def measured(folder: Path, width: int) -> dict[str, float]:
    """How far page and table reach beyond their width, and where the first order stands, in pixels."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium here: the page's layout is not looked at")
    page = folder / "page.html"
    page.write_text(PAGE.decode().replace("</body>", MEASURE))
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.search("<title>(.*?)</title>", done.stdout)
    assert found, done.stdout
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.parametrize("width", [500, 880, 890, 1160, 1170, 1400])
def test_no_order_is_cut_off_and_the_newest_stands_on_the_first_screen(tmp_path, width):
    found = measured(tmp_path, width)
    assert found["width"] == width
    assert (found["page"], found["table"]) == (0, 0)
    assert found["top"] < 600

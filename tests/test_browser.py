"""Pages in a real browser: nothing is cut at any width, in the dark or on paper; no script fails, and nothing is asked of a network.

Needs Chromium and its driver (Debian: chromium and chromium-driver), and Selenium.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_scored_clients import registered

from fedlora import report
from fedlora.data.federated import FederatedData
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.training.optimizers import AdamW

pytest.importorskip("plotly")
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("needs Chromium and chromedriver", allow_module_level=True)
pytest.importorskip("selenium")
METHODS_SHOWN = (
    "homlora",
    "fedsa",
    "hetlora",
    "pf2lora",
    "slora",
    "ffa",
    "flexlora",
    "fedprox",
    "perfedavg",
    "feddpa-t",
    "local",
    "centralized",
)
LOOKS = {  # width in pixels, whether the reader likes it dark, medium
    "wide": (1300, False, "screen"), "telephone": (390, False, "screen"), "dark": (1300, True, "screen"), "paper": (750, False, "print"),
}  # fmt: skip
# What is out of sight: the page beside its window, a table or text beside its box, words of a figure beside the figure.
CUT = """
const out = [], title = x => (x.closest('section')?.querySelector('h2') ?? x).textContent;
if (document.documentElement.scrollWidth > innerWidth + 1) out.push(`the page is ${document.documentElement.scrollWidth} wide`);
for (const box of document.querySelectorAll('.scroll, pre, .tile, h1, p'))
  if (box.scrollWidth > box.clientWidth + 1) out.push(`${title(box)}: ${box.scrollWidth} in ${box.clientWidth}`);
let figures = 0;
for (const svg of document.querySelectorAll('svg.main-svg')) {
  const all = svg.getBoundingClientRect(), frame = svg.closest('section').getBoundingClientRect();
  if (!all.width) continue;
  figures += 1;
  if (all.right > frame.right + 1) out.push(`${title(svg)}: a figure is wider than its section`);
  for (const text of svg.querySelectorAll('text')) {
    const b = text.getBoundingClientRect();
    if (b.width && (b.left < all.left - 1 || b.right > all.right + 1 || b.top < all.top - 1 || b.bottom > all.bottom + 1))
      out.push(`${title(svg)}: ${text.textContent}`);
  }
}
const asked = performance.getEntriesByType('resource').map(e => e.name).filter(n => !/^(file|data|blob):/.test(n));
const words = getComputedStyle(document.querySelector('svg.main-svg text')).fill, page = getComputedStyle(document.body).backgroundColor;
return {cut: out, figures, asked, words, page};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(BROWSER)
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of 3 and one of 1,000 clients; comparisons of 2 and of 12 settings."""
    folder = tmp_path_factory.mktemp("pages")

    def run(method: str, data: FederatedData, seed: int, **more: Any) -> Path:
        kind, where = METHODS[method], folder / f"{method}-{seed}-{len(data.ids)}"
        small = {"rank": 4} if "rank" in {f.name for f in dataclasses.fields(kind)} else {}
        recipe = {
            "name": where.name, "method": {"name": method}, "run": {"seed": seed},
            "model": {"name": "minilm", "task": "classification"},
            "data": {"source": "rows.csv", "text": "sentence", "label": "label"},
        }  # fmt: skip
        tiny.federation(kind(**small, optimizer=AdamW(1e-2)), where, data=data, seed=seed, recipe=recipe, **more).run()
        return where

    few = tiny.data(3)
    views = Evaluation(views=("personal", "global", "cross"))
    runs = {(m, s): run(m, few, s, evaluation=views) for m in METHODS_SHOWN for s in (0, 1)}
    many = run(
        "fedsa", registered(1000), 0, sampling=Sampling(rounds=2, clients_per_round=50), evaluation=Evaluation(every=2)
    )
    two = [runs[m, s] for m in METHODS_SHOWN[:2] for s in (0, 1)]
    return {
        "3 clients": report.write_run(runs["hetlora", 0], folder / "few.html"),
        "1,000 clients": report.write_run(many, folder / "many.html"),
        "2 settings": report.write_comparison(two, folder / "two.html"),
        "12 settings": report.write_comparison(list(runs.values()), folder / "twelve.html"),
    }


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("page", ["3 clients", "1,000 clients", "2 settings", "12 settings"])
def test_nothing_is_cut(page: str, look: str, pages: dict[str, Path], browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    width, dark, medium = LOOKS[look]
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": medium, "features": [scheme]})
    browser.get_log("browser")
    browser.get(pages[page].as_uri())
    drawn = "const d = [...document.querySelectorAll('[id^=figure-]')]; return d.length > 0 && d.every(x => x.querySelector('svg'))"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(drawn))
    found = browser.execute_script(CUT)
    assert found["cut"] == [] and found["asked"] == [] and found["figures"] > 0
    assert [x["message"] for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
    light = [int(c) for c in found["words"].removeprefix("rgb(").removesuffix(")").split(",")]
    assert (sum(light) > 3 * 128) == dark, found  # words are light where the page is dark
    assert (found["page"] in ("rgb(246, 247, 249)", "rgb(255, 255, 255)")) != dark


def test_a_live_page_updates_itself(tmp_path: Path, browser: Any) -> None:
    """fedlora watch in a browser: the page that stands open has the new round without being asked, and nothing is blocked."""
    import threading

    from selenium.webdriver.support.ui import WebDriverWait

    from fedlora.federation.callbacks import Callback
    from fedlora.report.live import Live

    class Stop(Callback):
        def round_start(self, round: int, clients: int) -> None:
            if round == 2:
                raise KeyboardInterrupt

    def fed() -> Any:
        return tiny.federation(
            METHODS["fedsa"](rank=4), tmp_path / "run", data=tiny.data(3), sampling=Sampling(rounds=2)
        )

    with pytest.raises(KeyboardInterrupt):
        fed().run(Stop())
    with Live(tmp_path / "run") as live:
        threading.Thread(target=live.serve_forever, args=(0.05,), daemon=True).start()
        browser.get_log("browser")
        browser.get(live.url)
        lead = "return document.querySelector('.lead')?.textContent"
        WebDriverWait(browser, 60).until(lambda b: b.execute_script("return !!document.querySelector('svg.main-svg')"))
        assert "1 rounds." in browser.execute_script(lead)
        fed().run()
        WebDriverWait(browser, 60).until(lambda b: "2 rounds." in (b.execute_script(lead) or ""))
        WebDriverWait(browser, 60).until(lambda b: b.execute_script("return !!document.querySelector('svg.main-svg')"))
        assert [x["message"] for x in browser.get_log("browser") if x["level"] == "SEVERE"] == []
        live.shutdown()
    said = "return document.getElementById('live')?.textContent"
    WebDriverWait(browser, 30).until(lambda b: "start fedlora watch again" in (b.execute_script(said) or ""))

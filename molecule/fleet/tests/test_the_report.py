"""The reports of the rollouts before, in a real browser: light and dark, narrow and wide, and without the network."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import pytest
from rollouts import HOSTS, noxctl

from lab.machine import need_tools
from lab.state import LabError

CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
# Asks the browser what a reader sees: does the page need sideways scrolling, can its text be told from its background, is any
# text too small, does one label lie on another.
MEASURE = """
<script>
function colour(text) { return text.match(/[\\d.]+/g).map(Number) }
function light(c) { const [r, g, b] = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b }
function behind(e) { for (; e; e = e.parentElement) { const c = colour(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] > 0) return c } return [255, 255, 255] }
const found = { wide: document.documentElement.scrollWidth - innerWidth, dark: light(behind(document.body)) < .2, faint: [], small: [], over: [], bars: [] };
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
  const style = getComputedStyle(e), box = e.getBoundingClientRect();
  if (!own || !box.width || ["SCRIPT", "title"].includes(e.tagName)) continue;
  const ink = light(colour(e instanceof SVGElement ? style.fill : style.color)), paper = light(behind(e.parentElement));
  const ratio = (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  if (ratio < 4.5) found.faint.push([e.textContent.trim().slice(0, 30), ratio]);
  const size = e instanceof SVGElement ? box.height / 1.2 : parseFloat(style.fontSize);
  if (size < 10) found.small.push([e.textContent.trim().slice(0, 30), size]);
}
const labels = [...document.querySelectorAll("svg text")].map(e => [e.textContent, e.getBoundingClientRect()]);
labels.forEach(([a, p], i) => labels.slice(i + 1).forEach(([b, q]) => {
  if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3) found.over.push([a, b]) }));
for (const e of document.querySelectorAll("svg rect[class]")) if (e.getBoundingClientRect().width >= 1) found.bars.push(e.getAttribute("class"));
const out = document.createElement("pre"); out.id = "measured"; out.textContent = JSON.stringify(found); document.body.append(out);
</script>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    try:
        need_tools({"chromium": "chromium"})
    except LabError as error:
        pytest.skip(f"no browser can be installed here: {error}")
    return "chromium"


def visit(browser: str, page: Path, width: int, dark: bool, place: Path) -> str:
    """The page as the browser made it of the file, and nothing else."""
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    words += [f"--user-data-dir={place}", f"--window-size={width},1400", "--host-resolver-rules=MAP * ~NOTFOUND"]
    words += ["--enable-logging=stderr", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    done = subprocess.run(
        [*words, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert "Content Security Policy" not in done.stderr and "ERR_" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outcome → the report of a rollout that ended so."""
    place, found = tmp_path_factory.mktemp("reports"), {}
    for run in json.loads(noxctl("runs", "--json").stdout):
        if run["verb"] == "rollout":
            found[run["outcome"]] = place / f"{run['id']}.html"
            assert noxctl("report", run["id"], "--out", str(found[run["outcome"]])).returncode == 0
    return found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read(browser: str, reports: dict[str, Path], width: int, dark: bool, tmp_path: Path) -> None:
    for outcome, report in reports.items():
        text = report.read_text()
        assert CSP.search(text)
        measured = tmp_path / f"{outcome}.html"  # the page itself lets no script run
        measured.write_text(CSP.sub("", text).replace("</body>", f"{MEASURE}</body>"))
        dom = visit(browser, measured, width, dark, tmp_path / "profile")
        match = re.search(r'<pre id="measured">(.*?)</pre>', dom)
        assert match
        found = json.loads(html.unescape(match[1]))
        assert found["dark"] == dark
        assert found["wide"] <= 0 and not found["faint"] and not found["small"] and not found["over"], (outcome, found)
        assert len(found["bars"]) > 2 * len(HOSTS) or outcome != "done"


def test_it_says_what_happened(browser: str, reports: dict[str, Path], tmp_path: Path) -> None:
    stopped = visit(browser, reports["stopped"], 1280, False, tmp_path / "profile")
    for words in ("Timeline", "What went wrong", "Waves", "Slowest tasks", "drift before", "canary", *HOSTS):
        assert words in stopped
    assert re.search(r"<code>0\.[0-9.]+-[0-9a-f]{12}</code>", stopped)  # which release before
    assert not re.search(r"(src|href)=", stopped)

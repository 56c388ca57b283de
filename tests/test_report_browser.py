"""The report in a real browser: keyboard, search, both colour schemes, and a phone's width."""

import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; install one to run the page")

DRIVER = """
<script>
const press = (key, target = document.activeElement) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const type = (text) => { at("search").value = text; at("search").dispatchEvent(new Event("input")); };
const name = () => document.querySelector("#detail .name")?.textContent;
const rows = () => [...document.querySelectorAll("#list [role=option] b")].map((b) => Number(b.textContent));
const seen = { start: name(), rows: rows(), contexts: document.querySelectorAll(".context").length };
seen.shaded = [...document.querySelectorAll(".context span")].filter((s) => s.style.getPropertyValue("--a")).length;
press("/", document.body); seen.focus = document.activeElement.id;
press("ArrowDown"); seen.down = name();
press("ArrowUp"); press("ArrowUp"); seen.up = name();
type("3"); seen.number = rows(); seen.chosen = name();
type("99999"); seen.none = document.querySelector("#list").textContent;
type(""); press("Escape"); seen.blurred = document.activeElement === document.body;
press("j", document.body); seen.j = name();
press("]", document.body); seen.other = name(); seen.promoted = !!document.querySelector(".pair");
seen.hash = location.hash;
seen.page = getComputedStyle(document.body).backgroundColor;
seen.svg = getComputedStyle(document.querySelector("figure svg text")).fill;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>
"""


def browse(tmp_path, url, *flags):
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path / 'profile'}", *flags, "--dump-dom", url],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def drive(tmp_path, html, *flags):
    page = tmp_path / "driven.html"
    page.write_text(html.replace("</body>", DRIVER + "</body>"))
    return json.loads(re.search(r'<pre id="seen">(.*?)</pre>', browse(tmp_path, page.as_uri(), *flags), re.S)[1])


def test_keyboard_search_and_colours(report, tmp_path):
    _, html, data = report
    records = sorted(data["coders"]["h.1"], key=lambda record: -record["density"])
    order = [record["latent"] for record in records]
    seen = drive(tmp_path, html)
    assert seen["rows"] == order
    assert seen["start"] == seen["up"] == f"h.1 / {order[0]}"
    assert seen["contexts"] == len(records[0]["contexts"]) > 0
    assert seen["shaded"] == sum(act > 0 for context in records[0]["contexts"] for act in context["acts"])
    assert seen["focus"] == "search"
    assert seen["down"] == seen["j"] == f"h.1 / {order[1]}"
    assert sorted(seen["number"]) == sorted(i for i in order if str(i).startswith("3"))
    assert seen["chosen"] == "h.1 / 3"
    assert f"None of {len(order)} latents" in seen["none"]
    assert "--latents 99999" in seen["none"]
    assert seen["blurred"]
    assert seen["other"].startswith("h.2.mlp.act / ")
    assert not seen["promoted"]
    assert seen["hash"] == "#" + seen["other"].replace(" / ", "/")
    assert (seen["page"], seen["svg"]) == ("rgb(253, 253, 252)", "rgb(28, 29, 31)")
    assert seen["wide"] == 0
    dark = drive(tmp_path, html, "--blink-settings=preferredColorScheme=0")
    assert (dark["page"], dark["svg"]) == ("rgb(21, 23, 26)", "rgb(230, 231, 233)")


def test_a_link_opens_its_latent(report, tmp_path):
    folder, _, data = report
    latent = data["coders"]["h.2.mlp.act"][-1]["latent"]
    dom = browse(tmp_path, (folder / "report.html").as_uri() + f"#h.2.mlp.act/{latent}")
    assert f'<div class="name">h.2.mlp.act / {latent}</div>' in dom


def test_fits_a_phone(report, tmp_path):
    folder, _, _ = report
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{(folder / "report.html").as_uri()}" style="width:390px;height:800px"></iframe><script>'
        "const f = document.getElementById('f'); f.onload = () => { const d = f.contentDocument.documentElement;"
        "document.body.dataset.widths = d.clientWidth + ' ' + d.scrollWidth; };</script>"
    )
    dom = browse(tmp_path, frame.as_uri(), "--allow-file-access-from-files", "--virtual-time-budget=5000")
    client, scroll = map(int, re.search(r'data-widths="(\d+) (\d+)"', dom).groups())
    assert client in range(370, 391)
    assert scroll == client

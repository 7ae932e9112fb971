"""The report is well-formed HTML, loads nothing, and Chromium shows it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from autoclip_core import ClipLog, Fixed, decide, write_report
from autoclip_core.cli.main import main

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
VOID = {"meta", "img", "br", "hr", "link", "input"}

pytestmark = pytest.mark.needs("plot")


class Page(HTMLParser):
    """Check that tags are closed in order, and collect tags, links and words."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.words, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attributes)
        self.loads += [values[k] for k in ("src", "href", "srcset") if k in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def log_of_a_run(names=("<head>", "embed")):
    log = ClipLog(names, settings={"policy": Fixed(2.0), "note": "<b>&"})
    for step in range(400):
        norms = [1.0 + step % 3, 1.0]
        log.record(decide(Fixed(2.0), Fixed(2.0).init(2), norms)[1])
    return log


def test_the_page_is_well_formed_and_loads_nothing(tmp_path):
    write_report(log_of_a_run(), tmp_path / "a.html", title="Run <1>")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.loads) == 3
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "script" not in page.tags
    assert "default-src 'none'" in text
    assert re.findall(r"https?://|@import|url\(", text) == []
    words = " ".join(page.words)
    for text in ("Run <1>", "Fixed(max_norm=2.0)", "<b>&", "<head>", "16.6 %"):
        assert text in words


def test_the_command_writes_a_report_of_a_log_or_of_norms(tmp_path, capsys):
    log_of_a_run().to_jsonl(tmp_path / "run.jsonl")
    (tmp_path / "norms.csv").write_text("step,norm\n0,1\n1,4\n2,nan\n")
    for name, policy in [
        ("run.jsonl", "Fixed"),
        ("norms.csv", "Quantile(quantile=0.9"),
    ]:
        out = tmp_path / f"{name}.html"
        assert main(["report", str(tmp_path / name), "-o", str(out)]) == 0
        assert policy in " ".join(Page(out.read_text(encoding="utf-8")).words)
    assert "report" not in capsys.readouterr().err


def test_control_characters_are_shown_escaped(tmp_path):
    log = log_of_a_run(names=("\x1b[31mhead", "embed"))
    log.settings["column \x1b[1m"] = "\x07"
    write_report(log, tmp_path / "a.html", title="Run \x1b")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert not any(c < " " and c != "\n" for c in text)
    words = " ".join(Page(text).words)
    for text in (r"\x1b[31mhead", r"column \x1b[1m", r"\x07", r"Run \x1b"):
        assert text in words


def test_an_empty_log_has_a_report(tmp_path):
    write_report(ClipLog(), tmp_path / "a.html")
    assert "Too early" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_chromium_shows_the_page(tmp_path):
    from matplotlib.image import imread

    write_report(log_of_a_run(), tmp_path / "a.html")
    picture = tmp_path / "a.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1050,2600"]
    command += [f"--screenshot={picture}", (tmp_path / "a.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.round(255 * imread(picture)[..., :3]).astype(int)
    assert pixels.shape[:2] == (2600, 1050)
    orange = (pixels == [0xD5, 0x5E, 0x00]).all(axis=-1)
    assert orange.sum() > 500  # the clipped steps in the first plot
    assert (pixels.min(axis=-1) < 100).mean() > 0.01  # dark pixels of the text

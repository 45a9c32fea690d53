"""A real browser opens a report without complaint and draws its images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from unweave.diffusion_core.report import Report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` binary on this machine")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=900,900",
)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 16, 16)
    report = (
        Report("Report <in> a browser")
        .add_text("Three colours.")
        .add_images("Colours", colours, ["red", "green", "blue"])
        .add_table(["concept", "rate"], [["cat", 0.25]])
        .add_numbers({"rate": 0.25})
    )
    return report.save(tmp_path / "report")


def open_page(page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    return subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_the_browser_reads_the_page_without_a_console_message(page: Path, tmp_path: Path) -> None:
    result = open_page(page, tmp_path / "profile", "--dump-dom")
    assert result.stdout.count("<img") == 3
    assert "Report &lt;in&gt; a browser" in result.stdout
    assert not [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def test_the_browser_draws_every_image(page: Path, tmp_path: Path) -> None:
    screenshot = tmp_path / "screenshot.png"
    open_page(page, tmp_path / "profile", f"--screenshot={screenshot}")
    with Image.open(screenshot) as image:
        raw = image.convert("RGB").tobytes()
    pixels = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, 3).int()
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        drawn = ((pixels - torch.tensor(colour)).abs() <= 8).all(dim=1).sum()
        assert drawn > 32 * 32, f"the image of colour {colour} is not drawn"

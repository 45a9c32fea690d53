"""Reports: one file with everything in it, where text stays text."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from unweave.attention_tools import AttentionError
from unweave.attention_tools.report import Table, write_report


class Page(HTMLParser):
    """What a browser would read: tags with attributes, and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path):
    picture = tmp_path / "maps.png"
    Image.new("RGB", (4, 4), "red").save(picture)
    table = Table("Words", ("word", "largest"), [("cat", 0.123456), ("dog", 2)])
    path = write_report(
        tmp_path / "report.html",
        "Maps",
        about={"words": ["cat", "dog"], "seed": 0},
        pictures={"Where they look.": picture},
        tables=[table],
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["maps.png", "report.html"]
    page = Page(path.read_text(encoding="utf-8"))
    (image,) = [own for tag, own in page.tags if tag == "img"]
    head, _, data = image["src"].partition(",")
    assert head == "data:image/png;base64" and base64.b64decode(data) == picture.read_bytes()
    assert image["alt"] == "Where they look."
    assert {"cat, dog", "0.1235", "2", "Words", "Maps"} <= set(page.texts)
    links = [own.get("src") or own.get("href") for _, own in page.tags]
    assert all(link.startswith("data:") for link in links if link)
    assert not re.search(r"https?:|<script", path.read_text(encoding="utf-8"))


def test_text_is_shown_literally(tmp_path):
    wild = "<script>alert('cat')</script> & \"dog\""
    path = write_report(
        tmp_path / "report.html",
        wild,
        about={"prompt": wild},
        pictures={},
        tables=[Table(wild, ("word",), [(wild,)])],
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "".join(page.texts).count(wild) == 5


def test_mistakes_are_named(tmp_path):
    with pytest.raises(AttentionError, match="needs 2 cells"):
        Table("Words", ("word", "largest"), [("cat",)])
    (tmp_path / "maps.npz").write_bytes(b"")
    for name in ("maps.npz", "none.png"):
        with pytest.raises(AttentionError, match=name):
            write_report(
                tmp_path / "report.html", "Maps", about={}, pictures={"x": tmp_path / name}
            )
    assert not (tmp_path / "report.html").exists()

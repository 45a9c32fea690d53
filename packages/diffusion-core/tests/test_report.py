"""Reports are self-contained, escape what users write, and show the numbers they save."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from unweave.diffusion_core.errors import ImageError, UnweaveError
from unweave.diffusion_core.report import Report, image_grid

HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=y>"


class Page(HTMLParser):
    """Collects the tags, attributes and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def some_images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def full_report() -> Report:
    return (
        Report("Erasing cats")
        .add_text("First paragraph.\n\nSecond paragraph.")
        .add_table(["concept", "rate"], [["cat", 0.123456], ["dog", None]])
        .add_images("Before", some_images(), ["one", "two", "three"])
        .add_images("After", some_images(2))
        .add_numbers({"rate": 0.25, "nested": {"low": 0.125, "none": None}})
    )


def test_every_image_is_a_data_uri_that_decodes_as_the_png_given(tmp_path: Path) -> None:
    page = Page(full_report().save(tmp_path))
    images = page.attributes("img")
    assert len(images) == 5
    for attributes in images:
        prefix, data = (attributes["src"] or "").split(",", 1)
        assert prefix == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.format == "PNG"
            image.load()
            assert image.size == (6, 8)
    data = (images[0]["src"] or "").split(",", 1)[1]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        expected = (some_images()[0] * 255).round().permute(1, 2, 0).flatten().int().tolist()
        assert list(image.tobytes()) == expected


def test_the_page_fetches_and_executes_nothing(tmp_path: Path) -> None:
    page = Page(full_report().save(tmp_path))
    assert not page.attributes("script")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert (value or "").startswith("data:")


def test_text_written_by_users_is_escaped_everywhere(tmp_path: Path) -> None:
    report = (
        Report(HOSTILE)
        .add_text(HOSTILE)
        .add_table([HOSTILE], [[HOSTILE]], title=HOSTILE)
        .add_images(HOSTILE, some_images(1), [HOSTILE])
        .add_numbers({HOSTILE: HOSTILE})
    )
    page = Page(report.save(tmp_path))
    assert not page.attributes("script")
    (image,) = page.attributes("img")
    assert image["alt"] == HOSTILE
    assert set(image) == {"src", "width", "height", "alt"}
    assert page.texts.count(HOSTILE) == 10


def test_the_page_shows_paragraphs_tables_labels_and_numbers(tmp_path: Path) -> None:
    page = Page(full_report().save(tmp_path))
    assert len(page.attributes("p")) == 2
    for text in ("concept", "cat", "0.1235", "-", "three", "nested.low", "0.125"):
        assert text in page.texts


def test_the_folder_holds_the_page_the_grid_and_the_numbers(tmp_path: Path) -> None:
    path = full_report().save(tmp_path / "a" / "report")
    assert path.name == "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "grid.png",
        "numbers.json",
        "report.html",
    ]
    numbers = json.loads((path.parent / "numbers.json").read_text())
    assert numbers == {"rate": 0.25, "nested": {"low": 0.125, "none": None}}
    with Image.open(path.parent / "grid.png") as grid:
        # Two rows of 8x6 images at scale 2, at most three columns, gaps of two pixels.
        assert grid.size == (3 * 14 + 2, 2 * 20)


def test_saving_again_without_images_leaves_no_old_grid(tmp_path: Path) -> None:
    full_report().save(tmp_path)
    Report("No images").save(tmp_path)
    assert not (tmp_path / "grid.png").exists()
    assert json.loads((tmp_path / "numbers.json").read_text()) == {}


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = full_report().save(tmp_path / "1"), full_report().save(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()


def test_numbers_may_be_tensors_but_must_be_finite() -> None:
    report = Report("r").add_numbers({"loss": torch.tensor(0.5), "list": torch.tensor([1, 2])})
    assert report.numbers == {"loss": 0.5, "list": [1, 2]}
    with pytest.raises(UnweaveError, match=r"finite.*nan"):
        report.add_numbers({"loss": float("nan")})
    with pytest.raises(UnweaveError, match="JSON"):
        report.add_numbers({"loss": object()})


def test_a_row_of_the_wrong_length_is_refused_with_its_content() -> None:
    with pytest.raises(UnweaveError, match=r"needs 2 cells.*got 1 in \['cat'\]"):
        Report("r").add_table(["concept", "rate"], [["cat"]])


def test_labels_must_match_the_images() -> None:
    with pytest.raises(UnweaveError, match="got 1 labels for 3 images"):
        Report("r").add_images("i", some_images(), ["one"])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (3, 4, 4), (2, 1, 4, 4), (1, 3, 0, 4)])
def test_what_is_no_batch_of_colour_images_is_refused_with_its_shape(
    shape: tuple[int, ...],
) -> None:
    with pytest.raises(ImageError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        image_grid(torch.zeros(shape), columns=2)


def test_images_with_nan_are_refused() -> None:
    images = some_images()
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ImageError, match="finite"):
        image_grid(images, columns=2)


def test_image_grid_places_each_image_in_reading_order() -> None:
    colours = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4)
    grid = image_grid(colours, columns=2, scale=2)
    assert grid.size == (2 * 10 + 2, 2 * 10 + 2)
    assert [grid.getpixel(xy) for xy in ((2, 2), (12, 2), (2, 12))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
    ]
    assert grid.getpixel((12, 12)) == (255, 255, 255)
    assert grid.getpixel((0, 0)) == (255, 255, 255)


def test_image_grid_refuses_zero_columns() -> None:
    with pytest.raises(UnweaveError, match="`columns` must be at least 1, got 0"):
        image_grid(some_images(), columns=0)

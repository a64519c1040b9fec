"""Image files: which are opened, as which colours, from where, and within which limits."""

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from controlprefix import RequestError, TrainingDataError
from controlprefix.data import as_examples
from controlprefix.image_files import open_images
from controlprefix.message import read_image

from image_models import picture


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def saved(image: Any, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def test_images_are_read_as_they_look() -> None:
    upright = Image.new("RGB", (6, 4), "red")
    upright.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    turned = saved(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    grey = Image.new("L", (4, 4), 100)
    deep = Image.fromarray(numpy.asarray(grey).astype(numpy.uint16) * 257)
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    cases = {
        "turned": (turned, upright),
        "16 bits": (saved(deep), grey.convert("RGB")),
        "transparent": (saved(transparent), Image.new("RGB", (4, 4), "white")),
        "palette": (saved(palette, transparency=0), Image.new("RGB", (4, 4), "white")),
        "CMYK": (read_image(Image.new("CMYK", (4, 4))), Image.new("RGB", (4, 4), "white")),
    }
    for name, (content, expected) in cases.items():
        (image,) = open_images([content])
        assert image.size == expected.size, name
        assert image.tobytes() == expected.tobytes(), name
    for mode in ("CMYK", "YCbCr", "HSV", "LAB", "F", "I", "LA", "PA", "RGBA", "1"):
        (image,) = open_images([read_image(Image.new(mode, (3, 2)))])
        assert (image.mode, image.size) == ("RGB", (3, 2))


FORMATS = st.sampled_from(["PNG", "GIF", "BMP"])


@given(at=st.integers(0, 400), value=st.integers(0, 255), form=FORMATS)
@settings(max_examples=60)
def test_damaged_images_are_clear_errors(at: int, value: int, form: str) -> None:
    content = bytearray(saved(Image.effect_noise((12, 12), 50), form))
    content[at % len(content)] = value
    for damaged in (bytes(content), bytes(content[: at % len(content)])):
        problem = ""
        try:
            assert [image.mode for image in open_images([damaged])] == ["RGB"]
        except RequestError as error:
            problem = str(error)
        assert not problem or "image 1 cannot be read" in problem or "pixels" in problem
        assert "BytesIO" not in problem


def test_no_image_runs_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program ran"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(RequestError, match="none of the formats PNG"):
        list(open_images([eps]))


def test_images_of_a_file_of_rows_are_beside_it(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0.png").write_bytes(saved(picture(0)))
    part = {"type": "image_url", "image_url": {"url": "img/0.png"}}
    message = {"role": "user", "content": [part, {"type": "text", "text": "img/0.png"}]}
    rows = [
        {"prompt": "What?", "images": "img/0.png", "completion": "a"},
        {"messages": [message, {"role": "assistant", "content": "a"}]},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = as_examples(file)
    assert len(first.images) == 1
    assert second.messages is not None
    assert len(second.messages[0].images) == 1
    assert second.messages[0].content == "img/0.png"  # a text is no path
    for wrong in ("A" * 5000, "a\0b"):
        file.write_text(json.dumps({"prompt": "x", "images": [wrong], "completion": "a"}))
        with pytest.raises(TrainingDataError, match="line 1"):
            as_examples(file)

"""Captions of images in a style, and in a user's voice.

Run it with `python examples/captions.py MODEL` (extra `images`): a model that reads images as
tokens, by name or as a folder, such as HuggingFaceTB/SmolVLM-256M-Instruct.
"""

import argparse

from PIL import Image, ImageDraw

from controlprefix import ControlPrefix, Example, Request

STYLES = {
    "plain": "A {color} {shape}.",
    "romantic": "A lonely {color} {shape}, dreaming of the sea.",
}


def picture(color: str, shape: str) -> Image.Image:
    """A square or a circle on white."""
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)((24, 24, 72, 72), fill=color)
    return image


def main(cp: ControlPrefix, *, steps: int = 20) -> None:
    """Train two styles on four images, and caption a fifth in each, and as a user would."""
    rows = [
        Example(
            prompt="Describe it.",
            images=(picture(color, shape),),
            completion=text.format(color=color, shape=shape),
            task="caption",
            attributes={"style": style},
        )
        for color in ("red", "blue")
        for shape in ("square", "circle")
        for style, text in STYLES.items()
    ]
    cp.train(rows, steps=steps, batch_size=8, num_slots=8, validation=0)
    cp.enroll("ana", ["ok so, tiny thing, big mood!!", "so tiny. so cute!!", "a mood, honestly!!"])
    new = picture("green", "circle")
    for fields in ({"attributes": {"style": style}} for style in STYLES):
        request = Request(
            prompt="Describe it.", images=(new,), task="caption", max_new_tokens=24, **fields
        )
        print(fields["attributes"], "->", cp.generate(request).text)
    request = Request(
        prompt="Describe it.", images=(new,), task="caption", user="ana", max_new_tokens=24
    )
    print("ana ->", cp.generate(request).text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a name, or a folder")
    main(ControlPrefix.from_pretrained(parser.parse_args().model, tenant="examples"))

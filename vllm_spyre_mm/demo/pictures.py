# SPDX-License-Identifier: Apache-2.0
"""Pictures of coloured shapes, and questions about them with their right answers.

Everything random comes from a `random.Random` that the caller passes in, so a seed fixes the
pictures and the questions. Nothing here needs more than Pillow.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
"""Red, green and blue, 0 to 255 each."""

KINDS: tuple[str, ...] = ("circle", "square", "triangle", "cross")
"""Kinds of shape."""

COLOURS: Mapping[str, RGB] = MappingProxyType(
    {
        "red": (215, 30, 40),
        "green": (30, 155, 60),
        "blue": (35, 75, 220),
        "yellow": (245, 215, 35),
        "purple": (145, 45, 175),
        "orange": (245, 135, 25),
    }
)
"""Colours of shapes, by name."""

PLACES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "top left": (0.25, 0.25),
        "top right": (0.75, 0.25),
        "bottom left": (0.25, 0.75),
        "bottom right": (0.75, 0.75),
    }
)
"""Places of shapes in reading order: (x, y) of the centre as fractions of width and height."""

BACKGROUNDS: tuple[RGB, ...] = ((255, 255, 255), (222, 222, 222), (0, 0, 0))
"""Background colours: white, light grey and black."""

NUMBERS: tuple[str, ...] = ("none", "one", "two", "three", "four")
"""Number words, by number."""

ORDINALS: tuple[str, ...] = ("first", "second", "third")
"""Ordinal words for the pictures of one question."""

SIZE_CLASSES: Mapping[str, tuple[int, int, float]] = MappingProxyType(
    {"small": (40, 48, 1.2), "medium": (44, 96, 2.0), "large": (40, 400, 3.0)}
)
"""(shortest side, longest side, largest ratio of the sides), in pixels, by name."""

_OPPOSITES: Mapping[str, str] = MappingProxyType(
    {
        "top": "bottom",
        "bottom": "top",
        "left": "right",
        "right": "left",
        "top left": "bottom right",
        "top right": "bottom left",
        "bottom left": "top right",
        "bottom right": "top left",
    }
)


@dataclass(frozen=True)
class Shape:
    """One shape: a key of `KINDS`, of `COLOURS` and of `PLACES`."""

    kind: str
    colour: str
    place: str

    def __str__(self) -> str:
        """For example "red circle"."""
        return f"{self.colour} {self.kind}"

    def describe(self) -> str:
        """For example "a red circle at the top left"."""
        return f"{article(str(self))} {self} at the {self.place}"


@dataclass(frozen=True)
class Picture:
    """An RGB image and what is drawn on it, in reading order."""

    image: Image.Image
    shapes: tuple[Shape, ...]

    def describe(self) -> str:
        """For example "a red circle at the top left and a blue square at the bottom right"."""
        return " and ".join(shape.describe() for shape in self.shapes)


@dataclass(frozen=True)
class Question:
    """A question, its right answer, and the name of its type (for statistics)."""

    text: str
    answer: str
    type: str


@dataclass(frozen=True)
class Task:
    """A question together with the pictures that it is about (none, one or several)."""

    pictures: tuple[Picture, ...]
    question: Question

    @property
    def images(self) -> list[Image.Image]:
        """The images of the pictures, in order."""
        return [picture.image for picture in self.pictures]

    def messages(self) -> list[dict[str, Any]]:
        """Chat messages with one ``{"type": "image"}`` part per picture, then the question."""
        parts: list[dict[str, str]] = [{"type": "image"} for _ in self.pictures]
        parts.append({"type": "text", "text": self.question.text})
        return [{"role": "user", "content": parts}]


def article(noun: str) -> str:
    """The indefinite article for `noun`, by its first letter."""
    return "an" if noun[0] in "aeiou" else "a"


def draw_picture(
    shapes: Sequence[Shape],
    size: tuple[int, int],
    background: RGB = BACKGROUNDS[0],
    rng: random.Random | None = None,
) -> Picture:
    """Draw `shapes` on a picture of `size` (width, height) in pixels.

    With `rng`, the colours, places and sizes of the shapes vary a little.
    """
    order = list(PLACES)
    ordered = tuple(sorted(shapes, key=lambda shape: order.index(shape.place)))
    image = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(image)
    for shape in ordered:
        _draw_shape(draw, shape, size, rng)
    return Picture(image, ordered)


def random_shapes(rng: random.Random, count: int) -> tuple[Shape, ...]:
    """`count` shapes of different kinds at different places."""
    kinds, places = rng.sample(KINDS, count), rng.sample(list(PLACES), count)
    return tuple(
        Shape(kind, rng.choice(list(COLOURS)), place)
        for kind, place in zip(kinds, places, strict=True)
    )


def random_size(rng: random.Random, size_class: str) -> tuple[int, int]:
    """A (width, height) in pixels of one of the `SIZE_CLASSES`, wide or tall."""
    low, high, ratio = SIZE_CLASSES[size_class]
    longer = round(low * (high / low) ** rng.random())
    shorter = max(low, round(longer / ratio ** rng.random()))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def random_picture(rng: random.Random, size_class: str | None = None) -> Picture:
    """A picture with one to three shapes; `size_class` is one of `SIZE_CLASSES`, or any."""
    size = random_size(rng, size_class or rng.choice(list(SIZE_CLASSES)))
    count = rng.choices((1, 2, 3), (0.45, 0.45, 0.1))[0]
    return draw_picture(random_shapes(rng, count), size, rng.choice(BACKGROUNDS), rng)


def questions_about(picture: Picture) -> list[Question]:
    """Every question that can be asked about one picture."""
    shapes = picture.shapes
    asked = [
        Question("What is in the picture?", picture.describe(), "describe"),
        Question("How many shapes are in the picture?", NUMBERS[len(shapes)], "count"),
        Question("How many pictures are there?", NUMBERS[1], "pictures"),
    ]
    for shape in shapes:
        asked.append(Question(f"What colour is the {shape.kind}?", shape.colour, "colour"))
        asked.append(Question(f"Where is the {shape}?", f"at the {shape.place}", "where"))
    drawn = {shape.place: f"{article(str(shape))} {shape}" for shape in shapes}
    for place in PLACES:
        answer, kind = (drawn[place], "at") if place in drawn else ("nothing", "empty")
        asked.append(Question(f"What is at the {place}?", answer, kind))
    return asked


def questions_about_several(pictures: Sequence[Picture]) -> list[Question]:
    """Every question that can be asked about two or three pictures together."""
    asked = [Question("How many pictures are there?", NUMBERS[len(pictures)], "pictures")]
    for ordinal, picture in zip(ORDINALS, pictures, strict=False):
        text = f"What is in the {ordinal} picture?"
        asked.append(Question(text, picture.describe(), "describe-nth"))
    return asked


def questions_without_picture() -> list[Question]:
    """Every question that can be asked without a picture."""
    asked = [
        Question("How many pictures are there?", NUMBERS[0], "text"),
        Question("Which shapes do you know?", " and ".join(KINDS), "text"),
        Question("Which colours do you know?", " and ".join(COLOURS), "text"),
    ]
    for word, opposite in _OPPOSITES.items():
        asked.append(Question(f"What is the opposite of {word}?", opposite, "text"))
    return asked


def random_questions(
    rng: random.Random, pictures: Sequence[Picture], count: int = 1
) -> list[Question]:
    """Up to `count` different questions about `pictures`, all types equally likely."""
    if not pictures:
        asked = questions_without_picture()
    elif len(pictures) == 1:
        asked = questions_about(pictures[0])
    else:
        asked = questions_about_several(pictures)
    by_type: dict[str, list[Question]] = {}
    for question in asked:
        by_type.setdefault(question.type, []).append(question)
    chosen: list[Question] = []
    while by_type and len(chosen) < count:
        kind = rng.choice(list(by_type))
        chosen.append(by_type[kind].pop(rng.randrange(len(by_type[kind]))))
        if not by_type[kind]:
            del by_type[kind]
    return chosen


def held_out_tasks(count: int, seed: int = 0) -> list[Task]:
    """`count` tasks that no training run has seen: most with one picture, some with none to three.

    Training draws its pictures from generators seeded with other strings.
    """
    rng = random.Random(f"held-out-{seed}")
    tasks = []
    for _ in range(count):
        number = rng.choices((0, 1, 2, 3), (0.05, 0.75, 0.12, 0.08))[0]
        pictures = tuple(random_picture(rng) for _ in range(number))
        tasks.append(Task(pictures, random_questions(rng, pictures)[0]))
    return tasks


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: Shape, size: tuple[int, int], rng: random.Random | None
) -> None:
    """Draw one shape on a picture of `size` (width, height)."""
    jitter = rng.uniform if rng else (lambda low, high: (low + high) / 2)
    x, y = (
        extent * (fraction + jitter(-0.03, 0.03))
        for extent, fraction in zip(size, PLACES[shape.place], strict=True)
    )
    r = min(size) * jitter(0.16, 0.21)
    red, green, blue = (
        max(0, min(255, round(level + jitter(-9, 9)))) for level in COLOURS[shape.colour]
    )
    fill = (red, green, blue)
    if shape.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.kind == "triangle":
        draw.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=fill)
    else:
        arm = r / 3
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)

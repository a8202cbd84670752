# SPDX-License-Identifier: Apache-2.0
"""The drawn pictures are repeatable, and the answers agree with what is drawn."""

import random

import pytest

from vllm_spyre_mm.demo.pictures import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    NUMBERS,
    PLACES,
    RGB,
    SIZE_CLASSES,
    Picture,
    Shape,
    Task,
    draw_picture,
    held_out_tasks,
    questions_about,
    questions_about_several,
    questions_without_picture,
    random_picture,
    random_questions,
)


def _pictures(count: int) -> list[Picture]:
    rng = random.Random("test-pictures")
    return [random_picture(rng) for _ in range(count)]


def _pixel(picture: Picture, place: str) -> RGB:
    """Colour of the pixel at the middle of `place`."""
    x, y = PLACES[place]
    pixel = picture.image.getpixel((int(picture.image.width * x), int(picture.image.height * y)))
    assert isinstance(pixel, tuple)
    red, green, blue = (int(level) for level in pixel)
    return red, green, blue


def _colour_name(pixel: RGB) -> str:
    """The name of the closest colour."""

    def distance(name: str) -> int:
        return sum((a - b) ** 2 for a, b in zip(pixel, COLOURS[name], strict=True))

    return min(COLOURS, key=distance)


def _answers(picture: Picture) -> dict[str, str]:
    return {question.text: question.answer for question in questions_about(picture)}


def test_seed_fixes_pictures_and_questions() -> None:
    first, second = held_out_tasks(40, seed=3), held_out_tasks(40, seed=3)
    assert [task.question for task in first] == [task.question for task in second]
    assert [[image.tobytes() for image in task.images] for task in first] == [
        [image.tobytes() for image in task.images] for task in second
    ]
    assert first != held_out_tasks(40, seed=4)


def test_shapes_are_drawn_where_the_answers_say() -> None:
    for picture in _pictures(300):
        drawn = {shape.place: shape for shape in picture.shapes}
        for place in PLACES:
            pixel = _pixel(picture, place)
            if place in drawn:
                assert _colour_name(pixel) == drawn[place].colour
            else:
                assert pixel in BACKGROUNDS


def test_answers_about_one_picture() -> None:
    shapes = (Shape("square", "blue", "bottom right"), Shape("circle", "orange", "top left"))
    answers = _answers(draw_picture(shapes, (60, 48)))
    assert answers == {
        "What is in the picture?": "an orange circle at the top left"
        " and a blue square at the bottom right",
        "How many shapes are in the picture?": "two",
        "How many pictures are there?": "one",
        "What colour is the circle?": "orange",
        "What colour is the square?": "blue",
        "Where is the orange circle?": "at the top left",
        "Where is the blue square?": "at the bottom right",
        "What is at the top left?": "an orange circle",
        "What is at the top right?": "nothing",
        "What is at the bottom left?": "nothing",
        "What is at the bottom right?": "a blue square",
    }


def test_answers_about_several_pictures() -> None:
    pictures = _pictures(3)
    answers = {question.text: question.answer for question in questions_about_several(pictures)}
    assert answers["How many pictures are there?"] == "three"
    assert answers["What is in the second picture?"] == pictures[1].describe()
    assert "What is in the third picture?" not in {
        question.text for question in questions_about_several(pictures[:2])
    }


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_cover_different_areas(kind: str) -> None:
    """The area of each kind of shape, in units of its bounding box, is the kind's own."""
    picture = draw_picture([Shape(kind, "red", "top left")], (400, 400))
    area = sum(count for count, pixel in picture.image.getcolors() if pixel == COLOURS["red"])
    expected = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 0.556}[kind]
    side = 2 * 0.185 * 400
    assert area / side**2 == pytest.approx(expected, abs=0.03)


def test_sizes_and_aspect_ratios_vary() -> None:
    images = [picture.image for picture in _pictures(400)]
    ratios = [image.width / image.height for image in images]
    assert min(ratios) < 0.45
    assert max(ratios) > 2.2
    sides = [side for image in images for side in image.size]
    assert min(sides) == 40
    assert max(sides) > 300
    for name, (low, high, ratio) in SIZE_CLASSES.items():
        rng = random.Random(name)
        for _ in range(50):
            size = random_picture(rng, name).image.size
            assert low <= min(size)
            assert max(size) <= high
            assert max(size) / min(size) <= ratio * 1.05


def test_random_questions_are_different_and_answerable() -> None:
    rng = random.Random("questions")
    picture = random_picture(rng)
    chosen = random_questions(rng, [picture], count=99)
    assert sorted(question.text for question in chosen) == sorted(_answers(picture))
    assert len(random_questions(rng, [picture], count=2)) == 2
    assert set(random_questions(rng, [])) <= set(questions_without_picture())


def test_messages_put_pictures_before_the_question() -> None:
    pictures = tuple(_pictures(2))
    task = Task(pictures, questions_about_several(pictures)[0])
    (message,) = task.messages()
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert message["content"][-1]["text"] == "How many pictures are there?"
    assert task.question.answer == NUMBERS[2]
    assert [image.size for image in task.images] == [p.image.size for p in pictures]

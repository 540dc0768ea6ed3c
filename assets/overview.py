"""Draw assets/overview.png from problem 0 and tests/results/default_run.json.

    python assets/overview.py
"""
import json
import math
import os
import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from data_gen import COLS, LADDER, draw_problem, make_problem, text_of  # noqa: E402
from eval import interval, share  # noqa: E402

BARS = {  # model: (shade, what the legend says)
    "out/stage1": ("#b8c4d6", "before stage 2"),
    "out/stage2": ("#1f3d63", "after"),
}
RED = "#c0392b"
SIDE = 270  # of the picture


def font(size):
    return ImageFont.load_default(size)


def draw_pair(image, draw):
    """The two forms of problem 0, and what stage 2 does between them."""
    problem = make_problem("train", 0)
    draw.text((20, 14), "text-rich: the teacher reads", "black", font(18))
    words = textwrap.fill(text_of(problem, "text_only"), 26)
    draw.rectangle([20, 60, 262, 178], outline="#888888")
    draw.multiline_text((32, 72), words, "black", font(17), spacing=7)

    draw.text((430, 14), "vision-rich: the student sees", "black", font(18))
    picture = draw_problem(problem, SIDE)[0]["question"].convert("RGB")
    image.paste(picture, (430, 48))
    frame = [430, 48, 430 + SIDE, 48 + SIDE]
    draw.rectangle(frame, outline="#888888")

    # The angle that is asked for: at C, on the line B D; arcs go clockwise from the right.
    A, C = problem["lines"][1]
    unit = SIDE / COLS
    x = 430 + C.real * unit
    y = 48 + C.imag * unit
    slope = A - C
    degrees = math.degrees(math.atan2(-slope.imag, slope.real))
    box = [x - 46, y - 46, x + 46, y + 46]
    draw.arc(box, 360 - degrees, 360, RED, 3)
    draw.text((x + 36, y - 58), "?", RED, font(20))

    draw.line([425, 118, 282, 118], RED, 3)
    head = [(268, 118), (282, 111), (282, 125)]
    draw.polygon(head, RED)
    above = "pull what the student\npredicts up to the teacher"
    below = "KL(teacher || student)\nKL(student || teacher)"
    draw.multiline_text((346, 74), above, RED, font(13), anchor="ma", align="center")
    draw.multiline_text((346, 130), below, RED, font(13), anchor="ma", align="center")
    answer = problem["output"].replace("†", "")
    draw.text((20, 200), f"one answer: {answer}", "black", font(17))
    note = "The same weights twice: the language model is\nfrozen, the eyes learn."
    draw.multiline_text((20, 240), note, "#555555", font(15), spacing=6)


def draw_bars(draw):
    """Accuracy by version, lines: 95 % intervals."""
    path = os.path.join(HERE, "..", "tests", "results", "default_run.json")
    with open(path) as f:
        models = json.load(f)["models"]
    left = 770
    bottom = 318
    height = 220
    draw.text((left - 10, 14), "accuracy by version", "black", font(18))
    x = left + 210
    for shade, words in BARS.values():
        draw.rectangle([x, 18, x + 14, 32], shade)
        draw.text((x + 20, 15), words, "black", font(15))
        x += 140

    for percent in (0, 50, 100):
        y = bottom - height * percent / 100
        draw.line([left - 6, y, 1230, y], "#cccccc")
        draw.text((left - 10, y), f"{percent} %", "black", font(13), anchor="rm")
    for k, version in enumerate(LADDER):
        for j, (name, (shade, _)) in enumerate(BARS.items()):
            count = models[name]["versions"][version]
            low, high = interval(count)
            x = left + k * 77 + j * 30
            top = bottom - height * share(count)
            draw.rectangle([x, top, x + 27, bottom], shade)
            ends = [bottom - height * low, bottom - height * high]
            draw.line([x + 14, ends[0], x + 14, ends[1]], "black")
        words = version.replace("_", "\n")
        at = (left + k * 77 + 29, bottom + 8)
        draw.multiline_text(at, words, "black", font(14), anchor="ma", align="center")


def main():
    image = Image.new("RGB", (1240, 370), "white")
    draw = ImageDraw.Draw(image)
    draw_pair(image, draw)
    draw_bars(draw)
    image.save(os.path.join(HERE, "overview.png"))


if __name__ == "__main__":
    main()

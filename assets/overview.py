"""Draw assets/overview.png, the picture at the top of the README, from problem 0 and default_run.json.

    python assets/overview.py
"""
import json
import os
import sys
import textwrap

from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from data_gen import LADDER, draw_problem, make_problem, text_of  # noqa: E402
from eval import interval, share  # noqa: E402

SHADES = {"out/stage1": "#b8c4d6", "out/stage2": "#1f3d63"}


def main():
    with open(os.path.join(HERE, "..", "tests", "results", "default_run.json")) as f:
        models = json.load(f)["models"]
    problem, font, bold = make_problem("train", 0), ImageFont.load_default(17), ImageFont.load_default(20)
    image = Image.new("RGB", (1240, 400), "white")
    draw = ImageDraw.Draw(image)
    draw.text((20, 14), "text-rich (teacher)", font=bold, fill="black")
    draw.rectangle([20, 48, 260, 318], outline="#888888")
    draw.multiline_text((32, 60), textwrap.fill(text_of(problem, "text_only"), 26), font=font, fill="black",
                        spacing=7)
    draw.text((430, 14), "vision-rich (student)", font=bold, fill="black")
    picture = draw_problem(problem, 270)[0]["question"]
    image.paste(picture.convert("RGB"), (430, 48))
    draw.rectangle([430, 48, 700, 318], outline="#888888")
    draw.line([425, 180, 270, 180], fill="#c0392b", width=3)
    draw.polygon([(262, 180), (276, 173), (276, 187)], fill="#c0392b")
    draw.multiline_text((345, 108), "pull what the\nstudent predicts\nup to the teacher",
                        font=ImageFont.load_default(15), fill="#c0392b", anchor="ma", align="center")
    draw.multiline_text((345, 192), "KL(teacher || student)\nKL(student || teacher)",
                        font=ImageFont.load_default(15), fill="#c0392b", anchor="ma", align="center")
    draw.text((20, 340), f"one answer:  {problem['output'].replace('†', '')}", font=font, fill="black")
    left, bottom, height = 770, 318, 240
    draw.text((left - 10, 14), "accuracy by version, before and after stage 2", font=bold, fill="black")
    for k, version in enumerate(LADDER):
        for j, (name, shade) in enumerate(SHADES.items()):
            count, x = models[name]["versions"][version], left + k * 77 + j * 30
            low, high = interval(count)
            draw.rectangle([x, bottom - height * share(count), x + 27, bottom], fill=shade)
            draw.line([x + 14, bottom - height * low, x + 14, bottom - height * high], fill="black")
        draw.multiline_text((left + k * 77 + 29, bottom + 8), version.replace("_", "\n"),
                            font=ImageFont.load_default(14), fill="black", anchor="ma", align="center")
    for percent in (0, 50, 100):
        y = bottom - height * percent / 100
        draw.line([left - 6, y, 1230, y], fill="#cccccc")
        draw.text((left - 10, y), f"{percent} %", font=ImageFont.load_default(13), fill="black", anchor="rm")
    image.save(os.path.join(HERE, "overview.png"))


if __name__ == "__main__":
    main()

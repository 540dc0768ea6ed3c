"""Watch it learn to read: assets/watch.gif, one pair while stage 2 trains.

    python assets/watch.py    # needs data/ and out/stage1; trains stage 2 as usual, 5 minutes

Every five steps, what teacher and student would say next after each word of the given answer, and
what the student says when it is asked and nobody gives it any word.
"""
import argparse
import os
import sys
import tempfile
import textwrap

import torch
from PIL import Image, ImageDraw, ImageFont

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import stage2_kl_align as stage2  # noqa: E402
from model import JsonLines, make_batches  # noqa: E402

PAIR = 1  # of stage2_top.jsonl: problem 0, text_only and vision_dominant
EVERY = 5  # steps between frames
SIZE = (900, 330)
SHORT = {"Answer": "Ans", "<|im_end|>": "end", "†": "*"}  # what the font and the room allow
GREEN = "#1b7f3b"
RED = "#c0392b"


def first_choices(vlm, tokenizer, row):
    """-> words of teacher and student, the student's probabilities of the teacher's words"""
    [strong, weak], _ = make_batches(tokenizer, vlm.config, [row], stage2.FORMS)
    ht, hs, _ = stage2.pair_of_rows(vlm, vlm, strong, weak)
    teacher = stage2.first_choice(ht, vlm.lm_head)
    student = stage2.first_choice(hs, vlm.lm_head)
    q = (hs @ vlm.lm_head.T).softmax(-1)
    of_teacher_s = q.gather(1, teacher[:, None])[:, 0].tolist()
    said_by_teacher = [tokenizer.decode([token]) for token in teacher]
    said_by_student = [tokenizer.decode([token]) for token in student]
    return said_by_teacher, said_by_student, of_teacher_s


def own_reply(vlm, tokenizer, row, args):
    [answered] = stage2.answered_by_student(vlm, tokenizer, [row], args, torch.device("cpu"))
    return answered["output"]


def draw_words(draw, y, words, colors, font):
    """Each word in a column of its own, below one another in all rows."""
    width = (SIZE[0] - 140) / len(words)
    x = 120 + width / 2
    for word, color in zip(words, colors):
        word = word.strip() or "_"
        word = SHORT.get(word, word)
        draw.text((x, y), word, color, font, anchor="ma")
        x += width


def frame(step, row, teacher, student, probabilities, reply):
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    bold = ImageFont.load_default(18)
    font = ImageFont.load_default(14)
    draw.text((16, 10), f"stage 2, step {step}", "black", bold)

    # What each of them is given.
    draw.text((16, 44), "the teacher reads", "gray", font)
    draw.multiline_text((16, 64), textwrap.fill(row["instruction"], 34), "black", font)
    draw.text((330, 44), f"the student sees, and reads: {row['instruction_2']}", "gray", font)
    path = os.path.join(row["folder"], row["image_url_2"])
    picture = Image.open(path).convert("RGB")
    picture = picture.resize((128, 128), Image.Resampling.LANCZOS)
    image.paste(picture, (330, 66))
    draw.rectangle([330, 66, 458, 194], outline="#888888")

    # What the student says by itself.
    answer = row["output"].split("†")[-1]
    is_right = reply.endswith(answer)
    draw.text((480, 66), "asked, the student says", "gray", font)
    color = GREEN if is_right else RED
    said = textwrap.fill(reply.replace("†", "*"), 48)
    draw.multiline_text((480, 88), said, color, font)

    # First choices, position by position.
    draw.text((16, 204), "given answer", "gray", font)
    draw.text((16, 232), "teacher", "black", font)
    draw.text((16, 258), "student", "black", font)
    draw.text((16, 286), "p(teacher's)", "gray", font)
    n = len(student)
    agree = []
    for one, other in zip(teacher, student):
        agree.append(GREEN if one == other else RED)
    draw_words(draw, 204, row["given"], ["gray"] * n, font)
    draw_words(draw, 232, teacher, ["black"] * n, font)
    draw_words(draw, 258, student, agree, font)
    width = (SIZE[0] - 140) / n
    x = 120 + 4
    for p, color in zip(probabilities, agree):
        top = 302 - 20 * p
        draw.rectangle([x, top, x + width - 8, 302], fill=color)
        x += width
    draw.line([120, 302, SIZE[0] - 20, 302], fill="#888888")
    return image


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--init", default="out/stage1")
    parser.add_argument("--data", default="data")
    parser.add_argument("--steps", default="200")
    parser.add_argument("--out", default=os.path.join(HERE, "watch.gif"))
    args = parser.parse_args()
    row = JsonLines([os.path.join(args.data, "stage2_top.jsonl")])[PAIR]
    frames = []

    def draw_at_save(out, step, vlm, tokenizer, optimizer, run):
        """Stands in for save_checkpoint: a picture, no checkpoint."""
        limit = argparse.Namespace(on_policy_tokens=64)
        ids = tokenizer(row["output"], add_special_tokens=False).input_ids
        row["given"] = [tokenizer.decode([token]) for token in ids]
        row["given"].append(tokenizer.eos_token)
        with torch.no_grad():
            words = first_choices(vlm, tokenizer, row)
        reply = own_reply(vlm, tokenizer, row, limit)
        frames.append(frame(step, row, *words, reply))

    stage2.save_checkpoint = draw_at_save
    with tempfile.TemporaryDirectory() as folder:
        line = ["--init", args.init, "--data", args.data, "--out", folder, "--no-evaluate"]
        stage2.main([*line, "--steps", "0"])  # the first frame: before any step
        stage2.main([*line, "--steps", args.steps, "--save_every", str(EVERY)])

    small = [image.quantize(32) for image in frames]
    lasts = [250] * len(small)  # milliseconds
    lasts[-1] = 3000
    first = small.pop(0)
    first.save(args.out, save_all=True, append_images=small, duration=lasts, loop=0)
    print(f"wrote {args.out}: {len(frames)} frames, {os.path.getsize(args.out):,} bytes")


if __name__ == "__main__":
    main()

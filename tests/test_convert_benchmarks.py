"""convert/benchmarks.py: rows in three public formats become rows of eval.py's; the diagnosis."""
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import eval as evaluation
from convert import benchmarks
from data_gen import LADDER
from eval import KINDS

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SAMPLES = os.environ.get("BENCHMARKS", os.path.join(ROOT, "..", "shared", "benchmarks"))
IMAGE_VERSIONS = [version for version in LADDER if version != "text_only"]


# --------------------------------------------------------------------------------------------------
# Rows in the public formats, written for the tests

ANGLE = "How large is x?\nChoices:\nA:40°\nB:60°\nC:120°\nD:140°"
AREA = "Find the area."


def mathverse_rows(*versions):
    """In each version two problems, one with options and one without."""
    rows = []
    for version in versions:
        shown = version.replace("_", " ").title()
        for number, question in enumerate([ANGLE, AREA]):
            is_choice = question == ANGLE
            rows.append({
                "sample_index": str(len(rows) + 1),
                "problem_index": str(number),
                "problem_version": shown,
                "question": "" if version == "vision_only" else question,
                "image": "" if version == "text_only" else f"images/{number}.png",
                "answer": "C" if is_choice else "$9 \\pi \\mathrm{cm}^{2}$",
                "question_type": "multi-choice" if is_choice else "free-form",
                "metadata": {"subject": "Plane", "subfield": "Angle" if is_choice else "Area"},
                "query_cot": f"Please reason.\nQuestion: {question}",
                "question_for_eval": question,
            })
    return rows


def mathvista_rows():
    """{pid: row}, as the file is."""
    common = {
        "choices": None,
        "unit": None,
        "precision": None,
        "metadata": {"task": "figures", "skills": ["counting", "logic"]},
    }
    rows = {}
    for pid, question, answer, kind, more in [
            ("1", "Is it odd?", "No", "text", {"choices": ["Yes", "No"]}),
            ("2", "How long?", "1.2", "float", {"unit": "cm", "precision": 1}),
            ("10", "How many?", "4", "integer", {}),
            ("3", "Which three?", "[1, 2, 3]", "list", {})]:
        row = {"pid": pid, "question": question, "answer": answer, "answer_type": kind}
        rows[pid] = common | row | {"image": f"images/{pid}.jpg"} | more
    return rows


def wemath_rows(three="3steps"):
    """Four groups, in the order of the file: first the first steps of all; all answers are B."""
    groups = [("2steps_1", 2), ("2steps_2", 2), ("2steps_10", 2), (f"{three}_1", 3)]
    rows = []
    for part in ("1", "2", "3", "multi"):
        for name, n_steps in groups:
            if part == "3" and n_steps == 2:
                continue
            rows.append({
                "ID": name,
                "key": f"{n_steps}steps_{part}",
                "question": "a = ( ) m",
                "option": "A. 3, 5;B. 0.5, 50; C. 300, 50.;D. 30, 50; E. No correct answer",
                "answer": "B",
                "image_path": f"{n_steps}steps/image/{name[-1]}-{part}.png",
                "knowledge concept description": "Lengths",
            })
    return rows


ROWS = {
    "mathverse": mathverse_rows(*IMAGE_VERSIONS),
    "mathvista": mathvista_rows(),
    "wemath": wemath_rows(),
}
PICTURE_FIELD = {"mathverse": "image", "mathvista": "image", "wemath": "image_path"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder. In set/pictures are all pictures that the rows name."""
    monkeypatch.chdir(tmp_path)
    for benchmark, rows in ROWS.items():
        for row in rows.values() if benchmark == "mathvista" else rows:
            path = Path("set/pictures", row[PICTURE_FIELD[benchmark]])
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (9, 9), 255).save(path)
    return tmp_path


def convert(benchmark, *contents, images="set/pictures", out="set"):
    """-> the rows of --out/test.jsonl"""
    files = []
    for number, content in enumerate(contents):
        files.append(f"{number}.json")
        with open(files[-1], "w") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))
    benchmarks.main([benchmark, *files, "--images", images, "--out", out])
    with open(f"{out}/test.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def refused(*arguments, **options):
    """The one line with which it exits, and leaves nothing behind."""
    before = sorted(Path().rglob("test*"))
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments, **options)
    assert sorted(Path().rglob("test*")) == before
    assert "\n" not in stopped.value.code
    return stopped.value.code


def mark(reply, row):
    return evaluation.mark(row, reply).match


def by_id(rows):
    return {row["id"]: row for row in rows}


# --------------------------------------------------------------------------------------------------
# Rows

ASKED = "End with a line `Answer: X`, X being only the option letter or the value."


@pytest.mark.parametrize("benchmark", ROWS)
def test_every_row_has_what_eval_reads(folder, benchmark):
    rows = convert(benchmark, ROWS[benchmark])
    assert len(rows) == len(ROWS[benchmark])
    for row in rows:
        fields = ["id", "image_url", "instruction", "kind", "choices", "groups", "answer"]
        if benchmark == "mathverse":
            fields.insert(5, "version")
        assert list(row) == fields
        assert row["kind"] in KINDS
        assert row["instruction"].endswith(f"\n{ASKED}")
        assert os.path.isfile(f"set/{row['image_url']}")
        assert mark(f"Answer: {row['answer']}", row)
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)


def test_mathverse_has_all_six_versions(folder):
    rows = by_id(convert("mathverse", ROWS["mathverse"], mathverse_rows("text_only")))
    assert len(rows) == 12
    assert [row["version"] for row in rows.values()].count("vision_only") == 2
    assert {row["version"] for row in rows.values()} == set(LADDER)

    # Both files count from 1.
    first = rows["1"]
    assert first["version"] == "text_dominant"
    assert first["image_url"] == "pictures/images/0.png"
    assert first["instruction"] == f"Please reason.\nQuestion: {ANGLE}\n{ASKED}"
    assert first["groups"] == ["Plane", "Plane, Angle"]
    assert (first["kind"], first["answer"]) == ("choice", "C")
    assert first["choices"] == ["40°", "60°", "120°", "140°"]
    assert "A:40°" in Path("set/test.jsonl").read_text(encoding="utf-8")  # not \u00b0

    text = rows["text_only/2"]
    assert text["version"] == "text_only"
    assert text["image_url"] == ""
    assert text["groups"] == ["text_only/Plane", "text_only/Plane, Area"]
    assert (text["kind"], text["choices"]) == ("free", [])


def test_mathverse_finds_the_options(folder):
    """In the picture-only version, in a file without question_for_eval, and after "Choice:"."""
    vision_only = mathverse_rows("vision_only")
    old = mathverse_rows("text_lite")
    del old[0]["question_for_eval"]
    of_two = mathverse_rows("text_only")
    of_two[0] |= {"question_for_eval": "Is it?\nChoice:\nA. True\nB. False", "answer": "False"}
    for rows, expected in [(vision_only, ["40°", "60°", "120°", "140°"]),
                           (old, ["40°", "60°", "120°", "140°"]), (of_two, ["True", "False"])]:
        row = convert("mathverse", rows[:1])[0]
        assert row["choices"] == expected
        os.remove("set/test.jsonl")
    assert mark("Answer: B", row)


def test_mathvista_shows_choices_unit_and_precision(folder):
    rows = by_id(convert("mathvista", ROWS["mathvista"]))
    asked = {id: row["instruction"].removesuffix(f"\n{ASKED}") for id, row in rows.items()}
    assert asked == {
        "1": "Is it odd?\n(A) Yes\n(B) No\nanswer_type: text",
        "2": "How long?\nanswer_type: float\nunit: cm\ndecimal places: 1",
        "10": "How many?\nanswer_type: integer",
        "3": "Which three?\nanswer_type: list",
    }
    kinds = {id: row["kind"] for id, row in rows.items()}
    assert kinds == {"1": "choice_text", "2": "float", "10": "integer", "3": "list"}
    assert rows["1"]["choices"] == ["Yes", "No"]
    assert rows["2"]["choices"] is None
    assert rows["2"]["groups"] == ["figures", "counting", "logic"]


def test_wemath_brings_the_steps_of_a_group_together(folder):
    rows = convert("wemath", ROWS["wemath"])
    assert [row["id"] for row in rows] == [
        "2steps_1/2steps_1", "2steps_1/2steps_2", "2steps_1/2steps_multi",
        "2steps_10/2steps_1", "2steps_10/2steps_2", "2steps_10/2steps_multi",
        "2steps_2/2steps_1", "2steps_2/2steps_2", "2steps_2/2steps_multi",
        "3steps_1/3steps_1", "3steps_1/3steps_2", "3steps_1/3steps_3", "3steps_1/3steps_multi"]
    lines = [row["groups"] for row in rows]
    assert lines == [["S1"], ["S1"], ["S2"]] * 3 + [["S1"], ["S1"], ["S1"], ["S3"]]

    # Without the description of the knowledge, which the released code adds.
    option = ROWS["wemath"][0]["option"]
    assert rows[0]["instruction"] == f"a = ( ) m\n{option}\n{ASKED}"
    assert rows[0]["choices"] == ["3, 5", "0.5, 50", "300, 50", "30, 50", "No correct answer"]
    assert (rows[0]["kind"], rows[0]["answer"]) == ("choice", "B")


def test_wemath_is_spelled_in_two_ways(folder):
    """The copy in the released Math-PUMA code says 3stpes_1, We-Math's own file 3steps_1."""
    rows = convert("wemath", wemath_rows("3stpes"))
    os.remove("set/test.jsonl")
    assert rows == convert("wemath", wemath_rows("3steps"))


@pytest.mark.parametrize("text,options", [
    ("A. 0.7; B. .5", ["0.7", ".5"]),
    ("A:40°\nB:60°", ["40°", "60°"]),
    ("A：4；B．5", ["4", "5"]),
    ("A. 30, 50.; B. No correct answer", ["30, 50", "No correct answer"]),
    ("A. it gets shape ;C.;B. it does not", []),
    ("A. 1; C. 2", []),
    ("B. 1; A. 2", []),
    ("no options", []),
    ("", [])])
def test_options_in(text, options):
    assert benchmarks.options_in(text) == options


# --------------------------------------------------------------------------------------------------
# Files and pictures

def test_files_may_be_arrays_or_objects(folder):
    rows = convert("mathvista", ROWS["mathvista"])
    os.remove("set/test.jsonl")
    array = list(ROWS["mathvista"].values())
    assert convert("mathvista", "\ufeff" + json.dumps(array)) == rows


def test_images_are_those_of_out_unless_said_otherwise(folder, monkeypatch):
    with open("1.json", "w") as f:
        json.dump(ROWS["wemath"], f)
    benchmarks.main(["wemath", "1.json", "--out", "set/pictures"])
    assert '"image_url": "2steps/image/1-1.png"' in Path("set/pictures/test.jsonl").read_text()

    # Without --out it is the current folder.
    os.remove("set/pictures/test.jsonl")
    monkeypatch.chdir("set/pictures")
    benchmarks.main(["wemath", "../../1.json"])
    assert os.path.isfile("test.jsonl")


def test_text_alone_needs_no_picture(folder):
    os.mkdir("empty")
    rows = convert("mathverse", mathverse_rows("text_only"), images="empty", out="empty")
    assert [row["image_url"] for row in rows] == ["", ""]


def test_pictures_stay_inside_out(folder):
    Image.new("L", (9, 9)).save("outside.png")
    inside = Path("set/pictures/inside.png")
    inside.symlink_to("images/0.png")
    Path("set/pictures/link.png").symlink_to(folder / "outside.png")
    Path("set/pictures/text.png").write_text("no picture")
    row = mathverse_rows("text_lite")[0]

    # A link becomes the name of the file itself.
    assert convert("mathverse", [row | {"image": "inside.png"}])[0]["image_url"] == (
        "pictures/images/0.png")
    os.remove("set/test.jsonl")

    for name, words in [("link.png", "is not inside"), ("../../outside.png", "is not inside"),
                        (str(folder / "outside.png"), "is not inside"),
                        ("no.png", "No such file"), ("text.png", "cannot identify")]:
        message = refused("mathverse", [mathverse_rows("text_lite")[1], row | {"image": name}])
        assert message.startswith("0.json:row 2: ")
        assert words in message
        assert "as --images the folder in --out that its picture names start from" in message

    # A link to the folder is no reason to lose the pictures.
    Path("linked").symlink_to("set")
    for images, out in (("set/pictures", "linked"), ("linked/pictures", "set")):
        convert("mathverse", [row], images=images, out=out)
        os.remove("set/test.jsonl")

    # Pictures that are not in --out.
    os.mkdir("other")
    assert "0.json:row 1: " in refused("mathverse", [row], out="other")
    assert "no test.jsonl" in refused("mathverse", [row], images="set/no")


ROW = ROWS["wemath"][0]
VERSE = ROWS["mathverse"][0]
BAD = {  # what is wrong: (benchmark, content of the file, what is said)
    "not JSON": ("wemath", "{", "0.json: JSONDecodeError"),
    "a number": ("wemath", 5, "0.json: TypeError"),
    "rows that are none": ("wemath", ["a"], "0.json:row 1: TypeError"),
    "another benchmark's": ("wemath", mathvista_rows(), "0.json:row 1: KeyError('ID')"),
    "a version that is no text": (
        "mathverse", [VERSE | {"problem_version": None}], "0.json:row 1: AttributeError"),
    "no answer": ("wemath", [ROW | {"answer": None}], "0.json:row 1: ValueError('no answer or"),
    "an empty answer": ("wemath", [ROW | {"answer": ""}], "0.json:row 1: ValueError('no answer or"),
    "no picture": ("wemath", [ROW | {"image_path": ""}], "0.json:row 1: ValueError('no answer or"),
    "a picture that is no name": (
        "wemath", [ROW | {"image_path": {"bytes": 1}}], "0.json:row 1: TypeError"),
    "one id for two": ("wemath", [ROW, ROW], "0.json:row 2: ValueError('its id is there twice')"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_named(folder, fault):
    benchmark, content, words = BAD[fault]
    message = refused(benchmark, content)
    assert message.startswith(words)
    assert f"give the testmini.json of {benchmark}" in message


def test_a_file_that_is_not_there(folder):
    with pytest.raises(SystemExit, match="^no.json: FileNotFoundError.*give the testmini.json"):
        benchmarks.main(["wemath", "no.json", "--out", "set"])


def test_what_is_there_is_not_overwritten(folder):
    Path("set/test.jsonl").write_text("precious")
    assert refused("wemath", ROWS["wemath"]) == (
        "give as --out a folder with the pictures and no test.jsonl")
    assert Path("set/test.jsonl").read_text() == "precious"


def test_the_file_is_complete_when_it_gets_its_name(folder, monkeypatch):
    seen = []

    def fail(part, path):
        seen.append((len(part.read_text().splitlines()), path.exists()))
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        convert("wemath", ROWS["wemath"])
    assert seen == [(13, False)]

    monkeypatch.undo()  # what is left of it is in nobody's way
    os.chdir(folder)
    assert len(convert("wemath", ROWS["wemath"])) == 13
    assert not list(Path("set").glob("*.part"))


def test_as_a_command(folder, monkeypatch, capsys):
    with open("1.json", "w") as f:
        json.dump(mathverse_rows("text_only"), f)
    command = "benchmarks.py mathverse 1.json --out set"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ROOT])
    runpy.run_path(os.path.join(ROOT, "convert", "benchmarks.py"), run_name="__main__")
    assert capsys.readouterr().out == f"{folder}/set/test.jsonl: 2 rows\n"
    assert sys.path[0] == ROOT  # model.py is there, and the script's own folder is convert/


# --------------------------------------------------------------------------------------------------
# The diagnosis

# Right in the groups: all | the composite and a step | the steps, no composite | the composite only
RIGHT = {"2steps_1": "12m", "2steps_2": "1m", "2steps_10": "12", "3steps_1": "m"}
DIAGNOSIS = """\
4 groups have all their steps and count, in %
S1       55.6  n=9
S2       66.7  n=3
S3      100.0  n=1
        score     IK     IG     CM     RM
strict   37.5    0.0   25.0   25.0   66.7
loose    62.5    0.0   25.0   50.0   33.3
rule-based: not comparable with judge-based papers
"""


def replies():
    """Lines of a replies.jsonl."""
    lines = []
    for row in wemath_rows():
        mark = row["key"].split("_")[1][0] in RIGHT[row["ID"]]
        lines.append({"id": f"{row['ID']}/{row['key']}", "reply": "Answer: B", "match": mark})
    return lines


def diagnose(lines):
    with open("replies.jsonl", "w") as f:
        for line in lines:
            f.write(json.dumps(line) + "\n")
    benchmarks.main(["diagnosis", "replies.jsonl"])


def test_diagnosis_by_hand(tmp_path, monkeypatch, capsys):
    """Of 4 groups one is mastered, one right with one step of two, one IG, one right by rote."""
    monkeypatch.chdir(tmp_path)
    for lines in (replies(), replies()[::-1]):  # the composite is not always the last
        diagnose(lines)
        assert capsys.readouterr().out == DIAGNOSIS

    misspelled = json.dumps(replies()).replace('"3steps_1/', '"3stpes_1/')
    diagnose(json.loads(misspelled))
    assert capsys.readouterr().out == DIAGNOSIS


def test_diagnosis_counts_whole_groups_only(tmp_path, monkeypatch, capsys):
    """As after eval.py --limit; a step may be missing, or the composite."""
    monkeypatch.chdir(tmp_path)
    lines = {line["id"]: line for line in replies()}
    del lines["2steps_1/2steps_1"]
    del lines["2steps_10/2steps_2"]
    del lines["3steps_1/3steps_multi"]
    diagnose(lines.values())
    out = capsys.readouterr().out
    assert out.startswith("1 groups have all their steps")
    assert "S1       50.0  n=2\nS2      100.0  n=1\n   " in out
    assert "strict    0.0    0.0    0.0    0.0  100.0\n" in out
    assert "loose   100.0    0.0    0.0  100.0    0.0\n" in out


def test_diagnosis_of_wrong_composites(tmp_path, monkeypatch, capsys):
    """IK: the composite and a step wrong, the same in both rules. None is right: no RM."""
    monkeypatch.chdir(tmp_path)
    lines = replies()
    for line in lines:
        line["match"] = line["id"] == "2steps_1/2steps_1"
    diagnose(lines)
    out = capsys.readouterr().out
    assert "strict    0.0  100.0    0.0    0.0    0.0\nloose     0.0  100.0    0.0" in out


def test_what_cannot_be_diagnosed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^no.jsonl: .*give a replies.jsonl that eval.py wrote"):
        benchmarks.main(["diagnosis", "no.jsonl"])
    Path("torn.jsonl").write_text('{"id": "2steps_1/2steps_1", "ma')
    with pytest.raises(SystemExit, match="^torn.jsonl: .*give a replies.jsonl"):
        benchmarks.main(["diagnosis", "torn.jsonl"])
    with pytest.raises(SystemExit, match="^replies.jsonl: KeyError.'match'.: give a replies"):
        diagnose([{"id": "2steps_1/2steps_1", "reply": "B"}])
    for lines in ([], [{"id": "12", "match": True}, {"id": "text_only/1", "match": True}]):
        with pytest.raises(SystemExit, match="no group of We-Math's has all its steps"):
            diagnose(lines)


# --------------------------------------------------------------------------------------------------
# Through eval.py

def evaluate(replies):
    """replies: {id: reply}. -> eval.json"""
    with open("given.jsonl", "w", encoding="utf-8") as f:
        for id, reply in replies.items():
            f.write(json.dumps({"id": id, "reply": reply}) + "\n")
    evaluation.main(["--replies", "given.jsonl", "--data", "set"])
    return json.loads(Path("given_marked/eval.json").read_text())


def test_from_files_to_a_report(folder):
    rows = convert("mathverse", ROWS["mathverse"], mathverse_rows("text_only"))
    given = {row["id"]: f"Answer: {row['answer']}" for row in rows}
    given["10"] = "Answer: 9"  # the second problem as vision_only
    result = evaluate(given)
    assert list(result["versions"]) == list(LADDER)
    assert result["versions"]["text_only"]["correct"] == 2
    assert result["versions"]["vision_only"]["correct"] == 1
    assert result["groups"]["Plane"] == {"correct": 9, "n": 10, "unparsed": 0}
    assert result["groups"]["Plane, Area"]["n"] == 5
    assert result["groups"]["text_only/Plane, Area"]["n"] == 1


def test_from_files_to_a_diagnosis(folder, capsys):
    rows = convert("wemath", ROWS["wemath"])
    given = {}
    for row, line in zip(rows, sorted(replies(), key=lambda line: line["id"])):
        assert row["id"] == line["id"]
        given[row["id"]] = "Answer: B" if line["match"] else "Answer: C"
    result = evaluate(given)
    assert result["groups"]["S1"] == {"correct": 5, "n": 9, "unparsed": 0}
    capsys.readouterr()
    benchmarks.main(["diagnosis", "given_marked/replies.jsonl"])
    assert capsys.readouterr().out == DIAGNOSIS


# --------------------------------------------------------------------------------------------------
# The real files

SPELLINGS = ("Answer: {}", "†Answer: {}", "$\\boxed{{{}}}$", "The answer is {}.", "{}")


@pytest.mark.parametrize("benchmark,name,n_rows", [
    ("mathverse", "mathverse_testmini_text_only", 40),
    ("mathvista", "mathvista_testmini", 40),
    ("wemath", "wemath_testmini", 38)])
def test_right_answers_of_the_real_files(benchmark, name, n_rows, tmp_path, monkeypatch):
    """Each given back in five spellings, and each option as letter, letter and text, or text."""
    path = os.path.join(SAMPLES, f"{name}.sample.json")
    if not os.path.isfile(path):
        pytest.skip("the samples are not here; name their folder in BENCHMARKS")
    monkeypatch.setattr(benchmarks, "find_picture", lambda name, images, out: name)
    benchmarks.main([benchmark, path, "--out", str(tmp_path)])
    with open(tmp_path / "test.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == n_rows

    for row in rows:
        for spelling in SPELLINGS:
            reply = spelling.format(row["answer"])
            assert mark(reply, row), row["id"]
        for letter, option in zip("ABCDEFGHIJ", row["choices"] or []):
            if row["choices"].count(option) > 1:
                continue
            expected = row["answer"] == (option if row["kind"] == "choice_text" else letter)
            for reply in (f"Answer: {letter}", f"Answer: {letter}. {option}", f"Answer: {option}"):
                assert mark(reply, row) == expected, (row["id"], reply)

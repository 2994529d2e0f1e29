"What comes in by a folder, a list or a pipe, and what goes out: a row for every picture, whatever its name is."
import io
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import photograph, shaken
from PIL import Image

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.training.learner import focus_learner
from fd_focus.use.cli import fd_focus_evaluate, fd_focus_predict
from fd_focus.use.files import Rows, answered, find_pictures, listed, no_formula, predict_files
from fd_focus.use.model_folder import save_focus
from fd_focus.use.predict import FocusClassifier

CODES = "\x1b[2J", "\u202e", "\n", "\x9b1m"
EVIL = f"crow{''.join(CODES)}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "`models(*classes, **config)` makes a folder of one untrained model that knows these three, anew each time."
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dls = FocusDataLoaders.from_toy(2, 1, image_size=64, n_classes=3, bs=2, num_workers=0)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, preset=None)
    shaken(learn.model)
    def make(*classes, **config):
        folder = save_focus(learn, place / str(len(list(place.iterdir()))))
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | dict(classes=classes or list(dls.vocab)) | config))
        return folder
    return make


@pytest.fixture(scope="module")
def model(models): return models("crow", "rook", "jay")


@pytest.fixture(scope="module")
def classifier(model): return FocusClassifier.load(model, "cpu")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "Six pictures, 0.png to 5.png, in a folder that is the working folder's `photos`."
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(6): photograph(i).save(f"photos/{i}.png")
    return Path("photos")


def answers(model, *paths, encoding="utf-8", stdin=None, work=fd_focus_predict, **kwargs):
    "The command in this process, on an output of an encoding: what it writes there, and its exit status."
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        if stdin is not None: patch.setattr(sys, "stdin", stdin)
        try: status = work(str(model), *paths, device="cpu", **kwargs) or 0
        except SystemExit as end: status = end.code
    output.flush()
    return output.buffer.getvalue().decode(encoding, "surrogateescape"), status


def strict(line):
    "A JSON line, by the letter of the standard."
    def refuse(name): raise ValueError(f"{name} is no JSON")
    return json.loads(line, parse_constant=refuse)


# Names of all kinds

@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_an_output_of_any_encoding_takes_every_name(models, photos, encoding):
    names = ["山雀", "Blåmes", "\U0001f426\ud800"]
    model = models(*names)
    os.rename(photos / "5.png", photos / "é\udcff山.png")
    table, status = answers(model, [str(photos)], encoding=encoding)
    assert status == 0 and table.count("\n") == 7 and table.count("photos/") == 6
    assert ("Blåmes" in table) == (encoding != "ascii") and ("\\u5c71\\u96c0" in table) == (encoding != "utf-8")
    lines, status = answers(model, [str(photos)], encoding=encoding, format="jsonl")
    rows = list(map(strict, lines.splitlines()))
    assert status == 0 and {name for row in rows for name, _ in row["top5"]} == set(names)
    assert rows[-1]["file"] == "photos/é\udcff山.png"
    Path("judged").mkdir()
    photos.rename("judged/Blåmes")
    text, status = answers(model, "judged", encoding=encoding, work=fd_focus_evaluate, out="judged.csv")
    assert status == 0 and "of 6 pictures right" in text and "Bl" in text
    assert "é\udcff山.png" in Path("judged.csv").read_text(encoding="utf-8", errors="surrogateescape")
    assert answers(model, ["judged"], out="rows.csv")[1] == 0 and len(list(open("rows.csv", "rb"))) == 7


def test_codes_in_names_do_not_steer_the_terminal(models, photos, capsys):
    "But a file of rows, and JSON anywhere, have the names as they are."
    model, name = models(EVIL, "rook", "jay"), f"photos/{EVIL}.png"
    os.rename(photos / "5.png", name)
    Path("photos", f"{EVIL}.jpg").write_text("no picture")
    Path("photos", f"x.{EVIL}").write_text("no picture")
    harmful = ("\x1b", "\u202e", "\x9b")
    with pytest.warns(DataWarning): table, status = answers(model, ["photos"], csv_safe=True)
    assert status == 1 and table.count("\n") == 8 and not any(code in table for code in harmful)
    assert table.count(r"crow\x1b[2J\u202e\n\x9b1m.jpg") >= 2               # in the row, and in its error
    with pytest.warns(DataWarning): lines, _ = answers(model, ["photos"], format="jsonl")
    assert name in [strict(line)["file"] for line in lines.splitlines()] and not any(code in lines for code in harmful)
    with pytest.warns(DataWarning): answers(model, ["photos"], out="rows.csv")
    assert name in set(pd.read_csv("rows.csv").file)
    Path("judged").mkdir()
    photos.rename(f"judged/{EVIL}")
    text, _ = answers(model, "judged", work=fd_focus_evaluate)
    assert "1 could not be read" in text and not any(code in text for code in harmful)
    assert text.count("\n") == 1 + str(text).rstrip().count("\n")
    said = answers(models("crow", "rook", "jay"), "judged", work=fd_focus_evaluate)[1]
    assert "which the model does not know" in said and not any(code in said for code in (*harmful, "\n"))
    told = capsys.readouterr().err
    assert not any(code in told for code in harmful)


def test_a_warning_of_a_command_is_a_line_without_codes(model, photos):
    Path("photos", f"x.{EVIL}").write_text("no picture")
    run = subprocess.run([Path(sys.executable).parent / "fd_focus_predict", model, "photos", "--device", "cpu"],
                         capture_output=True, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    lines = run.stderr.decode("ascii").splitlines()
    assert run.returncode == 0 and len(lines) == 2 and lines[1].startswith("6 pictures in ")
    assert lines[0] == ("DataWarning: left out, for they are no pictures that can be read: 1 "
                        r".crow\x1b[2j\u202e\n\x9b1m")


def test_cells_that_a_spreadsheet_would_compute(models, photos):
    model = models("=cmd|' /C calc'!A0", "+rook", "@jay")
    os.rename("photos", "-photos")
    for kwargs in (dict(), dict(out="rows.csv")):
        text = answers(model, ["-photos"], csv_safe=True, **kwargs)[0] or Path("rows.csv").read_text()
        table = pd.read_csv(io.StringIO(text))
        assert set(table.label) <= {"'=cmd|' /C calc'!A0", "'+rook", "'@jay"} and table.file[0] == "'-photos/0.png"
    plain = pd.read_csv(io.StringIO(answers(model, ["-photos"])[0]))
    assert plain.file[0] == "-photos/0.png" and plain.score_1.equals(table.score_1)
    assert answers(model, ["-photos"], out="rows.csv", csv_safe=True, resume=True)[1] == 0
    assert len(pd.read_csv("rows.csv")) == 6
    Path("judged").mkdir()
    os.rename("-photos", "judged/+rook")
    answers(model, "judged", work=fd_focus_evaluate, out="judged.csv", csv_safe=True)
    assert set(pd.read_csv("judged.csv").label) == {"'+rook"}
    assert [no_formula(text) for text in ("=1", "\t=1", "a=1", "")] == ["'=1", "'\t=1", "a=1", ""]


class Terminal(io.TextIOWrapper):
    def isatty(self): return True


def test_lines_for_a_person(model, photos):
    "On a terminal a line a picture; a table when it is asked for."
    Path("photos", "broken.png").write_text("no picture")
    for kwargs in (dict(), dict(format="csv")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", screen := Terminal(io.BytesIO(), encoding="utf-8"))
            with pytest.raises(SystemExit): fd_focus_predict(str(model), ["photos"], device="cpu", **kwargs)
        screen.flush()
        lines = screen.buffer.getvalue().decode().splitlines()
        assert len(lines) == (8 if kwargs else 7) and lines[0].startswith("file," if kwargs else "photos/0.png  ")
    text = answers(model, ["photos"], format="text")[0]
    assert len({line.index("%") for line in text.splitlines() if "%" in line}) == 1      # the columns stand in line
    assert "cannot be read as a picture" in text.splitlines()[-1]
    status = answers(model, ["photos"], format="text", out="a.txt", resume=True)[1]
    assert "--resume reads what it has written" in str(status)


# What comes in

@pytest.mark.parametrize("data", [b"\xef\xbb\xbfcaf\xc3\xa9.jpg\nb.jpg\r\n", "café.jpg\nb.jpg\n".encode("utf-16"),
                                  b"caf\xc3\xa9.jpg\nb.jpg"])
def test_a_list_may_have_a_mark_at_its_beginning(tmp_path, data):
    (tmp_path / "list.txt").write_bytes(data)
    with open(tmp_path / "list.txt", encoding="ascii") as stream:
        assert list(find_pictures(["-"], listed(stream))) == ["café.jpg", "b.jpg"]
    assert list(find_pictures(["-"], listed(io.StringIO("\ufeffcafé.jpg\n\nb.jpg")))) == ["café.jpg", "b.jpg"]


def test_a_program_that_waits_for_each_answer_gets_it(model, photos):
    args = [Path(sys.executable).parent / "fd_focus_predict", model, "-", "--device", "cpu", "--format", "jsonl"]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        late = threading.Timer(120, run.kill)
        late.start()
        for name in ("photos/0.png", "gone.png", "photos/1.png"):
            run.stdin.write(f"{name}\n")
            run.stdin.flush()
            assert strict(run.stdout.readline())["file"] == name
        run.stdout.close()                     # it has seen enough, while the list may go on
        run.stdin.write("photos/2.png\n")
        run.stdin.flush()
        assert run.wait() == 1
        late.cancel()


def test_a_slow_source_is_answered_as_it_comes(classifier, photos):
    got = threading.Event()
    def asked():
        for name in ("0.png", "1.png", "gone.png"):
            got.clear()
            yield photos / name
            assert got.wait(60), f"no answer about {name} before the next is asked"
        raise KeyError("the camera")
    with pytest.raises(KeyError, match="the camera"):
        for _ in classifier.stream(asked(), bs=4): got.set()
    assert got.is_set()


def test_what_is_left_of_a_stream_ends_with_it(classifier, photos):
    "No thread goes on to take from a source that nobody asks any more."
    taken, before = [], threading.active_count()
    def names():
        while True: yield taken.append(1) or photos / "0.png"
    stream = classifier.stream(names(), bs=2)
    next(stream)
    stream.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon: thread.join(5)
    assert len(taken) <= 6 and threading.active_count() <= before


def test_the_network_works_while_answers_are_used(classifier, photos, monkeypatch):
    second, answers, asked = threading.Event(), classifier._answers, []
    def watched(prepared):
        asked.append(len(prepared))
        if len(asked) == 2: second.set()
        return answers(prepared)
    monkeypatch.setattr(classifier, "_answers", watched)
    for n, _ in enumerate(classifier.stream([photos / "0.png"] * 6, bs=2)):
        if n == 0: assert second.wait(60), "the second batch waits until the first one has been used"
    assert asked == [2, 2, 2]


def test_what_goes_wrong_in_the_network_comes_in_its_place(classifier, photos, monkeypatch):
    answers, asked, found = classifier._answers, [], []
    def tired(prepared):
        asked.append(len(prepared))
        if len(asked) == 2: raise RuntimeError("out of memory")
        return answers(prepared)
    monkeypatch.setattr(classifier, "_answers", tired)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        for source, _ in classifier.stream([photos / f"{i}.png" for i in range(6)], bs=2): found.append(source.name)
    assert found == ["0.png", "1.png"] and len(asked) == 2 and threading.active_count() <= before + 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_what_is_no_regular_file_is_an_error(model, photos):
    os.mkfifo("photos/a.jpg")
    os.symlink("/dev/zero", "photos/b.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("photos/c.jpg")
        lines, status = answers(model, ["photos", "photos/a.jpg"], format="jsonl", regions="seen", bs=2)
        rows = list(map(strict, lines.splitlines()))
        assert status == 1 and ["error" in row for row in rows] == [False] * 6 + [True] * 4
        assert all("it is no regular file" in row["error"] for row in rows[6:])
        Path("judged").mkdir()
        photos.rename("judged/crow")
        text, _ = answers(model, "judged", work=fd_focus_evaluate, out="judged.csv")
    assert "of 9 pictures right" in text and "3 could not be read and count as wrong" in text
    assert pd.read_csv("judged.csv").error.str.contains("it is no regular file").sum() == 3


def test_what_belongs_to_a_system_is_left_out_as_in_training(photos):
    from fd_focus.data.tables import class_folders
    from fd_focus.use.evaluate import labelled_pictures
    Path("all").mkdir()
    photos.rename("all/crow")
    for name in (".thumbnails", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"):
        for place in (Path("all", name), Path("all/crow", name)):
            place.mkdir()
            photograph().save(place / "x.png")
    photograph().save("all/crow/._0.png", "PNG")
    found = [Path(name).name for name in find_pictures(["all"])]
    assert found == [f"{i}.png" for i in range(6)] == [Path(name).name for name in class_folders(Path("all")).file]
    assert len(labelled_pictures("all", ["crow"])) == 6


# Answers that are none

@pytest.fixture
def damaged(monkeypatch):
    "Every model that is loaded answers NaN; one that comes so from its folder is refused there."
    load = FocusClassifier.load
    def worse(*args, **kwargs):
        found = load(*args, **kwargs)
        found.pipeline.temperature = 1e-300
        return found
    monkeypatch.setattr(FocusClassifier, "load", worse)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_answer_of_nan_is_an_error(damaged, model, photos, kind):
    text, status = answers(model, [str(photos)], format=kind, regions="seen")
    assert status == 1 and text.count("the model's answer is no number") == 6 and "nan" not in text.lower()
    if kind == "jsonl": assert [set(strict(line)) for line in text.splitlines()] == [{"file", "error"}] * 6
    assert not list(Path("seen").rglob("*.png"))
    classifier = FocusClassifier.load(model, "cpu")
    for asked in (photos / "0.png", [photos / "0.png"]):
        with pytest.raises(ValueError, match="the model's answer is no number"): classifier.predict(asked)
    said = str(predict_files(classifier, map(str, photos.iterdir()), Rows(io.StringIO(), kind, 3, 4)))
    assert said.endswith("the model folder is broken, and no picture is to blame")


def test_one_answer_of_nan_costs_no_other(model, photos, monkeypatch):
    classifier = FocusClassifier.load(model, "cpu")
    look = classifier.pipeline.net.look
    def sometimes(x):
        found = look(x)
        found.answer[1], found.boxes[2], found.scores[3] = torch.nan, torch.inf, torch.inf
        return found
    monkeypatch.setattr(classifier.pipeline.net, "look", sometimes)
    text = io.StringIO()
    tally = predict_files(classifier, sorted(photos.glob("*.png")), Rows(text, "jsonl", 3, classifier.pipeline.n_boxes))
    rows = list(map(strict, text.getvalue().splitlines()))
    assert ["error" in row for row in rows] == [False, True, True, False, False, False] and tally.failed == 2
    assert "broken" not in str(tally)
    assert set(rows[3]["scores"]) == {None}


def test_where_all_answers_are_nan_nothing_is_judged(damaged, model, photos):
    Path("judged").mkdir()
    photos.rename("judged/crow")
    said = answers(model, "judged", work=fd_focus_evaluate)[1]
    assert "none of the 6 pictures could be answered; the first: the model's answer is no number" in said


# Drawings

def test_a_long_name_gets_a_drawing_all_the_same(model, photos):
    names = ["x" * 251 + ".png", "x" * 250 + "y.png", "山" * 80 + ".bmp", "山" * 80 + ".gif", "é" * 60 + ".png"]
    for name in names: photograph().save(f"photos/{name}")
    for _ in range(2):
        lines, status = answers(model, ["photos"], format="jsonl", regions="seen")
        assert status == 0 and lines.count("\n") == 11
        drawn = [file.name for file in Path("seen/photos").iterdir()]
        assert len(drawn) == 11 and max(len(os.fsencode(name)) for name in drawn) <= 200
        assert names[-1] in drawn                # names that fit stay


def test_a_drawing_that_cannot_be_written_is_one_row_with_an_error(model, photos):
    "A file lies where its folder should be; the other drawings and all answers are there."
    Path("photos/sub.png").mkdir()
    photograph().save("photos/sub.png/z.png")
    answers(model, ["photos/0.png"], regions="seen")
    Path("seen/photos/sub.png").write_text("in the way")
    lines, status = answers(model, ["photos"], format="jsonl", regions="seen")
    rows = list(map(strict, lines.splitlines()))
    assert status == 1 and all("label" in row for row in rows)
    assert ["error" in row for row in rows] == [False] * 6 + [True]
    assert rows[-1]["error"].startswith("not drawn: ") and len(list(Path("seen/photos").glob("?.png"))) == 6


# Going on

def shape(classifier): return dict(classes=classifier.classes, boxes=classifier.pipeline.n_boxes)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_wherever_a_run_was_killed_it_goes_on(model, classifier, photos, kind):
    "With names that take several lines of a table; the file ends as if nothing had happened."
    os.rename("photos/3.png", "photos/3\n\"é\n.png")
    assert answers(model, ["photos", "photos/0.png"], out="rows", format=kind)[1] == 0
    whole = Path("rows").read_bytes()
    for cut in range(0, len(whole) + 1, 5):
        Path("cut").write_bytes(whole[:cut])
        done = answered("cut", kind, **shape(classifier))
        kept = Path("cut").read_bytes()
        assert whole.startswith(kept) and len(kept) >= min(cut, whole.index(b"\n") + 1 if kind == "csv" else 0)
        assert kept.count(b"photos/") == len(done) and (kept.endswith(b"\n") or not kept)
    for cut in (0, len(whole) // 2, len(whole)):
        Path("cut").write_bytes(whole[:cut])
        assert answers(model, ["photos", "photos/0.png"], out="cut", format=kind, resume=True)[1] == 0
        assert Path("cut").read_bytes() == whole


def test_going_on_tries_again_what_had_an_error(model, photos, capsys):
    Path("photos/1.png").rename("away.png")
    listed = [f"photos/{i}.png" for i in range(4)]
    assert answers(model, listed, out="rows.csv", resume=True)[1] == 1           # nothing there yet: it begins
    Path("away.png").rename("photos/1.png")
    assert answers(model, listed, out="rows.csv", resume=True)[1] == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith(", 3 more answered before")
    table = pd.read_csv("rows.csv")
    assert list(table.file) == [f"photos/{i}.png" for i in (0, 2, 3, 1)] and table.error.isna().all()
    assert answers(model, listed, out="rows.csv", resume=True)[1] == 0
    assert capsys.readouterr().err.splitlines()[-1] == "all 4 pictures were answered before"
    assert pd.read_csv("rows.csv").equals(table)


def test_going_on_keeps_the_drawings_of_before(model, photos):
    "a.bmp and a.bmp.png would be drawn at one place; the second must not take it when the first is known already."
    photograph(1, (60, 40)).save("photos/a.bmp")
    photograph(2, (40, 60)).save("photos/a.bmp.png")
    names = ["photos/a.bmp", "photos/a.bmp.png"]
    answers(model, names[:1], out="rows.csv", regions="seen")
    answers(model, names, out="rows.csv", regions="seen", resume=True)
    drawn = {file.name: Image.open(file).height for file in Path("seen/photos").iterdir()}
    assert set(drawn) == {"a.bmp.png", "a.bmp.2.png"} and drawn["a.bmp.png"] < drawn["a.bmp.2.png"]     # lying, upright


@pytest.mark.parametrize("text", ["file,label\na.png,crow\n", "my notes", "my notes\n", '{"label": "crow"}\n', '"open',
                                  '{"file": "a.png", "error": "x"}\n', "[1]\n"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_of_other_things_is_left_alone(model, photos, text, kind):
    if kind == "jsonl" and "error" in text: return                              # that one is right
    Path("rows").write_text(text)
    said = answers(model, ["photos"], out="rows", format=kind, resume=True)[1]
    assert "rows is no " in said and "give another file" in said and Path("rows").read_text() == text


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_answers_of_another_model_are_left_alone(models, model, photos, kind):
    answers(model, ["photos"], out="rows", format=kind)
    before = Path("rows").read_bytes()
    other = models("kite", "heron", "swan")
    assert "rows has answers of another model" in answers(other, ["photos"], out="rows", format=kind, resume=True)[1]
    assert "give --out as well" in answers(model, ["photos"], resume=True)[1]
    assert Path("rows").read_bytes() == before and [file.name for file in Path().glob(".rows*")] == []

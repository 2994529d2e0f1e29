"What is wrong with a folder or a CSV, and how it is said."
import os
import shutil
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import photograph, two_classes

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning
from fd_focus.data.splits import fold_split, stratified_split
from fd_focus.data.tables import check_apart, check_table, csv_table, folder_table, with_parts

pytestmark = pytest.mark.usefixtures("no_memory_of_earlier_checks")


@pytest.fixture
def folder(tmp_path): return two_classes(tmp_path / "pictures")


def loaders(folder, **kwargs):
    return FocusDataLoaders.from_folder(folder, **dict(dict(image_size=32, bs=4, num_workers=0), **kwargs))


def test_real_photographs(data):
    table = folder_table(data / "cars_sedan33")
    assert dict(table.split.value_counts()) == {"train": 924, "valid": 513} and table.label.nunique() == 33
    chosen = folder_table(data / "cars_sedan33", valid_pct=0.2)      # to choose on, the 513 left alone
    assert (
        len(chosen) == 924
        and set(chosen.file) == set(table.file[table.split == "train"])
        and chosen.groupby("label").split.nunique().eq(2).all()
    )


def test_halves_are_known_by_other_names_too(folder):
    for train, other, judged in (("Training", "Test", "test"), ("train", "validation", "valid"),
                                 ("TRAIN", "Val", "valid"), ("train", "testing", "test")):
        root = folder.parent / f"{train}-{other}"
        for i, half in enumerate((train, other)):
            shutil.copytree(
                folder,
                root / half,
                ignore=lambda _, names, i=i: [n for n in names if n.endswith(".jpg") and int(n[:2]) // 2 % 2 == i],
            )
        table = folder_table(root)
        assert set(table.label) == {"a", "b"} and table.attrs["judged_by"] == judged
        assert (
            all(
                file.startswith(f"{train}/" if split == "train" else f"{other}/")
                for file, split in zip(table.file, table.split)
            )
            and len(table) == 16
        )
    shutil.copytree(folder, root / "valid")
    # the test half is left for later
    assert folder_table(root).attrs["judged_by"] == "valid" and len(folder_table(root)) == 24


def test_classes_one_level_deeper(folder):
    high = folder.parent / "high"
    shutil.copytree(folder, high / "birds")
    with pytest.raises(ValueError, match="only one class, birds, .*: a, b. If .*: give .*high/birds$"):
        folder_table(high)
    with pytest.raises(ValueError, match="one level deeper"): loaders(high)
    shutil.copytree(folder, high / "mammals")                               # folders in class folders are all right
    assert set(folder_table(high).label) == {"birds", "mammals"}
    halves = folder.parent / "halves"
    for name in ("train", "holdout"): shutil.copytree(folder, halves / name)
    with pytest.raises(
        ValueError, match=r"train in .*halves: named like halves .* \(a, b\).* train and valid .* give .*halves/train$"
    ):
        folder_table(halves)
    (halves / "holdout").rename(halves / "Validate")
    (halves / "train").rename(halves / "test")
    with pytest.raises(ValueError, match="test in .*named like halves"): folder_table(halves)
    photograph(50).save(halves / "test" / "x.jpg")                          # pictures of its own: a class
    assert set(folder_table(halves).label) == {"test", "Validate"}
    for name in ("train", "valid"): shutil.copytree(folder, folder.parent / "two" / name / "birds")
    with pytest.raises(ValueError, match="only one class, birds, .*move them up, into .*two/train, .*two/valid"):
        folder_table(folder.parent / "two")
    only = folder.parent / "only"
    # one class and nothing below it: no folders to name
    shutil.copytree(folder / "a", only / "a")
    with pytest.raises(ValueError, match="only one class, a; a classifier needs at least 2"): loaders(only)


def test_unread_kinds_are_counted(folder):
    for i, name in enumerate(["x.JXL", "y.jxl", "deep/z.cr2", ".hidden.jxl", "notes.txt", "box.xml"]):
        (folder / "ab"[i % 2] / name).parent.mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / name).write_text("")
    with pytest.warns(
        DataWarning,
        match=r"^3 files in class folders of .*pictures are left out: .cr2 1, .jxl 2; convert them to JPEG or PNG$",
    ):
        folder_table(folder)
    photograph(77).save(folder / "a" / "more.jfif", "JPEG")
    with pytest.warns(DataWarning): assert "a/more.jfif" in set(folder_table(folder).file)


def test_hidden_folders_are_no_data(folder):
    before = folder_table(folder)
    for place in ("a/.thumbnails", "a/deep/.cache", "a/__MACOSX", "__MACOSX/a", ".trash", "@eaDir", "b/@eaDir/x",
                  "lost+found", "System Volume Information", "$RECYCLE.BIN", "#recycle", ".ipynb_checkpoints"):
        (folder / place).mkdir(parents=True)
        photograph(60).save(folder / place / "0.jpg")
    photograph(61).save(folder / "._loose.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert folder_table(folder).equals(before)
        before.to_csv(folder / "split.csv", index=False)
        assert folder_table(folder).equals(before)


def test_what_fastai_writes_is_no_class(folder):
    before = folder_table(folder)
    (folder / "models").mkdir()                                             # as lr_find leaves it
    assert folder_table(folder).equals(before)
    (folder / "models" / "best.pth").write_bytes(b"weights")                # learn.save
    assert folder_table(folder).equals(before)
    (folder / "models" / "x.jxl").write_bytes(b"")                         # somebody's models
    with pytest.warns(DataWarning, match=".jxl 1"), pytest.raises(ValueError, match="without pictures: models"):
        folder_table(folder)
    photograph(60).save(folder / "models" / "x.jpg")
    with pytest.warns(DataWarning): assert set(folder_table(folder).label) == {"a", "b", "models"}


def test_pictures_are_known_by_their_content(folder):
    "Whatever their names end in; what is none, and seems to be one by its name, is counted."
    before = set(folder_table(folder).file)
    names = {"no_ending": "PNG", "x.jpg_large": "JPEG", "x.jif": "JPEG", "x.apng": "PNG", "x.jpeg~": "WEBP",
             "x.mpo": "JPEG", "x.avif": "AVIF", "x.jp2": "JPEG2000", "x.pgm": "PPM", "x.mp3": "GIF"}
    for i, (name, kind) in enumerate(names.items()): photograph(100 + i).save(folder / "a" / name, kind)
    for name in ("notes.txt", "box.xml"): (folder / "b" / name).write_text("PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert set(folder_table(folder).file) - before == {f"a/{name}" for name in names}
        assert len(loaders(folder).table) == 16 + len(names)
    photograph(1).save(folder / "b" / "x.nef", "TIFF")                      # a thumbnail would be read
    for name in ("cut.jpg_large", "README", "x.tga"): (folder / "b" / name).write_text("no picture")
    os.mkfifo(folder / "b" / "pipe")
    with pytest.warns(DataWarning, match="5 files .*: .jpg_large 1, .nef 1, .tga 1, no ending 2; convert"):
        assert len(folder_table(folder)) == 16 + len(names)


NFC, NFD = (unicodedata.normalize(form, "m\u00e9sange") for form in ("NFC", "NFD"))


def test_two_forms_of_an_accent_are_one_class(folder):
    for half, form in (("train", NFC), ("test", NFD)):
        for name, to in (("a", form), ("b", "b")): shutil.copytree(folder / name, folder.parent / "two" / half / to)
    table = folder_table(folder.parent / "two")
    assert set(table.label) == {NFC, "b"} and table.groupby("label").split.nunique().eq(2).all()
    for form, name in ((NFC, "a"), (NFD, "b")): shutil.copytree(folder / name, folder.parent / "beside" / form)
    with pytest.raises(ValueError, match="only one class, m\u00e9sange"): loaders(folder.parent / "beside")
    (folder.parent / "beside" / unicodedata.normalize("NFD", "caf\u00e9")).mkdir()
    with pytest.raises(ValueError, match="class folders without pictures: caf\u00e9"):
        folder_table(folder.parent / "beside")


def test_what_valid_pct_leaves_out(folder):
    rows = folder_table(folder).drop(columns="split")
    with_half = lambda name: rows.assign(split=[name if i % 4 == 0 else "train" for i in range(16)]).to_csv(
        folder / "split.csv", index=False
    )
    for name in ("valid", "val"):
        with_half(name)
        with pytest.warns(DataWarning, match="valid_pct=0.5 .* the 4 of the validation half; leave valid_pct away"):
            assert len(folder_table(folder, .5)) == 12
    for name in ("test", "train"):
        with_half(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            assert len(folder_table(folder, .5)) == {"test": 12, "train": 16}[name]
    (folder / "split.csv").unlink()
    for half in ("train", "valid", "test"): shutil.copytree(folder, folder.parent / "halves" / half)
    with pytest.warns(DataWarning, match="leaves out the 16 of the validation half"):
        folder_table(folder.parent / "halves", 0.5)
    shutil.rmtree(folder.parent / "halves" / "valid")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        folder_table(folder.parent / "halves", .5)


def test_pictures_that_a_csv_does_not_list(folder):
    rows = folder_table(folder)
    rows[2:].to_csv(folder / "split.csv", index=False)
    for read in (lambda: folder_table(folder), lambda: csv_table(folder / "split.csv")):
        with pytest.warns(
            DataWarning, match="split.csv does not list 2 of the pictures in .*, which are left out, such as a/00.jpg"
        ):
            assert len(read()) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        rows[2:].to_csv(folder / "part.csv", index=False)                       # any other CSV may be about a part
        csv_table(folder / "part.csv")
        # listed, though the test half is for later
        halves = np.resize(["train", "valid", "test"], 16)
        rows.assign(split=halves).to_csv(folder / "split.csv", index=False)
        folder_table(folder)
        rows.assign(file=[f"./{f}" if i % 2 else str(folder / f) for i, f in enumerate(rows.file)]).to_csv(
            folder / "split.csv", index=False
        )
        assert len(folder_table(folder)) == 16


def test_blanks_in_a_csv(folder):
    rows = folder_table(folder)
    text = "file, label, split, x0, y0, x1, y1\n" + "".join(
        f"{r.file} , {r.label}\t, {r.split} , 1, 2, 30, 40\n" for r in rows.itertuples()
    )
    (folder / "split.csv").write_text(text)
    table = folder_table(folder)
    assert table[["file", "label", "split"]].equals(rows) and table.box[0].tolist() == [1, 2, 30, 40]
    (folder / "split.csv").write_text('file,label,split\na/00.jpg, "crow, black", train\nb/01.jpg,jay ,train\n')
    with pytest.warns(DataWarning): assert csv_table(folder / "split.csv").label.tolist() == ["crow, black", "jay"]
    for label in ("  ", " \t "):
        (folder / "named.csv").write_text(f"file,label\na/00.jpg,a\nb/01.jpg,{label}\n")
        with pytest.raises(ValueError, match="line 3 has no file or no label"): csv_table(folder / "named.csv")
    (folder / "named.csv").write_text("file,label\na/00.jpg,a\na/00.jpg ,b\n")
    with pytest.raises(ValueError, match="a/00.jpg on lines 2, 3"): csv_table(folder / "named.csv")
    (folder / "named.csv").write_text("file,label,split\n\na/00.jpg,a,\nb/01.jpg,b,\n")
    with pytest.raises(ValueError, match=r"unknown split \(none\)"): csv_table(folder / "named.csv")


def test_a_file_instead_of_its_folder(folder):
    folder_table(folder).to_csv(folder / "split.csv", index=False)
    for read in (folder_table, FocusDataLoaders.from_folder):
        with pytest.raises(ValueError, match="split.csv is a file: give the folder that holds it"):
            read(folder / "split.csv")
        with pytest.raises(FileNotFoundError, match="no folder .*nowhere"): read(folder / "nowhere")


def test_loose_pictures_are_named(folder):
    photograph(99).save(folder / "loose.jpg")
    with pytest.warns(DataWarning, match="1 pictures in .* lie in no class folder and are left out: loose.jpg"):
        folder_table(folder)


def test_what_lies_beside_the_halves_is_told(folder):
    "A class folder or picture beside train/ and test/; the test half itself is left for later, without a word."
    place = folder.parent / "halves"
    for half in ("train", "valid", "Test"): shutil.copytree(folder, place / half)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = folder_table(place)
    shutil.copytree(folder / "a", place / "c")
    photograph(50).save(place / "loose.jpg")
    n = len(list((folder / "a").iterdir())) + 1
    with pytest.warns(
        DataWarning,
        match=f"^{n} pictures in .*halves lie beside its halves Test, train, valid and are left out: c/00.jpg",
    ):
        beside = folder_table(place)
    assert beside.equals(alone)


def test_a_class_may_be_called_none(folder):
    table = folder_table(folder)
    table.assign(label=table.label.replace(table.label[0], "None")).to_csv(folder / "named.csv", index=False)
    assert "None" in set(csv_table(folder / "named.csv").label)
    table.assign(label=table.label.replace(table.label[0], "")).to_csv(folder / "named.csv", index=False)
    with pytest.raises(ValueError, match="has no file or no label"): csv_table(folder / "named.csv")


def test_links_are_followed_and_circles_end(folder):
    away = folder.parent / "away"
    shutil.copytree(folder / "a", away)
    (folder / "a" / "more").symlink_to(away)
    (folder / "a" / "circle").symlink_to(folder / "a")
    assert (folder_table(folder).label == "a").sum() == 2 * len(list(away.iterdir()))


def test_a_folder_to_be_written_is_no_class(folder):
    for what in (folder / "runs" / "train", folder, folder / "kept"):
        with pytest.raises(
            ValueError, match="lies among the class folders of .* and would be taken for one; give a folder elsewhere"
        ):
            check_apart(what, folder, "--out")
    check_apart(folder / ".kept", folder, "cache"); check_apart(folder.parent / "kept", folder, "cache")
    with pytest.raises(ValueError, match="^cache .*kept lies among the class folders"):
        FocusDataLoaders.from_folder(folder, image_size=32, bs=4, num_workers=0, cache=folder / "kept")
    halves = folder.parent / "halves"
    for half in ("train", "test"): shutil.copytree(folder, halves / half)
    # train/ and test/ say what the classes are
    check_apart(halves / "runs", halves, "--out")


@pytest.mark.parametrize("text, says", [
    ("name,label\na.jpg,x\n", "has no column file; it has name, label"),
    ("file,label\n", "has no rows"),
    ("", "has no column file, label; it has $"),
    ("file,label,split\na.jpg,x,holdout\n", "unknown split holdout; use train, and valid or test"),
    ("file,label,is_valid\na.jpg,x,perhaps\n", "unknown is_valid perhaps; use True or False"),
    ("file,label\na.jpg,x,train\n", r"line 2 has 3 fields, more than the header names \(file, label\)"),
    ("file,label\n\na.jpg,x\nb.jpg,crow, black\n", "line 4 has 3 fields"),
    ("file,Label,label\na.jpg,x,y\n", "has more than one column label"),
    ('file,label\na.jpg,"x\nb.jpg,y\nc.jpg,y\n', "line 4 ends a field that began on a line before"),
    ("file,label\na.jpg,x\n./a.jpg,y\n", "lists 1 files more than once, such as a.jpg on lines 2, 3"),
    ("file,label,x0,y0,x1,y1\na.jpg,x,1,2,30,wide\n", "the box on line 2 has what is no number"),
    ("file,label\na.jpg,x\nb.jpg,x\na.jpg,y\n", "lists 1 files more than once, such as a.jpg on lines 2, 4"),
    ("file,label,x0,y0,x1\na.jpg,x,1,2,3\n", "has x0, y0, x1; a box needs x0, y0, x1 and y1"),
    ("file,label,x0,y0,x1,y1\na.jpg,x,1,2,30,40\nb.jpg,y,9,9,9,12\n", "the box on line 3 is empty"),
])
def test_what_is_wrong_with_a_csv(tmp_path, text, says):
    (tmp_path / "sheet.csv").write_text(text)
    with pytest.raises(ValueError, match=f"sheet.csv.*{says}"): csv_table(tmp_path / "sheet.csv")


def test_a_csv_that_is_no_utf8(tmp_path):
    (tmp_path / "sheet.csv").write_bytes("file,label\n1.jpg,Bussard\n2.jpg,Kr\xe4he\n".encode("latin1"))
    with pytest.raises(ValueError, match="sheet.csv cannot be read as a CSV table in UTF-8: 'utf-8' codec"):
        csv_table(tmp_path / "sheet.csv")
    with pytest.raises(FileNotFoundError, match="no file .*gone.csv"): csv_table(tmp_path / "gone.csv")


@pytest.mark.parametrize("lines, encoding", [
    ("file,label,split,\n{}/0.jpg,a,Train,\nb/1.jpg,b,Validation,\n", "utf-8"),          # a comma too many
    ("file,label,split\n{}/0.jpg,a,training,,\n\n,,\nb/1.jpg,b,VAL,,\n", "utf-8-sig"),
    (" File ;LABEL; Split;Note\n{}/0.jpg;a;train;\nb/1.jpg;b;valid\n", "utf-8"),          # a row too short
    ("file\tlabel\tis_valid\r\n{}/0.jpg\ta\tFalse\r\nb/1.jpg\tb\tTrue\r\n", "utf-16"),      # Excel's "Unicode text"
    ("file,label,is_valid\n{}\\0.jpg,a,0\nb\\1.jpg,b,1\n", "utf-8"),                      # from Windows
])
@pytest.mark.parametrize("name", [NFC, NFD])
def test_csvs_that_are_about(tmp_path, lines, encoding, name):
    "Whatever a spreadsheet or a person writes; the file is called as it is on the disk."
    for file in (f"{NFD}/0.jpg", "b/1.jpg"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    (tmp_path / "split.csv").write_bytes(lines.format(name).encode(encoding))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        table = folder_table(tmp_path)
    assert table[["file", "label", "split"]].to_numpy().tolist() == [[f"{NFD}/0.jpg", "a", "train"],
                                                                     ["b/1.jpg", "b", "valid"]]
    assert table.attrs["judged_by"] == "valid" and csv_table(tmp_path / "split.csv", .5).attrs["judged_by"] == "train"


def test_a_split_csv_stays_in_its_folder(folder):
    photograph(70).save(folder.parent / "secret.jpg")
    for name in ("../secret.jpg", "..\\secret.jpg", "a/../../secret.jpg", str(folder.parent / "secret.jpg")):
        text = f"file,label,split\na/00.jpg,a,train\n{name},b,train\na/02.jpg,b,test\n"
        for file in ("split.csv", "mine.csv"): (folder / file).write_text(text)
        for read in (lambda: folder_table(folder), lambda: csv_table(folder / "split.csv")):
            with pytest.raises(ValueError, match="split.csv: line 3 names .*secret.jpg, which lies outside of"):
                read()
        assert len(csv_table(folder / "mine.csv")) == 3                      # its owner says so
    (folder / "split.csv").write_text(f"file,label\na/00.jpg,a\n{folder}/b/01.jpg,b\n")
    with pytest.warns(DataWarning, match="does not list 14"): folder_table(folder)


@pytest.mark.parametrize("other", ["robin", "ROBIN", "Robin ", "Robin\u200b", "Ro\u00adbin", "Robin\xa0", "\uff32obin"])
def test_classes_that_look_alike_are_told(folder, other):
    (folder / "a").rename(folder / "Robin")
    shutil.copytree(folder / "Robin", folder / other)
    with pytest.warns(DataWarning) as said: loaders(folder)
    told, = [str(w.message) for w in said if "look alike" in str(w.message)]
    assert "'Robin'" in told and repr(other) in told
    assert all(f"U+{ord(c):04X}" in told for c in set(other) - set("Robin"))


def test_data_frames_are_read_as_csvs_are(folder):
    rows = folder_table(folder)
    of = lambda table: FocusDataLoaders.from_table(table, folder, image_size=32, bs=4, num_workers=0)
    plain = of(rows)
    three = rows.assign(split=np.resize(["train", "Train ", "valid", "test"], 16)).drop(index=[2, 6])
    for table in (three, three.assign(split=three.split.astype("category"))):
        dls = of(table)                                                     # neither trained on nor judged by
        assert not set(three.file[three.split == "test"]) & set(dls.table.file) and dls.judged_by == "valid"
    assert of(rows.assign(split=np.resize(["train", "train", "test"], 16))).judged_by == "test"
    valid = rows.split == "valid"
    for table in (rows.assign(file=rows.file.map(Path)), rows.assign(file=rows.file.str.replace("/", "\\")),
                  rows.drop(columns="split").assign(is_valid=valid),
                  rows.drop(columns="split").assign(is_valid=valid.astype(int)), rows.set_axis([0] * 16)):
        same = of(table).table
        assert same.file.tolist() == plain.table.file.tolist() and same.split.tolist() == plain.table.split.tolist()
    mixed = of(rows.assign(label=[7 if label == "a" else "crow" for label in rows.label]))
    assert list(mixed.vocab) == ["7", "crow"]
    boxed = of(rows.assign(x0=1, y0=2, x1=30, y1=40))
    assert boxed.table.box.iloc[0].tolist() == [1, 2, 30, 40]


@pytest.mark.parametrize("change, says", [
    (dict(label=[None] + ["a"] * 15), "row 0 has no file or no label"),
    (dict(file=["x"] * 15 + [np.nan]), "row 15 has no"),
    (dict(label=["a"] * 15 + [" "]), "row 15 has no file or no label"),
    (dict(file=["a/00.jpg"] * 2 + ["b"] * 14), "lists 2 files more than once, such as a/00.jpg on rows 0, 1"),
    (dict(label=[["a", "b"]] * 16), r"row 0 has several labels, \['a', 'b'\]; a picture is of one class here"),
    (dict(split=[np.nan] * 16), r"unknown split \(none\)"), (dict(x0=1), "the table has x0; a box needs"),
])
def test_what_is_wrong_with_a_data_frame(folder, change, says):
    table = folder_table(folder).assign(**change)
    with pytest.raises(ValueError, match=says): FocusDataLoaders.from_table(table, folder)


def test_a_data_frame_that_is_none(folder):
    rows = folder_table(folder)
    for table, says in ((rows.drop(columns="file"), "the table has no column file; it has label, split"),
                        (rows.drop(columns="split"), r"no column split \(or is_valid\); it has file, label"),
                        (rows[:0], "the table has no rows")):
        with pytest.raises(ValueError, match=says): FocusDataLoaders.from_table(table, folder)
    with pytest.raises(TypeError, match="give a pandas DataFrame, not dict"): FocusDataLoaders.from_table({}, folder)


def test_folders_without_pictures(folder, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no pictures in .*nothing: put them into one folder a class"):
        folder_table(tmp_path / "nothing")
    (folder / "finch").mkdir()
    with pytest.raises(ValueError, match="class folders without pictures: finch; fill or remove them"):
        folder_table(folder)
    (folder / "finch" / "a.jxl").write_text("")
    with pytest.warns(DataWarning), pytest.raises(ValueError, match="finch has .jxl; known are .apng"):
        folder_table(folder)


def test_tables_that_cannot_be_trained_on(folder):
    for splits, says in ((["train", "holdout"], "the table: unknown split holdout; use train, and valid or test"),
                         (["train", None], r"unknown split \(none\)"),
                         (["train"] * 2, "there are no validation pictures"),
                         (["valid"] * 2, "there are no training pictures")):
        table = folder_table(folder).assign(split=splits * 8)
        if "unknown" not in says:
            with pytest.raises(ValueError, match=says): check_table(table)
        with pytest.raises(ValueError, match=says): FocusDataLoaders.from_table(table, folder, image_size=32, bs=4)
    one = pd.DataFrame(dict(label=["a", "a"], split=["train", "valid"]))
    with pytest.raises(ValueError, match="only one class, a"): check_table(one)
    with pytest.raises(ValueError, match="classes of which no picture is left: b"): check_table(one, {"a", "b"})


def test_a_share_of_every_class():
    labels = pd.Series(list("aaaaaaaaaabbbbbcc") + ["d"])
    for seed in range(5):
        held = stratified_split(labels, .2, seed)
        assert pd.Series(held).groupby(labels).sum().to_dict() == {"a": 2, "b": 1, "c": 1, "d": 0}
    for pct in (0, 1, -.1):
        with pytest.raises(ValueError, match="use a share between 0 and 1"): stratified_split(labels, pct)


def test_folds_judge_every_picture_once(tmp_path):
    for label, n in dict(crow=7, jay=4).items():
        (tmp_path / label).mkdir()
        for i in range(n): photograph(i).save(tmp_path / label / f"{i}.jpg")
    folds = [folder_table(tmp_path, f"{i}/3") for i in (1, 2, 3)]
    assert sorted(file for table in folds for file in table.file[table.split == "valid"]) == sorted(folds[0].file)
    assert all(table.attrs["judged_by"] == "train" for table in folds)
    for wrong in ("4/3", "0/3", "3", "1/1"):
        with pytest.raises(ValueError, match="such as 2/5"): fold_split(folds[0].label, wrong)
    with pytest.raises(ValueError, match="no class has more than 7 pictures: use fewer"): folder_table(tmp_path, "1/8")
    (tmp_path / "owl").mkdir()
    photograph().save(tmp_path / "owl/0.jpg")
    with pytest.raises(ValueError, match="class 'owl' has a single picture"): folder_table(tmp_path, "1/3")


# Parts

def write_parts(folder, text): (folder / "parts.csv").write_text("file,part,x,y\n" + text)


def test_parts_beside_every_layout(folder):
    "The same points, whichever way the folder says what its pictures are."
    write_parts(folder, "a/00.jpg,tail,1,2\n a/00.jpg , beak ,63.5,48\nb/15.jpg,beak,0,0\n")
    plain = folder_table(folder)
    rows = plain[["file", "label"]]
    for names in (rows.file, "./" + rows.file, [str(folder / file) for file in rows.file]):
        rows.assign(file=names, split=np.resize(["train", "test"], 16)).to_csv(folder / "split.csv", index=False)
        for table in (folder_table(folder), plain):
            assert table.attrs["part_names"] == ["beak", "tail"]
            assert table.parts[0].tolist() == [[63.5, 48, 0], [1, 2, 0]] and table.parts[0].dtype == np.float32
            assert np.stack(table.visible).sum(0).tolist() == [2, 1] and table.visible[15].tolist() == [True, False]
            assert np.isnan(np.stack(table.box)).all()
    chosen = folder_table(folder, valid_pct=.5)           # parts of pictures that are left for later do no harm
    assert len(chosen) == 8 and chosen.attrs == {"judged_by": "train", "part_names": ["beak", "tail"]}


def test_parts_of_boxed_pictures_keep_the_boxes(folder):
    folder_table(folder).assign(x0=1, y0=2, x1=30, y1=40).to_csv(folder / "split.csv", index=False)
    write_parts(folder, "a/00.jpg,tail,1,2\n")
    assert folder_table(folder).box[0].tolist() == [1, 2, 30, 40]
    dls = loaders(folder)
    assert dls.truth(["a/00.jpg"])["parts"].shape == (1, 1, 3) and dls.table.attrs["part_names"] == ["tail"]


@pytest.mark.parametrize("text, says", [
    ("a/00.jpg,tail,1,2\na/99.jpg,tail,1,2\n", r"line 3 names a/99.jpg, which is not in .*pictures$"),
    ("a/00.jpg,tail,1,2\na/02.jpg,tail,1,\n", "line 3 has no number for x or y"),
    ("a/00.jpg,tail,left,2\n", "line 2 has no number for x or y"),
    ("a/00.jpg,tail,inf,2\n", "line 2 has no number for x or y"),
    ("a/00.jpg,,1,2\n", "line 2 has no file or no part"), (",tail,1,2\n", "line 2 has no file or no part"),
    ("a/00.jpg,tail,1,2\na/00.jpg,beak,1,2\n./a/00.jpg,tail,3,4\n", "line 4 names a part for the second time"),
    ("a/00.jpg,tail,1,2\na/02.jpg,tail,64.5,2\na/04.jpg,tail,1,-1\n",
     r"line 3: \(64.5, 2\) lies outside of a/02.jpg, which has 64x48 pixels; 2 of 3 points do"),
])
def test_what_is_wrong_with_parts(folder, text, says):
    write_parts(folder, text)
    with pytest.raises(ValueError, match=f"parts.csv: {says}"): folder_table(folder)


def test_parts_without_a_column(folder):
    (folder / "parts.csv").write_text("file,name,x,y\na/00.jpg,tail,1,2\n")
    with pytest.raises(ValueError, match="parts.csv has no column part; it has file, name, x, y"): folder_table(folder)
    with pytest.raises(FileNotFoundError, match="no file .*points.csv"):
        with_parts(pd.DataFrame({"file": ["a/00.jpg"]}), folder / "points.csv")


def test_a_broken_picture_with_parts_is_left_to_the_loaders(folder):
    (folder / "a" / "00.jpg").write_bytes(b"no picture")
    write_parts(folder, "a/00.jpg,tail,1000,2\na/02.jpg,tail,1,2\n")
    with pytest.raises(ValueError, match="1 of 16 pictures cannot be read"): loaders(folder)
    with pytest.warns(DataWarning): dls = loaders(folder, on_bad_image="skip")
    assert len(dls.table) == 15 and dls.table.attrs["part_names"] == ["tail"]


def test_parts_of_real_birds(data):
    table = folder_table(data / "cub_birds50")
    points = pd.read_csv(data / "cub_birds50" / "parts.csv")
    assert len(table) == 2952 and np.stack(table.visible).sum() == len(points) == 35022
    one = points.iloc[20_000]
    row, place = table.set_index("file").loc[one.file], table.attrs["part_names"].index(one.part)
    assert row.visible[place] and np.allclose(row.parts[place], [one.x, one.y, 0], atol=1e-4)

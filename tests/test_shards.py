"Shards: the same training as from the folder, and nothing that is damaged, foreign or half written taken for whole."
import io
import json
import os
import pickle
import shutil
import signal
import socket
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import photograph, two_classes
from PIL import Image
from safetensors.torch import load_file

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.data.pictures import DataWarning, open_image
from fd_focus.data.shards import ShardReader, check_shards, index_shards, is_shards, packed, read_index, write_shards
from fd_focus.training.checkpoint import facts, read_checkpoint
from fd_focus.training.learner import focus_learner
from fd_focus.use.cli import fd_focus_shards
from fd_focus.use.commands import fd_focus_train

pytestmark = pytest.mark.usefixtures("no_memory_of_earlier_checks")
SMALL = dict(image_size=32, bs=4, num_workers=0)
TINY = dict(arch="toy_resnet", pretrained=False, preset="none", image_size=48, epochs=3, bs=4)


@pytest.fixture
def photos(tmp_path): return two_classes(tmp_path / "photos")


@pytest.fixture
def shards(photos, tmp_path): return write_shards(photos, tmp_path / "shards", megabytes=.004)


def batches(dls, seed=0):
    "Two epochs."
    dls.train.rng.seed(seed)
    torch.manual_seed(0)             # of crops and flips
    return [(x.clone(), y.clone()) for _ in range(2) for x, y in dls.train]


def equal(first, second):
    return len(first) == len(second) and all(x.equal(x2) and y.equal(y2) for (x, y), (x2, y2) in zip(first, second))


@pytest.mark.parametrize("given", [
    {}, dict(valid_pct=.5, seed=3), dict(valid_pct="2/4"), dict(balance=True), dict(squash=False, crop_scale=.5),
    dict(cache="ram"), dict(num_workers=2)], ids=str)
def test_the_same_batches_as_from_the_folder(photos, shards, given):
    ours, theirs = (make(place, **SMALL | given) for make, place in (
        (FocusDataLoaders.from_shards, shards), (FocusDataLoaders.from_folder, photos)))
    assert len(list(shards.glob("*.tar"))) > 3
    assert (ours.judged_by, list(ours.vocab), ours.geometry) == (theirs.judged_by, list(theirs.vocab), theirs.geometry)
    assert ours.fingerprints == theirs.fingerprints and list(ours.table.file) == list(theirs.table.file)
    found = batches(ours)
    assert equal(found, batches(theirs)) and not equal(found, batches(ours, seed=1))


def test_one_shard_and_two_workers(photos, tmp_path):
    one = write_shards(photos, tmp_path / "one")
    assert len(list(one.glob("*.tar"))) == 1
    two, none = (FocusDataLoaders.from_shards(one, **SMALL | dict(num_workers=n)) for n in (2, 0))
    assert equal(batches(two), batches(none))


@pytest.mark.parametrize("halves", [("train", "valid"), ("train", "test")])
def test_a_split_of_its_own(photos, tmp_path, halves):
    for i, half in enumerate(halves):
        for file in sorted(photos.glob("?/*.jpg"))[i::2]:
            (place := tmp_path / "split" / half / file.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    out = write_shards(tmp_path / "split", tmp_path / "shards")
    assert sorted(file.name for file in out.glob("*.tar")) == sorted(f"{half}-000000.tar" for half in halves)
    dls = FocusDataLoaders.from_shards(out, **SMALL)
    assert dls.judged_by == halves[1] and dls.table.split.value_counts().to_dict() == {"train": 8, "valid": 8}
    assert {Path(file).parts[0] for file in dls.train_ds.items} == {"train"}


def test_names_of_all_kinds(tmp_path):
    "Dots, accents in two spellings, a class with a slash, the same name in two classes, endings in capitals."
    photos = tmp_path / "photos"
    names = ["a/St. Kilda wren.2.jpg", "b/St. Kilda wren.2.jpg", "a/wren.jpg", "a/wren.old.JPG", "b/zaunkönig.jpg",
             "b/zaunko\u0308nig 2.png", "b/ミソサザイ, \"x\"\n.jpg", "a/deeper/wren.jpg"]
    for i, name in enumerate(names):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(i).save(photos / name)
    label = ["Troglodytes/hirtensis" if name[0] == "a" else "NA" for name in names]
    table = pd.DataFrame(dict(file=names, label=label, split=["train", "valid"] * 4))
    out = write_shards(photos, tmp_path / "shards", table, megabytes=.005)
    read, index = ShardReader(out), read_index(out)
    assert index.file.tolist() == names and index.label.tolist() == label
    for name in names: assert read.file_bytes(name) == (photos / name).read_bytes()
    dls = FocusDataLoaders.from_shards(out, **SMALL | dict(bs=2))
    assert list(dls.vocab) == ["NA", "Troglodytes/hirtensis"] and len(dls.train_ds) == 4


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_text(photos, tmp_path):
    shutil.copy(photos / "a/00.jpg", os.fsdecode(os.fsencode(photos / "a") + b"/caf\xe9.jpg"))
    out = write_shards(photos, tmp_path / "shards")
    dls = FocusDataLoaders.from_shards(out, **SMALL)
    assert "a/caf\udce9.jpg" in set(dls.table.index)
    assert ShardReader(out)("a/caf\udce9.jpg").size == (64, 48)


def test_pictures_are_opened_as_files_are(tmp_path):
    "Orientation, transparency and 16 bits, at reading; the bytes stay."
    photos, exif = tmp_path / "photos", Image.Exif()
    for name in "ab": (photos / name).mkdir(parents=True)
    exif[0x0112] = 6
    photograph(0).save(photos / "a/turned.jpg", exif=exif)
    photograph(1).convert("RGBA").save(photos / "a/clear.png")
    Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20).save(photos / "b/deep.png")
    photograph(2, (900, 700)).save(photos / "b/large.jpg")
    out = write_shards(photos, tmp_path / "shards")
    for side in (None, 64):
        read = ShardReader(out, side)
        for file in photos.glob("?/*"):
            image = read(file.relative_to(photos).as_posix())
            assert np.array_equal(image, open_image(file, side))
    assert read("a/turned.jpg").size == (48, 64) and read("b/large.jpg").size == (113, 88)


def test_webdataset_reads_them(shards, photos):
    wds = pytest.importorskip("webdataset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(wds.WebDataset([str(file) for file in sorted(shards.glob("*.tar"))], shardshuffle=False))
    assert len(samples) == 16 and len({sample["__key__"] for sample in samples}) == 16
    for sample in samples:
        known = json.loads(sample["json"])
        assert sample["jpg"] == (photos / known["file"]).read_bytes()
        assert "ab"[int(sample["cls"])] == known["label"]


def written_by_webdataset(folder, broken=()):
    wds = pytest.importorskip("webdataset")
    folder.mkdir()
    for half, count in (("train", 26), ("val", 13)):
        with wds.ShardWriter(str(folder / f"{half}-%04d.tar"), maxcount=10, verbose=0) as writer:
            for i in range(count):
                stream = io.BytesIO()
                photograph(i + 100 * (half == "val")).save(stream, "JPEG")
                data = b"no picture" if (half, i) in broken else stream.getvalue()
                writer.write({"__key__": f"{half}{i:04d}", "jpg": data, "cls": i % 13})
    return folder


def test_reads_shards_of_webdataset(tmp_path):
    there = written_by_webdataset(tmp_path / "theirs")
    assert is_shards(there)
    with pytest.raises(FileNotFoundError, match="fd_focus_shards .*theirs makes one"):
        FocusDataLoaders.from_shards(there, **SMALL)
    assert "39 pictures of 13 classes in 5 shards" in packed(there)
    dls = FocusDataLoaders.from_shards(there, **SMALL)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.judged_by) == (26, 13, "valid")
    assert list(dls.vocab) == [f"{i:02d}" for i in range(13)]      # in the order of their numbers
    assert len(set(dls.fingerprints)) == 39
    assert [int(y) for _, y in dls.valid_ds] == list(range(13))


def test_a_class_may_be_a_name(tmp_path):
    there = tmp_path / "theirs"
    there.mkdir()
    for half in ("train", "test"):
        with tarfile.open(there / f"{half}.tar", "w") as tar:
            for i, label in enumerate(("wren", "tit/great")):
                photograph(i + 7 * (half == "test")).save(stream := io.BytesIO(), "PNG")
                add(tar, f"some/where.{i}/{i}.cls", label.encode())
                add(tar, f"some/where.{i}/{i}.PNG", stream.getvalue())
    index_shards(there)
    dls = FocusDataLoaders.from_shards(there, **SMALL | dict(bs=2))
    assert (list(dls.vocab), dls.judged_by) == (["tit/great", "wren"], "test")
    assert list(dls.train_ds.items) == ["train.tar/some/where.0/0.png", "train.tar/some/where.1/1.png"]


def test_shards_of_others_that_count_from_0(tmp_path):
    "The same name in two shards is two pictures."
    (there := tmp_path / "theirs").mkdir()
    for k in range(2):
        with tarfile.open(there / f"train-{k}.tar", "w") as tar:
            for i in range(4):
                photograph(i + 10 * k).save(stream := io.BytesIO(), "PNG")
                add(tar, f"{i}.png", stream.getvalue())
                add(tar, f"{i}.json", json.dumps(dict(file=f"{i}.png", label="ab"[i % 2])).encode())
    index_shards(there)
    dls = FocusDataLoaders.from_shards(there, valid_pct=.5, **SMALL)
    assert sorted(dls.table.index) == [f"train-{k}.tar/{i}.png" for k in range(2) for i in range(4)]
    assert len(set(dls.fingerprints)) == 8


def test_broken_pictures_of_others_are_named(tmp_path):
    there = written_by_webdataset(tmp_path / "theirs", broken=[("train", 11)])
    with pytest.raises(ValueError, match=r"1 of 39 pictures .* cannot be read .*\n.*train0011.jpg in train-0001.tar"):
        index_shards(there)
    assert not (there / "shards.json").exists()
    with pytest.warns(DataWarning, match="1 of 39 pictures .* are left out"): index_shards(there, "skip")
    assert len(FocusDataLoaders.from_shards(there, **SMALL).train_ds) == 25


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_a_sample_without_a_class_is_named(tmp_path):
    (tmp_path / "theirs").mkdir()
    stream = io.BytesIO()
    photograph().save(stream, "PNG")
    with tarfile.open(tmp_path / "theirs/train.tar", "w") as tar:
        add(tar, "one.png", stream.getvalue())
        add(tar, "one.json", b'{"caption": "a wren"}')
    with pytest.raises(ValueError, match="train.tar: one has no class: it needs a part .cls"):
        index_shards(tmp_path / "theirs")


def test_broken_pictures_are_not_packed(photos, tmp_path):
    (photos / "a/broken.jpg").write_bytes((photos / "a/00.jpg").read_bytes()[:300])
    with pytest.raises(ValueError, match="1 of 17 pictures cannot be read"): write_shards(photos, tmp_path / "shards")
    assert sorted(os.listdir(tmp_path)) == ["photos"]
    with pytest.warns(DataWarning): write_shards(photos, tmp_path / "shards", on_bad_image="skip")
    assert len(read_index(tmp_path / "shards")) == 16


def test_doubles_are_said_once(photos, tmp_path):
    shutil.copy(photos / "a/00.jpg", photos / "b/copy.jpg")
    with pytest.warns(DataWarning, match="1 picture under two labels") as said: write_shards(photos, tmp_path / "both")
    assert len(said) == 1
    with pytest.warns(DataWarning): write_shards(photos, tmp_path / "less", on_duplicate="drop")
    assert [len(read_index(tmp_path / name)) for name in ("both", "less")] == [17, 15]


def kill_at_third(folder):
    "In a process of its own: writes shards, and is killed in the middle."
    import fd_focus.data.shards as module
    write, seen = module._write_tar, []
    def until_third(*args):
        seen.append(args)
        if len(seen) == 3: os.kill(os.getpid(), signal.SIGKILL)
        write(*args)
    module._write_tar = until_third
    write_shards(folder / "photos", folder / "shards", megabytes=.004)


def test_a_killed_writer_leaves_no_shards(photos, processes, tmp_path):
    process = processes(kill_at_third, tmp_path)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "shards").exists()
    assert len(read_index(write_shards(photos, tmp_path / "shards"))) == 16


def test_an_interrupted_writer_cleans_up(photos, tmp_path, monkeypatch):
    import fd_focus.data.shards as module
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(module, "index_shards", stop)
    with pytest.raises(KeyboardInterrupt): write_shards(photos, tmp_path / "shards")
    assert os.listdir(tmp_path) == ["photos"]


@pytest.mark.parametrize("damage, message", [
    (lambda file: os.truncate(file, 2000), "train-000001.tar has 2000 bytes, and had "),
    (lambda file: file.unlink(), "train-000001.tar is missing"),
    (lambda file: file.with_name("pictures.csv").write_text("file\n"), "pictures.csv has changed"),
    (lambda file: file.with_name("shards.json").write_text("{}"), "of another program or version"),
    (lambda file: file.with_name("shards.json").write_text(""), "shards.json is damaged"),
    (lambda file: file.with_name("shards.json").unlink(), "fd_focus_shards .* makes one")])
def test_what_is_not_whole_is_refused(shards, damage, message):
    damage(shards / "train-000001.tar")
    with pytest.raises((ValueError, FileNotFoundError), match=message): FocusDataLoaders.from_shards(shards, **SMALL)


def test_what_opening_does_not_check(shards):
    "A byte that has changed in a shard of the same size: `check_shards` finds it, and reading where it matters."
    index = read_index(shards)
    row = index.iloc[5]
    with open(shards / row.shard, "r+b") as file:
        file.seek(row.start)
        file.write(b"no JPEG")
    dls = FocusDataLoaders.from_shards(shards, **SMALL)
    with pytest.raises(ValueError, match=f"{row.file} in the shards of .* cannot be read: "): dls.reader(row.file)
    with pytest.raises(ValueError, match=f"{row.shard} has other contents"): check_shards(shards)
    os.truncate(shards / row.shard, int(row.start) + 5)
    dls = FocusDataLoaders.from_shards(shards, check=False, **SMALL)
    with pytest.raises(ValueError, match=f"{row.shard} ends before {row.file}: copy it again"): dls.reader(row.file)


def test_wrong_places(photos, shards, tmp_path):
    (tmp_path / "empty").mkdir()
    for work, message in (
        (lambda: write_shards(tmp_path / "nowhere", tmp_path / "out"), "no folder"),
        (lambda: write_shards(tmp_path / "empty", tmp_path / "out"), "no pictures in"),
        (lambda: write_shards(photos, shards), "is there already"),
        (lambda: write_shards(photos, photos / "out"), "would be taken for one"),
        (lambda: write_shards(photos, tmp_path / "out", on_bad_image="ignore"), "use 'error' or 'skip'"),
        (lambda: write_shards(photos, tmp_path / "out", megabytes=0), "megabytes=0; use a size above 0"),
        (lambda: index_shards(shards, on_duplicate="keep"), "use 'warn' or 'drop'"),
        (lambda: packed(photos), "no tar files in .*give --out"),
        (lambda: packed(shards, tmp_path / "out"), "holds shards already"),
        (lambda: FocusDataLoaders.from_shards(photos, **SMALL), "no .*shards.json"),
        (lambda: FocusDataLoaders.from_shards(shards, test_pct=.2, **SMALL), "cannot be put aside"),
        (lambda: FocusDataLoaders.from_shards(shards, on_bad_image="skip", **SMALL), "when shards are written"),
        (lambda: FocusDataLoaders.from_shards(shards, cache=tmp_path / "cache", **SMALL), "use cache='ram'"),
        (lambda: FocusDataLoaders.from_shards(shards, wokers=2, **SMALL), "unknown argument wokers")):
        with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message): work()
    assert not (tmp_path / "out").exists()
    (tmp_path / "data.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    (photos / "all.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    assert not is_shards(photos) and not is_shards(tmp_path / "data.tar")      # an archive beside its class folders


def test_few_shards_are_open_at_a_time(photos, shards, monkeypatch):
    "And a reader goes through pickle, as a learner does that is exported."
    read = ShardReader(shards)
    names = read_index(shards).file
    for name in names: read(name)
    assert read.opened.cache_info().maxsize == 256 and read.opened.cache_info().currsize == len(read.shards)
    again = pickle.loads(pickle.dumps(read))
    assert again.file_bytes(names[3]) == (photos / names[3]).read_bytes()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    del read
    if descriptors: assert len(os.listdir("/proc/self/fd")) < descriptors
    monkeypatch.delattr(os, "pread")                # as on Windows
    assert again.file_bytes(names[5]) == (photos / names[5]).read_bytes()


def test_what_a_learner_asks_of_them(photos, shards):
    dls = FocusDataLoaders.from_shards(shards, **SMALL)
    learn = focus_learner(dls, "toy_resnet", pretrained=False)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1)
        probabilities, targets = learn.get_preds()
        one, _ = learn.get_preds(dl=dls.test_dl([dls.valid_ds.items[0]]))
        file, _ = learn.get_preds(dl=dls.test_dl([photos / dls.valid_ds.items[0]]))
    assert len(probabilities) == len(dls.valid_ds) and one.equal(file)
    assert [dls.vocab[i] for i in targets] == [dls.table.label[name] for name in dls.valid_ds.items]


def work(kwargs, environment, log):
    "A process that trains."
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.environ.update(environment)
    fd_focus_train(**kwargs)


def run(processes, out, n=1, **kwargs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = dict(WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [processes(work, dict(out=str(out), **kwargs), dict(meet, RANK=str(i), LOCAL_RANK=str(i)) if n > 1 else {},
                      f"{out}.{i}.log") for i in range(n)]


def finish(group):
    for process in group: process.join(300)
    return [process.exitcode for process in group]


def same(a, b):
    "Weights and the table of two finished runs agree to the last bit."
    first, second = load_file(a / "model/model.safetensors"), load_file(b / "model/model.safetensors")
    assert list(first) == list(second) and all(first[name].equal(second[name]) for name in first)
    return (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


def test_a_run_that_is_killed_goes_on(photos, shards, processes, tmp_path):
    "And ends as the undisturbed one, over shards or over the folder."
    data, out = dict(data=str(shards), workers=1), tmp_path / "run"
    assert finish(run(processes, tmp_path / "whole", **data, **TINY)) == [0], (tmp_path / "whole.0.log").read_text()
    assert finish(run(processes, tmp_path / "folder", data=str(photos), workers=1, **TINY)) == [0]
    assert same(tmp_path / "whole", tmp_path / "folder")
    process, = run(processes, out, **data, **TINY)
    end = time.monotonic() + 300
    while not (out / "checkpoint.pt").exists() or not read_checkpoint(out / "checkpoint.pt")["epoch"]:
        assert process.is_alive() and time.monotonic() < end
        time.sleep(.005)
    process.kill()
    process.join()
    assert finish(run(processes, out, resume=True)) == [0], (tmp_path / "run.0.log").read_text()
    assert same(tmp_path / "whole", out)


def test_another_picture_is_no_resume(photos, shards, tmp_path):
    "The fingerprints of the index go into the checkpoint."
    dls = FocusDataLoaders.from_shards(shards, **SMALL)
    photograph(99).save(photos / "a/00.jpg")
    other = FocusDataLoaders.from_shards(write_shards(photos, tmp_path / "others"), **SMALL)
    learners = [focus_learner(each, "toy_resnet", pretrained=False) for each in (dls, other)]
    for learn in learners: learn.create_opt()
    one, two = map(facts, learners)
    assert [name for name in one if one[name] != two[name]] == ["contents of the pictures"]


def test_two_processes(photos, shards, processes, tmp_path):
    for name, data in (("shards", shards), ("folder", photos)):
        assert finish(run(processes, tmp_path / f"of {name}", 2, data=str(data), workers=0, **TINY)) == [0, 0], \
            (tmp_path / f"of {name}.0.log").read_text()
    assert same(tmp_path / "of shards", tmp_path / "of folder")
    assert json.loads((tmp_path / "of shards/summary.json").read_text())["processes"] == 2


def test_the_command(photos, tmp_path, capsys):
    fd_focus_shards(str(photos), out=str(tmp_path / "s"))
    fd_focus_shards(str(tmp_path / "s"))
    packing, checking = capsys.readouterr().out.splitlines()
    assert "16 pictures of 2 classes in 1 shard; fd_focus_train --data" in packing
    assert checking.endswith("every byte as it was written")
    with pytest.raises(SystemExit, match="is there already"): fd_focus_shards(str(photos), out=str(tmp_path / "s"))

"""Tar shards and an index, or a library that streams: how fast, how well mixed, how much memory?

Writes rows.csv, a row a way and question. Needs webdataset, wids and litdata beside fd_focus:
    pip install --target libs --no-deps webdataset braceexpand wids litdata boto3 ...
    PYTHONPATH=libs python results/shards/measure.py cub_birds50 [--rounds 3]
Ways: `files` (a JPEG file a picture), `index` (fd_focus: tar shards, one pread a picture), `wids` (the same shards by
WebDataset's indexed reader), `webdataset` (the same shards as a stream with a buffer of 300), `litdata` (its own form,
streamed), `litdata index` (its own form, item by item). Each is measured in a process of its own, in CPU seconds of it
and its children, on files that the system has in memory. Shards have 8 MB, so that there are some of them.
"""
import argparse
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent
WAYS = ["files", "index", "wids", "webdataset", "litdata", "litdata index"]
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")


def as_item(row):       # litdata wants it at the top of a module
    path, file = row
    return dict(file=file, jpg=(path / file).read_bytes())


def write(photos, place, times):
    "The pictures, `times` over, as files, as our shards, and as litdata's chunks."
    from litdata import optimize
    from fd_focus.data.shards import write_shards
    from fd_focus.data.tables import folder_table
    for row in folder_table(photos).itertuples():
        for n in range(times):
            file = place / "files" / row.label / f"{n} {Path(row.file).name}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((photos / row.file).read_bytes() + b"%d" % n)      # behind the picture: nobody reads it
    write_shards(place / "files", place / "index", megabytes=8)
    rows = [(place / "files", file) for file in folder_table(place / "files").file]
    random.Random(0).shuffle(rows)
    optimize(as_item, rows, output_dir=str(place / "litdata"), chunk_bytes="8MB", num_workers=1, verbose=False)


def stream(way, place, epoch, workers=0):
    "(file, bytes) of an epoch, shuffled."
    from fd_focus.data.shards import ShardReader, read_index
    index = place / "index"
    if way in ("files", "index"):
        names = read_index(index).file.tolist()
        random.Random(epoch).shuffle(names)
        read = ShardReader(index).file_bytes if way == "index" else lambda name: (place / "files" / name).read_bytes()
        return ((name, read(name)) for name in names)
    shards = json.loads((index / "shards.json").read_text())["shards"]
    if way == "wids":
        import wids
        items = wids.ShardListDataset([dict(url=str(index / s["name"]), nsamples=s["pictures"]) for s in shards],
                                      localname=lambda url: url, lru_size=100, transformations=[])
        order = random.Random(epoch).sample(range(len(items)), len(items))
        found = (items[i] for i in order)
        return ((json.loads(s[".json"].read())["file"], s[".jpg"].read()) for s in found)
    import torch
    if way == "webdataset":
        import webdataset as wds
        items = wds.WebDataset([str(index / s["name"]) for s in shards], shardshuffle=100, seed=epoch,
                               empty_check=False, nodesplitter=wds.split_by_node)
        items = items.shuffle(300, rng=random.Random(epoch)).map(lambda s: (json.loads(s["json"])["file"], s["jpg"]))
        return torch.utils.data.DataLoader(items, batch_size=None, num_workers=workers) if workers else items
    import litdata
    if way == "litdata index":
        items = litdata.StreamingDataset(str(place / "litdata"))
        order = random.Random(epoch).sample(range(len(items)), len(items))
        return ((items[i]["file"], items[i]["jpg"]) for i in order)
    items = litdata.StreamingDataset(str(place / "litdata"), shuffle=True, seed=7)
    items.set_epoch(epoch)
    if workers: items = litdata.StreamingDataLoader(items, batch_size=1, num_workers=workers, collate_fn=lambda b: b[0])
    return ((s["file"], s["jpg"]) for s in items)


def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def rss():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1]) / 1024


def speed(way, place):
    "CPU microseconds a picture for the bytes, and with decoding to 128 pixels."
    from fd_focus.data.pictures import open_image
    for _ in stream(way, place, 0): pass                   # what is done once, and the files come into memory
    start, n = cpu(), sum(1 for _ in stream(way, place, 1))
    middle = cpu()
    for _, data in stream(way, place, 2): np.asarray(open_image(io.BytesIO(data), 128).resize((128, 128)))
    return dict(pictures=n, microseconds_of_bytes=round(1e6 * (middle - start) / n),
                decoded_a_cpu_second=round(n / (cpu() - middle)))


def loaders(way, place):
    "Pictures a CPU second of fd_focus's own loaders, transforms and batches included."
    from fd_focus.data.shards import FocusDataLoaders
    make = FocusDataLoaders.from_shards if way == "index" else FocusDataLoaders.from_folder
    dls = make(place / way, image_size=112, bs=32, num_workers=0)
    n, start = sum(len(x) for x, _ in dls.train), cpu()
    n = sum(len(x) for x, _ in dls.train)
    return dict(pictures=n, loaded_a_cpu_second=round(n / (cpu() - start)))


def order(way, place):
    "How well an epoch is mixed, and whether it is whole."
    from fd_focus.data.shards import read_index
    labels, names = read_index(place / "index").set_index("file").label, [None, None]
    names = [[name for name, _ in stream(way, place, epoch)] for epoch in (1, 2)]
    batches = [names[0][i:i + 16] for i in range(0, len(names[0]) - 15, 16)]
    places = [pd.Series(range(len(each)), each) for each in names]
    return dict(pictures=len(labels), classes_in_16=round(float(np.mean([labels[b].nunique() for b in batches])), 1),
                places_of_two_epochs=round(float(places[0].corr(places[1].reindex(places[0].index), "spearman")), 2),
                whole=sorted(names[0]) == sorted(labels.index))


def workers(way, place):
    "Whether an epoch is whole with two workers. They read before their program does: litdata starts threads."
    two = [name for name, _ in stream(way, place, 1, workers=2)]
    whole = sorted(two) == sorted(pd.read_csv(place / "index" / "pictures.csv").file)
    one = [name for name, _ in stream(way, place, 1)]
    return dict(pictures=len(two), whole=whole, same_order_as_without=two == one)


def share(way, place):
    "In one of two processes: how many pictures it gets."
    import torch
    torch.distributed.init_process_group("gloo")
    return dict(names=[name for name, _ in stream(way, place, 1)])


def resume(way, place):
    "litdata only: 500 pictures, and then a second loader that goes on."
    import litdata
    def loader():
        items = litdata.StreamingDataset(str(place / "litdata"), shuffle=True, seed=7)
        return litdata.StreamingDataLoader(items, batch_size=10, num_workers=1,
                                           collate_fn=lambda batch: [sample["file"] for sample in batch])
    whole, first, second = list(loader()), loader(), loader()
    batches = iter(first)
    for _ in range(50 if len(whole) > 100 else 5): next(batches)
    second.load_state_dict(first.state_dict())
    return dict(resumes_exactly=list(second) == whole[50 if len(whole) > 100 else 5:])


def memory(way, place):
    "Resident memory before and after an epoch of bytes, decoded; MB."
    from fd_focus.data.pictures import open_image
    items = iter(stream(way, place, 0))
    for _ in range(200): next(items)
    before, n = rss(), 200
    for _, data in items:
        open_image(io.BytesIO(data), 128).resize((128, 128))
        n += 1
    return dict(pictures=n, mb_after_200=round(before), mb_at_the_end=round(rss()))


def index_memory(way, place):
    "What a million rows of the index take, in the loaders too; MB."
    from fd_focus.data.shards import FocusDataLoaders, _digest
    n, folder = 1_000_000, place / "million"
    folder.mkdir(exist_ok=True)
    picture = next(iter((place / "files").glob("*/*.jpg"))).read_bytes()        # one is opened, to see what they are
    (folder / "train-000000.tar").write_bytes(picture)
    table = pd.DataFrame(dict(file=[f"class {i % 1000:04d}/photo_{i:07d}.jpg" for i in range(n)],
                              label=[f"class {i % 1000:04d}" for i in range(n)], split="train", print="0" * 32,
                              shard="train-000000.tar", start=0, size=len(picture)))
    table.to_csv(folder / "pictures.csv", index=False)
    (folder / "shards.json").write_text(json.dumps(dict(format="fd_focus shards 1", shards=[],
                                                        table=_digest(folder / "pictures.csv"))))
    del table
    before, start = rss(), cpu()
    dls = FocusDataLoaders.from_shards(folder, check=False, num_workers=0)
    return dict(pictures=len(dls.table), mb_of_index=round(rss() - before), seconds_to_open=round(cpu() - start, 1))


def ask(question, way, place, **environment):
    command = [sys.executable, __file__, str(place), "--ask", question, "--way", way]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            env=os.environ | environment)


def answer(process):
    try: said = process.communicate(timeout=200)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return dict(failed="no end after 200 s")
    return json.loads(said.splitlines()[-1]) if process.returncode == 0 and said else dict(failed=process.returncode)


def shares(way, place):
    meet = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(random.randint(20000, 60000)))
    pair = [answer(each) for each in [ask("share", way, place, RANK=str(i), LOCAL_RANK=str(i), **meet) for i in (0, 1)]]
    if any("failed" in each for each in pair): return pair[0] | pair[1]
    first, second = (each["names"] for each in pair)
    return dict(pictures_of_2_processes=f"{len(first)} + {len(second)}", in_both=len(set(first) & set(second)),
                in_none=len(set(pd.read_csv(place / "index" / "pictures.csv").file) - set(first) - set(second)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", help="where files, shards and chunks are kept, for another run")
    parser.add_argument("--ask")
    parser.add_argument("--way")
    args = parser.parse_args()
    if args.ask:
        out, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(globals()[args.ask](args.way, args.photos), default=str), file=out)
        raise SystemExit
    rows = []
    def note(question, way, found, **more):
        rows.append(dict(question=question, way=way) | more | found)
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(HERE / "rows.csv", index=False)
    with nullcontext(args.place) if args.place else tempfile.TemporaryDirectory() as folder:
        once, five = (Path(folder) / name for name in ("once", "five"))
        for place, times in ((once, 1), (five, 5)):
            if not (place / "litdata").exists(): write(args.photos, place, times)
        for number in range(args.rounds):
            for way in WAYS: note("speed", way, answer(ask("speed", way, once)), round=number)
            for way in ("files", "index"): note("loaders", way, answer(ask("loaders", way, once)), round=number)
        for way in WAYS: note("order", way, answer(ask("order", way, once)))
        for way in ("webdataset", "litdata"):
            note("workers", way, answer(ask("workers", way, once)))
            note("shares", way, shares(way, once))
        note("resume", "litdata", answer(ask("resume", "litdata", once)))
        for way in ("files", "index", "webdataset", "litdata"):
            for place in (once, five): note("memory", way, answer(ask("memory", way, place)))
        note("index of a million", "index", answer(ask("index_memory", "index", once)))

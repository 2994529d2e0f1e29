"The app in a real browser, its handler with every kind of picture, and the notebook widget."
import io
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from fd_focus.use import sheet
from fd_focus.use.answer import _spoken, cut_zooms, draw_heat, explain, fit
from fd_focus.use.app import _Guard, _names, about, attempt, build_app, example_files, focus_widget, launch_app
from fd_focus.use.cli import fd_focus_app
from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.use.model_folder import load_focus, save_focus
from fd_focus.training.learner import focus_learner
from fd_focus.use.predict import FocusClassifier, draw_prediction
from fd_focus.toy import ToyBirds

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def place(tmp_path_factory): return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def folder(place):
    "A model folder of three kinds of toy birds with shaken heads, a temperature, a threshold and two examples."
    drawn = ToyBirds(images_per_class=4, n_classes=3, image_size=64)
    for i in range(len(drawn)):
        (place / "birds" / drawn.classes[drawn.label(i)]).mkdir(parents=True, exist_ok=True)
        drawn[i][0].save(place / "birds" / drawn.classes[drawn.label(i)] / f"{i:02d}.png")
    dls = FocusDataLoaders.from_folder(place / "birds", image_size=64, bs=2, num_workers=0)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, preset=None)
    torch.manual_seed(0)
    for name, tensor in learn.model.state_dict().items():
        if "head" in name: tensor.normal_(0, .3)
    save_focus(learn, place / "model", metrics=dict(accuracy=.5), temperature=1.5, threshold=.35)
    (place / "model" / "examples").mkdir()
    for i in (0, 5): bird(i).save(place / "model" / "examples" / f"bird{i}.jpg")
    return place / "model"


def bird(i=0, size=240): return ToyBirds("test", n_classes=3, image_size=size)[i][0]


@pytest.fixture(scope="module")
def classifier(folder): return FocusClassifier.load(folder, "cpu")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def started(folder, begin):
    "`started(place)` is the app as a user starts it, once it listens: its process, port, and `said()`."
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fd_focus[app]'")
    def started(place):
        process, where = begin("fd_focus_app", folder, "--port", port := free_port(), "--max_mb", 1,
                               CUDA_VISIBLE_DEVICES="", GRADIO_TEMP_DIR=str(place / "uploads"))
        def said(): return (where / "out").read_text() + (where / "err").read_text()
        deadline = time.time() + 300
        while "Ctrl-C ends it" not in said():
            assert process.is_alive() and time.time() < deadline, said()
            time.sleep(.2)
        return process, port, said
    return started


def left_behind(place):
    "Files of visitors, and copies of examples, that are still there."
    return [file for file in (place / "uploads").rglob("*") if file.is_file() and not file.is_symlink()]


@pytest.fixture(scope="module")
def page(started, place):
    "Where `fd_focus_app` listens; ends with Ctrl-C."
    process, port, said = started(place)
    yield f"http://127.0.0.1:{port}"
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0 and "Traceback" not in said(), said()
    assert not left_behind(place), "what visitors have sent is still there"


def test_a_service_that_is_stopped_leaves_nothing_behind(started, tmp_path):
    "`systemctl stop`, `docker stop` and `kill` send SIGTERM. There is something to remove: copies of the examples."
    process, _, said = started(tmp_path)
    assert left_behind(tmp_path)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143 and "Traceback" not in said(), said()
    assert not left_behind(tmp_path)


@pytest.fixture(scope="module")
def browser(page, place):
    "Headless Chromium with the page loaded."
    if not (CHROMIUM and DRIVER): pytest.skip("chromium and chromedriver are not installed")
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1280,1000",
        f"user-data-dir={place / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.set_script_timeout(30)
    driver.get(page)
    yield driver
    driver.quit()


def wait(browser, condition, what, seconds=30):
    "The first truthy answer of a condition; a failure says what was waited for and what the page says."
    from selenium.common.exceptions import StaleElementReferenceException
    deadline = time.time() + seconds
    while time.time() < deadline:
        try:
            if answer := condition(): return answer
        except StaleElementReferenceException: pass
        time.sleep(.1)
    raise AssertionError(
        f"waited in vain for {what}; the page says: {browser.find_element('tag name', 'body').text[:500]}"
    )


def find(browser, css): return browser.find_elements("css selector", css)


def upload(browser, file):
    "Choose a file as a person would, over whatever is shown."
    wait(browser, lambda: find(browser, "#photo input[type=file]"), "the page")
    clear(browser)
    wait(browser, lambda: find(browser, "#photo input[type=file]"), "the place to drop a picture")[0].send_keys(
        str(file)
    )


def clear(browser):
    for button in find(browser, '#photo button[aria-label="Remove Image"]'): button.click()
    wait(browser, lambda: find(browser, "#answer") and not answer(browser), "an empty page")


def loaded(browser, css):
    "How many pictures have arrived, have pixels and are shown."
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter(e => e.complete && e.naturalWidth > 40 && e.offsetWidth > 40).length",
        css,
    )


def answer(browser):
    return next((card.get_attribute("data-label") for card in find(browser, "#answer .fd-answer")), None)


def test_a_picture_gets_its_answer(browser, classifier, place):
    bird(3).save(place / "mine.png")
    want = classifier.predict(place / "mine.png")
    upload(browser, place / "mine.png")
    wait(browser, lambda: answer(browser) == want.label, want.label)
    wait(browser, lambda: loaded(browser, "#answer img") == 2 + len(want.boxes), "regions, attention and zooms")
    text = find(browser, "#answer")[0].text
    assert f"{100 * want.probability:.0f} %" in text and ("35 %" in text)
    assert all(name in text for name, _ in want.top5)
    assert find(browser, "#answer .fd-answer")[0].get_attribute("data-verdict") == ("sure" if want.sure else "doubt")
    if where := os.environ.get("FD_FOCUS_SCREENSHOT"):
        browser.set_window_size(1280, 1000)
        time.sleep(1)
        browser.save_screenshot(where)


def test_on_a_phone_the_answer_is_whole_and_in_view(browser, place):
    "At 390 pixels: nothing is wider than the page, no name is cut, and the page goes to the answer by itself."
    bird(4).save(place / "phone.png")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=390, height=844, deviceScaleFactor=1, mobile=True))
    try:
        upload(browser, place / "phone.png")
        wait(browser, lambda: answer(browser), "the answer")
        seen = "const b = document.querySelector('#answer .fd-answer').getBoundingClientRect(); return "
        wait(browser, lambda: browser.execute_script(seen + "0 <= b.top && b.bottom <= innerHeight"), "it in view")
        left, right, page = browser.execute_script(seen + "[b.left, b.right, document.documentElement.scrollWidth]")
        assert 0 <= left and right <= 390 and page <= 390
        cut = browser.execute_script(
            "return [...document.querySelectorAll('#answer .fd-answer span, #answer .fd-answer div')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.innerText)")
        assert cut == []
        if where := os.environ.get("FD_FOCUS_SCREENSHOT"): browser.save_screenshot(where.replace(".png", "_phone.png"))
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_text_gets_a_friendly_word(browser, place):
    (place / "notes.txt").write_text("saw a wren today")
    upload(browser, place / "notes.txt")
    wait(browser, lambda: "notes.txt is no picture I can read" in find(browser, "#answer")[0].text, "the message")
    text = find(browser, "body")[0].text
    assert str(place) not in text and "Traceback" not in text and "Error" not in text
    assert not loaded(browser, "#answer img")
    wait(browser, lambda: not find(browser, "#photo img"), "room for the next file")
    if where := os.environ.get("FD_FOCUS_SCREENSHOT"): browser.save_screenshot(where.replace(".png", "_text.png"))


def test_a_dropped_text_too(browser):
    browser.execute_script("""
        const files = new DataTransfer()
        files.items.add(new File(["saw a wren"], "dropped.md", {type: "text/markdown"}))
        const drop = new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: files})
        document.querySelector("#photo button[aria-label^='Drop an image']").dispatchEvent(drop)""")
    wait(browser, lambda: "dropped.md is no picture I can read" in find(browser, "#answer")[0].text, "the message")


def test_after_a_bad_file_an_example_works(browser, classifier, folder):
    examples = wait(browser, lambda: find(browser, ".gallery-item"), "the examples")
    assert len(examples) == 2
    examples[1].click()
    want = classifier.predict(example_files(folder)[1])
    wait(
        browser,
        lambda: answer(browser) == want.label and loaded(browser, "#answer img") == 2 + len(want.boxes),
        want.label,
    )


def test_too_large_says_so(browser, place):
    (place / "big.png").write_bytes(bytes(2 * 2**20))
    upload(browser, place / "big.png")
    wait(browser, lambda: "exceed the maximum allowed size of 1.0 Mb" in find(browser, "body")[0].text, "the message")


def test_the_page_asks_nobody_else(browser, page):
    asked = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(asked) > 5
    assert [name for name in asked if not name.startswith((page, "data:", "blob:"))] == []


def send(page, content):
    "Upload a file without a browser."
    boundary = "x1y2z3"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'.encode()
        + b"Content-Type: image/png\r\n\r\n"
        + content
        + f"\r\n--{boundary}--\r\n".encode()
    )
    request = urllib.request.Request(
        f"{page}/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20)


def test_a_file_that_is_too_large_is_refused(page):
    assert send(page, bytes(1000)).status == 200
    with pytest.raises(urllib.error.HTTPError) as refused: send(page, bytes(2 * 2**20))
    assert refused.value.code == 413 and b"exceeded" in refused.value.read()


def get(address, body=None):
    request = urllib.request.Request(address, body and json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)


def asked(page, event, *data):
    "What the server answers to an event that no browser sent."
    session = f"s{time.monotonic_ns()}"
    get(f"{page}/gradio_api/queue/join", dict(data=data, fn_index=event, session_hash=session))
    for line in get(f"{page}/gradio_api/queue/data?session_hash={session}"):
        message = json.loads(line[6:]) if line.startswith(b"data: ") else {}
        if message.get("msg") == "process_completed": return message["output"]
    raise AssertionError("no answer")


def test_only_uploads_and_examples_are_opened(page, classifier, folder, place):
    "Every event that takes a photograph, asked for somebody else's picture, for none, and for what is no path."
    config = json.load(get(f"{page}/config"))
    photo = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "photo")
    events = [event["id"] for event in config["dependencies"] if event["inputs"] == [photo]]
    assert len(events) == 3                                   # upload, clear, an example was loaded
    secret = place / "secret.jpg"
    bird(4).save(secret)
    (place / "uploads").mkdir(exist_ok=True)
    (place / "uploads" / "link.jpg").symlink_to(secret)
    names = [str(secret), f"{secret}.gone", f"{place}/uploads/../secret.jpg", f"{place}/uploads/link.jpg", "/", ""]
    for event in events:
        answers = [asked(page, event, dict(path=name)) for name in names] + [asked(page, event, dict(url="x"))]
        assert all(
            "did not arrive" in (said := json.dumps(answer)) and "secret" not in said and "base64" not in said
            for answer in answers
        ), answers
        assert {answer["data"][0] for answer in answers} == {answers[0]["data"][0]}
    sent = dict(
        path=json.load(send(page, secret.read_bytes()))[0], orig_name="a.png", meta={"_type": "gradio.FileData"}
    )
    assert f'data-label="{classifier.predict(secret).label}"' in asked(page, events[0], sent)["data"][0]
    click = next(
        event["id"] for event in config["dependencies"] if event["inputs"] != [photo] and photo in event["outputs"]
    )
    shown = asked(page, click, 1)["data"][0]["value"]
    assert (
        f'data-label="{classifier.predict(example_files(folder)[1]).label}"'
        in asked(page, events[-1], shown)["data"][0]
    )


def call(address, method="GET", body=None, **headers):
    "Status, headers and text of what the server answers."
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address, body, headers, method=method)
    try: answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60)
    except urllib.error.HTTPError as error: answer = error
    return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/gradio_api/info", "/nothing"])
def test_headers_that_guard_the_page(page, path):
    for more in ({}, dict(Host="evil.example"), dict(Origin="https://evil.example")):
        headers = call(page + path, **more)[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control-")]


def test_only_its_own_names_are_answered(page):
    port = page.rsplit(":")[-1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", f"[::1]:{port}"):
        assert call(page + "/config", Host=host)[0] == 200, host
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "evil.example@127.0.0.1",
                 "127.0.0.1/evil.example", "10.0.0.1", "", "[", ":7860"):
        status, _, text = call(page + "/config", Host=host)
        assert status == 403 and b"--hosts NAME" in text and b"evil" not in text, host
    for host in ("evil.example", "localhost, evil.example"):
        assert call(page + "/config", X_Forwarded_Host=host)[0] == 403


def photo_events(page):
    "Numbers of the events that take a photograph."
    config = json.load(get(f"{page}/config"))
    photo = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == "photo")
    return [event["id"] for event in config["dependencies"] if event["inputs"] == [photo]]


def test_other_pages_may_not_ask(page):
    body = json.dumps(dict(data=[None], fn_index=photo_events(page)[0], session_hash="x")).encode()
    join, kind = f"{page}/gradio_api/queue/join", "application/json"
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://127.0.0.1.evil.example", "file://"):
        for method in ("POST", "OPTIONS", "DELETE"):
            more = dict(Access_Control_Request_Method="POST") if method == "OPTIONS" else {}
            assert call(join, method, body, Origin=origin, Content_Type=kind, **more)[0] == 403, (origin, method)
        assert call(f"{page}/gradio_api/upload", "POST", b"", Origin=origin)[0] == 403
        assert call(f"{page}/config", Origin=origin)[0] == 200         # as any program may ask; no page can read it
    assert call(join, "POST", body, Origin=page, Content_Type=kind)[0] == 200


def test_names_of_a_server_for_others():
    "Its address, whatever that is; its own name; those it was told. Not a name that somebody made to lead here."
    own = socket.gethostname()
    guard = _Guard(None, _names("0.0.0.0", ["Birds.example"]), ["birds.example"])
    for host in ("10.0.0.1:7860", "[fe80::1]:7860", "localhost:7860", own, f"{own}.local:80", "BIRDS.example:80"):
        assert guard.knows(host), host
    for host in ("evil.example", "10.0.0.1.evil.example", f"{own}.evil.example", "any number", ""):
        assert not guard.knows(host), host
    behind = dict(host="127.0.0.1:7860", origin="https://birds.example")          # a proxy that keeps no Host
    assert not guard.refuses(behind, "POST") and guard.refuses(behind | dict(origin="https://evil.example"), "POST")
    assert not guard.refuses(dict(host="birds.example", origin="https://birds.example"), "POST")
    guard = _Guard(None, _names("127.0.0.1", ["*"]), ["*"])
    assert guard.knows("evil.example") and not guard.refuses(dict(host="a", origin="http://b"), "POST")
    assert not _Guard(None, _names("birdbox", []), []).refuses(dict(host="birdbox:7860"), "GET")


def test_a_server_for_others(classifier, monkeypatch, place):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fd_focus[app]'")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place / "others"))
    app, port = build_app(classifier), free_port()
    url = launch_app(app, "0.0.0.0", port, hosts=["birds.example"])
    try:
        for host in ("birds.example", f"10.1.2.3:{port}", "localhost"):
            assert call(f"{url}config", Host=host)[0] == 200, host
        assert call(f"{url}config", Host="evil.example")[0] == 403
        assert call(f"{url}gradio_api/upload", "POST", b"", Origin="https://birds.example")[0] != 403
        for address in ("http://example.com/x.png", "HTTPS://example.com", "%68ttp://example.com"):
            assert call(f"{url}gradio_api/file={address}")[0] == 403           # it fetches nothing for a visitor
    finally: app.close(verbose=False)


def test_sixty_at_once_wait_in_line(page, place):
    event = photo_events(page)[0]
    file = io.BytesIO()
    bird(2, 64).save(file, "png")
    sent = dict(path=json.load(send(page, file.getvalue()))[0], meta={"_type": "gradio.FileData"})
    with ThreadPoolExecutor(60) as pool: answers = list(pool.map(lambda _: asked(page, event, sent), range(60)))
    assert all("data-label=" in answer["data"][0] for answer in answers)


@pytest.fixture
def offered(classifier, folder, tmp_path):
    "A model folder whose `examples/` holds what somebody else has put there."
    folder = shutil.copytree(folder, tmp_path / "model")
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    bird(7).save(folder / "examples" / "told.jpg", exif=exif)
    bird(8).save(tmp_path / "private.jpg")
    for name, target in (("passwd.jpg", "/etc/passwd"), ("private.jpg", tmp_path / "private.jpg"),
                         ("zero.png", "/dev/zero"), ("dots.jpg", "../../private.jpg"), ("gone.jpg", "gone"),
                         ("folder.jpg", "/etc"),
                         ("weights.png", "../model.safetensors"), ("loop.jpg", "loop.jpg")):
        (folder / "examples" / name).symlink_to(target)
    (folder / "examples" / "within.jpg").symlink_to("bird0.jpg")
    (folder / "examples" / "text.jpg").write_text("root:x:0:0")
    (folder / "examples" / "sub.jpg").mkdir()
    os.mkfifo(folder / "examples" / "pipe.jpg")
    Image.new("1", (6000, 6000)).save(folder / "examples" / "bomb.png")
    with open(folder / "examples" / "long.jpg", "wb") as file: file.truncate(2**33)
    return folder


def test_examples_are_pictures_of_the_folder(offered):
    with pytest.warns(UserWarning, match="is left out: it is no picture of this folder that can be read") as told:
        found = example_files(offered)
    assert [file.name for file in found] == ["bird0.jpg", "bird5.jpg", "told.jpg", "within.jpg"]
    assert len(told) == 13
    shutil.move(offered / "examples", offered.parent / "elsewhere")
    (offered / "examples").symlink_to(offered.parent / "elsewhere")            # the folder itself is a link
    with pytest.warns(UserWarning, match="left out"): assert example_files(offered) == []


def test_the_page_serves_copies_of_examples(classifier, offered, monkeypatch, place):
    "Of their pixels alone; whatever becomes of the file, the page has no other."
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fd_focus[app]'")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place / "copies"))
    with pytest.warns(UserWarning, match="left out"): files = example_files(offered)
    app = build_app(classifier, files)
    for file in files: file.unlink(); file.symlink_to("/etc/passwd")
    url = launch_app(app, port=free_port())
    try:
        text = call(f"{url}config")[2].decode()
        paths = {word.split('"')[0] for word in text.split('"path":"')[1:] if word[0] == "/"}
        assert len(paths) == 4 and "/etc" not in text and str(offered) not in text
        for path in paths:
            status, headers, content = call(f"{url}gradio_api/file={path}")
            assert status == 200 and b"secret" not in content and b"root" not in content
            assert Image.open(io.BytesIO(content)).size == (240, 240)
        assert call(f"{url}gradio_api/file={offered}/examples/bird0.jpg")[0] in (403, 404)
    finally: app.close(verbose=False)


def test_it_listens_on_this_machine_alone(page):
    if not Path("/proc/net/tcp").is_file(): pytest.skip("no /proc/net/tcp to look at")
    port = f"{int(page.rsplit(':')[-1]):04X}"
    rows = [
        line.split()
        for file in ("tcp", "tcp6")
        if Path(f"/proc/net/{file}").is_file()
        for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]
    ]
    assert [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port}")] == [f"0100007F:{port}"]


@pytest.mark.parametrize(
    "make",
    [
        lambda i: i.convert("L"),
        lambda i: i.convert("RGBA"),
        lambda i: i.convert("P"),
        lambda i: i.resize((3000, 40)),
        lambda i: i.resize((1, 1)),
        lambda i: Image.fromarray((np.asarray(i.convert("L")).astype(np.uint16) * 257)),
    ],
    ids=["grey", "alpha", "palette", "long", "dot", "16 bit"],
)
def test_any_picture(classifier, tmp_path, make):
    make(bird()).save(tmp_path / "x.png")
    card, found = attempt(classifier, tmp_path / "x.png", "x.png")
    assert found.prediction.label in card
    assert (
        found.regions.size == found.attention.size
        and max(found.regions.size) == 640
        and len(found.zooms) == len(found.prediction.boxes)
    )


@pytest.mark.parametrize("kind, size, min_side", [
    ("png", (900, 700), 73), ("jpg", (900, 700), 73), ("jpg", (5000, 4400), 73), ("png", (900, 700), None),
    ("tif", (900, 700), 73)])
def test_a_picture_is_decoded_once(classifier, tmp_path, monkeypatch, kind, size, min_side):
    "A JPEG that the network reads at less than the drawings need is decoded again for these; never whole."
    bird().resize(size).save(tmp_path / f"x.{kind}")
    monkeypatch.setattr(classifier, "min_side", min_side)
    want, decoded, prepare = classifier.predict(tmp_path / f"x.{kind}"), [], ImageFile.ImageFile.load_prepare
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", lambda self: (decoded.append(self.size), prepare(self)))
    text, found = attempt(classifier, tmp_path / f"x.{kind}", "x")
    reduced = kind == "jpg" and min_side is not None
    assert len(decoded) == 1 + reduced and decoded[-1][0] <= 2500 and found.prediction.size == size[::-1]
    assert max(found.regions.size) == 640 and max(found.zooms[0].size) >= 296
    assert found.prediction.probabilities.equal(want.probabilities)             # as the command says it


def test_a_banner_is_cut_off_once(folder, tmp_path, monkeypatch):
    "Also of a JPEG that comes reduced, and of no example: training has cut theirs off."
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fd_focus[app]'")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    net = load_focus(folder)
    net.about |= dict(banner=20, min_side=73)
    cut, whole = (FocusClassifier(net, "cpu", banner=banner) for banner in (True, False))
    picture = Image.new("RGB", (900, 700), "white")
    picture.paste(bird().resize((900, 680)))
    picture.save(tmp_path / "x.jpg", quality=100, subsampling=0)
    want, found = cut.predict(tmp_path / "x.jpg"), explain(cut, tmp_path / "x.jpg").prediction
    assert found.probabilities.equal(want.probabilities) and found.boxes.equal(want.boxes) and found.size == (700, 900)
    assert found.view.equal(want.view) and found.view[3] < 680 and "20 pixels, a banner" in about(cut)
    app, asked = build_app(cut, example_files(folder)), []
    def ask(classifier, *_): return asked.append(classifier.banner) or ("", None)
    monkeypatch.setattr("fd_focus.use.app.attempt", ask)
    offer = next(Path(app.kept.name).glob("1.png"))
    for name in ("upload", "copy"): (tmp_path / "uploads" / name).mkdir(parents=True)
    shutil.copy(tmp_path / "x.jpg", tmp_path / "uploads" / "upload")
    shutil.copy(offer, tmp_path / "uploads" / "copy")                      # as Gradio hands examples out
    for file in (tmp_path / "uploads/upload/x.jpg", tmp_path / "uploads/copy/1.png", offer):
        app.ask(dict(path=str(file)))
    assert asked == [20, 0, 0] and "a banner" not in about(whole)
    app.close(verbose=False)


@pytest.mark.parametrize("kind", ["png", "tif", "gif"])
def test_a_picture_that_unfolds_is_refused(classifier, tmp_path, kind, monkeypatch):
    "Before it is decoded: 36 million pixels in a few kilobytes."
    Image.new("1", (6000, 6000)).save(tmp_path / f"x.{kind}")
    def refuse(self): raise AssertionError("it was decoded")
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", refuse)
    text, found = attempt(classifier, tmp_path / f"x.{kind}", "x")
    assert found is None and "x has too many pixels" in text
    assert "36 megapixels (6,000 × 6,000 pixels); a picture may have 32 here, a JPEG up to 512" in text


@pytest.mark.parametrize("kind", ["png", "tif", "bmp"])
def test_three_hundred_megapixels_are_told_in_a_users_words(classifier, tmp_path, kind):
    "Even Pillow's own limit; no PIL, no bomb, no setting that a visitor cannot reach."
    Image.new("1", (20000, 15000)).save(tmp_path / f"x.{kind}")
    text, found = attempt(classifier, tmp_path / f"x.{kind}", f"holiday.{kind}")
    assert found is None and f"holiday.{kind} has too many pixels" in text and "It has 300 megapixels" in text
    assert "PIL" not in text and "bomb" not in text and str(tmp_path) not in text


@pytest.mark.parametrize("kind, said", [("gif", "It is an animation: the answer is about its first frame."),
                                        ("webp", "It is an animation: the answer is about its first frame."),
                                        ("png", "It is an animation: the answer is about its first frame."),
                                        ("tif", "The file has several pages: the answer is about the first.")])
def test_of_an_animation_the_first_frame_is_looked_at(classifier, tmp_path, kind, said):
    first, others = bird(1), [bird(2), bird(4)]
    first.save(tmp_path / f"x.{kind}", save_all=True, append_images=others)
    first.save(tmp_path / f"one.{kind}")
    for source in (tmp_path / f"x.{kind}", (tmp_path / f"x.{kind}").read_bytes()):
        assert said in attempt(classifier, source, "x")[0]
    assert said not in attempt(classifier, tmp_path / f"one.{kind}", "x")[0]


def chunk(kind, data): return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def test_much_beside_the_pixels_costs_nothing(classifier, tmp_path):
    "A PNG with megabytes of text, or text that unfolds to gigabytes, and a JPEG with as much EXIF as it can hold."
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 2_000_000)
    bird().save(tmp_path / "text.png", pnginfo=text)
    plain = io.BytesIO()
    bird().save(plain, "png")
    bomb = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100_000_000)))
    (tmp_path / "bomb.png").write_bytes(plain.getvalue()[:33] + 4 * bomb + plain.getvalue()[33:])
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100_000_000)))
    (tmp_path / "profile.png").write_bytes(plain.getvalue()[:33] + profile + plain.getvalue()[33:])
    exif = Image.Exif()
    exif[0x010E] = "x" * 65_000
    bird().save(tmp_path / "exif.jpg", exif=exif)
    for name in ("text.png", "bomb.png", "exif.jpg"):
        assert attempt(classifier, tmp_path / name, name)[1], name
    attempt(classifier, tmp_path / "profile.png", "profile.png")           # an answer or a word, but no error


def test_a_turned_photograph_is_upright(classifier, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    bird().resize((240, 160)).save(tmp_path / "x.jpg", exif=exif)
    assert explain(classifier, tmp_path / "x.jpg").regions.size == (427, 640)


def test_heat_lies_over_the_view(classifier):
    "A model that sees the centre alone: the map is drawn there, and the rest is dark."
    found = classifier.predict(bird())
    found = replace(found, view=torch.tensor([60., 60., 180., 180.]), attention=torch.ones(6, 6).triu())
    drawn = np.asarray(draw_heat(Image.new("RGB", (240, 240), "white"), found))
    assert (drawn[:60] == 63).all() and (drawn[:, 180:] == 63).all()
    inside = drawn[60:180, 60:180].astype(int)
    assert (inside[5, -5] == 255).all() and inside[-5, 5].max() < 110


def test_plain_model_and_its_words(place, classifier, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place))         # what lies there counts as uploaded
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fd_focus[app]'")
    dls = FocusDataLoaders.from_folder(place / "birds", image_size=64, bs=2, num_workers=0)
    save_focus(focus_learner(dls, "toy_resnet", pretrained=False, method="plain"), place / "plain")
    bird().save(place / "plain.png")
    plain = FocusClassifier.load(place / "plain", "cpu")
    text, _ = build_app(plain).ask(str(place / "plain.png"))
    assert "shows no regions" in text and "Nobody chose a limit" in text and "not calibrated" in text
    assert text.count("<img") == 2 and "What the network saw" in text and "Attention: dark is" in text
    answer = plain.predict(place / "plain.png")
    assert answer.attention.ndim == 2 and len(answer.boxes) == 0
    assert answer.explained().image().height > answer.explained().regions.height      # the map stands in the picture
    assert "| method | plain |" in about(plain) and "temperature 1.50" in about(classifier)


def choosy(place, limit, **more):
    "The model of the page, told to look again below a limit."
    config = json.loads((place / "model/config.json").read_text())
    config["options"] |= dict(answer="adaptive")
    config["options"].pop("look_again_below")
    folder = shutil.copytree(place / "model", place / f"below {limit}", dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | dict(look_again_below=limit) | more))
    return FocusClassifier.load(folder, "cpu")


def test_one_look_was_enough(folder, place):
    "No zooms, as nothing was zoomed; the regions are where it would have looked."
    once = choosy(place, 0, threshold=0.)
    text, found = attempt(once, bird(), "x.png")
    assert found.prediction.looked_again is False and found.zooms == [] and len(found.prediction.boxes) == 4
    assert "One look was enough." in text and "Zoom 1" not in text and text.count("<img") == 2
    assert "Where it would have looked again, best first" in text
    doubt = replace(found, prediction=replace(found.prediction, sure=False), threshold=.99)
    assert "One look was enough" not in doubt.card() and "The model took one look, as it always does." in doubt.card()
    model = doubt.prediction.model | dict(look_again_below=.5)
    some = replace(doubt, prediction=replace(doubt.prediction, model=model))
    assert "The model took one look; only pictures it is less sure of get a second." in some.card()
    assert "| second look | never |" in about(once)


def test_the_first_look_was_unsure(folder, place, classifier):
    text, found = attempt(choosy(place, 2.), bird(), "x.png")
    assert found.prediction.looked_again is True and len(found.zooms) == 4 and "Zoom 4" in text
    assert "The first look was unsure, so the model looked again, at the regions below." in text
    assert "Regions, best first" in text and "| second look | always |" in about(choosy(place, 2.))
    assert "| second look | where its first look is less than 62.5 % sure |" in about(choosy(place, .625))
    text, found = attempt(classifier, bird(), "x.png")                # a model that treats all pictures alike
    assert found.prediction.looked_again is None and found.looks() == "" and len(found.zooms) == 4
    assert "look" not in found.card() and "second look" not in about(classifier)


def test_widget(classifier, tmp_path):
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed: pip install 'fd_focus[app]'")
    bird().save(tmp_path / "x.png")
    widget = focus_widget(classifier, max_mb=.5)
    def choose(name, content):
        widget.children[0].value = [
            dict(
                name=name,
                type="",
                size=len(content),
                content=memoryview(content),
                last_modified=datetime.now(timezone.utc),
            )
        ]
        return widget.children[1].outputs[0]["data"]["text/html"]
    shown = choose("x.png", (tmp_path / "x.png").read_bytes())
    want = explain(classifier, tmp_path / "x.png")
    assert want.prediction.label in shown and shown.count("<img") == 2 + len(want.zooms)
    assert "notes.txt is no picture I can read" in choose("notes.txt", b"text")
    assert "big.png is too large" in choose("big.png", bytes(600_000))


def test_without_the_extra(classifier, folder, monkeypatch):
    for name, work in (("gradio", lambda: build_app(classifier)), ("ipywidgets", lambda: focus_widget(classifier))):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError, match=rf"{name} is not installed: pip install 'fd_focus\[app\]'"):
            work()
    with pytest.raises(SystemExit, match="gradio is not installed"): fd_focus_app(str(folder), device="cpu")


def test_command_errors(folder, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'fd_focus[app]'")
    with pytest.raises(SystemExit, match="no model folder"): fd_focus_app(str(tmp_path / "gone"))
    with pytest.raises(SystemExit, match="trained on pictures without one"):
        fd_focus_app(str(folder), device="cpu", banner=True)
    with pytest.raises(SystemExit, match="abacus"): fd_focus_app(str(folder), device="abacus")
    with pytest.raises(SystemExit, match="max_mb=-1"): fd_focus_app(str(folder), max_mb=-1., device="cpu")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen on 127.0.0.1, port {port}"):
            fd_focus_app(str(folder), port=port, device="cpu")


def test_how_sure_is_said(classifier, folder):
    "Sure, not sure, never sure; and on which pictures that was found out."
    found = explain(classifier, bird())
    says = lambda sure, threshold, **kwargs: replace(
        found, prediction=replace(found.prediction, sure=sure), threshold=threshold, **kwargs
    ).sentence()
    assert "counts as sure from 50 % on, a limit chosen on validation pictures" in says(True, .5)
    assert "counts as sure only from 50 % on, a limit chosen on test pictures" in says(False, .5, judges="test")
    assert "On test pictures no limit made this model's answers good enough" in says(
        False, 2.0, judges="test"
    ) and "> 99" not in says(False, 2.0)
    counts = dict(evidence=dict(right=57, of=63, pictures=90, wanted=.9))
    counted = replace(found, prediction=replace(found.prediction, sure=True, model=counts | dict(threshold=.8)),
                      threshold=.8)
    assert "sure from 80 % on: right in 57 of 63 such validation pictures." in counted.sentence()
    never = replace(counted, prediction=replace(counted.prediction, sure=False, model=counts | dict(threshold=2.)),
                    threshold=2.)
    assert "It is never sure: 90 validation pictures could not promise 90 % for any limit." in never.sentence()
    close = replace(found, prediction=replace(found.prediction, sure=False, probability=.6264), threshold=.6296)
    assert "counts as sure only from 63.0 % (this is 62.6 %) on" in close.sentence()
    for one in (says(True, 1.0), says(False, 1.0)):
        assert "from > 99 % on" in one and "no limit" not in one  # the value of old folders: a limit like any other
    net = load_focus(folder)
    net.about |= dict(threshold=2., judged_by="test")
    never = FocusClassifier(net, "cpu")
    assert explain(never, bird()).verdict == "doubt" and "On test pictures no limit" in explain(never, bird()).card()
    assert "| accuracy on test pictures | 50.0 % |" in about(
        never
    ) and "| sure from | never: no limit was good enough |" in about(never)
    assert "| accuracy on validation pictures | 50.0 % |" in about(classifier) and "| sure from | 35.0 % |" in about(
        classifier
    )


@pytest.mark.parametrize("size", [(4000, 3000), (1500, 6000)])
def test_a_large_photograph_is_explained(classifier, tmp_path, monkeypatch, size):
    "Of more pixels than PIL decodes: none of the drawings needs them all, and none differs."
    bird().resize(size, Image.Resampling.BICUBIC).save(tmp_path / "x.jpg")
    # Fixed regions: the body is not trained, and which of two near ties it prefers depends on the CPU.
    answers = FocusClassifier._answers
    boxes = torch.tensor(
        [[0.45, 0.63, 0.75, 0.93], [0.23, 0.63, 0.53, 0.93], [0.05, 0.23, 0.35, 0.53], [0.05, 0.45, 0.35, 0.75]]
    )
    def fixed(*args, **kwargs):
        return [replace(one, boxes=boxes * torch.tensor(one.size[::-1] * 2)) for one in answers(*args, **kwargs)]
    monkeypatch.setattr(FocusClassifier, "_answers", fixed)
    whole, prediction = Image.open(tmp_path / "x.jpg").convert("RGB"), classifier.predict(tmp_path / "x.jpg")
    image, moved = fit(whole, prediction)
    want = [draw_prediction(image, moved), draw_heat(image, moved), *cut_zooms(whole, prediction)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", size[0] * size[1] * 2 // 3)
    card, found = attempt(classifier, tmp_path / "x.jpg", "x.jpg")
    assert found.prediction.label in card and found.prediction.size == size[::-1]
    have = [found.regions, found.attention, *found.zooms]
    assert [picture.size for picture in have] == [picture.size for picture in want]
    for ours, theirs in zip(have, want):
        assert (
            np.abs(np.asarray(ours, float) - np.asarray(theirs)).mean() < 2
        )  # of 255: two ways to make a picture smaller


def test_fit_keeps_proportions(classifier):
    wide = bird().resize((300, 100))
    found = classifier.predict(wide)
    image, moved = fit(wide, found, 150)
    assert image.size == (150, 50) and moved.size == (50, 150)
    assert torch.allclose(moved.boxes, found.boxes / 2, atol=1e-3)


NAMES = ["Wren", "094.Dodge_Durango_SUV_2012", "W" * 300, "x_" * 2000, "鷦鷯 шапка", "\U0001f426 bird", "$x_1^{", "",
         " ", "two\nlines\x1b[31m", "caf\udce9", "<b>bold</b>", "\u202etxet", "a b " * 40]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_card_is_a_picture_whatever_a_class_is_called(classifier, name):
    found = classifier.predict(bird())
    for sure in (True, False, None):
        one = replace(found, label=name, top5=[(name, .6), ("other", .4)], sure=sure, looked_again=sure,
                      model=found.model | dict(threshold=None if sure is None else .5)).explained()
        image = one.image()
        assert image.mode == "RGB" and image.width == 1352 and 900 < image.height < 4000
        assert one.to_html().encode("utf-8", "surrogatepass")


def test_names_that_differ_at_their_end_do_so_on_the_card(classifier):
    "Their ends are drawn: two cards differ; and none is wider than its place."
    found, start = classifier.predict(bird()), "044.Bentley_Continental_Flying_Spur_Sedan_Long_Wheelbase_200"
    def card(name): return replace(found, label=name, top5=[(name, 1.)]).explained()._panel(1296)
    assert card(start + "6").size == card(start + "7").size and card(start + "6") != card(start + "7")
    for width in (60, 200, 450):
        lines = sheet.wrapped(start, sheet.font_for(start, 24), width)
        assert "".join(lines) == start and all(sheet.font_for(start, 24).getlength(line) <= width for line in lines)


@pytest.mark.parametrize("size", [(1, 1), (3000, 40), (40, 3000), (640, 480), (64, 64)])
def test_a_card_of_a_picture_of_any_shape(classifier, size):
    found = classifier.predict(bird().resize(size))
    for again in (True, False, None):
        image = replace(found, looked_again=again).explained().image()
        assert image.width == 1352 and 300 < image.height < 3000


def test_a_prediction_shows_itself(classifier, tmp_path, monkeypatch):
    "As what the model says when it is asked anew, and without asking it."
    bird(3).save(tmp_path / "x.png")
    found, want = classifier.predict(tmp_path / "x.png"), explain(classifier, tmp_path / "x.png")
    streamed = [one for _, one in classifier.stream(iter([tmp_path / "x.png", bird(3)]))]
    assert [one.source for one in streamed] == [tmp_path / "x.png", None]
    monkeypatch.setattr(FocusClassifier, "_answers", None)
    assert found.explained().image() == want.image() and found._repr_html_() == want.to_html()
    assert streamed[1].explained(bird(3)).image().size == want.image().size
    with pytest.raises(ValueError, match="remembers no picture; give it"): streamed[1].explained()
    assert "<img" not in streamed[1]._repr_html_() and streamed[1].label in streamed[1]._repr_html_()
    shown = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self))
    found.show()
    assert shown == [want.image()]
    (tmp_path / "x.png").unlink()
    assert found._repr_html_() == _spoken(found).to_html()                       # the words are left
    with pytest.raises(FileNotFoundError): found.explained()


def test_a_stream_is_explained(classifier, tmp_path):
    bird(3).save(tmp_path / "x.png")
    with open(tmp_path / "x.png", "rb") as file: assert classifier.predict(file).explained().zooms
    with open(tmp_path / "x.png", "rb") as file: assert explain(classifier, file).zooms


def test_frames_stay_readable():
    "On a picture of their own colour there is a dark edge on both sides; boxes in one place have numbers in four."
    for i, colour in enumerate(["red", "lime", "blue", "yellow", "white"]):
        boxes = [(-50, -50, -40, -40)] * i + [(100, 100, 300, 300)]
        drawn = np.asarray(sheet.draw_frames(Image.new("RGB", (640, 640), colour), boxes))
        row = drawn[250, 90:115].astype(int).sum(1)
        dark = np.flatnonzero(row == 0)
        assert len(dark) >= 4 and np.diff(dark).max() > 2, colour
    plain = sheet.draw_frames(Image.new("RGB", (640, 640)), [(100, 100, 300, 300)] * 4)
    plates = [plain.getpixel((x, y)) for x, y in ((110, 110), (290, 110), (110, 290), (290, 290))]
    assert sorted(plates) == sorted([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)])
    assert sheet.draw_frames(Image.new("RGB", (9, 9)), [(1, 1, 7, 7)]).size == (9, 9)

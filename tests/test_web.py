"The page of `--format web` answers in Chromium as FocusClassifier does, and talks to nobody but its own server."
import functools
import http.server
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from conftest import photograph, shaken
from PIL import Image

from fd_focus.data.loaders import FocusDataLoaders
from fd_focus.training.learner import focus_learner
from fd_focus.use import web
from fd_focus.use.cli import fd_focus_export
from fd_focus.use.export import export_model
from fd_focus.use.model_folder import load_focus, save_focus
from fd_focus.use.predict import FocusClassifier
from fd_focus.use.web import find_ort, write_page

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    "Class names with a word that HTML would read, a threshold, a squashed and cut picture."
    place = tmp_path_factory.mktemp("birds")
    for i in range(12):
        (place / ("wren", "<b>tit & co", "a_b")[i % 3]).mkdir(exist_ok=True)
        photograph(i).save(place / ("wren", "<b>tit & co", "a_b")[i % 3] / f"{i}.png")
    dls = FocusDataLoaders.from_folder(place, image_size=64, bs=2, num_workers=0)
    torch.manual_seed(0)
    learn = focus_learner(dls, "toy_resnet", pretrained=False, preset=None, answer="ensemble")
    shaken(learn.model)
    net = load_focus(folder := save_focus(learn, tmp_path_factory.mktemp("web") / "model", threshold=.5))
    net.folder = str(folder)
    return net


@pytest.fixture(scope="module")
def page(net, tmp_path_factory):
    "The page's address, and the requests that its server got."
    if not (CHROMIUM and DRIVER): pytest.skip("chromium and chromedriver are not installed")
    if not (ort := find_ort()): pytest.skip("no onnxruntime-web: npm or network is missing")
    folder = tmp_path_factory.mktemp("page")
    write_page(net, export_model(net, folder / "graph.onnx"), folder / "out", ort)
    asked = []

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_request(self, *args): asked.append((self.command, self.path))
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=folder / "out"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", dict(browser="ALL"))
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "window-size=1280,1000",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, Service(DRIVER))
    driver.get(page[0])
    wait(driver, lambda: "Drop a photograph" in text(driver, "said"), "the model")
    yield driver
    driver.quit()


def text(browser, name): return browser.find_element("id", name).text


def wait(browser, condition, what, seconds=60):
    end = time.time() + seconds
    while time.time() < end:
        if found := condition(): return found
        time.sleep(.05)
    raise AssertionError(f"waited in vain for {what}: {browser.find_element('tag name', 'body').text[:300]} "
                         f"{browser.get_log('browser')}")


def answer(browser, file):
    "What the page says of a file."
    browser.execute_script("document.getElementById('answer').dataset.found = ''")
    browser.find_element("id", "file").send_keys(str(file))
    found = wait(browser, lambda: browser.find_element("id", "answer").get_attribute("data-found"), "an answer")
    return json.loads(found)


def photos(place):
    "Files that browsers and Pillow could see differently."
    wide, exif = photograph(5, (311, 203)), Image.Exif()
    exif[0x0112] = 6                                             # to be turned by 90 degrees
    wide.save(place / "plain.png")
    small = photograph(6, (120, 90))                             # at half size it could not be decoded
    small.save(place / "turned.jpg", exif=exif, quality=92)
    wide.convert("L").save(place / "grey.png")
    clear = wide.convert("RGBA")
    clear.putalpha(Image.fromarray(np.uint8(255 * (np.indices((203, 311)).sum(0) % 90 < 45))))
    clear.save(place / "clear.png")
    return [place / name for name in ("plain.png", "turned.jpg", "grey.png", "clear.png")]


def test_answers_as_python_does(browser, net, page, tmp_path):
    classifier = FocusClassifier(net, "cpu", fold=False)
    for file in photos(tmp_path):
        want, found = classifier.predict(file), answer(browser, file)
        assert found["label"] == want.label and found["sure"] == want.sure, file.name
        assert abs(found["probability"] - want.probability) < 1e-4, file.name
        assert np.abs(np.array(found["boxes"]) - want.boxes.numpy()).max() < .1, file.name
        assert text(browser, "label") == want.label.replace("_", " ")
    assert {method for method, _ in page[1]} == {"GET"}
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"
                and "favicon" not in line["message"]]


def test_what_is_no_picture_gets_a_friendly_word(browser, tmp_path):
    (tmp_path / "notes.txt").write_text("saw a wren today")
    browser.find_element("id", "file").send_keys(str(tmp_path / "notes.txt"))
    wait(browser, lambda: "notes.txt is no picture" in text(browser, "said"), "the message")
    assert not browser.find_element("id", "answer").is_displayed()


def test_it_may_talk_to_nobody_else(browser):
    "The browser itself refuses: so says the page's policy."
    browser.set_script_timeout(20)
    said = browser.execute_async_script(
        "const done = arguments[0]; addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));"
        "fetch('https://example.com', {method: 'POST', body: 'x'}).catch(() => setTimeout(() => done('no'), 5000))")
    assert said == "connect-src"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_page(browser, width, tmp_path):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(
        width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
    try:
        answer(browser, photos(tmp_path)[0])
        wide = browser.execute_script("return [document.documentElement.scrollWidth, document.querySelector('canvas')"
                                      ".getBoundingClientRect().right]")
        assert max(wide) <= width
        if where := os.environ.get("FD_FOCUS_SCREENSHOT"):
            browser.save_screenshot(where.replace(".png", f"_{width}.png"))
    finally: browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_npm_the_page_names_a_fixed_version(net, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_ort() is None
    (tmp_path / "graph.onnx").write_bytes(b"graph")
    text = write_page(net, tmp_path / "graph.onnx", tmp_path / "out").read_text()
    assert f'src="{web._CDN}ort.wasm.min.js" integrity="sha384-' in text and web.ORT_WEB in web._CDN
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "about.json", "index.html", "model.onnx", "page.js"]


def test_command(net, tmp_path, monkeypatch, capsys):
    "The folder of files is given; nothing is fetched."
    for name in web._ORT_FILES: (tmp_path / name).write_text(name)
    monkeypatch.setenv("PATH", "")
    fd_focus_export(model=net.folder, format="web", out=str(tmp_path / "page"), ort=str(tmp_path), n=2)
    assert "python -m http.server --directory" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == [
        "about.json", "index.html", "model.onnx", "ort", "page.js"]
    for wrong, word in ((dict(ort=str(tmp_path)), "--ort is for --format web"),
                        (dict(ort=str(tmp_path / "page"), format="web"), "lacks ort.wasm.min.js")):
        with pytest.raises(SystemExit, match=word): fd_focus_export(model=net.folder, **wrong)


def test_a_folder_that_lacks_a_file(tmp_path):
    (tmp_path / "ort.wasm.min.js").touch()
    with pytest.raises(ValueError, match="lacks ort-wasm-simd-threaded.mjs, ort-wasm-simd-threaded.wasm"):
        find_ort(tmp_path)

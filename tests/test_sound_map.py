"""The map of sounds: what the page holds, and what a browser does with it."""

import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import DATA

from m2d_embed.audio.clips import load_audio
from m2d_embed.errors import AudioError, ConfigError, UnsupportedError
from m2d_embed.evaluate import sound_map
from m2d_embed.evaluate.sound_map import place, write_map

pytest.importorskip("umap")

RATE = 16_000
FILES = sorted((DATA / "digits").glob("*.opus")) + sorted((DATA / "sounds").glob("*.oga"))
LABELS = [file.name[0] if file.parent.name == "digits" else "sound" for file in FILES]
EVIL = "</script><b>{{sounds}} & \"'"


def clusters(sizes, d=16):
    """Embeddings in groups that are far apart."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((len(sizes), d)).repeat(sizes, axis=0)
    return (centres + 0.1 * rng.standard_normal(centres.shape)).astype(np.float32)


def page_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])


def page_sounds(page):
    found = re.findall(r'<script type="text/plain" id="sound-(\d+)">(.*?)</script>', page)
    assert [int(number) for number, _ in found] == list(range(len(found)))
    return [decoded(sound) for _, sound in found]


def decoded(sound):
    return soundfile.read(io.BytesIO(base64.b64decode(sound)))


def few(output, files=FILES[:3], labels=("a", "b", "a"), title="A map", rate=RATE):
    """A page of so few clips that UMAP is not needed."""
    rng = np.random.default_rng(0)
    write_map(rng.standard_normal((len(files), 8)).astype(np.float32), files, labels, output, title, rate)
    return output.read_text(encoding="utf-8")


# --- places -----------------------------------------------------------------------------------------------------------


def test_similar_clips_lie_together():
    points, method = place(clusters([9, 9, 9]))
    assert points.shape == (27, 2) and np.isfinite(points).all()
    assert "UMAP" in method and "15 neighbours" in method
    group = np.arange(27) // 9
    distance = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(27)
    assert (group[distance.argmin(axis=1)] == group).all()
    np.testing.assert_array_equal(place(clusters([9, 9, 9]))[0], points)


def test_large_dimensions_do_not_drown_the_others():
    embeddings = clusters([6, 6])
    embeddings[:, -1] = 1e4 * np.random.default_rng(1).standard_normal(12)
    embeddings[:, -2] = 7  # constant
    points, _ = place(embeddings)
    distance = np.linalg.norm(points[:, None] - points, axis=2) + 1e9 * np.eye(12)
    assert (distance.argmin(axis=1) // 6 == np.arange(12) // 6).mean() > 0.8


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_few_clips_are_placed_by_pca(n):
    points, method = place(clusters([1] * n))
    assert points.shape == (n, 2) and np.isfinite(points).all()
    assert len(np.unique(points.round(3), axis=0)) == n
    assert "PCA" in method


def test_five_clips_and_clips_that_are_all_alike():
    assert np.isfinite(place(clusters([5]))[0]).all()
    assert np.isfinite(place(np.ones((6, 4), np.float32))[0]).all()


def test_without_umap(monkeypatch):
    monkeypatch.setattr(sound_map, "require", _refuse)
    with pytest.raises(UnsupportedError, match="umap"):
        place(clusters([5]))


def _refuse(module, what):
    raise UnsupportedError(f"{what}: {module} is not installed")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_holds_names_labels_and_sounds(tmp_path):
    page = few(tmp_path / "map.html", [FILES[0], FILES[1], FILES[6]], ["three", "three", "alarm; clock"])
    data = page_data(page)
    assert data["labels"] == ["alarm; clock", "three"] and data["label"] == [1, 1, 0]
    assert data["file"] == ["digits/3_jackson_0.opus", "digits/3_nicolas_0.opus", "sounds/alarm-clock-elapsed.oga"]
    assert "PCA" in data["notes"][1] and "3 clips, 2 labels." in data["notes"][0]
    assert "<title>A map</title>" in page and "{{" not in page
    for file, (samples, rate) in zip([FILES[0], FILES[1], FILES[6]], page_sounds(page), strict=True):
        original = load_audio(file, RATE)
        assert rate == RATE and len(samples) == len(original)
        assert np.corrcoef(samples, original)[0, 1] > 0.8
    assert [path.name for path in tmp_path.iterdir()] == ["map.html"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page), "the page needs no network"


def test_hostile_names_do_no_harm(tmp_path):
    file = tmp_path / "<b>&'a.opus"
    shutil.copy(FILES[0], file)
    page = few(tmp_path / "map.html", [file, FILES[1]], [EVIL, "b"], EVIL)
    assert page_data(page)["labels"] == [EVIL, "b"]
    assert len(page_sounds(page)) == 2
    assert "<b>{{" not in page and "&lt;/script&gt;&lt;b&gt;{{sounds}} &amp;" in page


def test_long_clips_are_cut_and_the_page_says_so(tmp_path):
    long, exact = tmp_path / "long.wav", tmp_path / "exact.wav"
    tone = 0.1 * np.sin(np.arange(24 * RATE) / 20)
    soundfile.write(long, tone, RATE)
    soundfile.write(exact, tone[: 10 * RATE], RATE)
    page = few(tmp_path / "map.html", [long, exact, FILES[0]])
    assert [len(samples) for samples, _ in page_sounds(page)][:2] == [10 * RATE, 10 * RATE]
    assert "(1 of 3) the first 10 s" in page_data(page)["notes"][2]
    assert page_data(page)["seconds"][:2] == [24, 10]
    assert len(page_data(few(tmp_path / "short.html"))["notes"]) == 2


@pytest.mark.parametrize(("rate", "kept"), [(8_000, 8_000), (32_000, 48_000), (44_100, 48_000), (96_000, 48_000)])
def test_rates(tmp_path, rate, kept):
    samples, found = page_sounds(few(tmp_path / "map.html", [FILES[0]], ["a"], rate=rate))[0]
    assert found == kept and len(samples) == len(load_audio(FILES[0], kept))


def test_bad_files_are_named_and_leave_no_page(tmp_path):
    output = tmp_path / "map.html"
    output.write_text("the page of before")
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"bad\.wav"):
        few(output, [FILES[0], tmp_path / "bad.wav"], ["a", "b"])
    cut = tmp_path / "cut.wav"
    soundfile.write(cut, np.zeros(RATE), RATE)
    cut.write_bytes(cut.read_bytes()[:1000])
    with pytest.raises(AudioError, match=r"cut\.wav: truncated"):
        few(output, [FILES[0], cut], ["a", "b"])
    assert output.read_text() == "the page of before"
    assert not list(tmp_path.glob(".*"))


def test_sounds_are_encoded_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sound_map, "_ENCODED_AT_A_TIME", 2)
    (tmp_path / "gone.wav").write_bytes(FILES[0].read_bytes())
    clips = [sound_map.open_clip(file, None, RATE, "") for file in [*FILES[:3], tmp_path / "gone.wav"]]
    (tmp_path / "gone.wav").unlink()
    sounds = sound_map._encoded(clips, RATE)
    for clip in clips[:2]:  # in their order
        assert len(decoded(next(sounds))[0]) == len(load_audio(clip.source, RATE))
    with pytest.raises(AudioError, match=r"gone\.wav"):
        list(sounds)


def test_wrong_arguments(tmp_path):
    good = clusters([3])
    out = tmp_path / "map.html"
    with pytest.raises(ConfigError, match="got 2 files and 3 labels"):
        write_map(good, FILES[:2], ["a"] * 3, out, "", RATE)
    with pytest.raises(ConfigError, match=r"not empty, but got \(0, 8\)"):
        write_map(np.zeros((0, 8), np.float32), [], [], out, "", RATE)
    with pytest.raises(ConfigError, match=r"ends in \.html"):
        write_map(good, FILES[:3], ["a"] * 3, tmp_path / "map.png", "", RATE)
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        write_map(good, FILES[:3], ["a"] * 3, tmp_path / "nowhere" / "map.html", "", RATE)
    with pytest.raises(ConfigError, match="sample_rate=0"):
        write_map(good, FILES[:3], ["a"] * 3, out, "", 0)
    good[1, 2] = np.nan
    with pytest.raises(ConfigError, match=f"{FILES[1].name}: its embedding is not finite"):
        write_map(good, FILES[:3], ["a"] * 3, out, "", RATE)


# --- in a browser -----------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 15.0  # seconds
# Chromium reads commands from descriptor 3 and answers on 4; either may be in use while they are put there.
START = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A headless Chromium, driven over DevTools through a pair of pipes."""

    def __init__(self, profile: Path, *flags: str):
        commands, self.out = os.pipe()
        self.inp, answers = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        options += ["--autoplay-policy=no-user-gesture-required", "--window-size=1200,900", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(commands), str(answers), BROWSER, *options, "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.buffer, self.number, self.session = b"", 0, None
        self.errors: list[str] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        self.call("Runtime.enable")

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while (answer := self._read(deadline)).get("id") != self.number:
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self, deadline):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.inp], [], [], max(0, deadline - time.monotonic()))
            assert ready, "no answer from the browser"
            chunk = os.read(self.inp, 1 << 16)
            assert chunk, "the browser has gone"
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def ask(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression):
        deadline = time.monotonic() + PATIENCE
        while not self.ask(expression):
            assert time.monotonic() < deadline, f"never came true: {expression}"
            time.sleep(0.05)

    def open(self, page):
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete' && typeof state === 'object' && fitted > 1")

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, x, y):
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, button="left", clickCount=1)
        self.mouse("mouseReleased", x, y, button="left", clickCount=1)

    def press(self, selector):
        """Click the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        self.click(*self.ask(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})"))

    def place(self, i):
        """Where a clip is in the window."""
        return self.ask(f"(b => [b.x + screenX({i}), b.y + screenY({i})])(canvas.getBoundingClientRect())")

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.inp)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


NAMES = ["jackson.opus", "<b>&amp;'nicolas.opus", "theo.opus", "7 Jackson.opus"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    files = [Path(shutil.copy(file, folder / name)) for file, name in zip(FILES, NAMES, strict=False)]
    few(folder / "map.html", files, ["a", EVIL, "a", "c"], EVIL)
    return folder / "map.html"


@pytest.fixture
def opened(browser, page):
    browser.errors.clear()
    browser.open(page)
    yield browser
    assert not browser.errors


def test_browser_shows_names_as_text(opened):
    assert opened.ask("document.title") == EVIL
    assert opened.ask("document.querySelector('h1').textContent") == EVIL
    labels = "[...document.querySelectorAll('#legend .row span')].map(s => s.textContent)"
    assert opened.ask(labels) == sorted({EVIL, "a", "c"})
    assert opened.ask("[...document.querySelectorAll('#legend small')].map(s => s.textContent)") == ["1", "2", "1"]
    assert opened.ask("document.querySelectorAll('.tip b, .player b').length === document.querySelectorAll('b').length")
    colours = "[...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data].some(v => v)"
    assert opened.ask(colours), "nothing is drawn"


def test_180_labels_look_different(opened):
    looks = "[...Array(180).keys()].map(label => `${colour(label)} ${marker(label)}`)"
    assert opened.ask(f"new Set({looks}).size") == 180


def test_hovering_tells_file_and_label(opened):
    assert opened.ask("element('tip').hidden")
    opened.mouse("mouseMoved", *opened.place(1))
    opened.wait("!element('tip').hidden")
    assert opened.ask("element('tip').querySelector('b').textContent") == NAMES[1]
    assert opened.ask("element('tip').querySelector('span').textContent").startswith(EVIL)
    x, y = opened.place(1)
    opened.mouse("mouseMoved", x + 60, y + 60)
    opened.wait("element('tip').hidden")


def test_clicking_plays_and_stops(opened):
    opened.ask(
        "addEventListener('error', e => window.failed = true, true); window.heard = 0;"
        "audio.addEventListener('timeupdate', () => { heard = Math.max(heard, audio.currentTime); })"
    )
    opened.click(*opened.place(2))
    opened.wait("heard > 0.1")
    assert opened.ask("!window.failed && audio.duration") == pytest.approx(
        len(load_audio(FILES[2], RATE)) / RATE, abs=0.05
    )
    opened.wait("element('player').hidden && audio.paused")  # to its end
    opened.ask("audio.loop = true")
    opened.click(*opened.place(0))
    opened.wait("!audio.paused && !element('player').hidden")
    assert opened.ask("element('player').querySelector('b').textContent") == NAMES[0]
    opened.click(*opened.place(3))  # another one takes its place
    opened.wait("state.playing === 3 && !audio.paused")
    opened.click(*opened.place(3))
    opened.wait("audio.paused && element('player').hidden")
    opened.click(*opened.place(3))
    opened.wait("!audio.paused")
    opened.press("#stop")
    opened.wait("audio.paused && state.playing === -1")


def test_legend_hides_and_singles_out(opened):
    shown = "[...document.querySelectorAll('#legend .row')].map(row => row.getAttribute('aria-pressed'))"
    x, y = opened.place(3)
    pixel = f"canvas.getContext('2d').getImageData(...[{x}, {y}].map((v, k) => v - [canvas.getBoundingClientRect().x, "
    pixel += "canvas.getBoundingClientRect().y][k]).map(Math.round), 1, 1).data[3]"
    assert opened.ask(pixel) > 0
    opened.press("#legend li:nth-child(3) .row")  # c
    assert opened.ask(shown) == ["true", "true", "false"]
    opened.wait(f"{pixel} === 0")
    opened.click(x, y)
    assert opened.ask("state.playing") == -1, "a hidden clip does not play"
    opened.press("#legend li:nth-child(3) .only")
    assert opened.ask(shown) == ["false", "false", "true"]
    opened.wait(f"{pixel} > 0")
    opened.press("#legend li:nth-child(3) .only")
    assert opened.ask(shown) == ["true"] * 3
    opened.press("#hide")
    assert opened.ask(shown) == ["false"] * 3
    opened.press("#show")
    assert opened.ask(shown) == ["true"] * 3


def test_hiding_what_plays_stops_it(opened):
    opened.ask("audio.loop = true")
    opened.click(*opened.place(3))
    opened.wait("!audio.paused")
    opened.press("#legend li:nth-child(3) .row")
    opened.wait("audio.paused && element('player').hidden")


def test_wheel_zooms_and_dragging_moves(opened):
    x, y = opened.place(0)
    before = opened.ask("state.scale")
    opened.mouse("mouseWheel", x, y, deltaX=0, deltaY=-240)
    opened.wait(f"state.scale > 1.5 * {before}")
    assert opened.place(0) == pytest.approx([x, y], abs=1), "what is under the pointer stays there"
    opened.mouse("mousePressed", x, y, button="left", clickCount=1)
    opened.mouse("mouseMoved", x + 30, y + 20, button="left", buttons=1)
    opened.mouse("mouseReleased", x + 30, y + 20, button="left", clickCount=1)
    assert opened.place(0) == pytest.approx([x + 30, y + 20], abs=1)
    assert opened.ask("state.playing") == -1, "dragging is no click"
    opened.press("#fit")
    assert opened.ask("state.scale") == pytest.approx(before)


def test_search_by_keyboard(opened):
    opened.press("#query")
    opened.call("Input.insertText", text="JACKSON")
    opened.wait("!element('count').hidden")
    names = "[...document.querySelectorAll('#found span')].map(s => s.textContent)"
    assert opened.ask(names) == [NAMES[0], NAMES[3]]
    assert opened.ask("element('count').textContent") == "2 found"
    opened.ask("audio.loop = true")
    for key, code in (("Tab", 9), ("Enter", 13)):
        for kind in ("keyDown", "keyUp"):
            typed = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            opened.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)
    opened.wait("!audio.paused && state.playing === 0")
    opened.call("Input.dispatchKeyEvent", type="keyDown", key="Escape", code="Escape", windowsVirtualKeyCode=27)
    opened.wait("audio.paused && state.playing === -1")
    opened.press("#query")
    opened.call("Input.insertText", text=" nothing so named")
    opened.wait("element('count').textContent === '0 found' && element('found').hidden")

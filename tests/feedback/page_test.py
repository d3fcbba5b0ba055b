"""The page in a real browser: Chromium without a window, driven by its mouse and keys."""

import contextlib
import json
import re
import shutil

import numpy as np
import pytest

from gendiff.feedback import ask, consensus, labels
from gendiff.feedback.ask import Options

playwright = pytest.importorskip("playwright.sync_api", reason="drives a browser: pip install playwright")
expect = playwright.expect
PATIENCE = 90_000
"""Milliseconds that a condition may take on a machine that is busy with other things."""
expect.set_options(timeout=PATIENCE)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = next(filter(None, map(shutil.which, NAMES)), None) or shutil.which(own)
        if path is None:
            pytest.skip("no Chromium: install the package chromium, or run `playwright install chromium`")
        # Its sandbox needs rights that containers do not give; it sees this page only.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A served folder of samples and pages of a browser on it."""

    def __init__(self, folder, browser, stack, need=None, **options):
        self.options = Options(**{"port": 0, "rater": "anna", **options})
        self.board = ask.make_board(folder, self.options, need)
        self.url = stack.enter_context(ask.serving(self.board, self.options))
        self.context = browser.new_context(viewport={"width": 1200, "height": 800})
        self.context.set_default_timeout(PATIENCE)
        stack.callback(self.context.close)
        self.errors, self.asked = [], []

    def open(self, url=None):
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(url or self.url)
        expect(page.locator(".tile").first).to_be_visible()
        return page

    def stored(self, rater="anna"):
        """Labels by sample, as the file has them."""
        marks = labels.latest(labels.read(self.board.path))
        return {mark.sample: mark.label for (_, who), mark in marks.items() if who == rater}


@pytest.fixture
def serve(tmp_path, browser):
    with contextlib.ExitStack() as stack:
        pages = []

        def start(array=None, need=None, **options):
            np.save(tmp_path / "samples.npy", images(30) if array is None else array)
            pages.append(Page(tmp_path, browser, stack, need, **options))
            return pages[-1]

        yield start
        assert [error for each in pages for error in each.errors] == []


def images(count):
    pixels = np.zeros((count, 12, 12), np.uint8)
    for i in range(count):
        pixels[i, 2 : 2 + i % 8, 3:6], pixels[i, 0, 0] = 200, i % 256
        pixels[i, 0, 1] = i // 256
    return pixels


def saved(page):
    expect(page.locator("#saved")).to_have_text("all saved")


def until(page, condition):
    """Waits for a condition on the page (Playwright's own way needs `eval`, which the page's rules forbid)."""
    for _ in range(PATIENCE // 50):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {condition}")


def press(page, keys):
    for key in keys.split():
        page.keyboard.press(key)


def tile(page, index):
    return page.locator(f"#tile-{index}")


def counts(page):
    """What the filter's buttons say: all, unmarked, malign, undecided, benign."""
    texts = page.locator("#filters small").all_inner_texts()
    return [int(re.match(r"[\d,]+", text)[0].replace(",", "")) for text in texts]


def test_marks_by_key_and_click(serve):
    page_of = serve()
    page = page_of.open()
    assert "token" not in page.url, "it does not stay in the address bar"
    press(page, "m u b ArrowRight Space Space ArrowLeft")
    tile(page, 5).click()
    tile(page, 6).get_by_title("benign").click()
    tile(page, 7).click(click_count=3)
    saved(page)
    wanted = {"0": "malign", "1": "undecided", "2": "benign", "4": "undecided", "5": "malign", "6": "benign"}
    assert page_of.stored() == wanted | {"7": "benign"}
    assert counts(page) == [30, 23, 2, 2, 3]
    expect(tile(page, 0)).to_have_attribute("aria-label", "0, malign")
    expect(tile(page, 7)).to_have_attribute("aria-selected", "true")
    press(page, "Backspace")
    saved(page)
    assert page_of.stored() == wanted
    assert all(url.startswith(page_of.url.partition("?")[0]) for url in page_of.asked), "no other server is asked"
    found = consensus.classes(page_of.board.samples, labels.read(page_of.board.path))
    assert (found.malign.tolist(), found.benign.tolist()) == ([0, 5], [2, 6])


def test_undo_goes_back_mark_by_mark_and_over_pages(serve):
    page_of = serve()
    page = page_of.open()
    press(page, "3 m m b")
    press(page, "Home b")  # sample 0 changes its mind
    press(page, "End m")
    saved(page)
    assert page_of.stored() == {"0": "benign", "1": "malign", "2": "benign", "29": "malign"}
    press(page, "Home z")
    expect(tile(page, 29)).to_have_attribute("aria-selected", "true")
    expect(tile(page, 29)).to_have_attribute("aria-label", "29, unmarked")
    press(page, "Control+z")
    expect(tile(page, 0)).to_have_attribute("aria-label", "0, malign")
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "malign", "2": "benign"}
    page.reload()  # undo survives
    expect(tile(page, 3)).to_have_attribute("aria-selected", "true")
    page.locator("#undo").click()
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "malign"}
    press(page, "z z z z")
    saved(page)
    assert page_of.stored() == {}
    expect(page.locator("#undo")).to_be_disabled()
    marks = labels.read(page_of.board.path)
    assert len(marks) == 10, "undo appends too"
    assert {mark.undoes for mark in marks} - {""} == {mark.id for mark in marks if not mark.undoes}


def test_keys_move_turn_and_change_columns(serve):
    page = serve(columns=5).open()
    here = lambda: int(page.locator('[aria-selected="true"]').get_attribute("id")[5:])
    assert page.locator("#columns").inner_text() == "5 columns"
    press(page, "ArrowRight ArrowDown")
    assert here() == 6
    press(page, "ArrowUp ArrowLeft ArrowLeft ArrowUp")
    assert here() == 0
    size = page.locator(".tile").count()
    assert size % 5 == 0
    press(page, "n")
    assert here() == size
    press(page, "p End")
    assert here() == 29
    press(page, "p p p p Home 3")
    assert (here(), page.locator("#columns").inner_text()) == (0, "3 columns")
    press(page, "+ + -")
    assert page.locator("#columns").inner_text() == "4 columns"
    page.locator("#more").click()
    press(page, "ArrowDown")  # a click leaves the keyboard with the samples
    assert here() == 5
    box, last = page.locator("main").bounding_box(), page.locator(".tile").last.bounding_box()
    assert last["y"] + last["height"] <= box["y"] + box["height"], "a page fits the window"
    page.reload()
    expect(page.locator("#columns")).to_have_text("5 columns")


def test_filters_review_what_was_marked(serve):
    page_of = serve()
    page = page_of.open()
    press(page, "m b m u")
    shown = lambda: [element.get_attribute("aria-label") for element in page.locator(".tile").all()]
    page.locator("[data-filter=malign]").click()
    assert shown() == ["0, malign", "2, malign"]
    press(page, "b")
    assert shown() == ["0, benign", "2, malign"], "it stays in sight until the filter is chosen again"
    press(page, "f")
    assert shown() == ["3, undecided"]
    press(page, "f")
    assert shown() == ["0, benign", "1, benign"]
    press(page, "f f")
    assert shown()[0] == "4, unmarked"
    page.locator("[data-filter=malign]").click()
    press(page, "Backspace")
    assert shown() == ["2, unmarked"]
    page.locator("[data-filter=malign]").click()
    assert shown() == []
    press(page, "z")
    expect(tile(page, 2)).to_have_attribute("aria-label", "2, malign")
    press(page, "f f f f f g")
    expect(page.locator("[data-filter=all]")).to_have_attribute("aria-pressed", "true")
    expect(tile(page, 4)).to_have_attribute("aria-selected", "true")


def test_an_empty_filter_says_so(serve):
    page = serve().open()
    page.locator("[data-filter=benign]").click()
    expect(page.locator("#empty")).to_be_visible()
    press(page, "m Space ArrowDown n p z Enter Backspace Shift+B")
    assert counts(page) == [30, 30, 0, 0, 0]


def test_reload_resumes_and_the_clock_goes_on(serve):
    page_of = serve(images(400), columns=6)
    page = page_of.open()
    page.wait_for_timeout(1100)
    press(page, "b " * 50)
    page.close()  # at once: what is on its way still arrives
    page = page_of.open(page_of.url)
    saved(page)
    expect(tile(page, 50)).to_have_attribute("aria-selected", "true")
    assert len(page_of.stored()) == 50
    total = sum(mark.seconds for mark in labels.read(page_of.board.path))
    assert 1 < total < 60
    minutes, seconds = map(int, page.locator("#clock").inner_text().split(":"))
    assert 60 * minutes + seconds >= int(total)


def test_idle_and_hidden_time_does_not_count(serve):
    page_of = serve()
    page = page_of.context.new_page()
    page.clock.install()
    page.goto(page_of.url)
    expect(page.locator(".tile").first).to_be_visible()
    press(page, "b")
    page.clock.run_for(4000)
    press(page, "b")
    page.clock.fast_forward(600_000)
    press(page, "b")
    page.evaluate("""() => {
        Object.defineProperty(document, "hidden", { get: () => window.away ?? false });
        window.away = true; document.dispatchEvent(new Event("visibilitychange"));
    }""")
    page.clock.fast_forward(20_000)
    page.evaluate("() => { window.away = false; document.dispatchEvent(new Event('visibilitychange')); }")
    press(page, "b")
    saved(page)
    seconds = [mark.seconds for mark in labels.read(page_of.board.path)]
    assert 4 <= seconds[1] < 8
    assert 30 <= seconds[2] < 34, "ten idle minutes are 30 s"
    assert seconds[3] < 4, "what passed while hidden is nothing"


def test_two_pages_see_each_other(serve):
    page_of = serve()
    first, second = page_of.open(), page_of.open()
    press(first, "m")
    expect(tile(second, 0)).to_have_attribute("aria-label", "0, malign")
    press(second, "End b")
    expect(tile(first, 29)).to_have_attribute("aria-label", "29, benign")
    press(second, "Home u")
    expect(tile(first, 0)).to_have_attribute("aria-label", "0, undecided")
    press(first, "Home z")
    expect(first.locator("#say")).to_have_text(re.compile("nothing undone"))
    saved(first)
    assert page_of.stored() == {"0": "undecided", "29": "benign"}
    press(first, "2 Home")
    press(second, "Home")
    for _ in range(12):
        press(first, "b")
        press(second, "m")
    saved(first)
    saved(second)
    assert len(labels.read(page_of.board.path)) == 3 + 24, "both pages' marks are all in the file"


def test_raters_are_kept_apart(serve):
    page_of = serve()
    page = page_of.open()
    press(page, "m b")
    saved(page)
    page.locator("#rater").fill("béla")
    page.locator("#rater").press("Enter")
    expect(page).to_have_url(re.compile("rater=b%C3%A9la"))
    expect(tile(page, 0)).to_have_attribute("aria-label", "0, unmarked")
    press(page, "m m")
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "benign"}
    assert page_of.stored("béla") == {"0": "malign", "1": "malign"}
    assert consensus.agreement(labels.read(page_of.board.path)).pairs["anna", "béla"].share == 0.5


def test_the_meaning_is_kept_and_shared(serve):
    page_of = serve(meaning="a stroke")
    page, other = page_of.open(), page_of.open()
    expect(page.locator("#meaning")).to_have_value("a stroke")
    page.bring_to_front()
    press(page, "e")
    page.locator("#meaning").fill("a stroke <b>&")
    press(page, "Enter b")  # the keys belong to the samples again
    saved(page)
    assert labels.meaning(page_of.board.path) == "a stroke <b>&"
    expect(other.locator("#meaning")).to_have_value("a stroke <b>&")
    assert page_of.stored() == {"0": "benign"}


def test_the_rest_of_a_page_is_benign_only_when_said(serve):
    page_of = serve(images(60), columns=6)
    page = page_of.open()
    press(page, "m u n")
    size = int(page.locator(".tile").first.get_attribute("id")[5:])
    assert size < 60
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "undecided"}, "a page that was looked at is not marked"
    press(page, "p Shift+B")
    saved(page)
    rest = {str(i): "benign" for i in range(2, size)}
    assert page_of.stored() == {"0": "malign", "1": "undecided"} | rest
    assert len([mark for mark in labels.read(page_of.board.path) if mark.seconds]) <= 3, "time counts once"
    press(page, "z")
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "undecided"}, "one undo for one key"


def test_marks_made_without_a_connection_wait_and_arrive(serve):
    page_of = serve()
    page = page_of.open()
    press(page, "m")
    saved(page)
    page_of.context.set_offline(True)
    press(page, "b b")
    expect(page.locator("#banner")).to_contain_text("No connection")
    expect(page.locator("#banner")).to_contain_text("not lost: 2.")
    assert page_of.stored() == {"0": "malign"}
    page_of.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "benign", "2": "benign"}
    assert len(labels.read(page_of.board.path)) == 3
    page_of.errors.clear()  # the browser reports each failed request


def test_marks_survive_a_server_that_dies_and_a_page_that_is_closed(serve):
    page_of = serve()
    board, context = page_of.board, page_of.context
    page = context.new_page()
    with ask.serving(board, page_of.options) as url:
        page.goto(url)
        expect(tile(page, 0)).to_have_attribute("aria-selected", "true")
        press(page, "m")
        saved(page)
    press(page, "b b")
    expect(page.locator("#banner")).to_contain_text("not lost: 2.")
    same = Options(port=int(re.search(r":(\d+)/", url)[1]), rater="anna")
    with ask.serving(board, same) as url:
        expect(page.locator("#banner")).to_contain_text("open the address that was printed")
        page.close()
        page = context.new_page()
        page.goto(url)
        expect(tile(page, 3)).to_have_attribute("aria-selected", "true")
        saved(page)
    assert page_of.stored() == {"0": "malign", "1": "benign", "2": "benign"}


def test_a_refusal_is_told_and_nothing_is_dropped(serve):
    page_of = serve()
    page = page_of.open()
    path = page_of.board.path
    path.write_text("damage\n{}\n")
    press(page, "m")
    expect(page.locator("#banner")).to_contain_text("line 1 must be a JSON line")
    path.write_text("")
    expect(page.locator("#banner")).to_be_hidden()
    saved(page)
    assert page_of.stored() == {"0": "malign"}
    page_of.errors.clear()


def test_a_page_without_the_token_shows_nothing(serve):
    page_of = serve()
    page = page_of.context.new_page()
    assert page.goto(page_of.url.partition("?")[0]).status == 401
    assert "open the full address" in page.content()


KINDS = {
    "image": images(12),
    "point": np.random.default_rng(0).normal(size=(12, 2)),
    "trajectory": np.random.default_rng(0).normal(size=(12, 30, 2)).cumsum(1),
    "motion": np.random.default_rng(0).normal(size=(12, 10, 5, 3)) * 3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shown(serve, kind):
    page_of = serve(KINDS[kind])
    page = page_of.open()
    assert page_of.board.samples.kind == kind
    until(page, "[...document.querySelectorAll('.tile img')].every((image) => image.complete && image.naturalWidth)")
    assert page.locator(".tile img").count() == 12
    press(page, "Enter ArrowRight m")
    expect(page.locator("#large")).to_be_visible()
    expect(page.locator("#caption")).to_have_text("2")
    until(page, "document.querySelector('#whole').naturalWidth")
    press(page, "Space")
    expect(page.locator("#verdict")).to_have_text("✕ malign")
    press(page, "Enter")
    expect(page.locator("#large")).to_be_hidden()
    saved(page)
    assert page_of.stored() == {"1": "malign", "2": "malign"}


def test_equal_samples_share_their_label(serve):
    array = images(6)
    array[4] = array[0]
    page_of = serve(array)
    page = page_of.open()
    press(page, "m")
    expect(tile(page, 4)).to_have_attribute("aria-label", "4, malign")
    press(page, "Shift+B")
    saved(page)
    assert consensus.classes(page_of.board.samples, labels.read(page_of.board.path)).malign.tolist() == [0, 4]


def test_thousands_of_samples_open_and_turn_quickly(serve):
    page_of = serve(images(2000))
    page = page_of.open()
    assert page.locator(".tile").count() < 100, "one page of them"
    milliseconds = page.evaluate("""() => {
        const start = performance.now();
        for (let i = 0; i < 60; i++) document.dispatchEvent(new KeyboardEvent("keydown", { key: "n" }));
        return performance.now() - start;
    }""")
    assert milliseconds < 60 * 200
    press(page, "End m")
    saved(page)
    assert page_of.stored() == {"1999": "malign"}
    assert len(page_of.asked) < 60 * 100


def test_enough_labels_offer_to_finish(serve):
    page_of = serve(need=(1, 2))
    page = page_of.open()
    expect(page.locator("#need")).to_have_text("wanted: 0 / 1 malign, 0 / 2 benign")
    press(page, "m b")
    saved(page)
    expect(page.locator("#finish")).to_be_disabled()
    press(page, "b")
    page.locator("#finish").click()
    assert page_of.board.finished.wait(PATIENCE / 1000)


def test_the_file_holds_what_is_documented(serve):
    page_of = serve()
    page = page_of.open()
    press(page, "m")
    saved(page)
    (line,) = map(json.loads, page_of.board.path.read_text().splitlines())
    assert set(line) == {"type", "sample", "hash", "label", "seconds", "rater", "session", "time", "id"}
    assert line["hash"] == page_of.board.samples.hashes[0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["time"])


def test_labels_that_vanish_are_written_again_and_told(serve):
    page_of = serve()
    page = page_of.open()
    press(page, "m b")
    saved(page)
    page_of.board.path.unlink()
    press(page, "u")
    expect(page.locator("#banner")).to_contain_text("its 2 lines were written again")
    saved(page)
    assert page_of.stored() == {"0": "malign", "1": "benign", "2": "undecided"}
    page.locator("#banner").click()
    expect(page.locator("#banner")).to_be_hidden()
    press(page, "b")
    saved(page)
    expect(page.locator("#banner")).to_be_hidden()
    assert len(page_of.stored()) == 4


def test_half_an_emoji_is_stored_as_a_sign(serve):
    page_of = serve()
    page = page_of.open()
    page.evaluate("""() => {
        const field = document.querySelector("#meaning");
        field.value = "half \\ud83d";
        field.dispatchEvent(new Event("change"));
    }""")
    press(page, "m")
    saved(page)
    assert labels.meaning(page_of.board.path) == "half \N{REPLACEMENT CHARACTER}"
    assert page_of.stored() == {"0": "malign"}

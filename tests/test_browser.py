"""The chat page in a real Chromium, at a real server, with a tiny model that knows five dialogues by heart."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from nanochat import runs
from nanochat.dialogue import render
from nanochat.model import GPT, GPTConfig
from nanochat.rows import Rows, Window
from nanochat.tokenizer import Tokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")]

ROOT = Path(__file__).parent.parent
LONG = 1900  # tokens; of a reply that may have so many, those after the first 700 come slowly, on any machine: half a minute in all
SERVER = f"""
import time
from nanochat import batching, runtime, server

choose = batching.Batcher.choose

def slowly(batcher, job, logits):
    time.sleep(0.03 * (job.config.max_new_tokens == {LONG} and job.made > 700))
    return choose(batcher, job, logits)

batching.Batcher.choose = slowly
runtime.run_as_script(server.main)
"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-smooth-scrolling"]
RICH = ("# Rich\n\n**bold** and *slanted*, `code`\n\n- one\n- two\n\n```python\nprint(1)\n```\n\n"
        "<script>alert(1)</script> <img src=x onerror=alert(2)> [bad](javascript:alert(3)) [good](https://example.com/)")
ANSWERS = {"Hello": "Hey there!", "Bye": "See you soon.", "Rich": RICH, "你好": "你好，很高兴见到你。", "a" * 10_000: "So many letters."}
CONTEXT = 2048
SONG = "la" + " la" * 300  # of which the model sees no end


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder whose model answers as ANSWERS says, and sings to "Sing" until it is stopped."""
    torch.manual_seed(0)
    pairs = [*ANSWERS.items(), ("Sing", SONG)]
    texts = ["\n".join(pair) + "\n" for pair in pairs] * 3 + ["a" * 8192] * 3
    tokenizer = Tokenizer.train(texts, 448).for_chat()
    conversations = [[{"role": "user", "content": said}, {"role": "assistant", "content": reply}] for said, reply in pairs]
    conversations += [a + b for a in conversations[:4] for b in conversations if a != b]
    rows = Rows.of([Window(*(part[:257] for part in render(messages, tokenizer))) for messages in conversations], 256)
    batch = rows.batch(range(len(rows)))
    model = GPT(GPTConfig(tokenizer.vocab_size, block_size=CONTEXT, n_layer=2, n_head=2, n_embd=48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(300):
        loss = model(batch.inputs, batch.targets, segments=batch.segments) / (batch.targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.005:
            break
    assert loss < 0.02, f"the model does not know its dialogues by heart: loss {loss:.3f}"
    with torch.no_grad():  # later positions look like those that it has learned with: it sings on
        model.wpe.weight[256:] = model.wpe.weight[128:256].repeat(CONTEXT // 128 - 2, 1)
    folder = tmp_path_factory.mktemp("browser") / "talker"
    runs.save(folder, 1, model.eval(), tokenizer, settings={}, results={})
    return folder


@contextmanager
def serve(folder: Path, port: int = 0, key: str = ""):
    """Run the server until the block ends, at a free port if none is given; yields its process, which has its url, once it answers."""
    command = [sys.executable, "-c", SERVER, "--checkpoint", str(folder), "--port", str(port), "--max-tokens", str(CONTEXT)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | ({"NANOCHAT_API_KEY": key} if key else {})
    handle, name = tempfile.mkstemp(".log", dir=folder.parent)
    log = Path(name)
    with open(handle, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
    try:
        deadline = time.monotonic() + 120
        while True:
            if found := re.search(r"chat at (http://\S+),", log.read_text(encoding="utf-8")):
                process.url = f"{found[1]}/"
                with suppress(OSError):  # it listens before it serves
                    urllib.request.urlopen(process.url, timeout=60)
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(folder) -> str:
    with serve(folder) as process:
        yield process.url


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """open_page(address, **context) → a fresh browser's page, greedy by default.

    At the end of each test: no dialog was shown, no script failed, and no request left the server, nor was
    one stopped by the policy alone.
    """
    contexts, seen, wrong = [], [], []

    def open_page(address: str = url, kept: dict | None = None, **settings):
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1000, "height": 700}} | settings)
        contexts.append(context)
        kept = json.dumps({"settings": {"temperature": 0}} if kept is None else kept)
        context.add_init_script(f"localStorage.getItem('nanochat') ?? localStorage.setItem('nanochat', {json.dumps(kept)})")
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.asked = []  # the bodies of the requests for replies
        page.on("request", lambda request: seen.append((address, request.url)))
        page.on("request", lambda request: page.asked.append(request.post_data_json) if request.method == "POST" else None)
        page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
        page.wrong = wrong
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong
    assert seen and all(asked.startswith((address, "data:")) for address, asked in seen), seen


def say(page, text: str, wait: bool = True) -> None:
    """Send a message with Enter, and wait for the whole reply."""
    page.fill("#draft", text)
    page.press("#draft", "Enter")
    if wait:
        finished(page)


def until(page, condition: str, argument=None) -> None:
    """Wait until it is true. (Page.wait_for_function evaluates text inside the page, which its policy forbids.)"""
    deadline = time.monotonic() + 60
    while not page.evaluate(condition, argument):
        assert time.monotonic() < deadline, f"never true: {condition}"
        time.sleep(0.05)


def finished(page) -> None:
    page.wait_for_selector("article.assistant:last-child .below span")


def conversation(page) -> list[str]:
    return page.locator("#messages .text").all_inner_texts()


def notice(page) -> str:
    page.wait_for_selector("#notice p")
    return page.inner_text("#notice p")


def set_longest_reply(page, tokens: int) -> None:
    page.evaluate("tokens => { max_tokens.value = tokens; max_tokens.dispatchEvent(new Event('input')) }", tokens)


def sing(page, tokens: int = LONG) -> None:
    """Ask for a reply that goes on and on, and wait until some of it has come."""
    set_longest_reply(page, tokens)
    say(page, "Sing", wait=False)
    until(page, "document.querySelector('article.assistant:last-child .text')?.textContent.length > 30")


# ------------------------------------------------------------------ talking


def test_a_message_is_answered_and_the_next_one_goes_with_the_conversation(open_page):
    page = open_page()
    say(page, "Hello")
    assert conversation(page) == ["Hello", "Hey there!"]
    assert re.fullmatch(r"\d+ tokens · \d+ tokens/s( · context \d+ of 2048)?", page.inner_text(".below span"))
    say(page, "Bye")
    assert conversation(page) == ["Hello", "Hey there!", "Bye", "See you soon."]
    assert [m["content"] for m in page.asked[1]["messages"]] == ["Hello", "Hey there!", "Bye"]
    assert page.asked[1]["temperature"] == 0 and page.asked[1]["stream"] is True
    assert page.inner_text("#spoken") == "See you soon."  # aria-live: once, and whole


def test_a_reply_grows_while_it_comes(open_page):
    page = open_page()
    page.evaluate("""() => { window.sizes = new Set(); new MutationObserver(() =>
        sizes.add(document.querySelector('article.assistant .text')?.textContent.length ?? 0)).observe(document.getElementById('messages'), {childList: true, subtree: true}); }""")
    sing(page)
    until(page, "sizes.size > 3 && Math.max(...sizes) > 3000")
    sizes = page.evaluate("[...sizes]")  # in the order in which they came
    assert sizes == sorted(sizes)
    page.keyboard.press("Escape")
    finished(page)


def test_a_reply_that_is_too_long_says_so(open_page):
    page = open_page()
    set_longest_reply(page, 20)
    say(page, "Sing")
    assert "cut at the longest reply" in page.inner_text(".below span")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_came_and_says_so(open_page, how):
    page = open_page()
    sing(page)
    page.click("#send") if how == "button" else page.keyboard.press("Escape")
    finished(page)
    kept = conversation(page)[1]
    assert kept.startswith("la la") and len(kept) < 3 * 1800
    assert "stopped" in page.inner_text(".below span")
    page.reload()
    assert conversation(page)[1] == kept
    set_longest_reply(page, 100)
    say(page, "Hello", wait=False)  # and the conversation goes on; after half a song the reply may be one more, or empty
    page.wait_for_selector("article.assistant:last-child .below span", state="attached")
    assert page.asked[-1]["messages"][1] == {"role": "assistant", "content": page.asked[-1]["messages"][1]["content"]}
    assert page.get_by_label("Stop").count() == 0


def test_regenerate_asks_the_same_with_another_seed(open_page):
    page = open_page(kept={"settings": {"temperature": 0, "seed": 7}})
    say(page, "Hello")
    page.get_by_label("Regenerate").click()
    until(page, "document.querySelectorAll('article').length === 2")
    finished(page)
    assert conversation(page) == ["Hello", "Hey there!"]
    assert [asked["seed"] for asked in page.asked] == [7, 8]
    assert page.asked[0] | {"seed": 8} == page.asked[1]


def test_an_edit_cuts_the_conversation_there(open_page):
    page = open_page()
    say(page, "Hello")
    say(page, "Bye")
    page.get_by_label("You").nth(0).hover()
    page.get_by_label("Edit").nth(0).click()
    area = page.locator(".edit textarea")
    assert area.input_value() == "Hello"
    area.fill("你好")
    area.press("Escape")  # cancelled: nothing has changed
    assert len(conversation(page)) == 4
    page.get_by_label("Edit").nth(0).click()
    area.fill("你好")
    area.press("Enter")
    finished(page)
    assert conversation(page) == ["你好", "你好，很高兴见到你。"]
    assert [m["content"] for m in page.asked[-1]["messages"]] == ["你好"]


def test_a_new_chat_is_empty_and_the_last_one_can_come_back(open_page):
    page = open_page()
    say(page, "Hello")
    sing(page)
    page.get_by_label("New chat").click()  # while a reply is coming
    assert conversation(page) == [] and page.is_visible("#welcome")
    say(page, "Bye")
    assert conversation(page) == ["Bye", "See you soon."] and len(page.asked[-1]["messages"]) == 1
    page.get_by_label("New chat").click()
    page.get_by_text("Bring back the last chat").click()
    assert conversation(page) == ["Bye", "See you soon."]


def test_settings_and_system_prompt_go_with_the_request(open_page):
    page = open_page()
    page.click("#settings")
    page.get_by_label("System prompt").fill("Be brief.")
    for name, value, kept in [("max_tokens", "3", 3), ("seed", "11", 11), ("top_k", "5", 5), ("min_p", "7", None)]:
        page.fill(f"#{name}", value)
        page.press(f"#{name}", "Tab")
        assert page.input_value(f"#{name}") == str(kept or 0)  # 7 is out of bounds: it falls back
    page.get_by_role("button", name="Done").click()
    say(page, "Hello")
    asked = page.asked[0]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (asked["max_tokens"], asked["seed"], asked["top_k"]) == (3, 11, 5) and "min_p" not in asked
    assert re.match("[23] tokens", page.inner_text(".below span"))


# ------------------------------------------------------------------ Markdown, and what must stay text


def test_markdown_is_shown_and_html_stays_text(open_page):
    page = open_page()
    say(page, "Rich")
    reply = page.locator("article.assistant .text")
    for tag, text in [("h3", "Rich"), ("strong", "bold"), ("em", "slanted"), ("p code", "code"), ("li >> nth=1", "two"), ("pre", "print(1)")]:
        assert reply.locator(tag).inner_text() == text
    for piece in ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "[bad](javascript:alert(3))"):
        assert piece in reply.inner_text()
    assert page.locator("main script, main img, #messages [onerror]").count() == 0
    links = reply.locator("a")
    assert links.count() == 1 and links.get_attribute("href") == "https://example.com/"
    assert links.get_attribute("rel") == "noopener noreferrer"
    say(page, "<img src=x onerror=alert(4)>")  # nor is the user's text parsed; open_page sees dialogs
    assert conversation(page)[2] == "<img src=x onerror=alert(4)>" and page.locator("main img").count() == 0


def test_the_policy_is_a_second_fence(open_page):
    page = open_page()
    assert page.evaluate("(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()") == "TypeError"
    assert page.evaluate("fetch('https://example.com/').catch(error => error.name)") == "TypeError"
    assert page.evaluate("""new Promise(done => { const b = document.createElement('button');
        try { b.setAttribute('onclick', 'window.ran = true'); b.click() } catch {} done(window.ran ?? false) })""") is False
    assert any("https://example.com/" in message for message in page.wrong)  # the browser says whom it stopped
    page.wrong.clear()


def test_copying_a_block_of_code(open_page):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    say(page, "Rich")
    page.locator("figure").get_by_label("Copy").click()
    page.locator("#spoken", has_text="Copied").wait_for(state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)"


def test_ten_thousand_characters_go_out_and_come_in(open_page):
    page = open_page()
    say(page, "a" * 10_000)
    assert page.asked[0]["messages"][0]["content"] == "a" * 10_000
    assert conversation(page) == ["a" * 10_000, "So many letters."]
    pieces = [f"Line {i} is **bold**.\n\n" for i in range(500)]
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    began = time.monotonic()
    say(page, "more")
    assert page.locator("article:last-child p").count() == 500 and time.monotonic() - began < 30


def test_a_message_that_does_not_fit_gets_the_servers_words_and_stays(open_page):
    page = open_page()
    say(page, "z7" * 5_000, wait=False)
    assert "2048" in notice(page)
    assert conversation(page) == ["z7" * 5_000]
    page.get_by_label("Edit").click()
    page.fill(".edit textarea", "Hello")
    page.get_by_role("button", name="Send").first.click()
    finished(page)
    assert conversation(page) == ["Hello", "Hey there!"] and page.locator("#notice p").count() == 0


def test_a_chat_that_outgrows_the_context_goes_on_without_its_oldest_messages(open_page):
    old = [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": "la" + " la" * 900, "end": "stop"}]
    page = open_page(kept={"messages": old * 3, "settings": {"temperature": 0}})
    say(page, "Hello")
    assert [len(asked["messages"]) for asked in page.asked] == [7, 5]  # three songs do not fit: the server says so
    assert "without the oldest 2 messages" in page.inner_text("article:last-child .below span")
    say(page, "Bye")
    assert [len(asked["messages"]) for asked in page.asked] == [7, 5, 5]  # two left hardly room for a reply
    assert "without the oldest 4 messages" in page.inner_text("article:last-child .below span")
    assert len(conversation(page)) == 10  # all are still on the page


# ------------------------------------------------------------------ what goes wrong


def test_the_key_is_asked_for_until_it_is_right(folder, open_page):
    with serve(folder, key="sesame") as process:
        page = open_page(process.url)
        dialog = page.locator("#keyDialog")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.get_by_text("did not accept").wait_for()
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        dialog.wait_for(state="hidden")
        say(page, "Hello")
        assert conversation(page) == ["Hello", "Hey there!"]
        page.reload()  # it is kept for this tab, and in no address nor in what outlives the tab
        say(page, "Bye")
        assert not dialog.is_visible() and "sesame" not in page.evaluate("location.href + JSON.stringify(localStorage)")
        page.evaluate("sessionStorage.clear()")
        page.reload()
        page.fill("#key", "sesame")
        dialog.get_by_text("Cancel").click()
        assert notice(page) == "The server asks for a key."


def test_a_server_that_goes_and_comes_back(folder, open_page):
    with serve(folder) as process:
        page = open_page(process.url)
        sing(page)
        process.kill()
        assert "broke off" in notice(page)
        assert conversation(page)[1].startswith("la la") and "interrupted" in page.inner_text(".below span")
        page.get_by_label("New chat").click()
        say(page, "Hello", wait=False)
        assert "cannot be reached" in notice(page)
        page.fill("#draft", "a draft")
        page.get_by_role("button", name="Try again").click()
        until(page, "!document.querySelector('.streaming')")
        assert "cannot be reached" in notice(page)
    with serve(folder, urlsplit(process.url).port):
        page.get_by_role("button", name="Try again").click()
        finished(page)
        assert conversation(page) == ["Hello", "Hey there!"] and page.input_value("#draft") == "a draft"
        assert page.locator("#notice p").count() == 0


@pytest.mark.parametrize("status, headers, body, said", [
    (429, {"Retry-After": "7"}, {"error": {"message": "slow down"}}, "The server is busy. Try again in 7 s."),
    (503, {}, {"error": {"message": "Shutting down."}}, "Shutting down."),
    (400, {}, {"error": {"message": "this checkpoint has no chat template"}}, "this checkpoint has no chat template"),
    (500, {}, "<b>oops</b>", "500 Internal Server Error"),
    (200, {}, 'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
    (200, {}, "data: {broken\n\n", "The connection broke off before the reply was complete."),
    (200, {}, 'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n', "The connection broke off before the reply was complete."),
])  # fmt: skip
def test_errors_are_told_and_can_be_tried_again(open_page, status, headers, body, said):
    page = open_page()
    body = body if isinstance(body, str) else json.dumps(body)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, body=body))
    say(page, "Hello", wait=False)
    assert notice(page) == said and conversation(page) == ["Hello"]
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert conversation(page) == ["Hello", "Hey there!"] and page.locator("#notice p").count() == 0


def test_a_reload_keeps_conversation_draft_and_settings(open_page):
    page = open_page()
    say(page, "Hello")
    page.fill("#draft", "half a thou")
    page.click("#settings")
    page.fill("#max_tokens", "9")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Colours").click()
    page.get_by_label("中文").click()
    page.reload()
    assert conversation(page) == ["Hello", "Hey there!"] and page.input_value("#draft") == "half a thou"
    assert page.input_value("#max_tokens") == "9" and page.get_by_label("配色：浅色").count() == 1
    sing(page)
    page.reload()  # amid a reply: what had been kept of it, or the question to ask again
    page.wait_for_selector("article.assistant:last-child .below span, #notice p")
    assert page.evaluate("document.querySelectorAll('article').length") in (3, 4)


@pytest.mark.parametrize("garbage", ["{", "null", "[]", "7", '"x"', '{"messages": 5, "settings": [], "theme": 3, "draft": {}}',
                                     '{"messages": [null, {"role": "system"}, {"role": "user", "content": 5}], "language": "xx"}',
                                     '{"settings": {"temperature": "hot", "top_p": 9, "system": 1}, "theme": "constructor"}'])
def test_corrupt_storage_is_ignored(open_page, garbage):
    page = open_page()
    page.evaluate("garbage => { addEventListener('pagehide', () => localStorage.setItem('nanochat', garbage)); }", garbage)
    page.reload()
    say(page, "Hello")
    assert conversation(page) == ["Hello", "Hey there!"] and page.asked[0]["temperature"] == 0.8


def test_full_or_closed_storage_breaks_nothing(open_page):
    page = open_page()
    page.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }")
    page.reload()
    say(page, "Hello")
    assert conversation(page) == ["Hello", "Hey there!"] and "lost when the page is reloaded" in notice(page)
    page.add_init_script("for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {get() { throw new DOMException('closed', 'SecurityError') }})")
    page.reload()
    say(page, "Bye")
    assert conversation(page) == ["Bye", "See you soon."]


# ------------------------------------------------------------------ every reader, every window


def test_the_page_follows_a_reply_only_if_its_reader_is_at_the_bottom(open_page):
    page = open_page(viewport={"width": 360, "height": 640})
    sing(page)
    until(page, "document.querySelector('#scroll').scrollTop > 200")  # well before the 700th token
    page.hover("#scroll")
    while not page.is_visible("#down"):  # the reply may grow before the page hears of the wheel
        assert page.is_visible(".streaming")
        page.mouse.wheel(0, -150)
        page.wait_for_timeout(200)
    top = page.evaluate("document.querySelector('#scroll').scrollTop")
    size = page.evaluate("document.querySelector('#scroll').scrollHeight")
    until(page, "size => document.querySelector('#scroll').scrollHeight > size + 50", size)
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == top
    page.click("#down")
    page.wait_for_selector("#down", state="hidden")
    page.keyboard.press("Escape")
    finished(page)


def test_a_phone_has_no_sideways_scroll_and_its_composer_in_sight(open_page):
    page = open_page(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)

    def fits() -> None:
        wide = page.evaluate("""[...document.querySelectorAll('body *')].filter(node => !node.closest('pre, .unseen, [hidden]')
            && node.getBoundingClientRect().width && (node.getBoundingClientRect().right > innerWidth + 1 || node.getBoundingClientRect().left < -1))
            .map(node => node.outerHTML.slice(0, 80))""")
        assert not wide and page.evaluate("document.documentElement.scrollWidth") == 360
        box = page.locator("#form").bounding_box()
        assert box["y"] > 0 and box["y"] + box["height"] <= page.viewport_size["height"]

    fits()
    say(page, "Rich")
    fits()
    say(page, "W" * 300)
    fits()
    page.fill("#draft", "line\n" * 60)
    fits()
    page.set_viewport_size({"width": 360, "height": 330})  # the keyboard is open
    fits()
    page.tap("#settings")
    fits()
    page.get_by_role("button", name="Done").tap()  # in sight without scrolling
    small = page.evaluate("""[...document.querySelectorAll('button')].map(b => [b.outerHTML.slice(0, 60), b.getBoundingClientRect()])
        .filter(([, box]) => box.width && Math.min(box.width, box.height) < 36).map(([html]) => html)""")
    assert not small  # large enough for a thumb


def test_everything_can_be_done_with_the_keyboard(open_page):
    page = open_page()
    until(page, "document.activeElement.id === 'draft'")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.input_value("#draft") == "Hello\nthere" and conversation(page) == []
    page.keyboard.press("Control+A")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    finished(page)

    def tab_to(name: str) -> None:
        for _ in range(25):
            page.keyboard.press("Tab")
            focused = page.evaluate("""(() => { const node = document.activeElement, style = getComputedStyle(node), box = node.closest('form, .edit') ?? node;
                return {name: node.ariaLabel || node.textContent || node.labels?.[0]?.textContent || '', shown: parseFloat(style.outlineWidth) >= 2 && style.outlineStyle !== 'none'
                    || getComputedStyle(box).boxShadow.includes('1px') , opacity: node.closest('.below') ? getComputedStyle(node.closest('.below')).opacity : '1'} })()""")
            if focused["name"].startswith(name):
                assert focused["shown"], f"{name} has focus, and nothing shows it"
                return
        pytest.fail(f"Tab does not reach {name}")

    for name in ("New chat", "Settings", "Colours", "中文", "Conversation", "Copy", "Edit", "Copy", "Regenerate", "Message"):
        tab_to(name)  # in this order or another: every one is reached
    tab_to("Regenerate")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'draft'")
    finished(page)
    tab_to("Settings")
    page.keyboard.press("Enter")
    tab_to("Temperature")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    until(page, "document.activeElement.id === 'settings'")  # focus comes back
    tab_to("Edit")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.matches('.edit textarea')")
    page.keyboard.press("Control+A")
    page.keyboard.type("Bye")
    page.keyboard.press("Enter")
    finished(page)
    assert conversation(page) == ["Bye", "See you soon."] and page.asked[-1]["temperature"] == 0.05


def test_enter_that_chooses_characters_does_not_send(open_page):
    page = open_page()
    page.focus("#draft")
    keyboard = page.context.new_cdp_session(page)
    keyboard.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    page.keyboard.press("Enter")
    page.evaluate("document.querySelector('#draft').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', keyCode: 229, bubbles: true}))")
    assert conversation(page) == [] and page.asked == []
    page.fill("#draft", "")
    keyboard.send("Input.insertText", {"text": "你好"})
    page.keyboard.press("Enter")
    finished(page)
    assert conversation(page) == ["你好", "你好，很高兴见到你。"]


def test_chinese_is_whole(open_page):
    page = open_page(locale="zh-CN")
    assert page.get_by_text("想聊点什么？").is_visible() and page.locator("html").get_attribute("lang") == "zh-CN"
    words = "[...document.querySelectorAll('[data-t], [data-label], #fields label, #suggestions button, #draft')].map(n => [n.dataset.t, n.textContent, n.ariaLabel, n.placeholder].join('|'))"
    chinese = page.evaluate(words)
    say(page, "你好")
    assert re.fullmatch(r"\d+ 个词元 · 每秒 \d+ 个( · 上下文 \d+ / 2048)?", page.inner_text(".below span"))
    page.get_by_label("新对话").click()
    page.get_by_label("English").click()
    english = page.evaluate(words)[: len(chinese)]
    same = [a for a, b in zip(chinese, english) if a == b or "undefined" in a + b]
    assert not same and page.get_by_text("What shall we talk about?").is_visible()
    source = (ROOT / "nanochat" / "chat.html").read_text(encoding="utf-8")
    tables = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \},", source, re.S | re.M)
    names = [re.findall(r"(?:^    |, )(\w+): ", re.sub(r'"[^"]*"|`[^`]*`', "", table), re.M) for table in tables]
    assert len(names) == 2 and len(names[0]) > 40 and names[0] == names[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_follow_the_system_and_the_reader_and_can_be_read(open_page, scheme):
    page = open_page(color_scheme=scheme)
    say(page, "Hello")
    page.fill("#draft", "x")

    def contrasts() -> tuple[float, dict]:
        """How bright the page is, and each text's contrast with what is behind it (WCAG 2.2's formula)."""
        colours = page.evaluate("""(() => { const rgb = c => c.match(/[\\d.]+/g).map(Number), behind = node => { for (; node; node = node.parentElement) {
            const c = rgb(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3]) return c } };
            return Object.fromEntries(['body', '.user .text', '.below span', '#model', '#draft', '#send', '.composer > p', '#language'].map(name => {
                const node = document.querySelector(name); return [name, [rgb(getComputedStyle(node).color), behind(node)]] })) })()""")

        def luminance(colour) -> float:
            linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

        ratio = {}
        for name, (front, back) in colours.items():
            low, high = sorted([luminance(front), luminance(back)])
            ratio[name] = (high + 0.05) / (low + 0.05)
        return luminance(colours["body"][1]), ratio

    brightness, ratio = contrasts()
    assert (brightness > 0.5) == (scheme == "light")
    assert min(ratio.values()) >= 4.5, ratio
    for chosen in ("light", "dark"):
        page.click("#theme")
        page.mouse.move(300, 300)
        page.reload()  # the choice is kept
        brightness, ratio = contrasts()
        assert (brightness > 0.5) == (chosen == "light") and min(ratio.values()) >= 4.5, ratio

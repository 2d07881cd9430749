"""The server's pages in a real browser: asked, walked through, filtered, added to, refused.

Needs the extra `browser`, and Chromium or Chrome on the path; that is why it is not part of the default run.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from search_r3.data.documents import chunks_of
from search_r3.data.reading.chunks import Chunking
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import ServerSettings, create_app
from tests.browser import chromium, expect, overflow, window
from tests.conftest import favour, small_collection
from tests.gates import gate_for

pytestmark = pytest.mark.slow

WAIT = 60
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
ODD = "odd/..//a b?x=1#y&%2e"
LONG = "A long one about a kettle. " * 30 + "\n\nThe end of the <b>kettle</b>."
QUERY = "where is the red house?"


class Served:
    """An app in a thread, with a store or without."""

    def __init__(self, model: SearchR3, store: Store | None, token: str | None = None) -> None:
        self.engine, self.store = EngineThread(model, slots=4), store
        app = create_app(self.engine, ServerSettings("tiny", token), store=store)
        self.server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]})
        self.thread.start()

    def hits(self, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = httpx2.post(f"{self.url}v1/search", json=body, timeout=WAIT).json()
        return answer


@contextmanager
def serving(model: SearchR3, store: Store | None, token: str | None = None) -> Iterator[Served]:
    served = Served(model, store, token)
    try:
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(WAIT)


@pytest.fixture(scope="module")
def encoder(tiny_path: Path) -> SearchR3:
    """A model that says `red` until its budget is spent."""
    encoder = SearchR3(tiny_path, device="cpu", max_new_tokens=8)
    favour(encoder.backbone, encoder.backbone.tokenizer.convert_tokens_to_ids("Ġred"), 3.0)
    return encoder


@pytest.fixture
def make_store(encoder: SearchR3) -> Callable[[], Store]:
    return lambda: store_of(encoder)


def store_of(encoder: SearchR3) -> Store:
    """Documents about things of some colours, a long one, and some that mean harm."""
    store = Store.create("memory://page", Fingerprint.of(encoder), chunk_tokens=60)
    documents = [
        (
            one.doc_id,
            one.text,
            one.title,
            {"colour": one.title.split()[0], "number": place, "tags": ["thing", one.doc_id]},
        )
        for place, one in enumerate(list(small_collection().documents.values())[:12])
    ]
    documents += [
        ("bad", HOSTILE, HOSTILE, {HOSTILE: HOSTILE}),
        (ODD, "its id is odd", "", {}),
        ("long", LONG, "Kettle", {}),
    ]
    chunks = [
        chunk
        for name, text, title, facts in documents
        for chunk in chunks_of(name, text, title, metadata=facts, chunking=Chunking(60))
    ]
    store.upsert(chunks, encoder.encode_document([chunk.full_text for chunk in chunks]))
    return store


@pytest.fixture(scope="module")
def served(encoder: SearchR3) -> Iterator[Served]:
    with serving(encoder, store_of(encoder)) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def search(page: Any, query: str = QUERY) -> None:
    page.fill("#query", query)
    page.press("#query", "Enter")
    done(page)


def done(page: Any) -> None:
    expect(page.locator(".column")).not_to_have_count(0)
    expect(page.locator("#go")).to_have_text("Search")
    expect(page.locator('[aria-busy="true"]')).to_have_count(0)


def shown(page: Any, way: str) -> list[str]:
    """The ids of the documents in a column."""
    ids: list[str] = page.locator(f".s-{way} .hit").evaluate_all("hits => hits.map((hit) => hit.dataset.document)")
    return ids


@pytest.mark.parametrize("k", [5, 20])
def test_a_query_is_answered_in_three_ways_with_ranks_and_price(served: Served, browser: Any, k: int) -> None:
    answers = {mode: served.hits(query=QUERY, mode=mode, k=k) for mode in ("direct", "reason", "bm25")}
    ranks = {mode: {hit["parent_id"]: hit["rank"] for hit in answer["hits"]} for mode, answer in answers.items()}
    with window(browser) as page:
        page.goto(f"{served.url}#k={k}&q=first")
        done(page)
        expect(page.locator(".column.s-auto")).to_have_count(0)  # the model has no gate
        search(page)
        for mode, answer in answers.items():
            assert shown(page, mode) == list(ranks[mode])
            scores = [f"{hit['score']:.{2 if mode == 'bm25' else 3}f}" for hit in answer["hits"]]
            assert page.locator(f".column.s-{mode} .score").all_inner_texts() == scores
        assert page.inner_text("#reasoning") == answers["reason"]["reasoning"] != ""
        marks = {
            mode: page.locator(f".column.s-{mode} .mark").evaluate_all("all => all.map((e) => e.title)")
            for mode in ranks
        }
        assert marks["direct"] == [
            f"rank {rank} with reasoning" if (rank := ranks["reason"].get(one)) else "leaves with reasoning"
            for one in ranks["direct"]
        ]
        for (one, rank), words in zip(ranks["reason"].items(), marks["reason"], strict=True):
            steps = ranks["direct"].get(one, 99) - rank
            way = "up" if steps > 0 else "down"
            expected = "stays" if not steps else f"{way} {abs(steps)} from direct"
            assert words == (expected if one in ranks["direct"] else "enters")
        if k == 20:  # all of them
            assert {words.split(" ")[0] for words in marks["reason"]} >= {"up", "down"}
        for one, words in zip(ranks["bm25"], marks["bm25"], strict=True):
            if one in ranks["reason"]:
                assert words == f"rank {ranks['reason'][one]} with reasoning"
            else:
                assert words == (f"rank {ranks['direct'][one]} in direct" if one in ranks["direct"] else "only here")
        usage = answers["reason"]["usage"]
        price = page.inner_text(".column.s-reason .price")
        assert re.match(rf"{usage['prompt_tokens']} \+ {usage['completion_tokens']} tokens, [\d.]+\ss", price)
        assert f"wrote {usage['completion_tokens']} tokens (all that it may)" in page.inner_text("#summary")
        page.hover(f'.s-reason [data-document="{next(iter(ranks["reason"]))}"]')
        same = page.locator(".same").evaluate_all("hits => hits.map((hit) => hit.dataset.document)")
        assert same == [next(iter(ranks["reason"]))] * sum(next(iter(ranks["reason"])) in one for one in ranks.values())


def test_where_the_model_has_a_gate_a_column_says_which_queries_thought(tiny_path: Path, browser: Any) -> None:
    model = SearchR3(tiny_path, device="cpu", max_new_tokens=8)
    texts = [QUERY, "a black horse", "the green lamp", "kettle"]
    model.backbone.gate = gate_for(model, texts)
    words = {True: "thought", False: "did not think"}
    seen = set()
    with serving(model, store_of(model)) as gated, window(browser) as page:
        page.goto(gated.url)
        expect(page.locator("#deciding")).to_be_visible()
        for text in texts:
            search(page, text)
            answer = gated.hits(query=text, mode="auto")
            price = page.inner_text(".column.s-auto .price")
            assert price.startswith(f"{words[answer['thought']]} (probability {answer['gate']['probability']:.2f}); ")
            assert f"{answer['usage']['prompt_tokens']} " in price
            assert shown(page, "auto") == [hit["parent_id"] for hit in answer["hits"]]
            assert shown(page, "auto") == shown(page, "reason" if answer["thought"] else "direct")
            seen.add(answer["thought"])
    assert seen == {True, False}


@contextmanager
def held(served: Served, steps: int) -> Iterator[threading.Event]:
    """The decoder goes so many steps and no further, until the event."""
    go, count, step = threading.Event(), 0, served.engine._decoder.step

    def waiting() -> Any:
        nonlocal count
        count += 1
        assert count <= steps or go.wait(WAIT)
        return step()

    served.engine._decoder.step = waiting  # type: ignore[method-assign]
    try:
        yield go
    finally:
        go.set()
        served.engine._decoder.step = step  # type: ignore[method-assign]


def test_reasoning_is_there_while_it_is_written_and_can_be_stopped(served: Served, browser: Any) -> None:
    whole = served.hits(query=QUERY, mode="reason")["reasoning"].strip()
    with window(browser) as page:
        page.goto(served.url)
        with held(served, steps=4) as go:
            page.fill("#query", QUERY)
            page.press("#query", "Enter")
            expect(page.locator("#reasoning")).not_to_be_empty()
            part = page.inner_text("#reasoning").strip()
            assert whole.startswith(part) and len(part) < len(whole)
            expect(page.locator(".column.s-reason")).to_have_attribute("aria-busy", "true")
            expect(page.locator(".column.s-bm25 .hit").first).to_be_visible()
            go.set()
            done(page)
        assert page.inner_text("#reasoning").strip() == whole
        with held(served, steps=4) as go:
            page.click("#go")
            expect(page.locator("#reasoning")).not_to_be_empty()
            page.press("#query", "Escape")
            expect(page.locator("#go")).to_have_text("Search")
            expect(page.locator(".column.s-reason")).to_contain_text("Stopped.")
            go.set()
        search(page)  # the slot is free
        assert page.inner_text("#reasoning").strip() == whole


@pytest.mark.parametrize("way", ["mouse", "keyboard"])
def test_a_document_is_shown_whole_with_its_metadata(served: Served, browser: Any, way: str) -> None:
    with window(browser) as page:
        page.goto(served.url)
        search(page, "kettle")
        hit = page.locator('.s-bm25 [data-document="long"]')
        if way == "mouse":
            hit.click()
        else:
            hit.focus()
            page.keyboard.press("Enter")
        expect(page.locator("#document")).to_be_visible()
        expect(page.locator("#document-title")).to_have_text("Kettle")
        text = page.locator("#document-text").text_content()
        assert " ".join(text.split()) == " ".join(LONG.split())
        assert (
            page.locator("#document-text mark").text_content()
            == served.hits(query="kettle", mode="bm25")["hits"][0]["text"]
        )
        page.keyboard.press("Escape")
        expect(page.locator("#document")).to_be_hidden()
        expect(hit).to_be_focused()
        search(page, "red")
        page.click('.s-bm25 [data-document="d00"]')
        expect(page.locator("#document-facts")).to_contain_text('tags\n["thing","d00"]', use_inner_text=True)
        page.click("#close")
        search(page, "odd")
        page.click('.s-bm25 [data-document="{}"]'.format(ODD.replace('"', '\\"')))
        expect(page.locator("#document-text")).to_have_text("its id is odd")


def test_what_a_document_holds_stays_text(served: Served, browser: Any) -> None:
    with window(browser, "TrustedHTML") as page:
        page.goto(served.url)
        search(page, "owned onerror")
        hit = page.locator('.s-bm25 [data-document="bad"]')
        assert hit.locator("bdi").text_content() == HOSTILE and HOSTILE in hit.locator(".snippet").text_content()
        hit.click()
        expect(page.locator("#document-text")).to_have_text(HOSTILE)
        assert page.locator("#document-facts dt").last.text_content() == HOSTILE
        search_box = page.locator("#query")
        page.keyboard.press("Escape")
        search_box.fill(HOSTILE)
        search_box.press("Enter")
        done(page)
        assert page.title() == "Search-R3" and page.locator("img, main script").count() == 0
        with pytest.raises(Exception, match="TrustedHTML"):  # the browser refuses what a mistake would let through
            page.evaluate("document.body.innerHTML = '<b>text</b>'")


def test_filters_are_made_of_the_fields_that_there_are(served: Served, browser: Any) -> None:
    with window(browser) as page:
        page.goto(served.url)
        search(page)
        page.click("#filter summary")
        page.select_option("#field", "number")
        page.select_option("#operator", "≥")
        page.fill("#value", "5")
        page.press("#value", "Enter")
        expect(page.locator("#conditions")).to_have_text("number ≥ 5 ✕")
        done(page)
        wanted = served.hits(query=QUERY, mode="direct", filter={"number": {"$gte": 5}})["hits"]
        assert shown(page, "direct") == [hit["parent_id"] for hit in wanted]
        for field, operator, value in (("colour", "is not", "red"), ("tags", "has", "d09")):
            page.select_option("#field", field)
            page.select_option("#operator", operator)
            page.fill("#value", value)
            page.click("#add-condition")
        done(page)
        assert shown(page, "direct") == ["d09"]
        page.reload()  # they stand in the address
        done(page)
        assert shown(page, "direct") == ["d09"] and page.locator("#conditions li").count() == 3
        for _ in range(3):
            page.locator("#conditions button").last.click()
        done(page)
        assert len(shown(page, "direct")) == 10
        page.go_back()
        expect(page.locator("#conditions li")).to_have_count(1)


def test_files_that_are_dropped_are_added_and_what_cannot_be_is_said(
    encoder: SearchR3, make_store: Callable[[], Store], browser: Any
) -> None:
    drop = """files => {
        const data = new DataTransfer();
        for (const [name, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name));
        return data;
    }"""
    files = {
        "tea.md": b"# Green tea\nIt is not oxidised.",
        "d00": b"a purple river",
        "a.pdf": b"%PDF\xff\0",
        "b.txt": b" \n",
    }
    store = make_store()
    before = store.get("d00")
    with serving(encoder, store) as served, window(browser) as page:
        page.goto(served.url)
        expect(page.locator("#served")).to_contain_text("tiny")
        data = page.evaluate_handle(drop, [[name, list(content)] for name, content in files.items()])
        page.dispatch_event("body", "dragover", {"dataTransfer": data})
        expect(page.locator(".drop")).to_be_visible()
        page.dispatch_event("body", "drop", {"dataTransfer": data})
        expect(page.locator("#adding")).to_contain_text("2 documents added: 2 passages")
        expect(page.locator(".drop")).to_be_hidden()
        said = page.locator("#adding li").all_inner_texts()
        assert said == ["a.pdf: not a text in UTF-8; PDF and other kinds are for search-r3 index", "b.txt: empty"]
        [tea] = store.get("dropped/tea.md")
        assert tea.title == "Green tea" and tea.metadata == {"file": "tea.md"} and store.get("d00") == before
        assert "file" in page.locator("#field option").all_text_contents()
        search(page, "oxidised")
        assert shown(page, "bm25") == ["dropped/tea.md"]
        page.set_input_files("#files", {"name": "tea.md", "mimeType": "", "buffer": b"Black tea is oxidised."})
        expect(page.locator("#adding")).to_contain_text("1 document added")
        assert [chunk.text for chunk in store.get("dropped/tea.md")] == ["Black tea is oxidised."]


def test_the_keyboard_reaches_everything(served: Served, browser: Any) -> None:
    def focus() -> list[str]:
        place: list[str] = page.evaluate(
            "[document.activeElement.dataset.way, document.activeElement.innerText.trim()[0]]"
        )
        return place

    with window(browser) as page:
        page.goto(served.url)
        expect(page.locator("#query")).to_be_focused()
        search(page)
        for key, place in (
            ("ArrowDown", ["reason", "1"]),
            ("ArrowDown", ["reason", "2"]),
            ("ArrowLeft", ["direct", "2"]),
            ("ArrowLeft", ["direct", "2"]),
            ("End", ["direct", "1"]),  # of 10
            ("Home", ["direct", "1"]),
            ("ArrowRight", ["reason", "1"]),
            ("ArrowRight", ["bm25", "1"]),
            ("ArrowDown", ["bm25", "2"]),
        ):
            page.keyboard.press(key)
            assert focus() == place, key
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"  # focus can be seen
        page.keyboard.press("Enter")
        expect(page.locator("#document")).to_be_visible()
        page.keyboard.press("Escape")
        assert focus() == ["bm25", "2"]
        page.keyboard.press("Escape")
        expect(page.locator("#query")).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.press("/")
        expect(page.locator("#query")).to_be_focused()
        page.keyboard.press("/")
        expect(page.locator("#query")).to_have_value("/")  # in the box it is a letter


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1200])
def test_the_page_fits_and_follows_the_colours_that_are_preferred(
    served: Served, browser: Any, width: int, scheme: str
) -> None:
    with window(browser, width=width, color_scheme=scheme) as page:
        page.goto(served.url)
        search(page, HOSTILE)
        page.click("#filter summary")
        assert overflow(page, "html") <= 0
        red = int(re.search(r"\d+", page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))[0])  # type: ignore[index]
        assert red < 40 if scheme == "dark" else red > 220
        ways = [way for way in ("direct", "reason", "bm25") if page.locator(f".column.s-{way}").is_visible()]
        assert ways == (["reason"] if width == 390 else ["direct", "reason", "bm25"])
        if width == 390:
            page.click("#segments >> text=BM25")
            assert page.locator(".column.s-bm25").is_visible() and not page.locator(".column.s-reason").is_visible()
        page.goto(f"{served.url}docs")
        assert overflow(page, "html") <= 0


def test_the_token_is_asked_for_and_goes_with_the_tab(
    encoder: SearchR3, make_store: Callable[[], Store], browser: Any
) -> None:
    with serving(encoder, make_store(), "secret") as served, window(browser, "401") as page:
        page.goto(served.url)
        expect(page.locator("#token")).to_be_visible()
        page.fill("#token-value", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#token-title")).to_have_text("This is not the server's token")
        page.fill("#token-value", "secret")
        page.keyboard.press("Enter")
        expect(page.locator("#token")).to_be_hidden()
        search(page)
        assert len(shown(page, "reason")) == 10
        page.reload()
        done(page)
        assert len(shown(page, "reason")) == 10
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
        assert kept == [["secret"], [], ""]
        page.click("#forget")
        expect(page.locator("#token")).to_be_visible()


def test_without_a_store_texts_are_ranked_in_both_modes(encoder: SearchR3, browser: Any) -> None:
    texts = ["a red house", "a green boat", HOSTILE]
    with serving(encoder, None) as served, window(browser) as page:
        page.goto(served.url)
        expect(page.locator("#welcome-text")).to_contain_text("a model and no store")
        assert not page.locator("#choose").is_visible()
        page.fill("#texts", "\n".join([*texts, "", " "]))
        search(page)
        for mode in ("direct", "reason"):
            body = {"inputs": {"source_sentence": QUERY, "sentences": texts}, "parameters": {"prompt_name": mode}}
            scores = httpx2.post(f"{served.url}similarity", json=body).json()
            order = sorted(range(3), key=lambda place: -scores[place])
            assert page.locator(f".column.s-{mode} .snippet").all_inner_texts() == [texts[place] for place in order]
        assert page.locator(".column.s-bm25").count() == 0 and page.title() == "Search-R3"


def test_what_fails_is_said_and_the_rest_is_there(served: Served, browser: Any) -> None:
    def answer(route: Any) -> None:
        mode = route.request.post_data_json["mode"]
        if mode == "direct":
            error = {"error": {"message": "the queue is full"}}
            route.fulfill(status=429, json=error, headers={"Retry-After": "7"})
        elif mode == "reason":
            body = 'event: reasoning\ndata: {"text": "The query"}\n\n'
            route.fulfill(status=200, body=body, content_type="text/event-stream")
        else:
            route.continue_()

    with window(browser, "429") as page:
        page.goto(served.url)
        page.route("**/v1/search", answer)
        search(page)
        expect(page.locator(".column.s-direct")).to_contain_text("the queue is full (try again in 7 s)")
        expect(page.locator(".column.s-reason")).to_contain_text("The answer broke off; ask again.")
        assert shown(page, "bm25") == [hit["parent_id"] for hit in served.hits(query=QUERY, mode="bm25")["hits"]]
        expect(page.locator("#message")).to_be_visible()
        page.unroute("**/v1/search")
        page.click("#go")
        done(page)
        assert len(shown(page, "reason")) == 10 and page.locator("#message").is_hidden()


def test_no_page_asks_another_host(served: Served, browser: Any) -> None:
    with window(browser) as page:
        addresses: list[str] = []
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(served.url)
        search(page)
        page.click("footer >> text=Routes")
        expect(page.locator("h1")).to_have_text("Routes")
        assert page.locator("script").count() == 0
        assert len(addresses) > 10 and {one for one in addresses if not one.startswith((served.url, "data:"))} == set()

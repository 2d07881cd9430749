// A query in several ways, side by side. Texts of documents, queries and reasoning are untrusted: they reach the page
// through textContent alone, and the page's policy refuses every other way.

import { Refusal, ask, events, hasToken, send, setToken } from "./api.js";
import { byId, explain, make, plural } from "./common.js";
import { allowAdding, openDocument } from "./documents.js";
import { setWhere, showFields, where } from "./filters.js";

const WAYS = { direct: "direct", reason: "with reasoning", auto: "auto", bm25: "BM25" };
const NARROW = "(max-width: 48rem)";
let info = null;
let running = null; // what stops the search that is in work
let results = {}; // way -> {hits, price, choice, error}; absent while it is awaited
let shown = "reason"; // the column of a narrow window

// What it costs.

const seconds = (value) => `${value < 0.995 ? value.toFixed(2) : value.toFixed(1)}\u00a0s`;

function priceOf({ usage, seconds: time }) {
  const reasoned = usage.completion_tokens_details.reasoning_tokens;
  return { seconds: time.total, waited: time.queue, read: usage.prompt_tokens, reasoned };
}

function priceText({ seconds: time, waited, read, reasoned }) {
  const tokens = reasoned ? `${read} + ${reasoned} tokens` : read ? `${read} tokens` : "no tokens";
  return `${tokens}, ${seconds(time)}${waited > 0.1 ? `, of which ${seconds(waited)} in the queue` : ""}`;
}

function choiceText({ thought, gate }) {
  return `${thought ? "thought" : "did not think"} (probability ${gate.probability.toFixed(2)}); `;
}

// Asking: all requests at once, of which the reasoned one comes in pieces.

async function search(query) {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  results = {};
  byId("message").hidden = true;
  byId("go").textContent = "Stop";
  byId("reasoning").replaceChildren();
  byId("thinking").hidden = !info.store;
  render();
  const work = info.store ? searchStore(query, mine.signal) : compareTexts(query, mine.signal);
  await Promise.all(
    Object.entries(work).map(async ([way, promise]) => {
      const result = await promise.catch((error) => ({ hits: [], error }));
      if (running !== mine) return;
      results[way] = result;
      if (result.error) explain(result.error);
      render();
    }),
  );
  if (running !== mine) return;
  running = null;
  byId("go").textContent = "Search";
}

function searchStore(query, signal) {
  const body = (mode) => ({ query, mode, k: Number(byId("k").value), filter: where() });
  const plain = async (mode) => {
    const answer = await ask("POST", "v1/search", body(mode), signal);
    return { hits: answer.hits, price: priceOf(answer), choice: mode === "auto" ? choiceText(answer) : "" };
  };
  const asked = (way) => (way === "reason" ? reasoned(body(way), signal) : plain(way));
  return Object.fromEntries(ways().map((way) => [way, asked(way)]));
}

async function reasoned(body, signal) {
  const result = { hits: [] };
  const response = await send("POST", "v1/search", { ...body, stream: true }, signal);
  for await (const [name, data] of events(response)) {
    if (signal.aborted) break;
    if (name === "reasoning") byId("reasoning").append(data.text);
    else if (name === "hits") Object.assign(result, data);
    else result.price = priceOf(data);
  }
  return result;
}

// Without a store: the texts of the box, ranked by their cosine with the query.
function compareTexts(query, signal) {
  const sentences = byId("texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const compare = async (mode) => {
    if (!sentences.length) throw new Refusal(400, "There is no text to rank: write some, one on each line.");
    const body = { inputs: { source_sentence: query, sentences }, parameters: { prompt_name: mode } };
    const response = await send("POST", "similarity", body, signal);
    const scores = await response.json();
    const order = scores.map((_, place) => place).sort((a, b) => scores[b] - scores[a]);
    const hits = order.map((place, i) => ({
      rank: i + 1,
      score: scores[place],
      parent_id: String(place),
      title: `line ${place + 1}`,
      snippet: sentences[place],
    }));
    const [total, queue, read] = ["total-time", "queue-time", "compute-tokens"].map((name) => {
      return Number(response.headers.get(`x-${name}`));
    });
    return { hits, price: { seconds: total / 1000, waited: queue / 1000, read, reasoned: 0 } };
  };
  return { direct: compare("direct"), reason: compare("reason") };
}

// The columns.

function ways() {
  const more = { auto: info.store && info.auto, bm25: info.store };
  return Object.keys(WAYS).filter((way) => more[way] ?? true);
}

function ranksIn(way) {
  const result = results[way];
  return result && !result.error && new Map(result.hits.map((hit) => [hit.parent_id, hit.rank]));
}

function render() {
  const focused = document.activeElement?.closest(".hit")?.dataset;
  byId("columns").dataset.shown = shown;
  byId("columns").replaceChildren(...ways().map(column));
  byId("segments").replaceChildren(
    ...ways().map((way) => {
      const button = make("button", `s-${way}`, WAYS[way]);
      button.type = "button";
      button.setAttribute("aria-pressed", String(way === shown));
      button.addEventListener("click", () => {
        shown = way;
        render();
        byId("segments").querySelector('[aria-pressed="true"]').focus();
      });
      return button;
    }),
  );
  byId("summary").textContent = summary();
  if (focused) hitsOf(focused.way).find((hit) => hit.dataset.document === focused.document)?.focus();
}

function column(way) {
  const part = make("section", `column s-${way}`);
  part.dataset.way = way;
  const heading = make("h2", "small");
  heading.append(make("span", "system", WAYS[way]));
  const result = results[way];
  const price = make("p", "quiet price", result?.price ? (result.choice ?? "") + priceText(result.price) : result ? "" : "…");
  part.append(heading, price);
  part.setAttribute("aria-label", WAYS[way]);
  part.setAttribute("aria-busy", String(!result));
  const failure = result?.error?.name === "AbortError" ? "Stopped." : result?.error?.message;
  if (failure) part.append(make("p", "quiet", failure));
  else if (result && !result.hits.length) part.append(make("p", "quiet", "Nothing found."));
  else if (result) {
    const list = make("ol", "ranking");
    const [direct, reason] = [ranksIn("direct"), ranksIn("reason")];
    list.append(...result.hits.map((hit) => entry(way, hit, mark(way, hit, direct, reason))));
    part.append(list);
  }
  return part;
}

// Where a document of the other columns stands after reasoning, and from where it came in that of reasoning.
function mark(way, hit, direct, reason) {
  if (way === "reason") {
    if (!direct) return null;
    const old = direct.get(hit.parent_id);
    if (!old) return badge("enters", "enters");
    if (old === hit.rank) return badge("", "stays");
    const [kind, sign] = old > hit.rank ? ["up", "▲"] : ["down", "▼"];
    const steps = Math.abs(old - hit.rank);
    return badge(kind, `${sign} ${steps}`, `${kind} ${steps} from direct`);
  }
  if (!reason) return null;
  const rank = reason.get(hit.parent_id);
  if (rank) return badge("", `→ ${rank}`, `rank ${rank} with reasoning`);
  if (way === "direct") return badge("leaves", "leaves", "leaves with reasoning");
  const before = direct?.get(hit.parent_id);
  return before ? badge("", `direct ${before}`, `rank ${before} in direct`) : badge("", "only here");
}

function badge(kind, text, spoken = text) {
  const element = make("span", `mark ${kind}`);
  element.title = spoken;
  const sign = make("span", "", text);
  sign.setAttribute("aria-hidden", "true");
  element.append(sign, make("span", "hidden", spoken));
  return element;
}

function entry(way, hit, sign) {
  const item = make("li");
  const button = make(info.store ? "button" : "div", "hit");
  if (info.store) button.type = "button";
  button.tabIndex = hit.rank === 1 ? 0 : -1;
  button.dataset.way = way;
  button.dataset.document = hit.parent_id;
  const name = make("span", "name");
  const title = make("bdi", "", hit.title || hit.parent_id);
  title.dir = "auto";
  name.append(title);
  if (sign) name.append(sign);
  const snippet = make("span", "snippet", hit.snippet);
  snippet.dir = "auto";
  const score = make("span", "score", hit.score.toFixed(way === "bm25" ? 2 : 3));
  button.append(make("span", "rank", hit.rank), name, score, snippet);
  if (info.store) button.addEventListener("click", () => openDocument(hit));
  item.append(button);
  return item;
}

function summary() {
  const [direct, reason] = [ranksIn("direct"), ranksIn("reason")];
  if (!direct || !reason) return "";
  const documents = [...reason.keys()];
  const entered = documents.filter((one) => !direct.has(one)).length;
  const moved = documents.filter((one) => direct.has(one) && direct.get(one) !== reason.get(one)).length;
  const changes = [entered && `brought in ${entered}`, moved && `moved ${moved}`].filter(Boolean).join(" and ");
  const what = changes ? `${changes} of ${plural(documents.length, "document", "documents")}` : "changed nothing";
  const { price, reasoning_tokens: tokens, forced } = results.reason;
  const wrote = tokens ? `wrote ${plural(tokens, "token", "tokens")}${forced ? " (all that it may)" : ""} and ` : "";
  const took = `took ${seconds(price.seconds)}, against ${seconds(results.direct.price.seconds)}`;
  return `Reasoning ${what}. It ${wrote}${took} without.`;
}

// The keyboard.

const hitsOf = (way) => [...byId("columns").querySelectorAll(`[data-way="${way}"] .hit`)];

function walk(event) {
  const hit = event.target.closest(".hit");
  if (!hit || event.ctrlKey || event.metaKey || event.altKey) return;
  const { way } = hit.dataset;
  const here = hitsOf(way);
  const at = here.indexOf(hit);
  const visible = ways().filter((one) => hitsOf(one)[0]?.offsetParent);
  const beside = (step) => hitsOf(visible[visible.indexOf(way) + step] ?? way);
  const targets = {
    ArrowDown: () => here[at + 1],
    ArrowUp: () => here[at - 1] ?? byId("query"),
    ArrowRight: () => beside(1)[Math.min(at, beside(1).length - 1)],
    ArrowLeft: () => beside(-1)[Math.min(at, beside(-1).length - 1)],
    Home: () => here[0],
    End: () => here.at(-1),
    Escape: () => byId("query"),
  };
  if (!(event.key in targets)) return;
  event.preventDefault();
  const target = targets[event.key]();
  if (!target) return;
  for (const one of hitsOf(target.dataset.way)) one.tabIndex = one === target ? 0 : -1;
  target.focus();
}

addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, textarea, select, dialog[open]")) return;
  event.preventDefault();
  byId("query").select();
});
byId("columns").addEventListener("keydown", walk);
byId("query").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) {
    event.preventDefault();
    running.abort();
  }
  if (event.key !== "ArrowDown") return;
  const first = ways().map((way) => hitsOf(way)[0]).filter((hit) => hit?.offsetParent);
  const target = first.find((hit) => hit.dataset.way === "reason") ?? first[0];
  if (!target) return;
  event.preventDefault();
  target.focus();
});

// The same document is marked in all columns.
for (const kind of ["pointerover", "focusin"]) {
  byId("columns").addEventListener(kind, (event) => {
    const chosen = event.target.closest(".hit")?.dataset.document;
    for (const hit of byId("columns").querySelectorAll(".hit")) {
      hit.classList.toggle("same", hit.dataset.document === chosen);
    }
  });
}
byId("columns").addEventListener("pointerleave", () => {
  for (const hit of byId("columns").querySelectorAll(".same")) hit.classList.remove("same");
});

// What is asked stands in the fragment of the address, so that Back works and a question can be sent to others.

function goTo() {
  const state = { q: byId("query").value.trim() };
  if (!state.q) return byId("query").focus();
  if (info.store && byId("k").value !== "10") state.k = byId("k").value;
  if (where()) state.where = JSON.stringify(where());
  const next = `#${new URLSearchParams(state)}`;
  if (next !== location.hash) history.pushState(null, "", next);
  readAddress();
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const query = given.get("q");
  byId("welcome").hidden = Boolean(query);
  byId("answer").hidden = !query;
  if (!query) return;
  byId("query").value = query;
  if (given.get("k")) byId("k").value = given.get("k");
  try {
    setWhere(JSON.parse(given.get("where") ?? "null"));
  } catch {
    explain(new Refusal(400, "The filter in the address cannot be read."));
    return;
  }
  search(query);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else if (info) goTo();
  else start();
});
byId("k").addEventListener("change", () => byId("query").value.trim() && goTo());
addEventListener("hashchange", readAddress);

// The token.

byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(byId("token-value").value);
  byId("token-value").value = "";
  byId("token").close();
  start();
});
byId("forget").addEventListener("click", () => {
  setToken("");
  location.reload();
});

// The beginning.

async function showStore() {
  const { chunks, fields } = await ask("GET", "v1/fields");
  byId("served").textContent = `${info.model_id}, ${plural(chunks, "passage", "passages")}`;
  byId("welcome-text").textContent = chunks
    ? `${plural(chunks, "passage", "passages")} can be asked.`
    : "The store is empty: drop text files here, or index a folder (search-r3 index).";
  showFields(fields, () => byId("query").value.trim() && goTo());
}

async function start() {
  byId("message").hidden = true;
  try {
    info = await ask("GET", "info");
    byId("forget").hidden = !hasToken();
    const budget = plural(info.max_new_tokens, "token", "tokens");
    byId("limits").textContent = `· version ${info.version}, at most ${budget} of reasoning`;
    byId("options").hidden = !info.store;
    for (const id of ["ways", "keys"]) byId(id).hidden = !info.store;
    byId("comparing").hidden = info.store;
    byId("deciding").hidden = !ways().includes("auto");
    byId("columns").classList.toggle("three", ways().length === 3);
    byId("columns").classList.toggle("four", ways().length === 4);
    if (info.store) {
      allowAdding(info, showStore);
      await showStore();
    } else {
      byId("served").textContent = info.model_id;
      byId("query").placeholder = "A query";
      byId("welcome-text").textContent =
        "This server has a model and no store, so there are no documents to search (search-r3 serve STORE). " +
        "What its vectors do can be tried: the texts above are ranked for the query, without and with reasoning.";
    }
    readAddress();
  } catch (error) {
    explain(error);
  }
}

start();

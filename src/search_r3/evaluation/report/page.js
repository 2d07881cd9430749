"use strict";
// Texts of queries, documents and reasoning are untrusted: they reach the page through textContent alone.

const byId = (id) => document.getElementById(id);
const defaults = { place: "", base: "", other: "", filter: "all", search: "", sort: "gain", query: "" };
const state = { ...defaults };
const labels = [...byId("place").options].map((option) => option.textContent);
const filters = [...byId("filter").children].map((button) => button.value);
const loaded = new Map();
let view = { split: null, base: null, other: null, rows: [], shown: [] };

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(3);
const plural = (count, one, more) => `${count} ${count === 1 ? one : more}`;

// Data: one block for each split, read when it is first looked at.

function load(number) {
  if (!loaded.has(number)) loaded.set(number, JSON.parse(byId(`split-${number}`).textContent));
  return loaded.get(number);
}

function kindOf(difference, same) {
  if (difference > same) return "helps";
  return difference < -same ? "hurts" : "same";
}

function compare(split, base, other) {
  const all = other.values.map((value, i) => value - base.values[i]);
  const rows = split.listed.map((query, i) => ({
    i,
    id: split.ids[i],
    text: split.queries[i],
    base: base.values[query],
    other: other.values[query],
    difference: all[query],
    kind: kindOf(all[query], split.same),
  }));
  return { all, rows };
}

// State: what is chosen stands in the fragment of the address, so that it can be sent to others.

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(defaults)) state[key] = given.get(key) ?? defaults[key];
  if (!(state.sort in orders)) state.sort = defaults.sort;
  if (!filters.includes(state.filter)) state.filter = defaults.filter;
  if (!state.place && state.query) {
    const number = labels.findIndex((_, i) => load(i).ids.includes(state.query));
    if (number >= 0) state.place = labels[number];
  }
}

function writeState() {
  const given = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== defaults[key]) given.set(key, value);
  history.replaceState(null, "", `#${given}`);
}

function change(values) {
  Object.assign(state, values);
  render();
  writeState();
}

// The whole browser, from the state.

function render() {
  const number = Math.max(0, labels.indexOf(state.place));
  const split = load(number);
  const named = (name, position) => split.runs.find((run) => run.name === name) ?? split.runs[split.pair[position]];
  const base = named(state.base, 0);
  const other = named(state.other, 1);
  const { all, rows } = compare(split, base, other);
  view = { split, base, other, rows, shown: [] };
  byId("place").selectedIndex = number;
  fillSystems(byId("base"), split, base);
  fillSystems(byId("other"), split, other);
  byId("sort").value = state.sort;
  if (byId("search").value !== state.search) byId("search").value = state.search;
  renderSummary(all, split);
  renderHistogram(all, split.same);
  renderFilter(rows);
  renderList();
}

function fillSystems(select, split, chosen) {
  select.replaceChildren(...split.runs.map((run) => new Option(run.name, run.name, false, run === chosen)));
}

function renderSummary(all, split) {
  const count = { helps: 0, hurts: 0, same: 0 };
  for (const difference of all) count[kindOf(difference, split.same)] += 1;
  const mean = all.reduce((sum, difference) => sum + difference, 0) / all.length;
  const strong = make("strong", `difference ${kindOf(mean, split.same)}`, signed(mean));
  const counts = make("span", "", `helps ${count.helps}, hurts ${count.hurts}, same ${count.same}`);
  const what = make("span", "quiet", `mean gain in nDCG@10 of ${view.other.name} over ${view.base.name}`);
  const of = make("span", "quiet", `of ${plural(all.length, "query", "queries")}`);
  byId("summary").replaceChildren(strong, what, counts, of);
}

function renderHistogram(all, same) {
  const bins = Array.from({ length: 21 }, () => 0);
  for (const difference of all) {
    const step = Math.min(10, Math.max(1, Math.ceil(Math.abs(difference) * 10 - 1e-6)));
    const kind = kindOf(difference, same);
    bins[kind === "same" ? 10 : kind === "helps" ? 10 + step : 10 - step] += 1;
  }
  const most = Math.max(...bins);
  const [width, ground, top] = [640 / 21, 124, 22];
  const parts = [shape("line", { x1: 0, x2: 640, y1: ground, y2: ground })];
  bins.forEach((count, i) => {
    if (!count) return;
    const height = Math.max(2, ((ground - top) * count) / most);
    const kind = i === 10 ? "same" : i > 10 ? "helps" : "hurts";
    parts.push(shape("rect", { x: i * width + 1.5, y: ground - height, width: width - 3, height, rx: 2, class: kind }));
    parts.push(caption(i * width + width / 2, ground - height - 4, count));
  });
  for (const [i, text] of [[0, "−1"], [5, "−0.5"], [10, "same"], [15, "+0.5"], [20, "+1"]]) {
    parts.push(caption(i * width + width / 2, 145, text));
  }
  const [hurts, helps] = [bins.slice(0, 10), bins.slice(11)].map((part) => part.reduce((sum, count) => sum + count, 0));
  byId("histogram").replaceChildren(...parts);
  byId("histogram").setAttribute("aria-label", `Differences: ${hurts} below 0, ${bins[10]} the same, ${helps} above 0`);
}

function shape(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function caption(x, y, text) {
  const element = shape("text", { x, y, "text-anchor": "middle" });
  element.textContent = text;
  return element;
}

function renderFilter(rows) {
  for (const button of byId("filter").children) {
    const count = button.value === "all" ? rows.length : rows.filter((row) => row.kind === button.value).length;
    button.lastElementChild.textContent = count;
    button.setAttribute("aria-pressed", String(button.value === state.filter));
  }
}

// The list of queries.

const orders = {
  gain: (a, b) => b.difference - a.difference,
  loss: (a, b) => a.difference - b.difference,
  change: (a, b) => Math.abs(b.difference) - Math.abs(a.difference),
  given: (a, b) => a.i - b.i,
};

function renderList() {
  const wanted = state.search.trim().toLowerCase();
  const fits = (row) =>
    (state.filter === "all" || row.kind === state.filter) && `${row.id} ${row.text}`.toLowerCase().includes(wanted);
  view.shown = view.rows.filter(fits).sort(orders[state.sort] ?? orders.gain);
  const list = byId("list");
  list.replaceChildren(...view.shown.map(listItem));
  if (!view.shown.length) list.append(make("p", "item quiet", "No query fits."));
  const { split } = view;
  const total = view.base.values.length;
  byId("shown").textContent =
    split.listed.length < total
      ? `Lists ${split.listed.length} of ${total} queries: the largest gains and losses of ` +
        `${split.runs[split.pair[1]].name} over ${split.runs[split.pair[0]].name}, and an even sample of the rest.`
      : `All ${plural(total, "query", "queries")} of the split. Up and down walk through the list.`;
  choose(view.shown.find((row) => row.id === state.query) ?? view.shown[0]);
}

function listItem(row, position) {
  const item = make("div", "item");
  item.id = `query-${position}`;
  item.setAttribute("role", "option");
  item.append(
    make("span", "text", row.text),
    make("span", `difference ${row.kind}`, signed(row.difference)),
    make("span", "values", `${row.id} · ${row.base.toFixed(3)} → ${row.other.toFixed(3)}`),
  );
  return item;
}

function choose(row) {
  const list = byId("list");
  const position = view.shown.indexOf(row);
  for (const item of list.querySelectorAll('[aria-selected="true"]')) item.setAttribute("aria-selected", "false");
  byId("detail").replaceChildren();
  if (position < 0) {
    list.removeAttribute("aria-activedescendant");
    return;
  }
  const item = list.children[position];
  item.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", item.id);
  if (item.offsetTop < list.scrollTop) list.scrollTop = item.offsetTop;
  const below = item.offsetTop + item.offsetHeight - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below;
  renderDetail(row);
}

function pick(position) {
  const row = view.shown[Math.min(view.shown.length - 1, Math.max(0, position))];
  if (!row) return;
  state.query = row.id;
  choose(row);
  writeState();
}

function walk(event) {
  const at = view.shown.findIndex((row) => row.id === state.query);
  const steps = { ArrowUp: -1, ArrowDown: 1, PageUp: -10, PageDown: 10 };
  const ends = event.currentTarget === byId("list") ? { Home: 0, End: view.shown.length - 1 } : {};
  if (event.key in steps) pick(Math.max(0, at) + steps[event.key]);
  else if (event.key in ends) pick(ends[event.key]);
  else return;
  event.preventDefault();
}

// One query.

function renderDetail(row) {
  const { split, base, other } = view;
  const grades = new Map(split.relevant[row.i]);
  const before = new Map(base.top[row.i].map(([doc], rank) => [doc, rank + 1]));
  const after = new Map(other.top[row.i].map(([doc], rank) => [doc, rank + 1]));
  const facts = make("p", "quiet", `${row.id} · nDCG@10 ${row.base.toFixed(3)} → ${row.other.toFixed(3)} `);
  facts.append(make("span", `difference ${row.kind}`, signed(row.difference)));
  const parts = [make("h3", "asked", row.text), facts];
  for (const run of new Set([base, other])) {
    if (run.gate) parts.push(make("p", "quiet", gateText(run, run.gate[row.i])));
    if (!run.reasoning || !run.reasoning[row.i]) continue;
    parts.push(make("h3", "", `Reasoning of ${run.name}, ${plural(run.tokens[row.i], "token", "tokens")}`));
    parts.push(make("p", `reasoning s${run.number}`, run.reasoning[row.i]));
  }
  parts.push(make("h3", "", "What changed in the top 10"), changes(before, after));
  const columns = make("div", "columns");
  columns.append(
    ranking(base, row.i, grades, (doc) => place(after.get(doc))),
    ranking(other, row.i, grades, (doc, rank) => move(before.get(doc), rank)),
  );
  parts.push(columns, ...relevantDocuments(row, before, after));
  byId("detail").replaceChildren(...parts);
  byId("detail").scrollTop = 0;
}

function gateText(run, { thought, probability, ...evidence }) {
  const parts = Object.entries(evidence).map(([name, value]) => `${name} ${signed(value)}`);
  const what = thought ? "thought" : "did not think";
  const chance = `with a probability of ${probability.toFixed(2)}`;
  if (!parts.length) return `${run.name} ${what}: the model itself decides, and writes ${chance}`;
  return `${run.name} ${what}: reasoning pays ${chance} (log-odds: ${parts.join(", ")})`;
}

function place(rank) {
  return rank ? make("span", "mark", `→ ${rank}`) : make("span", "mark leaves", "leaves");
}

function move(old, rank) {
  if (!old) return make("span", "mark enters", "enters");
  if (old === rank) return make("span", "mark", "stays");
  return make("span", `mark ${old > rank ? "up" : "down"}`, `${old > rank ? "▲" : "▼"} ${Math.abs(old - rank)}`);
}

function changes(before, after) {
  const name = (doc) => view.split.documents[doc][0];
  const entered = [...after.keys()].filter((doc) => !before.has(doc));
  const left = [...before.keys()].filter((doc) => !after.has(doc));
  const moved = [...after].filter(([doc, rank]) => before.has(doc) && before.get(doc) !== rank);
  const steps = moved.map(([doc, rank]) => {
    const up = before.get(doc) - rank;
    return `${name(doc)} ${up > 0 ? "up" : "down"} ${Math.abs(up)}`;
  });
  const line = make("p", "moves");
  const kinds = [["Entered", entered.map(name)], ["Left", left.map(name)], ["Moved", steps]];
  const found = kinds.filter(([, names]) => names.length);
  found.forEach(([label, names]) => line.append(make("b", "", `${label} ${names.length}: `), `${names.join(", ")}. `));
  if (!found.length) line.textContent = "Nothing: the same documents in the same order.";
  return line;
}

function ranking(run, i, grades, mark) {
  const column = make("div");
  const heading = make("h3");
  heading.append(make("span", `system s${run.number}`, run.name));
  const list = make("ol", "ranking");
  run.top[i].forEach(([doc, score], position) => {
    list.append(entry(doc, grades.get(doc), position + 1, score.toFixed(3), [mark(doc, position + 1)]));
  });
  if (!run.top[i].length) list.append(make("li", "quiet", "nothing found"));
  column.append(heading, list);
  return column;
}

function entry(doc, grade, rank, score, marks) {
  const [id, text] = view.split.documents[doc];
  const item = make("li", grade ? "relevant" : "");
  const name = make("span", "name", id);
  if (grade) name.append(make("span", "mark is-relevant", grade > 1 ? `relevant, ${grade}` : "relevant"));
  name.append(...marks);
  item.append(make("span", "rank", rank), name, make("span", "score", score), make("span", "snippet", text));
  return item;
}

function relevantDocuments(row, before, after) {
  const shown = view.split.relevant[row.i];
  const total = view.split.relevant_in_all[row.i];
  const heading = make("h3", "", `Relevant documents: ${shown.length < total ? `${shown.length} of ${total}` : total}`);
  const list = make("ol", "ranking");
  const where = (run, rank) => make("span", "mark", `${run.name}: ${rank ?? "not in the top 10"}`);
  for (const [doc, grade] of shown) {
    list.append(entry(doc, grade, "", "", [where(view.base, before.get(doc)), where(view.other, after.get(doc))]));
  }
  return [heading, list];
}

// Sorting of tables: by the first tbody's cells; blanks stay last.

function sortTable(table, header) {
  const column = [...header.parentElement.children].indexOf(header);
  const numeric = header.classList.contains("number");
  const [first, second] = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
  const next = header.getAttribute("aria-sort") === first ? second : first;
  for (const other of header.parentElement.children) other.setAttribute("aria-sort", other === header ? next : "none");
  const sign = next === "ascending" ? 1 : -1;
  const value = (row) => row.children[column].dataset.value ?? row.children[column].textContent.trim();
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [value(one), value(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].children) {
    header.firstElementChild.addEventListener("click", () => sortTable(table, header));
  }
}

byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("place").addEventListener("change", (event) => {
  change({ place: labels[event.target.selectedIndex], query: "" });
});
for (const id of ["base", "other", "sort"]) {
  byId(id).addEventListener("change", (event) => change({ [id]: event.target.value }));
}
byId("search").addEventListener("input", (event) => change({ search: event.target.value }));
byId("search").addEventListener("keydown", walk);
byId("list").addEventListener("keydown", walk);
byId("list").addEventListener("click", (event) => {
  const item = event.target.closest('[role="option"]');
  if (!item) return;
  pick([...byId("list").children].indexOf(item));
  if (matchMedia("(max-width: 60rem)").matches) byId("detail").scrollIntoView();
});
byId("filter").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) change({ filter: button.value });
});
addEventListener("hashchange", () => {
  if (!location.hash.includes("=")) return;
  readState();
  render();
});

readState();
render();

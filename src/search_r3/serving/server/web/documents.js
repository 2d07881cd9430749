// A document as a whole, and documents that are dropped.

import { ask } from "./api.js";
import { byId, explain, make, plural } from "./common.js";

// Of their ids, so that no document that was indexed is replaced by a file of its name.
const FOLDER = "dropped/";
const AT_ONCE = 32;
let limits = null; // the server's, and what follows when documents were added; there once there is a store
let added = null;

// One document, with the passage that was found.

export async function openDocument(hit) {
  const dialog = byId("document");
  let whole;
  try {
    whole = await ask("GET", `v1/documents/${encodeURIComponent(hit.parent_id)}`);
  } catch (error) {
    explain(error);
    return;
  }
  byId("document-title").textContent = whole.title || whole.id;
  const passages = whole.chunks.length > 1 && `${whole.chunks.length} passages, the best of which is marked`;
  const place = [hit.page && `page ${hit.page}`, ...hit.headings, passages];
  byId("document-place").textContent = place.filter(Boolean).join(" · ");
  const facts = { id: whole.id, path: whole.path, source: whole.source, ...whole.metadata };
  const rows = Object.entries(facts).filter(([, value]) => value !== "" && value !== null);
  byId("document-facts").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = make("div");
      row.append(make("dt", "", name), make("dd", "", typeof value === "string" ? value : JSON.stringify(value)));
      return row;
    }),
  );
  const text = byId("document-text");
  const start = whole.chunks.length > 1 ? whole.text.indexOf(hit.text) : -1;
  const passage = make("mark", "", hit.text);
  if (start < 0) text.textContent = whole.text;
  else text.replaceChildren(whole.text.slice(0, start), passage, whole.text.slice(start + hit.text.length));
  dialog.showModal();
  text.scrollTop = start < 0 ? 0 : passage.offsetTop - text.offsetTop - 12;
}

byId("close").addEventListener("click", () => byId("document").close());
byId("document").addEventListener("click", (event) => {
  // The dialog itself is hit only outside of its content.
  if (event.target === event.currentTarget) event.currentTarget.close();
});

// Adding.

// Called at each beginning; documents can be added from then on.
export function allowAdding(info, onAdded) {
  limits = info;
  added = onAdded;
}

const canAdd = () => added && !byId("choose").disabled;
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
const showDrop = (isShown) => document.body.classList.toggle("dropping", isShown);

byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", async (event) => {
  await add([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault(); // else the browser leaves the page for the file that is dropped
  showDrop(canAdd());
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) showDrop(false);
});
addEventListener("drop", (event) => {
  showDrop(false);
  if (!carriesFiles(event)) return;
  event.preventDefault();
  if (canAdd()) add([...event.dataTransfer.files]);
});

// A file as a document. JSON makes some characters longer, so a file may have half of the largest request.
async function read(file) {
  const most = limits.max_body_bytes / 2;
  if (file.size > most) throw new Error(`larger than ${(most / 2 ** 20).toLocaleString("en")} MiB`);
  const bytes = await file.arrayBuffer().catch(() => {
    throw new Error("cannot be read; folders are for search-r3 index");
  });
  let text = "";
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    text = "\0";
  }
  if (text.includes("\0")) throw new Error("not a text in UTF-8; PDF and other kinds are for search-r3 index");
  if (!text.trim()) throw new Error("empty");
  const heading = /\.(md|markdown)$/i.test(file.name) && text.match(/^#\s+(.+)$/m)?.[1];
  const title = (heading || file.name.replace(/\.\w+$/, "")).trim();
  return { id: FOLDER + file.name, title, text, metadata: { file: file.name } };
}

async function add(files) {
  const started = performance.now();
  const done = { documents: 0, chunks: 0, tokens: 0 };
  const failures = [];
  byId("adding").hidden = false;
  byId("choose").disabled = true;
  let [batch, size] = [[], 0];

  async function write() {
    const documents = batch;
    [batch, size] = [[], 0];
    if (!documents.length) return;
    try {
      const answer = await ask("PUT", "v1/documents", { documents });
      done.documents += answer.documents;
      done.chunks += answer.chunks;
      done.tokens += answer.usage.prompt_tokens;
    } catch (error) {
      failures.push(...documents.map((one) => `${one.metadata.file}: ${error.message}`));
    }
  }

  for (const [place, file] of files.entries()) {
    byId("adding").textContent = `Adding ${place + 1} of ${files.length}: ${file.name}`;
    try {
      const document = await read(file);
      const isFull = batch.length >= Math.min(AT_ONCE, limits.max_client_batch_size);
      if (isFull || size + file.size > limits.max_body_bytes / 2) await write();
      batch.push(document);
      size += file.size;
    } catch (error) {
      failures.push(`${file.name}: ${error.message}`);
    }
  }
  await write();
  byId("choose").disabled = false;
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  const counts = [[done.documents, "document"], [done.chunks, "passage"], [done.tokens, "token"]];
  const [documents, passages, tokens] = counts.map(([count, what]) => plural(count, what, `${what}s`));
  byId("adding").replaceChildren(make("p", "", `${documents} added: ${passages}, ${tokens}, ${seconds} s.`));
  if (failures.length) {
    const list = make("ul");
    list.append(...failures.map((line) => make("li", "", line)));
    byId("adding").append(make("p", "", "Not added:"), list);
  }
  if (done.documents) added();
}

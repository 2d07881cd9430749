// Asking the server. Addresses are relative, so that the page works below a proxy's path, too.

const KEY = "search-r3-token";

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Browsers that are told to keep nothing raise an error where the storage is touched.
function storage(action) {
  try {
    return action(sessionStorage);
  } catch {
    return null;
  }
}

let token = storage((kept) => kept.getItem(KEY));

export const hasToken = () => Boolean(token);

export function setToken(value) {
  token = value;
  storage((kept) => (value ? kept.setItem(KEY, value) : kept.removeItem(KEY)));
}

export async function send(method, path, body, signal) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, body: body === undefined ? body : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const wait = response.headers.get("Retry-After");
  const message = error?.message ?? error ?? `status ${response.status}`;
  throw new Refusal(response.status, wait ? `${message} (try again in ${wait} s)` : message);
}

export const ask = async (method, path, body, signal) => (await send(method, path, body, signal)).json();

// The events of a stream, as [name, data]. A stream that ends without `done` has failed.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let last = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    buffer += value;
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const [, name, text] = block.match(/^event: (.*)\ndata: (.*)$/);
      const data = JSON.parse(text);
      last = name;
      if (last === "error") throw new Refusal(0, data.error.message);
      yield [last, data];
    }
  }
  if (last !== "done") throw new Refusal(0, "The answer broke off; ask again.");
}

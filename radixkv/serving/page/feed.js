// Reads server-sent events with fetch, which unlike EventSource can send a key in a header.

const RETRY_S = [1, 2, 4, 8, 15];

/** A refusal by the server, which trying again would not change. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Splits a stream of text into events: `push` returns those that became complete. */
export class EventParser {
  #rest = "";

  push(text) {
    const blocks = (this.#rest + text).split("\n\n");
    this.#rest = blocks.pop();
    return blocks.map(parseBlock).filter((event) => event !== null);
  }
}

function parseBlock(block) {
  let name = "message";
  let data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) name = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  return data === "" ? null : { name, data: JSON.parse(data) };
}

/** HTTP headers are bytes: a key with other characters is sent as UTF-8. */
export function asHeader(key) {
  return String.fromCharCode(...new TextEncoder().encode(`Bearer ${key}`));
}

/** Feeds `on.event` for as long as the page is open. Returns a function that ends it. */
export function follow(path, key, on) {
  const ending = new AbortController();
  run(path, key, on, ending.signal);
  return () => ending.abort();
}

async function run(path, key, on, signal) {
  for (let failures = 0; !signal.aborted; ) {
    try {
      await readOnce(path, key, on, signal, () => { failures = 0; });
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && [401, 403, 404].includes(error.status)) {
        on.refused(error);
        return;
      }
    }
    if (signal.aborted) return;
    const seconds = RETRY_S[Math.min(failures++, RETRY_S.length - 1)];
    on.lost(seconds);
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}

async function readOnce(path, key, on, signal, hasBegun) {
  const headers = { Accept: "text/event-stream" };
  if (key) headers.Authorization = asHeader(key);
  const answer = await fetch(path, { headers, signal, cache: "no-store", credentials: "same-origin" });
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Refused(answer.status, body?.error?.message ?? `status ${answer.status}`);
  }
  on.opened();
  const parser = new EventParser();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    for (const event of parser.push(value)) {
      if (event.name === "message") throw new Error(event.data.error?.message ?? "the stream failed");
      hasBegun();
      on.event(event);
    }
  }
}

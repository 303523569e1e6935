/** The server's side of the page: requests, server-sent events, and what can go wrong. */

/** The server refused, failed, or could not be reached; `message` is for people. */
export class ServerError extends Error {
  /** `status` is HTTP's, 0 without an answer; `retryAfter` is in seconds. */
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** Turns the bytes of a stream, cut anywhere, into the data of its events. */
export class EventParser {
  #decoder = new TextDecoder(); // keeps the beginning of a character until its end arrives
  #rest = "";
  #data = [];
  #afterReturn = false;

  /** The data of the events that these bytes complete. */
  push(bytes) {
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text && this.#afterReturn) {
      this.#afterReturn = false;
      if (text[0] === "\n") text = text.slice(1); // the other half of a line's end
    }
    if (!text) return [];
    this.#afterReturn = text.endsWith("\r");
    const lines = (this.#rest + text).split(/\r\n|\r|\n/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line === "data") {
        this.#data.push("");
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // else a comment, which servers send to keep the line open, or a field of no use here
    }
    return events;
  }
}

/** fetch, where anything but success is a ServerError, and stopping is still an AbortError. */
export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Is attending still running?");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({ error: null })) ?? {};
  throw new ServerError(error?.message || `The server answered with status ${response.status}.`, {
    status: response.status,
    code: error?.code ?? null,
    retryAfter: Number(response.headers.get("retry-after")) || null, // a date is left out
  });
}

/** POST some JSON. */
export function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** The card of the model that is served. */
export async function modelCard() {
  const { data } = await (await request("/v1/models")).json();
  if (!data?.length) throw new ServerError("The server lists no model.", { status: 503 });
  return data[0];
}

/**
 * The pieces of an answer, as they are written: {reasoning, content, finish, usage}, any of them.
 * Throws a ServerError if the stream carries an error, or ends before the answer does.
 */
export async function* answer(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await post("/v1/chat/completions", asked, signal);
  const reader = response.body.getReader();
  const parser = new EventParser();
  let finished = false;
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const data of parser.push(value)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) {
          const { message, code } = event.error;
          throw new ServerError(message || "The server failed.", { status: 500, code });
        }
        const { delta, finish_reason: finish } = event.choices?.[0] ?? {};
        finished ||= Boolean(finish);
        const reasoning = delta?.reasoning_content ?? delta?.reasoning ?? "";
        yield { reasoning, content: delta?.content ?? "", finish, usage: event.usage };
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {}); // Already ended or broken: nothing is left to cancel.
  }
  if (!finished) throw new ServerError("The stream ended before the answer was complete.");
}

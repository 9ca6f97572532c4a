// The page's API calls: GET v1/models, GET health, GET inspect, and POST v1/chat/completions (server-sent events).

import { apiKey } from "./storage.js";

/**
 * A failed call. kind: "offline" | "key" | "context" | "busy" | "failed" (the engine has stopped) | "request" |
 * "server" | "broken" (cut off mid-answer). retryAfter: the server's Retry-After in seconds, or null.
 */
export class ApiError extends Error {
  constructor(kind, message, retryAfter = null) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

const SENDABLE = /^[\x21-\x7e]*$/; // an API key: browsers refuse other characters in a header, or garble them

const TITLES = {
  offline: "The server cannot be reached",
  key: "The server asks for an API key",
  context: "This chat has become too long for the model",
  busy: "The server is busy",
  failed: "The model has stopped",
  request: "The server refused the request",
  server: "The server failed",
  broken: "The answer was cut off",
};

/**
 * {kind, title, detail} of an ApiError, to show and to store. Any other error is rethrown. `isFirst`: of the answer to
 * a chat's first message.
 */
export function describe(error, isFirst = false) {
  if (!(error instanceof ApiError)) throw error;
  let title = TITLES[error.kind];
  if (error.kind === "key" && apiKey()) title = "The server did not accept this API key";
  if (error.kind === "context" && isFirst) title = "This message is too long for the model";
  return { kind: error.kind, title, detail: error.message };
}

function headers() {
  const key = apiKey();
  if (!SENDABLE.test(key)) throw new ApiError("key", "It has a space, or a character that is not ASCII.");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function request(path, options) {
  const sent = { ...options, headers: headers() };
  let response;
  try {
    response = await fetch(path, sent);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", "Check that it is running, then try again.");
  }
  if (response.ok) return response;
  const message = messageOf(await textOf(response)) || `HTTP ${response.status} ${response.statusText}`.trim();
  if (response.status >= 500) await throwIfStopped();
  throw new ApiError(kindOf(response.status, message), message, secondsOf(response.headers.get("Retry-After")));
}

/** Throws ApiError "failed" with the reason if the server's engine has stopped, since retrying would not help. */
export async function throwIfStopped() {
  let state;
  try {
    state = await (await fetch("health")).json();
  } catch {
    return; // no health report
  }
  if (state?.status !== "error") return;
  throw new ApiError("failed", `${sentence(state.error)} It answers again when the server has been restarted.`);
}

function sentence(text) {
  const trimmed = String(text ?? "").trim() || "No reason was given";
  return trimmed[0].toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

/** Parses Retry-After (a number or a date) to seconds. */
function secondsOf(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(seconds, 0) : null;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ApiError("server", `It sent something other than JSON: ${text.slice(0, 200)}`);
  }
}

function messageOf(text) {
  try {
    const body = JSON.parse(text);
    const error = body.error ?? body.detail ?? body.message ?? body;
    return typeof error === "string" ? error : (error.message ?? text);
  } catch {
    return text.slice(0, 400);
  }
}

function kindOf(status, message) {
  if (status === 401 || status === 403) return "key";
  if (status === 429 || status === 503) return "busy";
  if (status >= 500) return "server";
  return /context length|context_length|maximum context|too long/i.test(message) ? "context" : "request";
}

/** The server's models {id, context}, the default first, without aliases (entries with another `root`). */
export async function listModels() {
  const body = parse(await textOf(await request("v1/models", {})));
  const models = body.data.filter((model) => !model.root || model.root === model.id);
  return (models.length ? models : body.data).map((model) => ({ id: model.id, context: model.context_window }));
}

/** Tokens of a recent answer and the model's shape (dsv4/server/inspection.py). */
export async function inspectAnswer(id, signal) {
  return parse(await textOf(await request(`inspect/${encodeURIComponent(id)}`, { signal })));
}

/** Trace of the computation that read the token at `position`. */
export async function inspectToken(id, position, signal) {
  return parse(await textOf(await request(`inspect/${encodeURIComponent(id)}/${position}`, { signal })));
}

/** Yields the chunks of a streamed chat completion; throws ApiError for an error event or a missing [DONE]. */
export async function* streamChat(body, signal) {
  const options = {
    method: "POST",
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
      timings_per_token: true,
    }),
    signal,
  };
  const response = await request("v1/chat/completions", options);
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) {
      await throwIfStopped();
      throw new ApiError("server", chunk.error.message ?? String(chunk.error));
    }
    yield chunk;
  }
  throw new ApiError("broken", "The connection ended before the answer did.");
}

/** Yields the data of each server-sent event in a byte stream; skips comments (keep-alives). */
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    while (true) {
      const { value, done } = await received(reader.read());
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line !== "" || data.length === 0) continue;
        yield data.join("\n");
        data = [];
      }
    }
  } finally {
    // Also if the consumer stops early: closing the connection stops the generation.
    await reader.cancel().catch(() => {});
  }
}

const textOf = (response) => received(response.text());

/** What `reading` gives; ApiError "broken" if the connection is lost meanwhile. */
async function received(reading) {
  try {
    return await reading;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("broken", "The connection was lost.");
  }
}

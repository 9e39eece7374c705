// The server's API, with the key that was entered: kept in this tab's session, sent in a header, never in an address.

const STORED = "fastprompt-key";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

async function send(method, path, { json, body, headers = {}, signal } = {}) {
  const all = { ...headers };
  if (key.get()) all.Authorization = `Bearer ${key.get()}`;
  if (json !== undefined) all["Content-Type"] = "application/json";
  const content = json === undefined ? body : JSON.stringify(json);
  let response;
  try {
    response = await fetch(path, { method, headers: all, body: content, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new ApiError(response.status, said?.error?.message ?? `the server answered ${response.status}`);
}

export const get = async (path) => (await send("GET", path)).json();
export const post = async (path, json, signal) => (await send("POST", path, { json, signal })).json();
export const act = (method, path, options) => send(method, path, options);
export const promptPath = (name, action = "") => `/v1/prompts/${encodeURIComponent(name)}${action}`;

/** The events of a streamed answer, parsed, as they come. */
export async function* events(path, json, signal) {
  const response = await send("POST", path, { json, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(200, event.error.message);
      yield event;
    }
  }
}

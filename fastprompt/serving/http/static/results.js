// How the playground shows an answer, by what the server does.

import { events, post } from "./api.js";
import { slot } from "./colours.js";
import { el, seconds } from "./dom.js";

const LABELS = 8;

/** A card for one prompt's answer: `run(request, signal)` fills it. */
export class Result {
  constructor(name, colour) {
    this.note = el("p", { className: "note", textContent: "running" });
    this.body = el("div", {});
    this.element = el("article", { className: "card result", "aria-label": `Answer under ${name}` },
      el("h3", {}, el("i", { className: `dot c${colour}` }), name), this.body, this.note);
    this.name = name;
    this.colour = colour;
  }

  async run(show, request, signal) {
    try {
      await show(this, request, signal);
    } catch (error) {
      if (error.name === "AbortError") this.note.textContent = "stopped";
      else this.note.replaceWith(el("p", { className: "wrong", role: "alert", textContent: error.message }));
    } finally {
      this.body.querySelector(".running")?.classList.remove("running");
    }
  }
}

async function text(result, request, signal) {
  const out = el("p", { className: "out running" });
  result.body.replaceChildren(out);
  const start = performance.now();
  let first = null;
  let reason = "";
  let usage = null;
  const { path, json } = textCall(result.name, request);
  for await (const event of events(path, json, signal)) {
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    if (!choice) continue;
    const piece = choice.text ?? choice.delta?.content ?? "";
    if (piece && first === null) first = (performance.now() - start) / 1000;
    if (piece) out.append(piece);
    reason = choice.finish_reason ?? reason;
  }
  const took = (performance.now() - start) / 1000;
  const tokens = usage?.completion_tokens;
  const parts = [first === null ? "no text" : `first text after ${seconds(first)}`];
  if (tokens) parts.push(`${counted(tokens)} in ${seconds(took)}`);
  if (reason) parts.push(`ended by ${reason}`);
  result.note.textContent = parts.join(" · ");
}

function textCall(model, request) {
  const shared = { model, max_tokens: request.maxTokens, temperature: request.temperature, stream: true, stream_options: { include_usage: true } };
  return request.chat
    ? { path: "/v1/chat/completions", json: { ...shared, messages: [{ role: "user", content: request.text }] } }
    : { path: "/v1/completions", json: { ...shared, prompt: request.text } };
}

const counted = (tokens) => `${tokens} ${tokens === 1 ? "token" : "tokens"}`;

async function timed(result, call) {
  const start = performance.now();
  const answer = await call();
  const tokens = answer.usage.prompt_tokens;
  result.note.textContent = `${counted(tokens)} · ${seconds((performance.now() - start) / 1000)}`;
  return answer.data[0];
}

async function sequence(result, request, signal) {
  const found = await timed(result, () => post("/v1/classify", { model: result.name, input: request.text, top_k: LABELS }, signal));
  const rows = found.labels.map(({ label, probability, value }) => {
    const bar = el("i", { className: `c${result.colour}` });
    bar.style.width = `${100 * Math.min(1, Math.max(0, probability ?? 0))}%`;
    const said = probability === undefined ? value.toPrecision(4) : `${(100 * probability).toFixed(1)} %`;
    const term = el("dt", {}, el("span", { textContent: label }), el("b", { textContent: said }));
    return el("div", {}, term, el("dd", { "aria-hidden": "true", hidden: probability === undefined }, bar));
  });
  result.body.replaceChildren(el("dl", { className: "scores" }, ...rows));
}

async function token(result, request, signal) {
  const found = await timed(result, () => post("/v1/token-classify", { model: result.name, input: request.text }, signal));
  const letters = Array.from(request.text); // the server counts whole characters
  const piece = (from, to) => letters.slice(from, to).join("");
  const kinds = [...new Set(found.spans.map((span) => span.label))].sort();
  const parts = [];
  let at = 0;
  for (const span of found.spans) {
    const colour = 1 + (kinds.indexOf(span.label) % LABELS);
    const title = span.probability === undefined ? span.label : `${span.label}, ${(100 * span.probability).toFixed(1)} %`;
    parts.push(piece(at, span.start), el("mark", { className: `m${colour}`, title }, piece(span.start, span.end), el("small", { textContent: span.label })));
    at = span.end;
  }
  parts.push(piece(at));
  result.body.replaceChildren(el("p", { className: "out" }, ...parts));
  if (!found.spans.length) result.note.textContent += " · nothing marked";
}

async function embedding(result, request, signal) {
  const found = await timed(result, () => post("/v1/embeddings", { model: result.name, input: request.text }, signal));
  result.vector = found.embedding;
  const first = result.vector.slice(0, 4).map((value) => value.toFixed(3)).join(", ");
  result.body.replaceChildren(el("p", { className: "out mono", textContent: `[${first}, …] of ${result.vector.length}` }));
}

/** Say how near the vectors of all prompts are to the first one's. */
function compare(results) {
  const [first, ...others] = results.filter((result) => result.vector);
  for (const other of others) {
    const cosine = other.vector.reduce((sum, value, i) => sum + value * first.vector[i], 0); // both have length 1
    const row = el("p", { className: "out" }, "cosine with ", first.name, ": ", el("b", { textContent: cosine.toFixed(4) }));
    other.body.append(row);
  }
}

export const shows = { text, sequence, token, embedding };
export const finish = { embedding: compare };

export const resultFor = (name, names) => new Result(name, slot(name, new Set(names)));

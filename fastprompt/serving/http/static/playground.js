// One input under several prompts, side by side.

import { get } from "./api.js";
import { slot } from "./colours.js";
import { $, el } from "./dom.js";
import { finish, resultFor, shows } from "./results.js";

const MOST = 12;
const SUGGESTED = 8;

export class Playground {
  constructor() {
    this.names = [];
    this.about = null;
    this.abort = null;
    $("play").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    $("play-stop").addEventListener("click", () => this.abort?.abort());
    $("play-text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("play").requestSubmit();
    });
    $("play-name").addEventListener("input", (event) => this.typed(event));
    $("play-name").addEventListener("keydown", (event) => this.pressed(event));
  }

  /** Begin with the bare backbone and the first prompts there are. */
  async start(about) {
    const changed = this.about?.model !== about.model || this.about?.task !== about.task;
    this.about = about;
    for (const option of document.querySelectorAll(".text-only")) option.hidden = about.task !== "text";
    for (const option of document.querySelectorAll(".chat-only")) option.hidden ||= !about.chat;
    if (!changed) return;
    const { data } = await get("/v1/models?limit=3");
    this.names = data.map((model) => model.id);
    this.draw();
  }

  add(name) {
    if (name && !this.names.includes(name) && this.names.length < MOST) this.names.push(name);
    $("play-name").value = "";
    this.draw();
  }

  remove(name) {
    this.names = this.names.filter((other) => other !== name);
    this.draw();
    $("play-name").focus();
  }

  draw() {
    const keep = new Set(this.names);
    const chips = this.names.map((name) =>
      el("span", { className: "chip" }, el("i", { className: `dot c${slot(name, keep)}` }), el("span", { textContent: name, title: name }),
        el("button", { type: "button", textContent: "×", "aria-label": `Remove ${name}`, onclick: () => this.remove(name) })));
    for (const chip of $("play-chips").querySelectorAll(".chip")) chip.remove();
    $("play-chips").prepend(...chips);
    $("play-run").disabled = !this.names.length || this.abort !== null;
  }

  async typed(event) {
    if (event.inputType === "insertReplacementText" || event.inputType === undefined) return this.add(event.target.value);
    const start = event.target.value;
    const query = new URLSearchParams({ limit: SUGGESTED, ...(start ? { after: start } : {}) });
    const { data } = await get(`/v1/models?${query}`).catch(() => ({ data: [] }));
    if (start !== $("play-name").value) return;
    const names = data.map((model) => model.id).filter((name) => name.startsWith(start));
    $("play-names").replaceChildren(...names.map((value) => el("option", { value })));
  }

  pressed(event) {
    if (event.key === "Enter") {
      event.preventDefault();
      this.add(event.target.value);
    } else if (event.key === "Backspace" && !event.target.value && this.names.length) {
      this.remove(this.names.at(-1));
    }
  }

  async run() {
    const request = {
      text: $("play-text").value,
      maxTokens: $("play-max").valueAsNumber || 64,
      temperature: $("play-temperature").valueAsNumber || 0,
      chat: $("play-chat").checked,
    };
    this.abort = new AbortController();
    $("play-stop").disabled = false;
    this.draw();
    const results = this.names.map((name) => resultFor(name, this.names));
    $("results").replaceChildren(...results.map((result) => result.element));
    const { task } = this.about;
    await Promise.all(results.map((result) => result.run(shows[task], request, this.abort.signal)));
    finish[task]?.(results);
    this.abort = null;
    $("play-stop").disabled = true;
    this.draw();
  }
}

// Which prompts the running rows are under, or where steps are short those of the last one: a bar and its legend.

import { $, count, el } from "./dom.js";
import { slot } from "./colours.js";

const NAMED = 8;

export function showMix(engine) {
  const running = Object.keys(engine.running_by_prompt).length ? engine.running_by_prompt : engine.last_by_prompt ?? {};
  const names = new Set([...Object.keys(running), ...Object.keys(engine.waiting_by_prompt)]);
  const rows = [...names].map((name) => ({
    name,
    running: count(running, name),
    waiting: count(engine.waiting_by_prompt, name),
  }));
  rows.sort((a, b) => b.running - a.running || b.waiting - a.waiting || (a.name < b.name ? -1 : 1));
  const shown = rows.slice(0, NAMED).sort((a, b) => (a.name < b.name ? -1 : 1)); // so that they keep their places
  const rest = rows.slice(NAMED);
  const keep = new Set(shown.map((row) => row.name));
  const parts = shown.map((row) => ({ ...row, colour: slot(row.name, keep) }));
  if (rest.length) {
    const sum = (field) => rest.reduce((total, row) => total + row[field], 0);
    parts.push({ name: `${rest.length} more`, running: sum("running"), waiting: sum("waiting"), colour: 0 });
  }
  const pieces = parts.filter((part) => part.running).map((part) => {
    const piece = el("i", { className: `c${part.colour}`, title: `${part.name}: ${part.running}` });
    piece.style.flexGrow = part.running;
    return piece;
  });
  const legend = parts.map((part) =>
    el("li", {}, el("i", { className: `dot c${part.colour}` }), el("span", { className: "name", textContent: part.name, title: part.name }),
      el("b", { textContent: part.running }), part.waiting ? el("small", { textContent: `+${part.waiting} waiting` }) : null));
  if (!legend.length) legend.push(el("li", {}, el("small", { textContent: "Nothing runs." })));
  $("mix").replaceChildren(el("div", { className: "bar", "aria-hidden": "true" }, ...pieces), el("ul", { className: "legend" }, ...legend));
  const many = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  const last = engine.mix ? `last step: ${many(engine.rows ?? "–", "row")} of ${many(engine.mix, "prompt")}` : "";
  $("mix-note").textContent = last;
}

// The page: who asks, what is in sight, and the numbers of each second.

import { get, key } from "./api.js";
import { Chart } from "./chart.js";
import { setBare } from "./colours.js";
import { $, ask, bytes, el, seconds, short } from "./dom.js";
import { History } from "./history.js";
import { showMix } from "./mix.js";
import { Playground } from "./playground.js";
import { Prompts } from "./prompts.js";

const SECOND = 1000;
const LISTED_EVERY = 5; // seconds between looks at the list of prompts
const THEMES = ["auto", "light", "dark"];

const page = { about: null, charts: [], history: new History(), ticks: 0, asking: false };
const playground = new Playground();
const prompts = new Prompts((name) => {
  playground.add(name);
  $("play-text").focus();
  $("play").scrollIntoView({ block: "center" });
});

function state(kind, text) {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = `state ${kind}`;
}

function unreachable(error) {
  if (error.status === 503) state("warn", "not ready");
  else state("bad", error.status ? error.message : "offline");
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function open() {
  try {
    page.about = await get("/v1/dashboard");
  } catch (error) {
    if (error.status === 401) return askForKey(Boolean(key.get()));
    unreachable(error);
    return setTimeout(open, 3 * SECOND);
  }
  const { about } = page;
  setBare(about.model);
  $("model").textContent = about.model;
  $("model").title = about.model;
  document.title = `${about.model} · fastprompt`;
  $("key").hidden = !about.keys;
  for (const part of document.querySelectorAll(".admin")) part.hidden = !about.admin;
  notice("");
  makeCharts(about.task === "text");
  await tick();
  try {
    await playground.start(about);
  } catch (error) {
    notice(error.message);
  }
}

async function askForKey(wrong) {
  state("warn", "key needed");
  $("key-wrong").hidden = !wrong;
  $("key-value").value = "";
  const answer = await ask($("key-dialog"));
  if (answer === "use") key.set($("key-value").value.trim());
  if (answer === "clear") key.set("");
  $("key-value").value = "";
  if (answer === "use" || answer === "clear") return open();
  if (page.about === null) notice("Enter a key to see this server.");
}

function makeCharts(text) {
  page.history = new History();
  const whole = [{ field: "wholeMedian", label: "median" }, { field: "wholeWorst", label: "p99" }];
  const first = [{ field: "firstMedian", label: "median" }, { field: "firstWorst", label: "p99" }];
  const computed = { field: "computed", label: "computed" };
  page.charts = [
    new Chart("Tokens a second", text ? [{ field: "generated", label: "generated" }, computed] : [computed, { field: "padded", label: "with padding" }], short),
    new Chart(text ? "Time to first token" : "Time to answer", text ? first : whole, seconds),
    new Chart("Rows", [{ field: "running", label: "running" }, { field: "waiting", label: "waiting" }], short),
  ];
  $("charts").replaceChildren(...page.charts.map((chart) => chart.element));
}

function tiles(stats) {
  const { engine, recent } = stats;
  const text = page.about.task === "text";
  const now = page.history.now;
  const rows = [
    ["Running", short(engine.running), "rows"],
    ["Waiting", short(engine.waiting), "rows"],
    ["Tokens a second", short(text ? now.generated : now.computed), text ? `${short(engine.generated_tokens)} generated` : `${short(engine.computed_tokens)} in all`],
    [text ? "First token" : "Answer", seconds((text ? recent.time_to_first_token : recent.seconds).p50), `p99 ${seconds((text ? recent.time_to_first_token : recent.seconds).p99)}`],
    ["Prompts", short(stats.prompts), "on disk"],
    ...memory(engine),
  ];
  $("tiles").replaceChildren(...rows.map(([name, value, more]) =>
    el("div", { className: "tile" }, el("dt", { textContent: name }), el("dd", {}, value, el("small", { textContent: more })))));
}

function memory(engine) {
  const { residency, loaded } = engine;
  const found = [];
  if (residency?.device) found.push(["On the device", short(residency.device.prompts), bytes(residency.device.bytes)]);
  if (residency?.host) found.push(["In host memory", short(residency.host.prompts), bytes(residency.host.bytes)]);
  if (loaded) found.push(["In the model", short(loaded.prompts), bytes(loaded.bytes)]);
  if (engine.blocks) found.push(["KV blocks in use", `${Math.round(100 * (1 - engine.blocks_free / engine.blocks))} %`, `${short(engine.blocks)} in all`]);
  return found;
}

async function tick() {
  if (page.about === null || document.hidden || page.asking) return;
  page.asking = true;
  try {
    if (page.about.admin) await look();
    else state(...((await get("/ready")).status === "ready" ? ["good", "ready"] : ["warn", "not ready"]));
  } catch (error) {
    page.history.add(performance.now() / SECOND, null);
    if (error.status === 401) {
      page.about = null;
      await askForKey(true);
    } else {
      unreachable(error);
    }
  } finally {
    page.asking = false;
  }
}

async function look() {
  const stats = await get("/v1/stats");
  page.history.add(performance.now() / SECOND, stats);
  state(stats.ready ? "good" : "warn", stats.ready ? "ready" : "not ready");
  tiles(stats);
  showMix(stats.engine);
  for (const chart of page.charts) chart.show(page.history.points);
  prompts.update(page.about, stats);
  if (page.ticks++ % LISTED_EVERY === 0) await prompts.refresh();
}

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").textContent = name[0].toUpperCase() + name.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${name === "auto" ? "as the system" : name}`);
  localStorage.setItem("fastprompt-theme", name);
}

$("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme ?? "auto";
  theme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});
$("key").addEventListener("click", () => askForKey(false));
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close(button.dataset.close));
}
document.addEventListener("visibilitychange", tick);
setInterval(tick, SECOND);
theme(THEMES.includes(localStorage.getItem("fastprompt-theme")) ? localStorage.getItem("fastprompt-theme") : "auto");
open();

// The table of prompts: paged, found by name, with what runs under them; loading, pinning and deleting.

import { act, get, promptPath } from "./api.js";
import { $, ask, bytes, count, el, toast } from "./dom.js";

const PAGE = 25;

export class Prompts {
  constructor(try_) {
    this.try = try_; // called with the name of a prompt to try in the playground
    this.cursors = [null]; // where the pages before this one begin, and this one
    this.shown = [];
    this.active = false;
    this.last = null;
    this.stats = null;
    this.about = null;
    this.turn = 0;
    $("before").addEventListener("click", () => this.page(() => this.cursors.pop()));
    $("after").addEventListener("click", () => this.page(() => this.cursors.push(this.last)));
    $("show-all").addEventListener("click", () => this.show(false));
    $("show-active").addEventListener("click", () => this.show(true));
    $("find").addEventListener("input", () => this.page(() => (this.cursors = [null])));
    $("upload").addEventListener("click", () => this.upload());
  }

  page(move) {
    move();
    return this.refresh();
  }

  show(active) {
    this.active = active;
    $("show-all").setAttribute("aria-pressed", String(!active));
    $("show-active").setAttribute("aria-pressed", String(active));
    return this.page(() => (this.cursors = [null]));
  }

  /** Ask for the page in sight again. */
  async refresh() {
    const turn = ++this.turn;
    const start = $("find").value;
    const found = this.active ? await this.running(start) : await this.listed(start);
    if (turn !== this.turn) return; // another page was asked for meanwhile
    this.shown = found.data;
    this.last = found.last_id;
    $("before").disabled = this.cursors.length < 2;
    $("after").disabled = !found.has_more;
    this.draw();
  }

  async listed(start) {
    const query = new URLSearchParams({ limit: PAGE });
    const cursor = this.cursors.at(-1);
    if (cursor !== null || start) query.set("after", cursor ?? start);
    const found = await get(`/v1/prompts?${query}`);
    if (!start) return found;
    const data = found.data.filter((prompt) => prompt.name.startsWith(start));
    const exact = cursor === null ? await get(promptPath(start)).catch(() => null) : null;
    return { data: exact ? [exact, ...data] : data, last_id: found.last_id, has_more: found.has_more && data.length === found.data.length };
  }

  async running(start) {
    const { running_by_prompt: running = {}, waiting_by_prompt: waiting = {} } = this.stats?.engine ?? {};
    const names = [...new Set([...Object.keys(running), ...Object.keys(waiting)])].sort();
    const wanted = names.filter((name) => name !== this.about.model && name.startsWith(start)).slice(0, 2 * PAGE);
    const data = await Promise.all(wanted.map((name) => get(promptPath(name)).catch((error) => ({ name, error: error.message }))));
    return { data, has_more: false, last_id: null };
  }

  /** Take new numbers of the engine; the rows stay. */
  update(about, stats) {
    this.about = about;
    this.stats = stats;
    $("prompts-count").textContent = stats.prompts.toLocaleString();
    for (const row of $("prompts").tBodies[0].rows) this.count(row);
  }

  count(row) {
    for (const cell of row.querySelectorAll("[data-count]")) {
      cell.textContent = count(this.stats?.engine[`${cell.dataset.count}_by_prompt`], row.promptName);
    }
  }

  draw() {
    const focused = document.activeElement?.dataset?.focus;
    const rows = this.shown.map((prompt) => this.row(prompt));
    $("prompts").tBodies[0].replaceChildren(...rows);
    $("prompts-empty").hidden = rows.length > 0;
    $("prompts-empty").textContent = this.active ? "Nothing runs under a prompt now." : "No prompts here.";
    if (focused) rows.flatMap((row) => [...row.querySelectorAll("button")]).find((b) => b.dataset.focus === focused)?.focus();
  }

  row(prompt) {
    const name = el("td", { className: "name", textContent: prompt.name });
    const cell = (label, text, options = {}) => el("td", { "data-label": label, ...options }, text);
    const row = prompt.error
      ? el("tr", { className: "gone" }, name, el("td", { colSpan: 7, textContent: prompt.error }))
      : el("tr", {}, name, cell("Method", prompt.method.replaceAll("_", " ")), cell("Length", prompt.length, { className: "number" }),
          cell("Size", bytes(prompt.bytes), { className: "number" }), cell("Version", prompt.version.slice(0, 8), { className: "mono", title: prompt.version }),
          cell("Tier", this.tier(prompt)), cell("Running", "", { className: "number", "data-count": "running" }),
          cell("Waiting", "", { className: "number", "data-count": "waiting" }));
    row.append(this.actions(prompt));
    row.promptName = prompt.name;
    this.count(row);
    return row;
  }

  tier(prompt) {
    const where = prompt.tier ?? "disk";
    return el("span", { className: `tier ${where}` }, prompt.pinned ? `${where}, pinned` : where);
  }

  actions(prompt) {
    const button = (text, label, act) =>
      el("button", { type: "button", className: "small", textContent: text, onclick: act, "aria-label": `${label} ${prompt.name}`, "data-focus": `${text} ${prompt.name}` });
    const buttons = [];
    if (!prompt.error) buttons.push(button("Try", "Try in the playground:", () => this.try(prompt.name)));
    if (!prompt.error && this.about?.pins) {
      buttons.push(prompt.pinned
        ? button("Unpin", "Let be evicted:", () => this.change("POST", prompt, "/unpin", "may be evicted"))
        : button("Pin", "Load and keep on the device:", () => this.change("POST", prompt, "/pin", "is loaded and stays on the device")));
      if (prompt.tier && prompt.tier !== "disk" && !prompt.pinned) {
        buttons.push(button("Unload", "Take off the device:", () => this.change("POST", prompt, "/unload", "leaves memory")));
      }
    }
    buttons.push(button("Delete", "Delete", () => this.remove(prompt)));
    return el("td", { className: "actions" }, ...buttons);
  }

  async change(method, prompt, action, done, options) {
    try {
      await act(method, promptPath(prompt.name, action), options);
      toast(`${prompt.name} ${done}`);
    } catch (error) {
      toast(`${prompt.name}: ${error.message}`);
    }
    await this.refresh().catch(() => {});
  }

  async remove(prompt) {
    $("delete-name").textContent = prompt.name;
    if ((await ask($("delete-dialog"))) !== "delete") return;
    const headers = prompt.version ? { "If-Match": `"${prompt.version}"` } : {};
    await this.change("DELETE", prompt, "", "is deleted", { headers });
  }

  async upload() {
    $("upload-wrong").hidden = true;
    for (;;) {
      if ((await ask($("upload-dialog"))) !== "load") return;
      const name = $("upload-name").value;
      const body = new FormData();
      for (const file of $("upload-files").files) body.append("files", file, file.name);
      const headers = $("upload-replace").checked ? {} : { "If-None-Match": "*" };
      try {
        await act("PUT", promptPath(name), { body, headers });
        toast(`${name} is loaded`);
        $("upload-dialog").querySelector("form").reset();
        await this.refresh();
        return;
      } catch (error) {
        $("upload-wrong").textContent = error.message;
        $("upload-wrong").hidden = false;
      }
    }
  }
}

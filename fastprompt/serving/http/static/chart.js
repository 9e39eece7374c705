// A chart of one or two lines over the last minutes: drawn as SVG, read with the pointer or the arrow keys.

import { el, svg } from "./dom.js";

const HEIGHT = 170;
const EDGE = { top: 8, right: 10, bottom: 20, left: 46 };

export class Chart {
  /** `series` are {field, label}; `format` writes a value. */
  constructor(title, series, format) {
    this.series = series;
    this.format = format;
    this.points = [];
    this.picked = null;
    this.values = series.map(() => el("b", { textContent: "–" }));
    const keys = series.map((s, i) => el("span", {}, el("i", { className: `key${i + 1}` }), ` ${s.label} `, this.values[i]));
    this.picture = svg("svg", { role: "img", tabindex: "0" });
    this.tip = el("div", { className: "tip", hidden: true });
    this.element = el("div", { className: "card chart" }, el("h3", {}, el("strong", { textContent: title }), ...keys), this.picture, this.tip);
    this.title = title;
    this.picture.addEventListener("pointermove", (event) => this.pick(this.indexAt(event.offsetX)));
    this.picture.addEventListener("pointerleave", () => this.pick(null));
    this.picture.addEventListener("blur", () => this.pick(null));
    this.picture.addEventListener("keydown", (event) => this.step(event));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  show(points) {
    this.points = points;
    const now = points.at(-1) ?? {};
    this.series.forEach((s, i) => (this.values[i].textContent = this.write(now[s.field])));
    this.draw();
  }

  write(value) {
    return Number.isFinite(value) ? this.format(value) : "–";
  }

  pick(index) {
    this.picked = index;
    this.draw();
  }

  step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.pick(null);
    if (!move || !this.points.length) return;
    event.preventDefault();
    const last = this.points.length - 1;
    this.pick(Math.min(last, Math.max(0, (this.picked ?? last + 1) + move)));
  }

  get width() {
    return Math.max(120, this.picture.clientWidth || 300);
  }

  span() {
    const end = this.points.at(-1).time;
    return { start: Math.min(this.points[0].time, end - 60), end };
  }

  x(time) {
    const { start, end } = this.span();
    return EDGE.left + ((time - start) / (end - start)) * (this.width - EDGE.left - EDGE.right);
  }

  indexAt(x) {
    if (!this.points.length) return null;
    const distances = this.points.map((p) => Math.abs(this.x(p.time) - x));
    return distances.indexOf(Math.min(...distances));
  }

  draw() {
    const { width } = this;
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    if (!this.points.length) return;
    const found = this.points.flatMap((p) => this.series.map((s) => p[s.field])).filter(Number.isFinite);
    const top = ceiling(Math.max(0, ...found));
    const y = (value) => EDGE.top + (1 - value / top) * (HEIGHT - EDGE.top - EDGE.bottom);
    this.picture.replaceChildren(
      ...this.axes(top, y, found.length > 0), ...this.series.map((s, i) => this.line(s.field, i + 1, y)), ...this.cross(y),
    );
    const now = this.points.at(-1);
    const said = this.series.map((s) => `${s.label} ${this.write(now[s.field])}`).join(", ");
    this.picture.setAttribute("aria-label", `${this.title}: ${this.picked === null ? said : this.tip.textContent}`);
  }

  axes(top, y, scaled) {
    const { start, end } = this.span();
    const parts = [];
    for (const value of [0, top / 2, top]) {
      parts.push(svg("line", { class: "grid", x1: EDGE.left, x2: this.width - EDGE.right, y1: y(value), y2: y(value) }));
      const label = value === 0 ? "0" : scaled ? this.format(value) : "";
      parts.push(svg("text", { class: "axis", x: EDGE.left - 6, y: y(value) + 4, "text-anchor": "end" }, label));
    }
    const text = { class: "axis", y: HEIGHT - 4 };
    parts.push(svg("text", { ...text, x: EDGE.left }, ago(end - start)));
    parts.push(svg("text", { ...text, x: this.width - EDGE.right, "text-anchor": "end" }, "now"));
    return parts;
  }

  line(field, number, y) {
    let path = "";
    let pen = "M";
    for (const point of this.points) {
      if (!Number.isFinite(point[field])) {
        pen = "M";
        continue;
      }
      path += `${pen}${this.x(point.time).toFixed(1)} ${y(point[field]).toFixed(1)}`;
      pen = "L";
    }
    return svg("path", { class: `line l${number}`, d: path });
  }

  cross(y) {
    const point = this.points[this.picked ?? -1];
    this.tip.hidden = !point;
    if (!point) return [];
    const x = this.x(point.time);
    const rows = this.series.map((s) => el("div", {}, `${s.label} `, el("b", { textContent: this.write(point[s.field]) })));
    this.tip.replaceChildren(el("div", { textContent: ago(this.points.at(-1).time - point.time) }), ...rows);
    this.tip.style.left = `${Math.min(x + 14, this.element.clientWidth - this.tip.offsetWidth - 8)}px`;
    const dots = this.series.flatMap((s, i) =>
      Number.isFinite(point[s.field]) ? [svg("circle", { class: `ring d${i + 1}`, cx: x, cy: y(point[s.field]), r: 4.5 })] : [],
    );
    return [svg("line", { class: "cross", x1: x, x2: x, y1: EDGE.top, y2: HEIGHT - EDGE.bottom }), ...dots];
  }
}

/** The least round number that is not below a value. */
function ceiling(value) {
  if (value <= 0) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((n) => n * size).find((n) => n >= value * 0.999);
}

function ago(time) {
  const whole = Math.round(time);
  if (whole < 1) return "now";
  return whole < 120 ? `${whole} s ago` : `${Math.round(whole / 60)} min ago`;
}

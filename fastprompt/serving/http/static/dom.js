// Elements and numbers. Text enters the page as text nodes and attributes only: a prompt's name is never read as HTML.

export const $ = (id) => document.getElementById(id);

/** An element; `properties` are set as properties, those with a dash and the role as attributes, `on…` as listeners. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The same in SVG, where everything is an attribute. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const units = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** 12345 as "12.3k". */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  for (const [size, unit] of units) if (Math.abs(value) >= size) return `${trim(value / size)}${unit}`;
  return trim(value);
}

function trim(value) {
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return String(Number(value.toFixed(digits)));
}

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${trim(value / size)} ${unit}`;
  }
  return `${value} B`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? `${trim(value * 1000)} ms` : `${trim(value)} s`;
}

/** What an object that came as JSON counts under a name, which may be any string. */
export const count = (counts, name) => (counts && Object.hasOwn(counts, name) ? counts[name] : 0);

let toasted;

/** Say something for some seconds, to screen readers too. */
export function toast(text) {
  $("toast").textContent = text;
  clearTimeout(toasted);
  toasted = setTimeout(() => $("toast").replaceChildren(), 6000);
}

/** Open a dialog; the value of the button that closed it. */
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}

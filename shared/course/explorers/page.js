"use strict";
// What all explorers share: elements, numbers and characters as they are shown, lists that are walked by keys,
// drawing on a canvas, light and dark, the height of the frame.

// An element. Attributes that begin with "on" are listeners; children are elements or texts.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// A button that does something.
function button(words, does, attributes = {}) {
  return make("button", { type: "button", onclick: does, ...attributes }, words);
}

const VISIBLE = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
const NAMES = { " ": "space", "\n": "line break", "\t": "tab", "\r": "carriage return" };

// A token as it can be seen: spaces and line breaks have signs of their own.
function visible(token) {
  return [...token].map((c) => VISIBLE[c] ?? c).join("");
}

// A token as a screen reader should say it.
function spoken(token) {
  return NAMES[token] ?? visible(token);
}

function percent(share) {
  if (share === 0) return "0 %";
  if (share < 0.0005) return "< 0.1 %";
  if (share > 0.9995 && share < 1) return "> 99.9 %";
  return `${(100 * share).toFixed(share < 0.0995 || (share > 0.995 && share < 1) ? 1 : 0)} %`;
}

function whole(number) {
  return Math.round(number).toLocaleString("en-US");
}

function decimals(number, digits = 3) {
  return number.toFixed(digits).replace("-", "−");
}

// What `in_base64` of page.py has packed.
function numbersOf(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

// Numbers from 0 to 1 that are the same each time (mulberry32).
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

// Makes a list of elements one stop of the Tab key, in which arrow keys, Home and End walk; whatever comes into
// focus or is clicked is chosen. columns: how far up and down go. Returns a function that marks one as chosen.
function choices(list, items, chosen, columns = () => 1) {
  const role = list.getAttribute("role") === "radiogroup" ? "aria-checked" : "aria-selected";
  const mark = (index) => {
    items.forEach((item, i) => {
      item.tabIndex = i === index ? 0 : -1;
      item.setAttribute(role, String(i === index));
    });
  };
  const go = (index) => {
    const within = Math.min(Math.max(index, 0), items.length - 1);
    items[within].focus();
  };
  items.forEach((item, i) => {
    item.addEventListener("focus", () => {
      mark(i);
      chosen(i);
    });
    item.addEventListener("click", () => item.focus());
  });
  list.addEventListener("keydown", (event) => {
    const here = items.indexOf(document.activeElement);
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns() };
    if (event.key in steps) go(here + steps[event.key]);
    else if (event.key === "Home") go(0);
    else if (event.key === "End") go(items.length - 1);
    else return;
    event.preventDefault();
  });
  mark(0);
  return mark;
}

// How many items of a wrapping list stand in a row.
function perRow(items) {
  const top = items[0].offsetTop;
  const first = items.findIndex((item) => item.offsetTop > top);
  return first < 0 ? items.length : first;
}

// A colour of page.css by its name, as it is now.
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A canvas's context in CSS pixels, cleared; the canvas becomes width by height of them.
function canvasOf(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.fillStyle = colour("paper");
  context.fillRect(0, 0, width, height);
  return context;
}

// A bar with its label and its share; mark: where another share is, as a line.
function bar(label, name, share, largest, mark = null) {
  const track = make("span", { class: "track", "aria-hidden": "true" });
  const fill = make("span", { class: "fill" });
  fill.style.width = `${(100 * share) / largest}%`;
  track.append(fill);
  if (mark !== null) {
    const line = make("span", { class: "mark" });
    line.style.left = `${(100 * mark) / largest}%`;
    track.append(line);
  }
  const shown = make("span", { class: "token", "aria-label": name }, label);
  return [shown, track, make("span", { class: "share" }, percent(share))];
}

// Tells the frame how tall the page is, and redraws when it becomes light or dark, or wider or narrower.
function explore(draw) {
  const root = document.getElementById("explorer");
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let told = null;
  let redraw = () => {};
  const setTheme = () => {
    document.documentElement.dataset.theme = told ?? (dark.matches ? "dark" : "light");
    redraw();
  };
  window.addEventListener("message", (event) => {
    if (event.source !== window.parent || !event.data || !("theme" in event.data)) return;
    told = event.data.theme;
    setTheme();
  });
  dark.addEventListener("change", setTheme);
  setTheme();
  redraw = draw(root, data);
  let width = root.clientWidth;
  new ResizeObserver(() => {
    if (root.clientWidth !== width) {
      width = root.clientWidth;
      redraw();
    }
    const main = document.querySelector("main");
    window.parent.postMessage({ height: Math.ceil(main.getBoundingClientRect().height) + 2 }, "*");
  }).observe(document.querySelector("main"));
}

"use strict";
// The numbers of five formats on a line: drag it, zoom, choose a number and see what each format makes of it.

const TRIES = [
  // what is written, the number, how much of the line to show
  ["π", Math.PI, 8],
  ["0.1", 0.1, 0.05],
  ["257", 257, 12],
  ["2,049", 2049, 16],
  ["70,000", 70000, 50000],
  ["1e−8", 1e-8, 4e-8],
];
const ROW = 44; // height of a format's row, in pixels
const DENSE = 3; // nearer than so many pixels, numbers are drawn as an area

explore((root, data) => {
  const formats = data.formats;
  let number = data.number;
  let middle = 4; // of what is seen of the line
  let width = 9;
  let chosen = formats.findIndex((format) => format.name === "fp16");
  let drag = null;

  const line = make("canvas", { class: "map numbers", "aria-hidden": "true" });
  const field = make("input", { id: "number", autocomplete: "off", spellcheck: "false", size: "14", oninput: read });
  const status = make("p", { class: "status", role: "status" });
  const zoom = make("input", {
    type: "range", id: "zoom", min: "-20", max: "40", step: "0.5",
    oninput: () => look(number, 2 ** -Number(zoom.value)),
  });
  const rows = formats.map((format) => make("div", { class: "format", role: "radio" }));
  const list = make("div", { role: "radiogroup", "aria-label": "What each format makes of it" }, ...rows);
  const bits = make("div", { class: "bits", role: "group", "aria-label": "Bits to turn over" });
  const detail = make("section", { "aria-label": "The bits, and the neighbours" });

  // What is typed: 0.1, 1e-8, 2^-24.
  function read() {
    const typed = field.value.trim().replaceAll("−", "-").replaceAll(",", "").replace(/^([+-]?)(π|pi)$/i, `$1${Math.PI}`);
    const power = typed.match(/^([+-]?)([\d.]+)\^([+-]?\d+)$/);
    const wanted = power ? Number(`${power[1]}1`) * Number(power[2]) ** Number(power[3]) : Number(typed);
    if (typed === "" || !Number.isFinite(Math.fround(wanted))) {
      field.setAttribute("aria-invalid", "true");
      status.textContent = "That is no number of float32: write one such as 0.1, −3, 1e-8 or 2^-24.";
      return;
    }
    choose(wanted, field);
  }

  // A number becomes the chosen one, rounded to float32. The line moves where it would be out of sight.
  function choose(wanted, from = null) {
    number = Math.fround(wanted);
    if (from !== field) field.value = short(number);
    field.removeAttribute("aria-invalid");
    if (Math.abs(number - middle) > 0.48 * width) {
      const far = Math.abs(number) > width || Math.abs(number) < width / 1e3;
      look(number, far && number !== 0 ? 3 * Math.abs(number) : width);
    } else {
      show();
    }
  }

  function look(where, wide) {
    width = Math.min(Math.max(wide, 2 ** -40), 2 ** 20);
    middle = where;
    zoom.value = String(-Math.log2(width));
    show();
  }

  function show() {
    showRows();
    showBits();
    showDetail();
    say();
    drawLine();
    zoom.setAttribute("aria-valuetext", `${short(width, 2)} wide`);
  }

  function say() {
    const format = formats[chosen];
    const nearest = rounded(format, number);
    const off = offBy(number, nearest);
    const became = off === "exact" ? `has ${short(number)} itself` : `makes ${short(nearest)} of ${short(number)}`;
    const [low, high] = inSight(format);
    const count = high - low + 1;
    const seen = count === 1 ? "is one of its numbers" : `are ${whole(count)} of its numbers`;
    status.textContent = `${format.name} ${became}${off === "exact" || off === "lost" ? "" : `, off by ${off}`}. `
      + `On the line above ${seen}.`;
  }

  // The places of the first and of the last of a format's numbers between both ends of the line.
  function inSight(format) {
    const [from, to] = [middle - width / 2, middle + width / 2];
    const largest = largestCode(format);
    const within = (place) => Math.min(Math.max(place, -largest), largest);
    let low = within(placeOf(format, codeOf(format, from)));
    if (atPlace(format, low) < from) low += 1;
    let high = within(placeOf(format, codeOf(format, to)));
    if (atPlace(format, high) > to) high -= 1;
    return [low, high];
  }

  function bitSpans(format, code) {
    const text = bitsOf(format, code);
    return ["sign", "exponent", "fraction"].map((part) => {
      const of = [...text].filter((_, index) => partOf(format, index) === part).join("");
      return make("span", { class: part }, of);
    });
  }

  function showRows() {
    formats.forEach((format, index) => {
      const code = codeOf(format, number);
      const nearest = valueOf(format, code);
      rows[index].replaceChildren(
        make("strong", {}, format.name),
        make("code", { "aria-hidden": "true" }, ...bitSpans(format, code)),
        make("span", { class: "becomes" }, short(nearest)),
        make("span", { class: "soft" }, offBy(number, nearest)));
      rows[index].setAttribute("aria-label", `${format.name}: ${short(nearest)}, ${offBy(number, nearest)}`);
    });
  }

  // The bits of the chosen format, each a button that turns it over. Arrows walk along them.
  function showBits() {
    const format = formats[chosen];
    const code = codeOf(format, number);
    const text = bitsOf(format, code);
    const here = [...bits.children].indexOf(document.activeElement);
    const buttons = [...text].map((bit, index) => {
      const worth = 2 ** (text.length - 1 - index);
      const turned = valueOf(format, bit === "1" ? code - worth : code + worth);
      const part = partOf(format, index);
      const flip = () => Number.isFinite(turned) && choose(turned);
      return button(bit, flip, {
        class: part, tabindex: index === Math.max(here, 0) ? "0" : "-1", "aria-pressed": String(bit === "1"),
        "aria-label": `${part}, bit ${index + 1} of ${text.length}: ${bit}; turned over: ${short(turned)}`,
        title: `turned over: ${short(turned)}`,
      });
    });
    bits.replaceChildren(...buttons);
    if (here >= 0) buttons[Math.min(here, buttons.length - 1)].focus();
  }

  bits.addEventListener("keydown", (event) => {
    const all = [...bits.children];
    const here = all.indexOf(document.activeElement);
    const to = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = all[Math.min(Math.max(to, 0), all.length - 1)];
    all.forEach((one) => one.setAttribute("tabindex", one === next ? "0" : "-1"));
    next.focus();
  });

  function showDetail() {
    const format = formats[chosen];
    const code = codeOf(format, number);
    const { exponent, fraction } = format;
    title.textContent = `${format.name}: 1 bit of sign, ${exponent} of exponent, ${fraction} of fraction`;
    detail.replaceChildren(make("p", { class: "formula" }, ...meaning(format, code)), make("p", {}, ...neighbours(format, code)));
    const place = placeOf(format, code);
    const largest = largestCode(format);
    step(below, place > -largest ? place - (valueOf(format, code) >= number ? 1 : 0) : null);
    step(above, place < largest ? place + (valueOf(format, code) <= number ? 1 : 0) : null);
  }

  function step(control, place) {
    control.disabled = place === null || Math.abs(place) > largestCode(formats[chosen]);
    control.onclick = () => choose(atPlace(formats[chosen], place));
  }

  // The three parts put together again.
  function meaning(format, code) {
    const value = valueOf(format, code);
    const largest = short(valueOf(format, largestCode(format)));
    if (!Number.isFinite(value)) {
      return [`The largest number of ${format.name} is ${largest}. Beyond it comes ${beyond(format)}.`];
    }
    const size = code % signOf(format);
    const [high, digits] = [Math.floor(size / 2 ** format.fraction), size % 2 ** format.fraction];
    const bias = biasOf(format);
    const power = high === 0 ? `1 − ${bias}` : `${high} − ${bias}`;
    return [
      `${code >= signOf(format) ? "−" : "+"} (${high === 0 ? 0 : 1} + ${whole(digits)} / ${whole(2 ** format.fraction)}) · 2`,
      make("sup", {}, power), " = ", make("strong", { class: "value" }, short(value, 9)),
    ];
  }

  // Between which two the number lies, and why the one was taken.
  function neighbours(format, code) {
    const value = valueOf(format, code);
    if (!Number.isFinite(value)) return [];
    if (Math.abs(number) > valueOf(format, largestCode(format))) {
      return [format.saturates ? "It has no inf: this is its largest number, and PyTorch stops there." : "This is its largest number."];
    }
    const power = Math.max(value === 0 ? -Infinity : powerOf(Math.abs(value)), 1 - biasOf(format));
    const gap = 2 ** (power - format.fraction);
    const about = `From here to the next larger size is a step of ${short(gap, 4)}. `;
    if (value === number) return [about, `${short(number)} is one of its numbers: nothing is lost.`];
    const other = atPlace(format, placeOf(format, code) + (value < number ? 1 : -1));
    const way = Math.abs((number - value) / (other - value));
    const why = way === 0.5
      ? "It lies exactly in the middle; the one whose last bit is 0 is taken."
      : `It lies ${percent(way)} of the way from the one that is taken to the other.`;
    return [about, `${short(number)} is between ${short(value)} and ${short(other)}. ${why}`];
  }

  // Drawing.

  function drawLine() {
    const wide = line.parentElement.clientWidth - 2;
    const high = formats.length * ROW + 26;
    const context = canvasOf(line, wide, high);
    const at = (value) => ((value - middle) / width + 0.5) * wide;
    context.font = "12px system-ui, sans-serif";
    drawAxis(context, at, wide, high);
    formats.forEach((format, index) => {
      const top = index * ROW;
      context.fillStyle = colour(index === chosen ? "orange" : "ink");
      context.fillText(format.name, 4, top + 14);
      drawBeyond(context, format, at, top, wide);
      drawNumbers(context, format, at, top);
    });
    context.strokeStyle = colour("orange");
    context.lineWidth = 1.5;
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(at(number), 0);
    context.lineTo(at(number), high - 20);
    context.stroke();
    context.setLineDash([]);
    formats.forEach((format, index) => drawNearest(context, format, at, index * ROW, wide));
  }

  // Numbers that lie apart as lines, others as an area.
  function drawNumbers(context, format, at, top) {
    const [low, high] = inSight(format);
    context.fillStyle = colour("blue");
    let place = low;
    while (place <= high) {
      const value = atPlace(format, place);
      const last = Math.min(high, lastOfStep(format, place));
      const gap = at(atPlace(format, place + 1)) - at(value);
      if (gap < DENSE && last > place) {
        context.fillRect(at(value) - 0.5, top + 20, Math.max(at(atPlace(format, last)) - at(value), 0) + 1, 18);
      } else {
        const thick = gap > 8 ? 2 : 1;
        for (let each = place; each <= last; each++) {
          context.fillRect(Math.round(at(atPlace(format, each)) - thick / 2), top + 20, thick, 18);
        }
      }
      place = last + 1;
    }
  }

  // The last place before the distance to the next number changes.
  function lastOfStep(format, place) {
    const size = 2 ** format.fraction;
    const edge = Math.abs(place) < 2 * size ? 2 * size : Math.floor(Math.abs(place) / size) * size + size;
    if (place >= 0) return edge - 1;
    const nearer = Math.ceil(Math.abs(place) / size) * size - size;
    return Math.abs(place) <= 2 * size ? -1 : -(nearer + 1);
  }

  // Where a format has no numbers any more.
  function drawBeyond(context, format, at, top, wide) {
    const end = valueOf(format, largestCode(format));
    for (const side of [1, -1]) {
      const [from, to] = side > 0 ? [at(end), wide] : [0, at(-end)];
      const [left, right] = [Math.max(from, 0), Math.min(to, wide)];
      if (right - left < 2) continue;
      context.fillStyle = colour("panel");
      context.fillRect(left, top + 20, right - left, 18);
      context.fillStyle = colour("soft");
      const words = `beyond: ${side < 0 ? "−" : ""}${beyond(format)}`;
      const room = context.measureText(words).width + 16;
      const inner = side > 0 ? left > 0 : right >= wide; // which of both ends the words stand at
      if (right - left > room) context.fillText(words, inner ? left + 8 : right - room + 8, top + 33);
    }
  }

  function drawNearest(context, format, at, top, wide) {
    const nearest = rounded(format, number);
    const [from, to] = [at(number), Number.isFinite(nearest) ? at(nearest) : at(number)];
    context.strokeStyle = colour("orange");
    context.lineWidth = 3;
    context.beginPath();
    context.moveTo(from, top + 29);
    context.lineTo(to, top + 29);
    context.stroke();
    if (to < 0 || to > wide || !Number.isFinite(nearest)) return;
    context.fillStyle = colour("orange");
    context.strokeStyle = colour("paper");
    context.lineWidth = 2;
    context.beginPath();
    context.arc(to, top + 29, 6, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }

  function drawAxis(context, at, wide, high) {
    const rough = (width * 90) / wide;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map((times) => times * unit).find((size) => size >= rough);
    const digits = Math.max(1, Math.ceil(Math.log10(Math.max(Math.abs(middle) + width, gap) / gap)) + 1);
    context.fillStyle = colour("soft");
    context.textAlign = "center";
    for (let i = Math.ceil((middle - width / 2) / gap); i * gap <= middle + width / 2; i++) {
      const words = short(i * gap, digits);
      const half = context.measureText(words).width / 2;
      const place = at(i * gap);
      context.fillRect(place, high - 20, 1, 5);
      if (place > half && place < wide - half) context.fillText(words, place, high - 4);
    }
    context.textAlign = "left";
  }

  // The pointer: a drag moves the line, a click chooses.
  line.addEventListener("pointerdown", (event) => {
    drag = { x: event.offsetX, middle, moved: false };
    line.setPointerCapture(event.pointerId);
  });
  line.addEventListener("pointermove", (event) => {
    if (drag === null) return;
    const by = event.offsetX - drag.x;
    if (Math.abs(by) > 4) drag.moved = true;
    if (!drag.moved) return;
    middle = drag.middle - (by / line.clientWidth) * width;
    say();
    drawLine();
  });
  line.addEventListener("pointerup", (event) => {
    const clicked = drag !== null && !drag.moved;
    drag = null;
    if (!clicked) return;
    const pixel = width / line.clientWidth;
    const unit = 10 ** Math.floor(Math.log10(pixel));
    const value = middle + (event.offsetX / line.clientWidth - 0.5) * width;
    choose(Math.round(value / unit) * unit);
  });
  line.addEventListener("pointercancel", () => (drag = null));

  const title = make("h3", {});
  const below = button("◀ the next below", () => {});
  const above = button("the next above ▶", () => {});
  const markRow = choices(list, rows, (index) => {
    chosen = index;
    show();
  });
  markRow(chosen);
  const tries = TRIES.map(([words, value, wide]) => button(words, () => {
    middle = value;
    choose(value);
    look(number, wide);
  }));
  root.append(
    make("p", { class: "soft" }, "Each blue line is a number that the format has; where they lie too close, they are one blue area. Drag the line, zoom, and click to choose a number."),
    make("div", { class: "controls" },
      make("label", { for: "number" }, "The number"), field, make("span", { class: "soft" }, "or"), ...tries),
    line,
    make("div", { class: "controls" },
      button("◀", () => look(middle - width / 4, width), { "aria-label": "Move to the left" }),
      button("▶", () => look(middle + width / 4, width), { "aria-label": "Move to the right" }),
      make("label", { for: "zoom" }, "Zoom"), zoom),
    status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "The formats" }, make("h3", {}, "What each makes of it"), list),
      make("section", { "aria-label": "One format" }, title, bits, detail,
        make("div", { class: "controls" }, below, above))));
  choose(number);
  look(middle, width);
  return drawLine;
});

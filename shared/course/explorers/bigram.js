"use strict";
// The table of a bigram: hover or choose a row, see what may follow, draw from it.

const SHOWN = 12; // bars
const LABELS = 2.6; // cells that the map's labels take

// A row's probabilities at a temperature: the softmax of its logarithms, divided by it. What never followed stays
// at 0. A row without any counts gives nothing.
function probabilitiesOf(row, temperature) {
  const largest = Math.max(...row);
  if (largest === 0) return row.map(() => 0);
  const powers = row.map((n) => (n === 0 ? 0 : Math.exp(Math.log(n / largest) / temperature)));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

explore((root, data) => {
  const { tokens, table } = data;
  const largest = Math.max(...table.map((row) => Math.max(...row)));
  let uniform = randomNumbers(data.seed);
  let row = data.start; // whose distribution is drawn from
  let looked = null; // the row that is hovered over
  let temperature = 1;
  let drawn = null; // { token, u }: the last draw, from `row`
  let text = [row];
  let timer = null;
  let under = null; // the cell under the pointer
  let grid = { cell: 1, edge: 0 }; // of the map, in pixels

  const map = make("canvas", { class: "map", "aria-hidden": "true" });
  const cellWords = make("p", { class: "soft" });
  const chips = tokens.map((token) =>
    make("span", { class: "chip", role: "option", "aria-label": spoken(token) }, visible(token)),
  );
  const list = make("div", { class: "chips", role: "listbox", "aria-label": "The present character" }, ...chips);
  const status = make("p", { class: "status", role: "status" });
  const bars = make("div", { class: "bars" });
  const line = make("div", { class: "line", "aria-hidden": "true" });
  const written = make("pre", { class: "text", tabindex: "0", "aria-label": "The text so far" });
  const degrees = make("output", { class: "number" });
  const slider = make("input", {
    type: "range", min: "-1", max: "1", step: "0.05", value: "0", id: "temperature", oninput: warm,
  });
  const again = button("Write 60 more", writeOn);

  function warm() {
    temperature = 10 ** Number(slider.value) > 9.9 ? 10 : 10 ** Number(slider.value);
    drawn = null;
    show();
  }

  function choose(index) {
    stop();
    row = index;
    drawn = null;
    text = [index];
    show();
  }

  // One draw. The row that it is drawn from stays in sight, until the next.
  function step() {
    if (drawn !== null) row = drawn.token;
    const p = probabilitiesOf(table[row], temperature);
    if (p.every((share) => share === 0)) {
      stop();
      drawn = null;
      show();
      return;
    }
    const u = uniform();
    let end = 0;
    let token = null;
    for (const candidate of ranked(row)) {
      if (p[candidate] === 0) continue;
      token = candidate;
      end += p[candidate];
      if (u < end) break;
    }
    drawn = { token, u };
    text.push(token);
    show();
  }

  function writeOn() {
    if (timer !== null) {
      stop();
      return;
    }
    let left = 60;
    const moves = window.matchMedia("(prefers-reduced-motion: no-preference)").matches;
    again.textContent = "Stop";
    const next = () => {
      step();
      left -= 1;
      if (left === 0) stop();
    };
    if (moves) {
      timer = setInterval(next, 70);
    } else {
      timer = 0;
      while (left > 0) next();
    }
  }

  function stop() {
    if (timer !== null) clearInterval(timer);
    timer = null;
    again.textContent = "Write 60 more";
  }

  // Likeliest first.
  function ranked(index) {
    return table[index].map((_, i) => i).sort((a, b) => table[index][b] - table[index][a] || a - b);
  }

  function show() {
    const index = looked ?? row;
    const last = looked === null ? drawn : null;
    const plain = probabilitiesOf(table[index], 1);
    const p = probabilitiesOf(table[index], temperature);
    const order = ranked(index).filter((token) => table[index][token] > 0);
    degrees.textContent = decimals(temperature, temperature < 1 ? 2 : 1);
    slider.setAttribute("aria-valuetext", degrees.textContent);
    markChip(row);
    showBars(order, p, plain, last);
    showLine(order, p, last);
    showText();
    say(index, order, p, last);
    drawMap();
  }

  function say(index, order, p, last) {
    const sum = table[index].reduce((a, b) => a + b, 0);
    if (sum === 0) {
      status.textContent = `Nothing ever followed ${spoken(tokens[index])}: there is nothing to draw.`;
      return;
    }
    const pairs = data.counted ? ` (${whole(sum)} pairs)` : "";
    const best = order.slice(0, 3).map((token) => `${visible(tokens[token])} ${percent(p[token])}`).join(", ");
    let words = `After ${visible(tokens[index])}${pairs}, likeliest first: ${best}.`;
    if (last !== null) {
      words = `Drawn after ${visible(tokens[index])}: u = ${last.u.toFixed(3)} falls on ${visible(tokens[last.token])}, `
        + `which has ${percent(p[last.token])} of the line.`;
    }
    status.textContent = words;
  }

  function showBars(order, p, plain, last) {
    const top = order.slice(0, SHOWN);
    if (last !== null && !top.includes(last.token)) top[top.length - 1] = last.token;
    const longest = Math.max(0.05, ...top.map((token) => Math.max(p[token], plain[token])));
    bars.replaceChildren();
    for (const token of top) {
      const parts = bar(visible(tokens[token]), spoken(tokens[token]), p[token], longest, temperature === 1 ? null : plain[token]);
      bars.append(make("div", { class: last?.token === token ? "row drawn" : "row" }, ...parts));
    }
    const others = order.filter((token) => !top.includes(token));
    const rest = others.reduce((sum, token) => sum + p[token], 0);
    const words = `${others.length} other characters together ${percent(rest)}, `
      + `${tokens.length - order.length} never`;
    bars.append(make("p", { class: "soft row wide" }, words));
  }

  // The probabilities laid end to end from 0 to 1, likeliest first, and where u fell.
  function showLine(order, p, last) {
    line.replaceChildren();
    let start = 0;
    order.forEach((token, i) => {
      const part = make("span", { class: `part tint${i % 4}` });
      part.style.left = `${100 * start}%`;
      part.style.width = `${100 * p[token]}%`;
      if (p[token] > 0.035) part.append(visible(tokens[token]));
      if (last?.token === token) part.classList.add("drawn");
      line.append(part);
      start += p[token];
    });
    if (last !== null) {
      const pointer = make("span", { class: "pointer" }, "▼");
      pointer.style.left = `${100 * last.u}%`;
      line.append(pointer);
    }
  }

  function showText() {
    const before = text.slice(0, -1).map((token) => tokens[token]).join("");
    const end = tokens[text[text.length - 1]];
    written.replaceChildren(before, make("mark", {}, end === "\n" ? "⏎\n" : end === " " ? "␣" : end));
    written.scrollTop = written.scrollHeight;
  }

  function drawMap() {
    const n = tokens.length;
    const side = Math.min(map.parentElement.clientWidth - 2, 560);
    const named = side / (n + LABELS) >= 7;
    const cell = side / (n + (named ? LABELS : 0));
    const edge = side - n * cell;
    const context = canvasOf(map, side, side);
    const here = looked ?? row;
    const size = Math.min(13, cell * 1.3);
    context.font = `${size}px ui-monospace, Menlo, Consolas, monospace`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillStyle = colour("blue");
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        if (table[i][j] === 0) continue;
        context.globalAlpha = data.counted
          ? 0.06 + 0.94 * (Math.log1p(table[i][j]) / Math.log1p(largest))
          : 0.03 + 0.97 * Math.sqrt(table[i][j] / largest);
        context.fillRect(edge + j * cell, edge + i * cell, cell, cell);
      }
    }
    context.globalAlpha = 1;
    for (let i = 0; named && i < n; i++) {
      const middle = edge + (i + 0.5) * cell;
      const away = edge - (i % 2 === 0 ? 0.7 : 1.85) * cell; // in two rows, so that none lies on its neighbour
      context.fillStyle = colour(i === here ? "orange" : "soft");
      context.fillText(visible(tokens[i]), away, middle);
      context.fillStyle = colour(i === under?.column ? "orange" : "soft");
      context.fillText(visible(tokens[i]), middle, away);
    }
    context.strokeStyle = colour("orange");
    context.lineWidth = 2;
    context.strokeRect(edge, edge + here * cell - 1, n * cell - 1, cell + 2);
    if (under !== null) context.strokeRect(edge + under.column * cell - 1, edge + here * cell - 1, cell + 2, cell + 2);
    grid = { cell, edge };
    cellWords.textContent = under === null
      ? "Down: the present character. Across: the next. The stronger the colour, the more often; empty: never."
      : `${visible(tokens[under.row])} then ${visible(tokens[under.column])}: ${howOften(under)}`;
  }

  function howOften({ row: i, column: j }) {
    const sum = table[i].reduce((a, b) => a + b, 0);
    if (table[i][j] === 0) return "never";
    const share = percent(table[i][j] / sum);
    return data.counted ? `${whole(table[i][j])} times, ${share} of its row` : share;
  }

  function cellAt(event) {
    const place = (offset) => Math.floor((offset - grid.edge) / grid.cell);
    const [i, j] = [place(event.offsetY), place(event.offsetX)];
    const inside = i >= 0 && j >= 0 && i < tokens.length && j < tokens.length;
    return inside ? { row: i, column: j } : null;
  }

  function look(index) {
    if (timer !== null || looked === index) {
      drawMap();
      return;
    }
    looked = index;
    show();
  }

  map.addEventListener("pointermove", (event) => {
    under = timer === null ? cellAt(event) : null;
    look(under === null ? null : under.row);
  });
  map.addEventListener("pointerleave", () => {
    under = null;
    look(null);
  });
  map.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell === null) return;
    looked = null;
    choose(cell.row);
  });
  const markChip = choices(list, chips, choose, () => perRow(chips));
  list.addEventListener("keydown", (event) => {
    const index = tokens.indexOf(event.key);
    if (index >= 0 && !event.ctrlKey && !event.metaKey && !event.altKey) chips[index].focus();
  });
  chips.forEach((chip, i) => {
    chip.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && look(i));
    chip.addEventListener("pointerleave", () => look(null));
  });

  const controls = make("div", { class: "controls" },
    button("Draw the next", step, { class: "first" }), again, button("Begin again", () => choose(data.start)));
  const warmth = make("div", { class: "controls" },
    make("label", { for: "temperature" }, "Temperature"), slider, degrees);
  root.append(make("div", { class: "columns" },
    make("section", { "aria-label": "The table" }, map, cellWords, make("h3", {}, "The present character"), list),
    make("section", { "aria-label": "Drawing" }, status, bars, line, warmth, controls, written)));
  show();
  return drawMap;
});

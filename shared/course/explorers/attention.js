"use strict";
// The attention of a phrase: choose a head, a token that looks and one that is looked at; the arithmetic of their
// weight opens below.

const LISTED = 8; // bars of what a token looks at
const TERMS = 16; // products that are written out

// One head of a layer: query i and key j as arrays, and what follows from them.
class Head {
  constructor(layer, head, time) {
    const shared = layer.heads / layer.kv_heads; // query heads for each head of keys
    const size = time * layer.head_dim;
    this.layer = layer;
    this.time = time;
    this.dim = layer.head_dim;
    this.q = layer.queries.subarray(head * size, (head + 1) * size);
    const of = Math.floor(head / shared);
    this.k = layer.keys.subarray(of * size, (of + 1) * size);
    this.rows = Array.from({ length: time }, (_, i) => this.softmaxOf(i));
  }

  query(i) {
    return this.q.subarray(i * this.dim, (i + 1) * this.dim);
  }

  key(j) {
    return this.k.subarray(j * this.dim, (j + 1) * this.dim);
  }

  product(i, j) {
    const [q, k] = [this.query(i), this.key(j)];
    return q.reduce((sum, number, place) => sum + number * k[place], 0);
  }

  score(i, j) {
    const { scale, softcap } = this.layer;
    const score = scale === null ? this.product(i, j) / Math.sqrt(this.dim) : this.product(i, j) * scale;
    return softcap === null ? score : softcap * Math.tanh(score / softcap);
  }

  // The mask: no position sees what comes later, nor what lies before its window.
  sees(i, j) {
    return j <= i && (this.layer.window === null || j > i - this.layer.window);
  }

  // A row: the scores of the keys in sight, what is taken from each so that e to it stays small, the sum, the weights.
  softmaxOf(i) {
    const scores = Array.from({ length: this.time }, (_, j) => (this.sees(i, j) ? this.score(i, j) : null));
    const seen = scores.filter((score) => score !== null);
    const largest = Math.max(...seen);
    const shift = Math.max(...seen.map(Math.abs)) > 20 ? largest : 0;
    const powers = scores.map((score) => (score === null ? 0 : Math.exp(score - shift)));
    const sum = powers.reduce((a, b) => a + b, 0);
    return { scores, shift, powers, sum, weights: powers.map((power) => power / sum) };
  }
}

explore((root, data) => {
  const { tokens } = data;
  const time = tokens.length;
  const heads = [];
  for (const layer of data.layers) {
    layer.queries = numbersOf(layer.q);
    layer.keys = numbersOf(layer.k);
    for (let head = 0; head < layer.heads; head++) {
      heads.push({ name: `Layer ${layer.number}, head ${head + 1}`, head: new Head(layer, head, time) });
    }
  }
  let chosen = 0;
  let query = time - 1;
  let key = likeliest(query);
  let looked = null; // the query that is hovered over
  let grid = { cell: 1, edge: 0 };

  const across = data.layers[0].heads;
  const thumbnails = heads.map(({ name }) => {
    const canvas = make("canvas", { "aria-hidden": "true" });
    return make("span", { class: "thumbnail", role: "radio", "aria-label": name, title: name }, canvas);
  });
  const picker = make("div", { class: "picker", role: "radiogroup", "aria-label": "Layer and head" }, ...thumbnails);
  picker.style.setProperty("--across", across);
  const chips = tokens.map((token, i) =>
    make("span", { class: "chip", role: "option", "aria-label": `${spoken(token)}, position ${i + 1}` }, visible(token)),
  );
  const phrase = make("div", { class: "chips phrase", role: "listbox", "aria-label": "The token that looks" });
  chips.forEach((chip, i) => {
    phrase.append(chip);
    if (tokens[i].endsWith("\n")) phrase.append(make("span", { class: "break", role: "presentation" }));
  });
  const status = make("p", { class: "status", role: "status" });
  const map = make("canvas", { class: "map", "aria-hidden": "true" });
  const mapTitle = make("h3", {});
  const bars = make("div", { class: "bars", role: "group", "aria-label": "What it looks at" });
  const sums = make("section", { class: "sums", "aria-label": "The arithmetic of one weight" });

  function head() {
    return heads[chosen].head;
  }

  function likeliest(i) {
    const { weights } = head().rows[i];
    return weights.indexOf(Math.max(...weights));
  }

  function quoted(i) {
    return `‹${visible(tokens[i])}›`;
  }

  function choose(i, j = null) {
    query = i;
    looked = null;
    key = j ?? likeliest(i);
    show();
  }

  function show() {
    markHead(chosen);
    markToken(query);
    showRow();
    showSums();
    drawMap();
  }

  // What the token that is chosen, or hovered over, looks at.
  function showRow() {
    const i = looked ?? query;
    const { weights } = head().rows[i];
    chips.forEach((chip, j) => {
      const share = Math.round(88 * weights[j]);
      chip.style.background = `color-mix(in srgb, var(--blue) ${share}%, var(--paper))`;
      chip.style.color = weights[j] > 0.55 ? "var(--on-blue)" : "";
      chip.classList.toggle("hidden", !head().sees(i, j));
      chip.classList.toggle("looks", j === i);
    });
    const order = weights.map((_, j) => j).filter((j) => head().sees(i, j));
    order.sort((a, b) => weights[b] - weights[a] || b - a);
    const best = order.slice(0, 3).map((j) => `${quoted(j)} (position ${j + 1}) ${percent(weights[j])}`);
    status.textContent = `${heads[chosen].name}: ${quoted(i)} (position ${i + 1}) looks at ${best.join(", ")}.`;
    const focused = bars.contains(document.activeElement);
    bars.replaceChildren();
    for (const j of order.slice(0, LISTED)) {
      const distance = i === j ? "itself" : `${i - j} back`;
      const name = `${spoken(tokens[j])}, position ${j + 1}, ${percent(weights[j])}: open the arithmetic`;
      const parts = bar(visible(tokens[j]), null, weights[j], 1);
      const line = make("button", {
        type: "button", class: "row", "aria-label": name, "aria-pressed": String(j === key && i === query),
        onclick: () => choose(i, j),
      }, ...parts.slice(0, 1), make("span", { class: "soft" }, distance), ...parts.slice(1));
      bars.append(line);
      if (focused && j === key) line.focus();
    }
    if (order.length > LISTED) {
      const rest = order.slice(LISTED).reduce((sum, j) => sum + weights[j], 0);
      bars.append(make("p", { class: "soft row wide" }, `the other ${order.length - LISTED} together ${percent(rest)}`));
    }
  }

  function showSums() {
    const at = head();
    const row = at.rows[query];
    sums.replaceChildren(make("h3", {}, `The arithmetic: ${quoted(query)} looks at ${quoted(key)}`));
    if (!at.sees(query, key)) {
      const why = key > query
        ? `${quoted(key)} comes later: the mask hides it. Its score is −∞, and its weight exactly 0.`
        : `${quoted(key)} lies before the window of ${at.layer.window}: the mask hides it, and its weight is exactly 0.`;
      sums.append(make("p", {}, why));
      return;
    }
    sums.append(...productOf(at), ...scoreOf(at, row), ...softmaxLines(row));
  }

  // q · k, number by number; of long vectors only the largest products.
  function productOf(at) {
    const [q, k] = [at.query(query), at.key(key)];
    const places = Array.from(q, (_, place) => place);
    let written = places;
    if (places.length > TERMS) {
      written = [...places].sort((a, b) => Math.abs(q[b] * k[b]) - Math.abs(q[a] * k[a])).slice(0, TERMS);
      written.sort((a, b) => a - b);
    }
    const largest = Math.max(...places.map((place) => Math.abs(q[place] * k[place])), 1e-12);
    const rows = written.map((place) => {
      const product = q[place] * k[place];
      const cell = make("td", { class: product < 0 ? "signed minus" : "signed" }, decimals(product));
      cell.style.setProperty("--part", `${(100 * Math.abs(product)) / largest}%`);
      return make("tr", {}, ...[String(place + 1), decimals(q[place]), decimals(k[place])].map((t) => make("td", {}, t)), cell);
    });
    const rest = places.filter((place) => !written.includes(place)).reduce((sum, place) => sum + q[place] * k[place], 0);
    const lines = [];
    if (written.length < places.length) lines.push(total(`the other ${places.length - written.length}`, rest, ""));
    lines.push(total("q · k", at.product(query, key), "total"));
    const titles = ["", `q of ${quoted(query)}`, `k of ${quoted(key)}`, "product"].map((t) => make("th", { scope: "col" }, t));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows, ...lines));
    const words = `1. The dot product of query and key: ${at.dim} products, added up.`;
    return [make("p", { class: "step" }, words), make("div", { class: "scroll" }, table)];
  }

  function total(words, number, kind) {
    return make("tr", { class: kind }, make("td", { colspan: "3" }, words), make("td", {}, decimals(number)));
  }

  function scoreOf(at, row) {
    const { scale, softcap } = at.layer;
    const product = decimals(at.product(query, key));
    const divided = scale === null ? `${product} / √${at.dim}` : `${product} · ${scale}`;
    const capped = softcap === null ? divided : `${softcap} · tanh(${divided} / ${softcap})`;
    return [
      make("p", { class: "step" }, scale === null ? "2. Divided by the root of their length, the score:" : "2. Scaled, the score:"),
      make("p", { class: "formula" }, `${capped} = `, make("strong", { class: "score" }, decimals(row.scores[key]))),
    ];
  }

  function softmaxLines(row) {
    const count = row.scores.filter((score) => score !== null).length;
    const shifted = row.shift === 0 ? "" : `, with ${decimals(row.shift)} (the row's largest score) taken from each`;
    const power = row.shift === 0 ? decimals(row.scores[key]) : `${decimals(row.scores[key])} − ${decimals(row.shift)}`;
    const [e, sum] = [decimals(row.powers[key], 4), decimals(row.sum, 4)];
    return [
      make("p", { class: "step" }, `3. The softmax, over the ${count} positions in sight${shifted}:`),
      make("p", { class: "formula" }, "e", make("sup", {}, power), ` / Σ = ${e} / ${sum} = `,
        make("strong", { class: "weight" }, decimals(row.weights[key], 4)), ` = ${percent(row.weights[key])}`),
    ];
  }

  function paint(context, cell, edge, at) {
    context.fillStyle = colour("blue");
    for (let i = 0; i < time; i++) {
      for (let j = 0; j <= i; j++) {
        context.globalAlpha = Math.sqrt(at.rows[i].weights[j]);
        context.fillRect(edge + j * cell, edge + i * cell, cell, cell);
      }
    }
    context.globalAlpha = 1;
  }

  function drawThumbnails() {
    thumbnails.forEach((thumbnail, index) => {
      const context = canvasOf(thumbnail.firstChild, 42, 42);
      paint(context, 42 / time, 0, heads[index].head);
    });
  }

  function drawMap() {
    const side = Math.min(map.parentElement.clientWidth - 2, 520);
    const named = side / (time + 1.6) >= 9 && Math.max(...tokens.map((token) => [...token].length)) <= 2;
    const cell = side / (time + (named ? 1.6 : 0));
    const edge = side - time * cell;
    const here = looked ?? query;
    grid = { cell, edge };
    mapTitle.textContent = heads[chosen].name;
    const context = canvasOf(map, side, side);
    paint(context, cell, edge, head());
    context.font = `${Math.min(13, 0.85 * cell)}px ui-monospace, Menlo, Consolas, monospace`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let i = 0; named && i < time; i++) {
      const middle = edge + (i + 0.5) * cell;
      context.fillStyle = colour(i === here ? "orange" : "soft");
      context.fillText(visible(tokens[i]), edge / 2, middle);
      context.fillStyle = colour(i === key ? "orange" : "soft");
      context.fillText(visible(tokens[i]), middle, edge / 2);
    }
    context.strokeStyle = colour("orange");
    context.lineWidth = 1.5;
    context.strokeRect(edge + 1, edge + here * cell, (here + 1) * cell - 1, cell);
    if (looked === null) {
      context.lineWidth = 3;
      context.strokeRect(edge + key * cell, edge + query * cell, cell, cell);
    }
  }

  function redraw() {
    drawThumbnails();
    drawMap();
  }

  function cellAt(event) {
    const [i, j] = [event.offsetY, event.offsetX].map((offset) => Math.floor((offset - grid.edge) / grid.cell));
    return i >= 0 && j >= 0 && i < time && j < time ? [i, j] : null;
  }

  function look(i) {
    if (looked === i) return;
    looked = i === query ? null : i;
    showRow();
    drawMap();
  }

  map.addEventListener("pointermove", (event) => look(cellAt(event)?.[0] ?? null));
  map.addEventListener("pointerleave", () => look(null));
  map.addEventListener("click", (event) => {
    const cell = cellAt(event);
    if (cell !== null) choose(...cell);
  });
  chips.forEach((chip, i) => {
    chip.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && look(i));
    chip.addEventListener("pointerleave", () => look(null));
  });
  const markHead = choices(picker, thumbnails, (index) => {
    chosen = index;
    key = likeliest(query);
    show();
  }, () => across);
  const markToken = choices(phrase, chips, (i) => choose(i), () => perRow(chips));

  root.append(
    make("p", { class: "soft" }, "Choose a head (layers down, heads across), then a token. It looks at what takes on colour: the stronger, the more weight."),
    picker, phrase, status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "All weights of the head" }, mapTitle, map,
        make("p", { class: "soft" }, "Down: the token that looks. Across: what it looks at."),
        make("h3", {}, "The most weight is on"), bars),
      sums));
  redraw();
  show();
  return redraw;
});

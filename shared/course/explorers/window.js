"use strict";
// A window MLP: move the window, choose a place in it, put another character there, see what that changes.

const SHOWN = 6; // bars of what is likeliest
const BEFORE = 3; // and of what was likeliest with the text's own character
const NEAREST = 5;
const RADIUS = 11; // of a character on the map, in pixels

// A matrix that `_in_steps` has packed: its rows as arrays.
function matrixOf({ rows, steps, numbers }) {
  const bytes = Uint8Array.from(atob(numbers), (c) => c.charCodeAt(0));
  const whole = new Int16Array(bytes.buffer);
  const columns = whole.length / rows;
  const sizes = numbersOf(steps);
  return Array.from(sizes, (size, i) => Float64Array.from(whole.subarray(i * columns, (i + 1) * columns), (n) => n * size));
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

// The network, computed as PyTorch does: embeddings joined, a tanh layer, logits.
class Network {
  constructor(matrices) {
    const read = Object.fromEntries(Object.entries(matrices).map(([name, packed]) => [name, matrixOf(packed)]));
    Object.assign(this, read);
    this.window = this.places.length;
    this.channels = this.places[0].length;
    this.padding = this.tokens.length - 1;
  }

  // The vector of a token in a place: its embedding and the place's.
  vector(token, place) {
    return this.tokens[token].map((number, i) => number + this.places[place][i]);
  }

  // What a vector in a place adds to each neuron's sum.
  through(vector, place) {
    const from = place * this.channels;
    return this.hidden.map((row) => dot(row.subarray(from, from + this.channels), vector));
  }

  // The sums of all neurons, without what `except` puts in.
  sums(tokens, except = null) {
    const total = Float64Array.from(this.hidden_bias[0]);
    tokens.forEach((token, place) => {
      if (place !== except) this.through(this.vector(token, place), place).forEach((number, i) => { total[i] += number; });
    });
    return total;
  }

  activations(tokens) {
    return this.sums(tokens).map(Math.tanh);
  }

  probabilities(activations) {
    const logits = this.head.map((row, i) => dot(row, activations) + this.head_bias[0][i]);
    const largest = Math.max(...logits);
    const powers = logits.map((logit) => Math.exp(logit - largest));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  // For each token: how far the prediction moves when it takes this place (total variation, 0 to 1).
  changes(tokens, place) {
    const now = this.probabilities(this.activations(tokens));
    const others = this.sums(tokens, place);
    return this.head.map((_, token) => {
      const added = this.through(this.vector(token, place), place);
      return variation(now, this.probabilities(others.map((sum, i) => Math.tanh(sum + added[i]))));
    });
  }

  // The tokens' vectors: as in the table, or as the hidden layer sees them in a place.
  space(place) {
    return place === null ? this.tokens : this.tokens.map((vector) => Float64Array.from(this.through(vector, place)));
  }
}

function variation(p, q) {
  return p.reduce((sum, share, i) => sum + Math.abs(share - q[i]), 0) / 2;
}

// Of a token: how alike its direction is to that of each mapped one, seen from their mean; the most alike first.
function neighbours(space, mapped, token) {
  const mean = space[0].map((_, i) => mapped.reduce((sum, other) => sum + space[other][i], 0) / mapped.length);
  const from = (other) => space[other].map((number, i) => number - mean[i]);
  const own = from(token);
  const alike = mapped.filter((other) => other !== token).map((other) => {
    const vector = from(other);
    return { token: other, cosine: dot(own, vector) / Math.sqrt(Math.max(dot(own, own) * dot(vector, vector), 1e-30)) };
  });
  return alike.sort((a, b) => b.cosine - a.cosine);
}

// Points, moved so that none lies on another.
function apart(points, least) {
  const placed = points.map((point) => [...point]);
  for (let round = 0; round < 200; round++) {
    for (let i = 0; i < placed.length; i++) {
      for (let j = 0; j < i; j++) {
        const [x, y] = [placed[i][0] - placed[j][0], placed[i][1] - placed[j][1]];
        const distance = Math.max(Math.hypot(x, y), 1e-6);
        const push = Math.max(0, least - distance) / distance / 2;
        placed[i][0] += push * x; placed[i][1] += push * y;
        placed[j][0] -= push * x; placed[j][1] -= push * y;
      }
    }
  }
  return placed;
}

explore((root, data) => {
  const { text, vocabulary, mapped } = data;
  const network = new Network(data.matrices);
  const maps = numbersOf(data.maps);
  let end = text.length - 1; // the window's last position
  let place = network.window - 1; // the chosen one of its places
  let other = null; // the token that stands there in place of the text's
  let table = false; // the map: the table, or as the hidden layer sees it
  let state = null; // what follows from these
  let spots = []; // of the map, in pixels

  function nameOf(token) {
    return token === network.padding ? "·" : visible(vocabulary[token]);
  }

  function spokenName(token) {
    return token === network.padding ? "nothing, before the text" : spoken(vocabulary[token]);
  }

  const chips = text.map((token, i) =>
    make("span", { class: "chip", role: "option", "aria-label": `${spokenName(token)}, position ${i + 1}` }, nameOf(token)));
  const phrase = make("div", { class: "chips phrase", role: "listbox", "aria-label": "Where the window ends" }, ...chips);
  const slots = Array.from({ length: network.window }, () => make("span", { class: "slot", role: "radio" }));
  const row = make("div", { class: "slots", role: "radiogroup", "aria-label": "A place in the window" }, ...slots);
  row.style.setProperty("--across", network.window);
  const [joined, layer] = [0, 1].map(() => make("canvas", { class: "strip", "aria-hidden": "true" }));
  const status = make("p", { class: "status", role: "status" });
  const map = make("canvas", { class: "map", "aria-hidden": "true" });
  const bars = make("div", { class: "bars" });
  const near = make("div", { class: "bars", role: "group", "aria-label": "The most alike" });
  const nearTitle = make("h3", {});
  const keys = vocabulary.map((token) => make("span", { class: "chip", role: "option", "aria-label": spoken(token) }, visible(token)));
  const keyboard = make("div", { class: "chips", role: "listbox", "aria-label": "The character in this place" }, ...keys);
  const space = make("select", { id: "space", onchange: () => { table = space.value === "table"; show(); } },
    make("option", { value: "seen" }, "as the hidden layer sees them in this place"), make("option", { value: "table" }, "of the embedding table itself"));
  const back = button("Put it back", () => put(null));

  // The window in the text, and as it is with the other character.
  function windowAt() {
    const given = slots.map((_, i) => text[end - network.window + 1 + i] ?? network.padding);
    return { given, tokens: given.map((token, i) => (i === place && other !== null ? other : token)) };
  }

  function settled() {
    const { given, tokens } = windowAt();
    const own = given[place];
    const before = network.probabilities(network.activations(given));
    const activations = network.activations(tokens);
    state = {
      given, tokens, own, before, activations, now: network.probabilities(activations),
      changes: network.changes(given, place),
    };
    show();
  }

  function put(token) {
    other = token === windowAt().given[place] ? null : token;
    settled();
  }

  function show() {
    markEnd(end);
    markPlace(place);
    markKey(state.tokens[place] === network.padding ? 0 : state.tokens[place]);
    back.disabled = other === null;
    chips.forEach((chip, i) => chip.classList.toggle("within", i <= end && i > end - network.window));
    slots.forEach((slot, i) => {
      slot.textContent = nameOf(state.tokens[i]);
      slot.classList.toggle("swapped", i === place && other !== null);
      slot.setAttribute("aria-label", `${spokenName(state.tokens[i])}, place ${i + 1} of ${network.window}`);
    });
    say();
    showBars();
    showNear();
    drawStrips();
    drawMap();
  }

  function say() {
    const order = ranked(state.now).slice(0, 3).map((i) => `${nameOf(i)} ${percent(state.now[i])}`).join(", ");
    let words = `After ‹${state.tokens.map(nameOf).join("")}› the likeliest are ${order}.`;
    if (other !== null) {
      words += ` With ${nameOf(other)} in place of ${nameOf(state.own)} the prediction has moved by ${decimals(state.changes[other], 2)}.`;
    }
    status.textContent = words;
  }

  function ranked(p) {
    return p.map((_, i) => i).sort((a, b) => p[b] - p[a] || a - b);
  }

  function showBars() {
    const likeliest = new Set([...ranked(state.now).slice(0, SHOWN), ...ranked(state.before).slice(0, BEFORE)]);
    const top = ranked(state.now).filter((i) => likeliest.has(i));
    const longest = Math.max(0.05, ...top.map((i) => Math.max(state.now[i], state.before[i])));
    bars.replaceChildren(...top.map((i) => make("div", { class: "row" },
      ...bar(nameOf(i), spokenName(i), state.now[i], longest, other === null ? null : state.before[i]))));
  }

  // The characters most alike to the one in the text, the least alike, and what each would change.
  function showNear() {
    const found = neighbours(network.space(table ? null : place), mapped, state.own);
    state.nearest = found.slice(0, 3).map(({ token }) => token);
    nearTitle.textContent = `Most and least like ${nameOf(state.own)}, and how far each would move the prediction`;
    const focused = near.contains(document.activeElement) ? document.activeElement.dataset.token : null;
    near.replaceChildren(...[...found.slice(0, NEAREST), found.at(-1)].map(({ token, cosine }) => {
      const [label, track] = bar(nameOf(token), null, state.changes[token], 1);
      const moved = decimals(state.changes[token], 2);
      const name = `${spokenName(token)}: cosine ${decimals(cosine, 2)}, moves the prediction by ${moved}: put it there`;
      return make("button", {
        type: "button", class: "row", "aria-label": name, "aria-pressed": String(token === other), "data-token": token, onclick: () => put(token),
      }, label, make("span", { class: "soft" }, `cosine ${decimals(cosine, 2)}`), track, make("span", { class: "share" }, moved));
    }));
    if (focused !== null) near.querySelector(`[data-token="${focused}"]`)?.focus();
  }

  // Numbers as cells: blue above 0, orange below, the stronger the larger.
  function cells(context, numbers, [left, wide], height, largest) {
    const width = wide / numbers.length;
    numbers.forEach((number, i) => {
      context.fillStyle = colour(number < 0 ? "orange" : "blue");
      context.globalAlpha = Math.min(1, Math.abs(number) / largest);
      context.fillRect(left + i * width, 0, width, height);
    });
    context.globalAlpha = 1;
  }

  function drawStrips() {
    const width = row.clientWidth;
    const wide = width / network.window;
    const context = canvasOf(joined, width, 26);
    state.tokens.forEach((token, i) => cells(context, network.vector(token, i), [i * wide + 2, wide - 4], 26, 2.5));
    context.strokeStyle = colour("orange");
    context.lineWidth = 2;
    context.strokeRect(place * wide + 1, 1, wide - 2, 24);
    cells(canvasOf(layer, width, 18), state.activations, [2, width - 4], 18, 1);
  }

  function drawMap() {
    const width = Math.min(map.parentElement.clientWidth - 2, 520);
    const height = Math.round(0.8 * width);
    const context = canvasOf(map, width, height);
    const index = table ? 0 : place + 1;
    const at = mapped.map((_, i) => [0, 1].map((axis) => maps[2 * (index * mapped.length + i) + axis]));
    const points = at.map(([x, y]) => [(x + 1) / 2 * (width - 60) + 30, (1 - y) / 2 * (height - 60) + 30]);
    spots = apart(points, 2 * RADIUS + 1);
    const of = (token) => spots[mapped.indexOf(token)];
    context.strokeStyle = colour("soft");
    context.lineWidth = 1.5;
    for (const token of mapped.includes(state.own) ? state.nearest : []) {
      context.beginPath();
      context.moveTo(...of(state.own));
      context.lineTo(...of(token));
      context.stroke();
    }
    context.font = "14px ui-monospace, Menlo, Consolas, monospace";
    context.textAlign = "center";
    context.textBaseline = "middle";
    const most = Math.max(...mapped.map((token) => state.changes[token]), 0.01);
    mapped.forEach((token, i) => {
      const strength = state.changes[token] / most;
      const circle = (style, alpha) => {
        context.beginPath();
        context.arc(...spots[i], RADIUS, 0, 2 * Math.PI);
        context.globalAlpha = alpha;
        context.fillStyle = colour(style);
        context.fill();
        context.globalAlpha = 1;
      };
      circle("paper", 1);
      circle("blue", 0.05 + 0.95 * strength);
      if (token === state.own || token === other) {
        context.strokeStyle = colour(token === other ? "orange" : "ink");
        context.lineWidth = 3;
        context.stroke();
      }
      context.fillStyle = colour(strength > 0.55 ? "on-blue" : "ink");
      context.fillText(nameOf(token), ...spots[i]);
    });
  }

  map.addEventListener("click", (event) => {
    const distances = spots.map(([x, y]) => Math.hypot(event.offsetX - x, event.offsetY - y));
    const closest = distances.indexOf(Math.min(...distances));
    if (distances[closest] < 2 * RADIUS) put(mapped[closest]);
  });
  const markEnd = choices(phrase, chips, (i) => {
    if (i !== end) other = null;
    end = i;
    settled();
  }, () => perRow(chips));
  const markPlace = choices(row, slots, (i) => {
    if (i !== place) other = null;
    place = i;
    settled();
  });
  const markKey = choices(keyboard, keys, put, () => perRow(keys));
  row.addEventListener("keydown", (event) => {
    const token = vocabulary.indexOf(event.key);
    if (token >= 0 && !event.ctrlKey && !event.metaKey && !event.altKey) {
      put(token);
      event.preventDefault();
    }
  });

  root.append(
    make("p", { class: "soft" }, "Choose where the window ends."), phrase,
    make("p", { class: "soft" }, `The window: choose a place, and type another character into it. Below each character its vector (${network.channels} numbers; blue: above 0, orange: below).`),
    row, joined,
    make("p", { class: "soft" }, `Joined, they are one vector of ${network.window * network.channels} numbers. From it the hidden layer makes ${network.hidden.length}:`),
    layer, status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "The map" },
        make("div", { class: "controls" }, make("label", { for: "space" }, "The vectors"), space), map,
        make("p", { class: "soft" }, "The stronger the blue, the further the prediction moves when that character takes the place. Dark ring: it stands in the text; lines: the three most like it, in all directions, not only these two.")),
      make("section", { "aria-label": "The prediction" },
        make("h3", {}, "What comes next; line: with the text's own character"), bars, nearTitle, near)),
    make("h3", {}, "The character in this place"), keyboard, make("div", { class: "controls" }, back));
  settled();
  return show;
});

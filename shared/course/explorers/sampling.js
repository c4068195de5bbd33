"use strict";
// From a distribution to a token: temperature, top-k and top-p, what they cut, and a draw from what is left.

const SHOWN = 12; // bars
const VISIBLE_PART = 0.0008; // parts of a line that are shorter are drawn as one
const STEPS = [...Array.from({ length: 20 }, (_, i) => i + 1), 25, 30, 40, 50, 65, 80, 100, 150, 200, 300, 500, 750, 1000, 1500];

function softmax(scores) {
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

// The tokens, likeliest first, their probabilities at the temperature, and those that they are drawn with: 0 is cut.
// topK, topP: null cuts nothing. As `distribution` in shared/sampling/generate.py.
function distributionOf(logits, temperature, topK, topP) {
  const order = Array.from(logits, (_, i) => i).sort((a, b) => logits[b] - logits[a] || a - b);
  const scores = order.map((i) => logits[i] / temperature);
  const warmed = softmax(scores);
  let kept = scores.length;
  if (topK !== null && topK < kept) kept = scores.filter((score) => score >= scores[topK - 1]).length;
  if (topP !== null) {
    const among = softmax(scores.slice(0, kept));
    let before = 0;
    let left = 0;
    while (left < kept && (left === 0 || before < topP)) before += among[left++];
    kept = left;
  }
  const drawn = softmax(scores.slice(0, kept));
  return { order, warmed, kept, drawn };
}

explore((root, data) => {
  const { tokens, vocabulary } = data;
  const size = vocabulary.length;
  const numbers = numbersOf(data.logits);
  const rows = tokens.map((_, i) => numbers.subarray(i * size, (i + 1) * size));
  const ks = [...STEPS.filter((k) => k < size), null];
  const uniform = randomNumbers(data.seed);
  let position = data.start;
  let temperature = 1;
  let topK = null;
  let topP = null;
  let last = null; // { rank, u }: the last draw
  let counts = new Map(); // of the draws with these settings, by rank
  let all = []; // the distribution at each position

  const chips = tokens.map(() => make("span", { class: "chip left", role: "option" }));
  const phrase = make("div", { class: "chips phrase", role: "listbox", "aria-label": "What has been read, up to" });
  chips.forEach((chip, i) => {
    phrase.append(chip);
    if (tokens[i].endsWith("\n")) phrase.append(make("span", { class: "break", role: "presentation" }));
  });
  const status = make("p", { class: "status", role: "status" });
  const bars = make("div", { class: "bars counted" });
  const [warm, drawnFrom] = [0, 1].map(() => make("div", { class: "line", "aria-hidden": "true" }));
  const tally = make("p", { class: "soft" });

  function slider(id, label, attributes, set) {
    const shown = make("output", { class: "number", for: id });
    const input = make("input", { type: "range", id, ...attributes, oninput: change });
    function change() {
      shown.textContent = set(Number(input.value));
      input.setAttribute("aria-valuetext", shown.textContent);
      settled();
    }
    shown.textContent = set(Number(input.value));
    input.setAttribute("aria-valuetext", shown.textContent);
    return [make("label", { for: id }, label), input, shown];
  }

  const controls = make("div", { class: "dials" },
    ...slider("temperature", "Temperature", { min: "-1", max: "0.6", step: "0.02", value: "0" }, (exponent) => {
      temperature = 10 ** exponent;
      return decimals(temperature, 2);
    }),
    ...slider("top-k", "Top-k", { min: "0", max: String(ks.length - 1), value: String(ks.length - 1) }, (step) => {
      topK = ks[step];
      return topK === null ? "off" : String(topK);
    }),
    ...slider("top-p", "Top-p", { min: "0.05", max: "1", step: "0.01", value: "1" }, (share) => {
      topP = share >= 1 ? null : share;
      return topP === null ? "off" : decimals(topP, 2);
    }));

  function quoted(token) {
    return `‹${visible(token)}›`;
  }

  // After a change of the settings or of the position: what was drawn before was drawn from something else.
  function settled() {
    last = null;
    counts = new Map();
    all = rows.map((row) => distributionOf(row, temperature, topK, topP));
    show();
  }

  function draw(times) {
    const { drawn } = all[position];
    for (let n = 0; n < times; n++) {
      const u = uniform();
      let end = 0;
      let rank = 0;
      while (rank < drawn.length - 1 && u >= (end += drawn[rank])) rank++;
      last = { rank, u };
      counts.set(rank, (counts.get(rank) ?? 0) + 1);
    }
    show();
  }

  function show() {
    mark(position);
    chips.forEach((chip, i) => {
      chip.replaceChildren(visible(tokens[i]), make("small", {}, String(all[i].kept)));
      chip.setAttribute("aria-label", `${spoken(tokens[i])}, position ${i + 1}, ${all[i].kept} left`);
    });
    say();
    showBars();
    showLine(warm, all[position].warmed, all[position].kept, null);
    showLine(drawnFrom, all[position].drawn, all[position].kept, last);
  }

  function say() {
    const { order, kept, warmed, drawn } = all[position];
    const cut = warmed.slice(kept).reduce((a, b) => a + b, 0);
    const lost = kept === size ? "nothing is cut" : `${size - kept} are cut, with ${percent(cut)} between them`;
    let words = `After ${quoted(tokens[position])} (position ${position + 1}) ${kept} of ${size} tokens can be drawn; ${lost}.`;
    if (last !== null) {
      words = `u = ${last.u.toFixed(3)} falls on ${quoted(vocabulary[order[last.rank]])}, which has ${percent(drawn[last.rank])} of the lower line. ${words}`;
    }
    status.textContent = words;
    const sum = [...counts.values()].reduce((a, b) => a + b, 0);
    tally.textContent = sum === 0 ? "Nothing drawn yet with these settings." : `${whole(sum)} drawn with these settings.`;
  }

  // Likeliest first: what a token is drawn with, and as a line what the model itself gave it.
  function showBars() {
    const { order, warmed, kept, drawn } = all[position];
    const plain = distributionOf(rows[position], 1, null, null).warmed;
    const ranks = order.slice(0, SHOWN).map((_, rank) => rank);
    if (last !== null && last.rank >= SHOWN) ranks[SHOWN - 1] = last.rank;
    const longest = Math.max(0.05, ...ranks.map((rank) => Math.max(drawn[rank] ?? warmed[rank], plain[rank])));
    bars.replaceChildren();
    for (const rank of ranks) {
      const token = vocabulary[order[rank]];
      const gone = rank >= kept;
      const parts = bar(visible(token), spoken(token), gone ? warmed[rank] : drawn[rank], longest, plain[rank]);
      if (gone) parts[2].textContent = "cut";
      const times = counts.get(rank);
      parts.push(make("span", { class: "share soft" }, times ? `${times} ×` : ""));
      const kind = `row${gone ? " gone" : ""}${last?.rank === rank ? " drawn" : ""}`;
      bars.append(make("div", { class: kind }, ...parts));
    }
    const others = order.map((_, rank) => rank).filter((rank) => rank < kept && !ranks.includes(rank));
    if (size > ranks.length) {
      const rest = others.reduce((sum, rank) => sum + drawn[rank], 0);
      const some = others.length === 0 ? "no other can be drawn" : `${others.length} others can be drawn, ${percent(rest)} together`;
      bars.append(make("p", { class: "soft row wide" }, `${some}; ${size - kept} are cut`));
    }
  }

  // Probabilities laid end to end from 0 to 1, likeliest first. What is cut is hatched.
  function showLine(line, shares, kept, at) {
    const { order } = all[position];
    line.replaceChildren();
    const add = (from, to, kind, name) => {
      const part = make("span", { class: kind });
      part.style.left = `${100 * from}%`;
      part.style.width = `${100 * (to - from)}%`;
      if (to - from > 0.035) part.append(name);
      line.append(part);
      return part;
    };
    let start = 0;
    let small = 0; // of those that can be drawn, the ones too short to be seen
    shares.slice(0, kept).forEach((share, rank) => {
      if (share < VISIBLE_PART && at?.rank !== rank) {
        small += share;
        return;
      }
      const part = add(start, start + share, `part tint${rank % 4}`, visible(vocabulary[order[rank]]));
      part.classList.toggle("drawn", at?.rank === rank);
      start += share;
    });
    if (small > 0) add(start, start + small, "part tint3", "…");
    if (start + small < 1 - 1e-9) add(start + small, 1, "part gone", "");
    if (at !== null) {
      const pointer = make("span", { class: "pointer" }, "▼");
      pointer.style.left = `${100 * at.u}%`;
      line.append(pointer);
    }
  }

  const mark = choices(phrase, chips, (i) => {
    if (i === position) return;
    position = i;
    last = null;
    counts = new Map();
    show();
  }, () => perRow(chips));
  root.append(
    make("p", { class: "soft" }, "Choose how far the model has read. The small number: how many tokens can still be drawn there with these settings."),
    phrase,
    make("div", { class: "columns" },
      make("section", { "aria-label": "The cut and the draw" },
        controls, status,
        make("h3", {}, "At this temperature; hatched: cut"), warm,
        make("h3", {}, "What is left, stretched to 1"), drawnFrom,
        make("div", { class: "controls" }, button("Draw one", () => draw(1), { class: "first" }), button("Draw 100", () => draw(100))),
        tally),
      make("section", { "aria-label": "The likeliest" }, make("h3", {}, "The likeliest; line: at temperature 1, uncut"), bars)));
  settled();
  return () => {};
});

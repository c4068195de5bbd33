"use strict";
// A map of passages: choose a question, see which passages each search finds, and fuse two of the searches.

const SHOWN = 5; // hits that are listed

function integersOf(text, kind) {
  return Array.from(new kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer));
}

// Reciprocal rank fusion: each ranking gives what stands at its place p the score weight / (k + p). Best first,
// equals as first met.
function fusion(rankings, k, weights) {
  const scores = new Map();
  rankings.forEach((ranking, i) => {
    ranking.forEach((id, place) => scores.set(id, (scores.get(id) ?? 0) + weights[i] / (k + place + 1)));
  });
  return [...scores].sort((a, b) => b[1] - a[1]);
}

explore((root, data) => {
  const { passages, places, names } = data;
  const questions = data.questions.map((entry) => ({
    ...entry,
    rankings: entry.found.map(({ ids }) => integersOf(ids, Uint16Array)),
    near: integersOf(entry.near, Uint8Array),
  }));
  const ways = [...names, "fused", "re-ranked"];
  let chosen = 0; // of questions
  let way = 0; // whose hits have lines on the map
  let k = 60;
  let weight = 1; // of words; that of meaning is 1
  let opened = null; // a passage whose text is shown
  let filter = 0;
  let grid = { x: () => 0, y: () => 0 };

  const select = make("select", { id: "question", onchange: () => choose(Number(select.value)) });
  const filters = make("select", { id: "filter", onchange: () => {
    filter = Number(filters.value);
    const fitting = fits();
    if (fitting.length > 0 && !fitting.includes(chosen)) choose(fitting[0]);
    else show();
  } });
  const passageList = make("select", { id: "passage", onchange: () => open(Number(passageList.value)) });
  passageList.append(make("option", { value: "-1" }, "the one that answers it"), ...passages.map(({ cite }, i) => make("option", { value: String(i) }, cite)));
  const chips = ways.map((name) => make("span", { class: "chip", role: "radio" }, name));
  const wayList = make("div", { class: "chips", role: "radiogroup", "aria-label": "Lines on the map to the hits of" }, ...chips);
  const status = make("p", { class: "status", role: "status" });
  const map = make("canvas", { class: "map", "aria-hidden": "true" });
  const mapWords = make("p", { class: "soft" });
  const text = make("p", { class: "passage" });
  const lists = make("div", { class: "hits" });
  const slider = make("input", { type: "range", id: "weight", min: "0", max: "1", step: "0.05", value: "1", oninput: () => {
    weight = Number(slider.value);
    show();
  } });
  const weighed = make("output", { class: "number" });
  const constant = make("select", { id: "k", onchange: () => {
    k = Number(constant.value);
    show();
  } }, ...[60, 10, 1].map((value) => make("option", { value: String(value) }, String(value))));
  const curve = make("canvas", { class: "curve", "aria-hidden": "true" });
  const bars = make("div", { class: "bars" });

  // What a way finds for a question: [passage, score], the best first; null where it was not asked.
  function found(entry, number) {
    if (number < 2) return entry.rankings[number].map((id, i) => [id, entry.found[number].scores[i]]);
    if (number === 2) return fusion(entry.rankings, k, [1, weight]);
    return entry.reranked ? entry.reranked.ids.map((id, i) => [id, entry.reranked.scores[i]]) : null;
  }

  // The place of the first right passage, from 1; 0 where none was found.
  function placeOf(entry, hits) {
    return hits.findIndex(([id]) => entry.right.includes(id)) + 1;
  }

  function first(entry, number) {
    return placeOf(entry, found(entry, number)) === 1;
  }

  const FILTERS = [
    ["all questions", () => true],
    [`${names[0]} is right first, ${names[1]} is not`, (right) => right[0] && !right[1]],
    [`${names[1]} is right first, ${names[0]} is not`, (right) => right[1] && !right[0]],
    [`fusing loses what ${names[0]} has first`, (right) => right[0] && !right[2]],
    [`fusing mends what ${names[0]} misses`, (right) => right[2] && !right[0]],
    ["none of the three is right first", (right) => !right[0] && !right[1] && !right[2]],
    ["also re-ranked", (right, entry) => Boolean(entry.reranked)],
  ];

  function fits(number = filter) {
    const all = questions.map((_, i) => i);
    return all.filter((i) => FILTERS[number][1]([0, 1, 2].map((way) => first(questions[i], way)), questions[i]));
  }

  function choose(index) {
    chosen = index;
    opened = null;
    if (way === 3 && !questions[chosen].reranked) way = 0;
    show();
  }

  function step(by) {
    const fitting = fits();
    if (fitting.length === 0) return;
    const at = fitting.indexOf(chosen);
    choose(fitting[(at < 0 ? 0 : at + by + fitting.length) % fitting.length]);
  }

  function open(index) {
    opened = index < 0 ? null : index;
    show();
  }

  function show() {
    const entry = questions[chosen];
    const fitting = fits();
    markWay(way);
    filters.replaceChildren(...FILTERS.map(([words], i) => make("option", { value: String(i) }, `${words} (${fits(i).length})`)));
    filters.value = String(filter);
    const listed = fitting.includes(chosen) ? fitting : [chosen, ...fitting];
    select.replaceChildren(...listed.map((i) => make("option", { value: String(i) }, questions[i].text)));
    select.value = String(chosen);
    passageList.value = String(opened ?? -1);
    weighed.textContent = decimals(weight, 2);
    slider.setAttribute("aria-valuetext", weighed.textContent);
    showLists(entry);
    showPassage(entry);
    showShares();
    say(entry);
    draw();
  }

  function say(entry) {
    const parts = ways.map((name, number) => {
      const hits = found(entry, number);
      if (hits === null) return null;
      const place = placeOf(entry, hits);
      return place === 0 ? `${name}: not among its ${hits.length}` : `${name}: place ${place}`;
    });
    status.textContent = `The passage that answers it. ${parts.filter(Boolean).join("; ")}.`;
  }

  function showLists(entry) {
    lists.replaceChildren();
    ways.forEach((name, number) => {
      const hits = found(entry, number);
      const place = hits === null ? 0 : placeOf(entry, hits);
      const verdict = { 0: "misses it", 1: "right first" }[place] ?? `right at place ${place}`;
      const heading = make("h3", {}, `${name} `, make("span", { class: "soft" }, hits === null ? "" : verdict));
      const section = make("section", { "aria-label": `Found by ${name}` }, heading);
      if (hits === null) section.append(make("p", { class: "soft" }, "Not read for this question: choose one that is “also re-ranked”."));
      for (const [i, [id, score]] of (hits ?? []).slice(0, SHOWN).entries()) section.append(hit(entry, i, id, score, number));
      lists.append(section);
    });
  }

  function hit(entry, i, id, score, number) {
    const right = entry.right.includes(id);
    const digits = number === 2 ? 4 : 2;
    return make("button", {
      type: "button", class: right ? "hit right" : "hit", "aria-pressed": String(id === opened), onclick: () => {
        open(id === opened ? -1 : id);
        lists.querySelectorAll("section")[number].querySelectorAll("button")[i]?.focus();
      },
    }, make("span", { class: "number" }, `${i + 1}`), make("span", { class: "cite" }, `${right ? "✓ " : ""}${passages[id].cite}`),
    make("span", { class: "share" }, decimals(score, digits)));
  }

  function showPassage(entry) {
    text.replaceChildren();
    const id = opened ?? entry.right[0];
    const at = ways.map((name, number) => {
      const place = (found(entry, number) ?? []).findIndex(([other]) => other === id) + 1;
      return place === 0 ? null : `${name} ${place}`;
    }).filter(Boolean);
    text.append(make("strong", {}, passages[id].cite), entry.right.includes(id) ? " (answers it)" : "", ": ", passages[id].text,
      make("span", { class: "soft" }, ` Places: ${at.length === 0 ? "in no list" : at.join(", ")}.`));
  }

  // How many questions have a right passage first.
  function countFirst(number) {
    return questions.filter((entry) => first(entry, number)).length;
  }

  function showShares() {
    const counts = [0, 1, 2].map(countFirst);
    bars.replaceChildren(...ways.slice(0, 3).map((name, i) => {
      const parts = bar(name, null, counts[i] / questions.length, 1);
      parts[2].textContent = `${counts[i]} of ${questions.length}`;
      return make("div", { class: "row" }, ...parts);
    }));
    drawCurve(counts);
  }

  // Found first by the weight of words, for this k.
  function drawCurve(counts) {
    const [width, height, left, bottom] = [curve.parentElement.clientWidth, 130, 34, 22];
    const context = canvasOf(curve, width, height);
    const kept = weight;
    const weights = Array.from({ length: 21 }, (_, i) => i / 20);
    const values = weights.map((value) => {
      weight = value;
      return countFirst(2);
    });
    weight = kept;
    const all = [...values, counts[0], counts[1]];
    const [low, high] = [Math.min(...all) - 2, Math.max(...all) + 2];
    const x = (value) => left + value * (width - left - 8);
    const y = (value) => 6 + ((high - value) / (high - low)) * (height - bottom - 8);
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("soft");
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const value of new Set([counts[0], counts[1], values[20]])) context.fillText(String(value), left - 6, y(value));
    context.textAlign = "center";
    for (const value of [0, 0.5, 1]) context.fillText(value === 0.5 ? "weight of words" : String(value), Math.max(left, Math.min(x(value), width - 8)), height - 8);
    const line = (name, points, dashes) => {
      context.strokeStyle = colour(name);
      context.lineWidth = 2;
      context.setLineDash(dashes);
      context.beginPath();
      points.forEach(([a, b], i) => (i === 0 ? context.moveTo(a, b) : context.lineTo(a, b)));
      context.stroke();
      context.setLineDash([]);
    };
    line("soft", [[left, y(counts[0])], [x(1), y(counts[0])]], [2, 4]);
    line("soft", [[left, y(counts[1])], [x(1), y(counts[1])]], [8, 4]);
    line("blue", weights.map((value, i) => [x(value), y(values[i])]), []);
    context.fillStyle = colour("orange");
    context.beginPath();
    context.arc(x(weight), y(counts[2]), 5, 0, 2 * Math.PI);
    context.fill();
  }

  function draw() {
    const side = Math.min(map.parentElement.clientWidth - 2, 520);
    const entry = questions[chosen];
    const all = [...places, ...questions.map((question) => question.at)];
    const range = (axis) => [Math.min(...all.map((point) => point[axis])), Math.max(...all.map((point) => point[axis]))];
    const [[left, right], [low, high]] = [range(0), range(1)];
    const size = Math.max(right - left, high - low) || 1;
    const scale = (side - 30) / size;
    const middle = [(left + right) / 2, (low + high) / 2];
    grid = { x: (point) => side / 2 + (point[0] - middle[0]) * scale, y: (point) => side / 2 - (point[1] - middle[1]) * scale };
    const context = canvasOf(map, side, side);
    const near = new Map(entry.rankings[0].map((id, i) => [id, entry.near[i] / 255]));
    const strongest = Math.max(...near.values(), 1e-6);
    drawLines(context, entry);
    places.forEach((point, id) => {
      const share = (near.get(id) ?? 0) / strongest;
      dot(context, point, 3, "line", 1);
      if (share > 0) dot(context, point, 3 + 3 * share ** 3, "blue", share ** 2);
    });
    for (const id of entry.right) ring(context, places[id], "green", 10);
    if (opened !== null) ring(context, places[opened], "ink", 8);
    cross(context, entry.at);
    const five = entry.rankings[0].slice(0, SHOWN);
    const distance = (id) => Math.hypot(places[id][0] - entry.at[0], places[id][1] - entry.at[1]);
    const closest = places.map((_, id) => id).sort((a, b) => distance(a) - distance(b)).slice(0, SHOWN);
    const both = five.filter((id) => closest.includes(id)).length;
    mapWords.textContent = `The map keeps ${percent(data.share)} of the variance. Blue: near by ${names[0]}, in all dimensions, the stronger the nearer. `
      + `Of its five nearest, ${both} ${both === 1 ? "is" : "are"} among the five nearest on the map.`;
  }

  function drawLines(context, entry) {
    const hits = (found(entry, way) ?? []).slice(0, SHOWN);
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    hits.forEach(([id], i) => {
      const [x, y] = [grid.x(places[id]), grid.y(places[id])];
      context.strokeStyle = colour(entry.right.includes(id) ? "green" : "soft");
      context.lineWidth = entry.right.includes(id) ? 3 : 1.5;
      context.setLineDash(i === 0 ? [] : [5, 3]);
      context.beginPath();
      context.moveTo(grid.x(entry.at), grid.y(entry.at));
      context.lineTo(x, y);
      context.stroke();
      context.setLineDash([]);
      context.fillStyle = colour("ink");
      const away = Math.hypot(x - grid.x(entry.at), y - grid.y(entry.at)) || 1;
      context.fillText(String(i + 1), x + (13 * (x - grid.x(entry.at))) / away, y + (13 * (y - grid.y(entry.at))) / away);
    });
  }

  function dot(context, point, radius, name, alpha) {
    context.globalAlpha = alpha;
    context.fillStyle = colour(name);
    context.beginPath();
    context.arc(grid.x(point), grid.y(point), radius, 0, 2 * Math.PI);
    context.fill();
    context.globalAlpha = 1;
  }

  function ring(context, point, name, radius) {
    context.strokeStyle = colour(name);
    context.lineWidth = 2.5;
    context.strokeRect(grid.x(point) - radius / 1.3, grid.y(point) - radius / 1.3, (2 * radius) / 1.3, (2 * radius) / 1.3);
  }

  function cross(context, point) {
    const [x, y, arm] = [grid.x(point), grid.y(point), 8];
    context.strokeStyle = colour("orange");
    context.lineWidth = 4;
    for (const sign of [1, -1]) {
      context.beginPath();
      context.moveTo(x - arm, y - sign * arm);
      context.lineTo(x + arm, y + sign * arm);
      context.stroke();
    }
  }

  function redraw() {
    showShares();
    draw();
  }

  map.addEventListener("click", (event) => {
    const distance = (point) => Math.hypot(grid.x(point) - event.offsetX, grid.y(point) - event.offsetY);
    const id = places.map((_, i) => i).reduce((best, i) => (distance(places[i]) < distance(places[best]) ? i : best), 0);
    open(distance(places[id]) < 14 ? id : -1);
  });
  const markWay = choices(wayList, chips, (index) => {
    way = index;
    show();
  }, () => perRow(chips));

  const named = (id, words) => make("label", { for: id, class: "soft" }, words);
  root.append(
    make("p", { class: "soft" }, "Each dot is a passage. A question (the cross) falls among them; the square marks the passage that answers it."),
    make("div", { class: "controls" }, named("filter", "Show"), filters),
    make("div", { class: "controls" }, named("question", "Question"), select, button("Next question", () => step(1), { class: "first" }), button("Back", () => step(-1))),
    status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "The map" },
        make("div", { class: "controls" }, make("span", { class: "soft" }, "Lines to the first five of"), wayList), map, mapWords),
      make("section", { "aria-label": "What is found" }, lists,
        make("div", { class: "controls" }, named("passage", "Passage"), passageList), text)),
    make("h3", {}, "Fused: how much should words weigh?"),
    make("div", { class: "controls" }, named("weight", "Weight of words (that of meaning is 1)"), slider, weighed, named("k", "k"), constant),
    make("div", { class: "columns" },
      make("section", { "aria-label": "Found first" }, make("p", { class: "soft" }, "Questions whose right passage is found first"), bars),
      make("section", { "aria-label": "Found first by weight" }, make("p", { class: "soft" }, `The same by the weight (dotted: ${names[0]}, dashed: ${names[1]})`), curve)));
  const differs = (entry) => ![0, 1, 2].every((number) => first(entry, number));
  const starts = [(entry) => entry.reranked && differs(entry), (entry) => entry.reranked, differs, () => true];
  chosen = starts.map((fit) => questions.findIndex(fit)).find((index) => index >= 0);
  show();
  return redraw;
});

"use strict";
// A weight in 8 and 4 bits: which scheme, how large the groups; one group's levels; one weight made larger.

const BFLOAT16 = { name: "bf16", exponent: 8, fraction: 7, infinite: true, saturates: false };
const f32 = Math.fround; // what PyTorch computes in float32 is rounded after each operation

// Each scheme: of a group of weights its codes, what each stands for, and all levels with their codes.
function int8Group(weights) {
  const absmax = Math.max(...weights.map(Math.abs));
  const factor = absmax === 0 ? 0 : f32(127 / Math.max(absmax, 2 ** -126));
  const scale = f32(absmax / 127);
  const levels = Array.from({ length: 255 }, (_, i) => f32((i - 127) * scale));
  const codes = weights.map((weight) => roundedToEven(f32(weight * factor)) + 127);
  return { codes, levels, first: -127, facts: [["largest size", absmax], ["scale: that / 127", scale]] };
}

function int4Group(weights) {
  const [low, high] = [Math.min(...weights), Math.max(...weights)];
  const exact = f32(f32(high - low) / 15);
  const scale = rounded(BFLOAT16, exact);
  const zero = rounded(BFLOAT16, f32(low + f32(8 * exact)));
  const start = f32(zero - f32(8 * scale));
  const levels = Array.from({ length: 16 }, (_, code) => f32(f32(code * scale) + start));
  const codes = weights.map((weight) => {
    const steps = roundedToEven(f32(f32(weight - zero) / (scale === 0 ? 1 : scale)));
    return Math.min(Math.max(steps, -8), 7) + 8;
  });
  return { codes, levels, first: 0, facts: [["smallest", low], ["largest", high], ["scale: (largest − smallest) / 15", scale]] };
}

function nf4Group(weights, unit) {
  const absmax = Math.max(...weights.map(Math.abs));
  const inverse = f32(1 / Math.max(absmax, f32(1e-38)));
  const middles = unit.slice(1).map((level, i) => f32(f32(level + unit[i]) / 2));
  const codes = weights.map((weight) => {
    const scaled = Math.min(Math.max(f32(weight * inverse), -1), 1);
    return middles.filter((middle) => middle < scaled).length;
  });
  const levels = unit.map((level) => f32(level * absmax));
  return { codes, levels, first: 0, facts: [["largest size: the scale", absmax]] };
}

const SCHEMES = {
  int8: { bits: 8, round: int8Group },
  int4: { bits: 4, round: int4Group },
  NF4: { bits: 4, round: nf4Group },
};

// The root of the mean of the squares.
function rms(numbers) {
  return Math.sqrt(numbers.reduce((sum, number) => sum + number * number, 0) / Math.max(numbers.length, 1));
}

// A row in groups of a size: of each group what its scheme gives, and the weights as they come back.
function roundedRow(scheme, weights, size, unit) {
  const groups = [];
  for (let start = 0; start < weights.length; start += size) {
    const group = SCHEMES[scheme].round(weights.slice(start, start + size), unit);
    groups.push({ ...group, back: group.codes.map((code) => group.levels[code]) });
  }
  return { groups, back: groups.flatMap((group) => group.back) };
}

explore((root, data) => {
  const unit = data.levels.map(f32);
  const numbers = numbersOf(data.weight);
  const plain = Array.from({ length: data.rows }, (_, row) =>
    Array.from(numbers.subarray(row * data.columns, (row + 1) * data.columns)));
  const typical = rms(plain.flat());
  const names = Object.keys(SCHEMES);
  const sizeName = (size) => (size === data.columns ? "the whole row" : `groups of ${size}`);
  let scheme = "int4";
  let size = data.sizes[0];
  let row = 0;
  let place = 0; // a column of the chosen group
  let times = 1; // what the group's largest weight is multiplied by
  let found = []; // of each row what `roundedRow` gives
  let spoiled = plain; // the weights with the one that was made larger

  const status = make("p", { class: "status", role: "status" });
  const chipsOf = (label, words, chosen) => {
    const chips = words.map((word) => make("span", { class: "chip", role: "radio" }, word));
    const list = make("div", { class: "chips", role: "radiogroup", "aria-label": label }, ...chips);
    return { list, mark: choices(list, chips, chosen) };
  };
  const schemes = chipsOf("Scheme", names, (index) => {
    scheme = names[index];
    compute();
  });
  const sizes = chipsOf("How many weights share a scale", data.sizes.map(sizeName), (index) => {
    size = data.sizes[index];
    compute();
  });
  const range = (id, most, least, step, on) => make("input", {
    type: "range", id, min: String(least), max: String(most), step: String(step), value: String(least), oninput: (event) => on(Number(event.target.value)),
  });
  const rowSlider = range("row", data.rows, 1, 1, (value) => go(value - 1, place));
  const groupSlider = range("group", 1, 1, 1, (value) => go(row, (value - 1) * size));
  const factor = range("times", 1.5, 0, 0.02, (value) => {
    times = 10 ** value;
    compute();
  });
  const factorWords = make("output", { class: "number" });
  const maps = ["The weights", "Rounded", "How far off, by group"].map((words) => {
    const title = make("h3", {}, words);
    const canvas = make("canvas", { class: "map weights", "aria-hidden": "true" });
    return { title, canvas };
  });
  const groupTitle = make("h3", {});
  const picture = make("canvas", { "aria-hidden": "true" });
  const facts = make("div", {});
  const bars = make("div", { class: "bars" });

  // The column of the largest weight in the chosen group, as it was given.
  function outlier() {
    const start = place - (place % size);
    const group = plain[row].slice(start, start + size).map(Math.abs);
    return start + group.indexOf(Math.max(...group));
  }

  function go(toRow, toPlace) {
    row = toRow;
    place = toPlace;
    compute();
  }

  function spoil() {
    return plain.map((weights, index) => {
      if (index !== row || times === 1) return weights;
      const at = outlier();
      return weights.map((weight, column) => (column === at ? f32(weight * times) : weight));
    });
  }

  function compute() {
    spoiled = spoil();
    found = spoiled.map((weights) => roundedRow(scheme, weights, size, unit));
    show();
  }

  // Of each group of a row how far off it is, as a part of a typical weight; the one that was made larger left out.
  function errorsOf(index, done = found[index], of = size) {
    const skipped = times === 1 || index !== row ? null : outlier();
    const off = spoiled[index].map((weight, column) => done.back[column] - weight);
    return done.groups.map((_, g) => rms(off.slice(g * of, (g + 1) * of).filter((_, i) => g * of + i !== skipped)) / typical);
  }

  function show() {
    schemes.mark(names.indexOf(scheme));
    sizes.mark(data.sizes.indexOf(size));
    const group = Math.floor(place / size);
    rowSlider.value = String(row + 1);
    groupSlider.max = String(data.columns / size);
    groupSlider.value = String(group + 1);
    groupSlider.disabled = size === data.columns;
    factorWords.textContent = `· ${decimals(times, times < 9.95 ? 1 : 0)}`;
    factor.setAttribute("aria-valuetext", factorWords.textContent);
    const one = found[row].groups[group];
    const off = errorsOf(row)[group];
    const all = rms(found.flatMap((_, index) => errorsOf(index)));
    const used = new Set(one.codes).size;
    const bits = SCHEMES[scheme].bits + 32 / size;
    const where = size === data.columns ? `Row ${row + 1}` : `Row ${row + 1}, group ${group + 1}`;
    status.textContent = `${scheme}, ${sizeName(size)}: ${Number(bits.toFixed(2))} bits for each weight, off by ${percent(all)} of a typical weight. `
      + `${where}: ${used} of ${one.levels.length} codes in use, ${times === 1 ? "" : "its others "}off by ${percent(off)}.`;
    groupTitle.textContent = `${where}: ${size} weights, one scale`;
    showFacts(one);
    showBars();
    draw();
  }

  function showFacts(one) {
    const steps = one.levels.slice(1).map((level, i) => level - one.levels[i]);
    const lines = [...one.facts];
    if (scheme === "NF4") lines.push(["smallest step", Math.min(...steps)], ["largest step", Math.max(...steps)]);
    facts.replaceChildren(make("table", { class: "way" }, make("tbody", {}, ...lines.map(([words, value]) =>
      make("tr", {}, make("td", {}, words), make("td", { class: "value" }, short(value, 4)))))));
  }

  // The other weights of the row, by how many share a scale.
  function showBars() {
    const at = outlier();
    const without = (weights) => weights.filter((_, column) => column !== at);
    const errorOf = (weights, of) => {
      const { back } = roundedRow(scheme, weights, of, unit);
      return rms(without(weights.map((weight, column) => back[column] - weight))) / typical;
    };
    const now = data.sizes.map((of) => errorOf(spoiled[row], of));
    const before = data.sizes.map((of) => errorOf(plain[row], of));
    const longest = Math.max(...now, ...before, 1e-9);
    bars.replaceChildren(...data.sizes.map((of, i) => {
      const parts = bar(sizeName(of), null, now[i], longest, times === 1 ? null : before[i]);
      return make("div", { class: of === size ? "row scheme drawn" : "row scheme" }, ...parts);
    }));
  }

  // Drawing.

  function draw() {
    const wide = maps[0].canvas.parentElement.clientWidth - 2;
    const [cell, high] = [wide / data.columns, Math.max(4, Math.min(6, 150 / data.rows))];
    const tall = Math.ceil(high * data.rows);
    const contexts = maps.map(({ canvas }) => canvasOf(canvas, wide, tall));
    for (let r = 0; r < data.rows; r++) {
      drawRow(contexts[0], spoiled[r], r, cell, high);
      drawRow(contexts[1], found[r].back, r, cell, high);
    }
    const errors = found.map((_, index) => errorsOf(index));
    const calm = plain.map((weights) => roundedRow(scheme, weights, size, unit));
    const most = Math.max(...calm.flatMap(({ back }, r) => {
      const off = back.map((value, column) => value - plain[r][column]);
      return Array.from({ length: data.columns / size }, (_, g) => rms(off.slice(g * size, (g + 1) * size)) / typical);
    }));
    maps[2].title.replaceChildren("How far off, by group ", make("span", { class: "soft" }, `(full colour: ${percent(1.3 * most)} or more)`));
    errors.forEach((of, r) => of.forEach((error, g) => {
      contexts[2].fillStyle = colour("blue");
      contexts[2].globalAlpha = Math.min(1, error / (1.3 * most));
      contexts[2].fillRect(g * size * cell, r * high, size * cell - 1, high);
    }));
    contexts[2].globalAlpha = 1;
    const start = place - (place % size);
    for (const context of contexts) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(Math.max(start * cell, 1), Math.max(row * high - 1, 1), Math.min(size * cell, wide - 2), high + 2);
    }
    drawGroup();
  }

  function drawRow(context, weights, r, cell, high) {
    weights.forEach((weight, column) => {
      context.fillStyle = colour(weight < 0 ? "orange" : "blue");
      context.globalAlpha = Math.min(1, Math.abs(weight) / (2.5 * typical));
      context.fillRect(column * cell, r * high, cell, high);
    });
    context.globalAlpha = 1;
  }

  // The group's weights above, its levels below, and what goes where; a level is the taller, the more weights it has.
  function drawGroup() {
    const wide = picture.parentElement.clientWidth;
    const context = canvasOf(picture, wide, 168);
    const start = place - (place % size);
    const weights = spoiled[row].slice(start, start + size);
    const one = found[row].groups[Math.floor(place / size)];
    const reach = 1.06 * Math.max(...weights.map(Math.abs), ...one.levels.map(Math.abs), 1e-12);
    const at = (value) => (0.5 + value / (2 * reach)) * wide;
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("soft");
    context.fillText("the weights", 2, 12);
    context.fillText("its levels, taller with more weights on them", 2, 164);
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    context.strokeRect(at(0) - 0.5, 16, 1, 130);
    const counts = one.levels.map((_, code) => one.codes.filter((each) => each === code).length);
    const tallest = Math.max(...counts);
    one.levels.forEach((level, code) => {
      context.fillStyle = colour("blue");
      context.globalAlpha = counts[code] === 0 ? 0.4 : 1;
      const tall = counts[code] === 0 ? 8 : 10 + (44 * counts[code]) / tallest;
      context.fillRect(at(level) - 1, 146 - tall, counts[code] === 0 ? 1 : 3, tall);
    });
    context.globalAlpha = 1;
    const changed = times === 1 ? null : outlier() - start;
    weights.forEach((weight, i) => {
      const level = one.levels[one.codes[i]];
      const tall = 10 + (44 * counts[one.codes[i]]) / tallest;
      context.strokeStyle = colour(i === changed ? "orange" : "soft");
      context.fillStyle = colour(i === changed ? "orange" : "ink");
      context.lineWidth = i === changed ? 2 : 0.7;
      context.beginPath();
      context.moveTo(at(weight), 28);
      context.lineTo(at(level), 146 - tall);
      context.stroke();
      context.beginPath();
      context.arc(at(weight), 26, i === changed ? 6 : 3, 0, 2 * Math.PI);
      context.fill();
    });
  }

  for (const { canvas } of maps) {
    canvas.addEventListener("click", (event) => {
      const [r, column] = [event.offsetY / canvas.clientHeight, event.offsetX / canvas.clientWidth];
      go(Math.min(Math.floor(r * data.rows), data.rows - 1), Math.min(Math.floor(column * data.columns), data.columns - 1));
    });
  }

  // The group with the largest error, as the weights were given.
  function worst() {
    times = 1;
    factor.value = "0";
    compute();
    const errors = found.map((_, index) => errorsOf(index));
    const most = Math.max(...errors.flat());
    const r = errors.findIndex((of) => of.includes(most));
    go(r, errors[r].indexOf(most) * size);
  }

  const labelled = (words, input, ...more) => make("div", { class: "controls slider" }, make("label", { for: input.id }, words), input, ...more);
  root.append(
    make("p", { class: "soft" }, `${data.rows} rows of a weight, ${data.columns} numbers each: blue above 0, orange below, the stronger the larger. Click on a group.`),
    make("div", { class: "controls" }, schemes.list, sizes.list),
    status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "The matrix" }, ...maps.flatMap(({ title, canvas }) => [title, canvas])),
      make("section", { "aria-label": "One group" }, groupTitle, picture,
        labelled("Row", rowSlider), labelled("Group", groupSlider, button("the one that is most off", worst)),
        labelled("Its largest weight", factor, factorWords), facts,
        make("h3", {}, "How far off the row's other weights are, if a scale serves"), bars,
        make("p", { class: "soft" }, "The line: before that weight was made larger."))));
  worst();
  return draw;
});

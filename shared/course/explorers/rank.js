"use strict";
// A change of a weight as a sum of pieces, a column times a row each: choose how many are kept.

const FLOAT16 = { name: "fp16", exponent: 5, fraction: 10, infinite: true, saturates: false };
const TERMS = 8; // pieces that are written out

// The float16 in a base64 text, the lowest byte first.
function halvesOf(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const codes = new Uint16Array(bytes.buffer);
  return Float32Array.from(codes, (code) => valueOf(FLOAT16, code));
}

// A change and its pieces: piece k is values[k] times the column left[k] times the row right[k].
class Change {
  constructor({ name, values, left, right }, out, width) {
    this.name = name;
    this.values = values;
    this.out = out;
    this.width = width;
    const [columns, rows] = [halvesOf(left), halvesOf(right)];
    this.left = values.map((_, k) => columns.subarray(k * out, (k + 1) * out));
    this.right = values.map((_, k) => rows.subarray(k * width, (k + 1) * width));
    const squares = values.map((value) => value * value);
    this.total = squares.reduce((a, b) => a + b, 0);
    this.whole = this.sumOf(0, values.length);
  }

  // The pieces from one to before another, added up: out * width numbers, row after row.
  sumOf(from, to) {
    const sum = new Float32Array(this.out * this.width);
    for (let k = from; k < Math.min(to, this.values.length); k++) {
      const row = this.right[k];
      for (let i = 0; i < this.out; i++) {
        const factor = this.values[k] * this.left[k][i];
        const start = i * this.width;
        for (let j = 0; j < this.width; j++) sum[start + j] += factor * row[j];
      }
    }
    return sum;
  }

  // What the first pieces hold of the squared length.
  share(rank) {
    if (rank >= this.values.length) return 1;
    return this.values.slice(0, rank).reduce((sum, value) => sum + value * value, 0) / this.total;
  }

  term(k, i, j) {
    return this.values[k] * this.left[k][i] * this.right[k][j];
  }
}

// A colour of page.css as three numbers.
function channels(name) {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour(name);
  return [1, 3, 5].map((start) => parseInt(context.fillStyle.slice(start, start + 2), 16));
}

explore((root, data) => {
  const changes = data.changes.map((change) => new Change(change, data.out, data.in));
  const most = Math.min(data.out, data.in);
  let chosen = 0;
  let rank = Math.min(8, most);
  let cell = { row: 0, column: 0 }; // at first the largest of the first change
  let kept = new Float32Array(0); // the chosen change at this rank

  const chips = changes.map(({ name }) => make("span", { class: "chip", role: "radio" }, name));
  const picker = make("div", { class: "chips", role: "radiogroup", "aria-label": "Change" }, ...chips);
  const slider = (id, least, largest, value, on) => make("input", {
    type: "range", id, min: String(least), max: String(largest), step: "1", value: String(value), oninput: (event) => on(Number(event.target.value)),
  });
  const ranks = slider("rank", 0, most, rank, (value) => {
    rank = value;
    compute();
  });
  const rankWords = make("output", { class: "number" });
  const status = make("p", { class: "status", role: "status" });
  const pictures = ["The change", "At this rank", "What is missing"].map((words) => ({
    title: make("h3", {}, words), canvas: make("canvas", { class: "map weights", "aria-hidden": "true" }),
  }));
  const curve = make("canvas", { "aria-hidden": "true" });
  const counts = make("div", { class: "bars" });
  const lossTitle = make("h3", {}, `${changes[0].name}: the loss with every matrix's change cut to a rank`);
  const lossPlot = make("canvas", { "aria-hidden": "true" });
  const rowSlider = slider("row", 1, data.out, 1, (value) => open(value - 1, cell.column));
  const columnSlider = slider("column", 1, data.in, 1, (value) => open(cell.row, value - 1));
  const sums = make("div", {});

  changes[0].whole.forEach((number, at, all) => {
    if (Math.abs(number) <= Math.abs(all[cell.row * data.in + cell.column])) return;
    cell = { row: Math.floor(at / data.in), column: at % data.in };
  });

  function change() {
    return changes[chosen];
  }

  function open(row, column) {
    cell = { row, column };
    showSums();
    drawPictures();
  }

  function compute() {
    kept = change().sumOf(0, rank);
    show();
  }

  function show() {
    mark(chosen);
    const of = change();
    const numbers = rank * (data.out + data.in);
    const all = data.out * data.in;
    rankWords.textContent = String(rank);
    const there = of.values.length < most ? ` It has ${of.values.length} pieces in all.` : "";
    const loss = measuredAt();
    const measured = chosen > 0 || loss === null ? "" : ` With all changes cut to rank ${loss[0]}, the loss is ${loss[1].toFixed(3)}.`;
    status.textContent = `${of.name}: ${rank === 1 ? "1 piece holds" : `${rank} pieces hold`} ${percent(of.share(rank))} of the squared length, `
      + `in ${whole(numbers)} numbers instead of ${whole(all)} (${percent(numbers / all)}).${there}${measured}`;
    const longest = Math.max(1, numbers / all);
    counts.replaceChildren(
      make("div", { class: "row scheme" }, ...bar("caught", null, of.share(rank), longest)),
      make("div", { class: "row scheme zero" }, ...bar("numbers", null, numbers / all, longest, longest > 1 ? 1 : null)));
    showSums();
    draw();
  }

  // The loss at the largest measured rank that is not above the chosen one.
  function measuredAt() {
    const below = data.losses.filter(([of]) => of <= rank);
    return below.length === 0 ? null : below[below.length - 1];
  }

  // One number of the matrix, as the sum of its terms.
  function showSums() {
    const of = change();
    const { row, column } = cell;
    rowSlider.value = String(row + 1);
    columnSlider.value = String(column + 1);
    const used = Math.min(rank, of.values.length);
    const typical = Math.sqrt(of.total / (data.out * data.in));
    const digits = Math.min(Math.max(2, 2 - Math.floor(Math.log10(typical))), 9);
    const lines = [];
    const largest = Math.max(...Array.from({ length: TERMS }, (_, k) => (k < used ? Math.abs(of.term(k, row, column)) : 0)), 1e-30);
    for (let k = 0; k < Math.min(used, TERMS); k++) {
      const term = of.term(k, row, column);
      const shown = make("td", { class: term < 0 ? "signed minus" : "signed" }, decimals(term, digits));
      shown.style.setProperty("--part", `${(100 * Math.abs(term)) / largest}%`);
      const cells = [String(k + 1), short(of.values[k], 3), decimals(of.left[k][row]), decimals(of.right[k][column])];
      lines.push(make("tr", {}, ...cells.map((words) => make("td", {}, words)), shown));
    }
    const total = (words, number, kind) => make("tr", { class: kind }, make("td", { colspan: "4" }, words), make("td", { class: "value" }, decimals(number, digits)));
    if (used > TERMS) {
      let rest = 0;
      for (let k = TERMS; k < used; k++) rest += of.term(k, row, column);
      lines.push(total(`the other ${used - TERMS} pieces`, rest, ""));
    }
    const at = row * data.in + column;
    lines.push(total(`at rank ${rank}`, kept[at], "total"), total("in the change", of.whole[at], ""));
    const titles = ["piece", "strength", "column", "row", "product"];
    sums.replaceChildren(make("div", { class: "scroll" }, make("table", { class: "terms" },
      make("thead", {}, make("tr", {}, ...titles.map((words) => make("th", { scope: "col" }, words)))),
      make("tbody", {}, ...lines))));
  }

  // Drawing.

  function draw() {
    drawPictures();
    drawCurve();
    if (data.losses.length > 0) drawLosses();
  }

  function drawPictures() {
    const of = change();
    const reach = 2.5 * Math.sqrt(of.total / (data.out * data.in));
    const missing = of.whole.map((value, at) => value - kept[at]);
    const box = pictures[0].canvas.parentElement.clientWidth - 2;
    pictures[1].title.textContent = `At rank ${rank}`;
    [of.whole, kept, missing].forEach((numbers, index) => {
      const { canvas } = pictures[index];
      const side = Math.min(box, 340);
      const tall = (side * data.out) / data.in;
      const context = canvasOf(canvas, side, tall);
      context.imageSmoothingEnabled = false;
      context.drawImage(image(numbers, reach), 0, 0, side, tall);
      const [wide, high] = [side / data.in, tall / data.out];
      context.strokeStyle = colour("ink");
      context.lineWidth = 2;
      context.strokeRect(cell.column * wide - 3, cell.row * high - 3, wide + 6, high + 6);
    });
  }

  // Blue above 0, orange below, the paper at 0.
  function image(numbers, reach) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [data.in, data.out];
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(data.in, data.out);
    const [paper, above, below] = ["paper", "blue", "orange"].map(channels);
    numbers.forEach((number, at) => {
      const strength = Math.min(1, Math.abs(number) / reach);
      const to = number < 0 ? below : above;
      for (let c = 0; c < 3; c++) pixels.data[4 * at + c] = paper[c] + strength * (to[c] - paper[c]);
      pixels.data[4 * at + 3] = 255;
    });
    context.putImageData(pixels, 0, 0);
    return canvas;
  }

  // Bars: the strength of each piece, those that are kept in full colour. The line: what the first so many hold.
  function drawCurve() {
    const of = change();
    const wide = curve.parentElement.clientWidth;
    const [high, top, bottom] = [180, 14, 158];
    const context = canvasOf(curve, wide, high);
    const left = 42;
    const slot = (wide - left - 6) / most;
    const y = (share) => bottom - share * (bottom - top);
    context.font = "12px system-ui, sans-serif";
    of.values.forEach((value, k) => {
      context.fillStyle = colour("blue");
      context.globalAlpha = k < rank ? 1 : 0.3;
      const tall = (value / of.values[0]) * (bottom - top);
      context.fillRect(left + k * slot, bottom - tall, Math.max(slot - 0.7, 0.7), tall);
    });
    context.globalAlpha = 1;
    changes.forEach((each, index) => {
      context.strokeStyle = colour(index === chosen ? "ink" : "soft");
      context.lineWidth = index === chosen ? 2 : 1;
      context.setLineDash(index === chosen ? [] : [3, 4]);
      context.beginPath();
      for (let r = 0; r <= most; r++) context.lineTo(left + r * slot, y(each.share(r)));
      context.stroke();
    });
    context.setLineDash([]);
    context.fillStyle = colour("orange");
    context.beginPath();
    context.arc(left + rank * slot, y(of.share(rank)), 6, 0, 2 * Math.PI);
    context.fill();
    context.fillStyle = colour("soft");
    context.textAlign = "right";
    for (const share of [0, 0.5, 1]) context.fillText(percent(share).replace(" ", ""), left - 4, y(share) + 4);
    context.textAlign = "center";
    for (let r = most / 4; r <= most; r += most / 4) context.fillText(String(Math.round(r)), Math.min(left + r * slot, wide - 10), high - 6);
  }

  function drawLosses() {
    const wide = lossPlot.parentElement.clientWidth;
    const [high, top, bottom, left] = [130, 16, 106, 42];
    const context = canvasOf(lossPlot, wide, high);
    const values = data.losses.map(([, loss]) => loss);
    const [low, up] = [Math.min(...values), Math.max(...values)];
    const gap = (wide - left - 30) / Math.max(data.losses.length - 1, 1);
    const x = (i) => left + 8 + i * gap;
    const y = (loss) => (up === low ? top : bottom - ((loss - low) / (up - low)) * (bottom - top));
    const now = data.losses.indexOf(measuredAt());
    context.font = "12px system-ui, sans-serif";
    context.strokeStyle = colour("blue");
    context.lineWidth = 2;
    context.beginPath();
    data.losses.forEach(([, loss], i) => context.lineTo(x(i), y(loss)));
    context.stroke();
    data.losses.forEach(([of, loss], i) => {
      context.fillStyle = colour(i === now ? "orange" : "blue");
      context.beginPath();
      context.arc(x(i), y(loss), i === now ? 6 : 4, 0, 2 * Math.PI);
      context.fill();
      context.fillStyle = colour("soft");
      context.textAlign = "center";
      context.fillText(String(of), x(i), high - 6);
    });
    context.textAlign = "right";
    context.fillText(up.toFixed(2), left - 2, y(up) + 4);
    context.fillText(low.toFixed(2), left - 2, y(low) + 4);
  }

  for (const { canvas } of pictures) {
    canvas.addEventListener("click", (event) => {
      const [row, column] = [event.offsetY / canvas.clientHeight, event.offsetX / canvas.clientWidth];
      open(Math.min(Math.floor(row * data.out), data.out - 1), Math.min(Math.floor(column * data.in), data.in - 1));
    });
  }
  const mark = choices(picker, chips, (index) => {
    chosen = index;
    compute();
  }, () => perRow(chips));

  const labelled = (words, input, ...more) => make("div", { class: "controls slider" }, make("label", { for: input.id }, words), input, ...more);
  const plots = [make("h3", {}, "How strong each piece is, and what the first so many hold"), curve,
    make("p", { class: "soft" }, changes.length > 1 ? "Line: this change. Dashed: the others." : "Bars: strengths. Line: the share that is held."), counts];
  if (data.losses.length > 0) plots.push(lossTitle, lossPlot);
  root.append(
    make("p", { class: "soft" }, `A change of ${data.out} × ${data.in} numbers: blue above 0, orange below. Each piece is a column times a row.`),
    picker,
    make("div", { class: "controls" }, make("label", { for: "rank" }, "Rank"), ranks, rankWords),
    status,
    make("div", { class: "three" }, ...pictures.map(({ title, canvas }) => make("section", { "aria-label": title.textContent }, title, canvas))),
    make("div", { class: "columns" },
      make("section", { "aria-label": "Pieces" }, ...plots),
      make("section", { "aria-label": "One number" }, make("h3", {}, "One number of the matrix (click one)"),
        labelled("Row", rowSlider), labelled("Column", columnSlider), sums)));
  compute();
  return draw;
});

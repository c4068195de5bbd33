"use strict";
// Gradients as a histogram, shifted by a loss scale against the range of a format.

const FIRST = -46; // the axis, in powers of 2
const LAST = 34;
const FATES = [
  // name, colour, words
  ["zero", "orange", "become 0"],
  ["short", "tint", "have digits missing"],
  ["full", "blue", "have all digits"],
  ["over", "ink", "are too large"],
];

// Of each size times the scale: 0 where the format makes 0 of it, 1 below its first number with all digits, 3 where it
// is too large, else 2.
function fatesOf(format, sizes, scale) {
  const normal = 2 ** (1 - biasOf(format));
  return Array.from(sizes, (size) => {
    const scaled = Math.fround(size * scale);
    const nearest = rounded(format, scaled);
    if (nearest === 0) return 0;
    if (isTooLarge(format, scaled)) return 3;
    return nearest < normal ? 1 : 2;
  });
}

// How far each is off after the scale was divided out again: a part of itself, infinite where it is lost.
function errorsOf(format, sizes, scale) {
  return Array.from(sizes, (size) => {
    const back = rounded(format, Math.fround(size * scale)) / scale;
    return Number.isFinite(back) ? Math.abs(back - size) / size : Infinity;
  });
}

explore((root, data) => {
  const sizes = numbersOf(data.sizes);
  const { formats } = data;
  let chosen = formats.findIndex((format) => format.name === data.format);
  let power = 0;
  let followed = Math.floor(sizes.length / 2);

  const chips = formats.map((format) => make("span", { class: "chip", role: "radio" }, format.name));
  const picker = make("div", { class: "chips", role: "radiogroup", "aria-label": "Format" }, ...chips);
  const slider = make("input", {
    type: "range", id: "scale", min: "0", max: "40", step: "1", value: "0",
    oninput: () => {
      power = Number(slider.value);
      show();
    },
  });
  const written = make("output", { class: "number" });
  const status = make("p", { class: "status", role: "status" });
  const picture = make("canvas", { class: "map", "aria-hidden": "true" });
  const bars = make("div", { class: "bars" });
  const which = make("input", {
    type: "range", id: "which", min: "0", max: String(sizes.length - 1), step: "1", value: String(followed),
    oninput: () => {
      followed = Number(which.value);
      show();
    },
  });
  const sums = make("div", {});

  function show() {
    const format = formats[chosen];
    const scale = 2 ** power;
    const fates = fatesOf(format, sizes, scale);
    markFormat(chosen);
    written.textContent = `2${raised(power)} = ${whole(scale)}`;
    slider.setAttribute("aria-valuetext", `2 to the ${power}`);
    const share = (fate) => fates.filter((each) => each === fate).length / fates.length;
    bars.replaceChildren(...FATES.map(([name, , words], fate) =>
      make("div", { class: `row ${name}` }, ...bar(words, null, share(fate), 1))));
    const errors = errorsOf(format, sizes, scale).sort((a, b) => a - b);
    const typical = errors[Math.floor(errors.length / 2)];
    const off = Number.isFinite(typical) ? `are off by more than ${Number((100 * typical).toPrecision(2))} %` : "are lost";
    status.textContent = `${format.name}, scale 2${raised(power)}: ${percent(share(0))} become 0, ${percent(share(1))} have digits missing, `
      + `${percent(share(3))} are too large (${beyond(format)}). Divided by the scale again, half of them ${off}.`;
    showSums(format, scale);
    draw(fates);
  }

  // One gradient on its way there and back.
  function showSums(format, scale) {
    const size = sizes[followed];
    const scaled = Math.fround(size * scale);
    const nearest = rounded(format, scaled);
    const back = nearest / scale;
    const code = codeOf(format, scaled);
    const line = (words, value, more = []) => make("tr", {}, make("td", {}, words), make("td", { class: "value" }, short(value, 6)), ...more);
    which.setAttribute("aria-valuetext", short(size, 3));
    sums.replaceChildren(make("div", { class: "scroll" }, make("table", { class: "way" }, make("tbody", {},
      line("the gradient", size),
      line(`times 2${raised(power)}`, scaled),
      line(`in ${format.name}`, nearest),
      line(`divided by 2${raised(power)}`, back)))),
    make("p", {}, make("code", { "aria-label": `bits ${bitsOf(format, code)}` },
      ...["sign", "exponent", "fraction"].map((part) => make("span", { class: part },
        [...bitsOf(format, code)].filter((_, i) => partOf(format, i) === part).join("")))),
    ` off by: ${offBy(size, back)}`));
  }

  function draw(fates) {
    const wide = picture.parentElement.clientWidth - 2;
    const high = Math.min(300, Math.max(220, wide / 3));
    const bottom = high - 22;
    const context = canvasOf(picture, wide, high);
    const at = (exponent) => ((exponent - FIRST) / (LAST - FIRST)) * wide;
    const top = 34;
    const bins = Array.from({ length: LAST - FIRST }, () => [0, 0, 0, 0]);
    sizes.forEach((size, i) => {
      const bin = Math.floor(Math.log2(size) + power) - FIRST;
      bins[Math.min(Math.max(bin, 0), bins.length - 1)][fates[i]] += 1;
    });
    const tallest = Math.max(...bins.map((bin) => bin.reduce((a, b) => a + b)));
    drawZones(context, at, top, bottom, wide);
    const slot = wide / bins.length;
    bins.forEach((bin, i) => {
      let y = bottom;
      bin.forEach((count, fate) => {
        const tall = (count / tallest) * (bottom - top - 4);
        context.fillStyle = FATES[fate][1] === "tint" ? hatch(context) : colour(FATES[fate][1]);
        context.fillRect(i * slot + 0.5, y - tall, Math.max(slot - 1, 1), tall);
        y -= tall;
      });
    });
    drawAxis(context, at, bottom, wide);
    const here = at(Math.log2(sizes[followed]) + power);
    context.fillStyle = colour("ink");
    context.beginPath();
    context.moveTo(here, bottom);
    context.lineTo(here - 6, bottom + 9);
    context.lineTo(here + 6, bottom + 9);
    context.fill();
  }

  // Stripes of the paper on blue.
  function hatch(context) {
    const tile = document.createElement("canvas");
    tile.width = 6;
    tile.height = 6;
    const on = tile.getContext("2d");
    on.fillStyle = colour("blue");
    on.globalAlpha = 0.35;
    on.fillRect(0, 0, 6, 6);
    on.globalAlpha = 1;
    on.fillRect(0, 0, 6, 2);
    return context.createPattern(tile, "repeat");
  }

  // Where a format makes 0, where it has numbers, and where it has none.
  function drawZones(context, at, top, bottom, wide) {
    const format = formats[chosen];
    const lowest = 1 - biasOf(format);
    const zones = [
      ["0", FIRST, lowest - format.fraction - 1],
      ["digits missing", lowest - format.fraction - 1, lowest],
      [format.name, lowest, Math.log2(valueOf(format, largestCode(format)))],
      [beyond(format), Math.log2(valueOf(format, largestCode(format))), LAST],
    ];
    context.font = "12px system-ui, sans-serif";
    context.textAlign = "center";
    zones.forEach(([words, from, to], i) => {
      const [left, right] = [Math.max(at(from), 0), Math.min(at(to), wide)];
      if (right <= left) return;
      context.fillStyle = colour(i === 2 ? "tint0" : "panel");
      context.fillRect(left, 22, right - left - 1, bottom - 22);
      context.fillStyle = colour("ink");
      if (context.measureText(words).width < right - left - 2) context.fillText(words, (left + right) / 2, 15);
    });
  }

  function drawAxis(context, at, bottom, wide) {
    context.fillStyle = colour("soft");
    context.textAlign = "center";
    for (let exponent = -40; exponent <= LAST; exponent += wide < 500 ? 16 : 8) {
      context.fillText(`2${raised(exponent)}`, at(exponent), bottom + 20);
    }
  }

  picture.addEventListener("click", (event) => {
    const exponent = FIRST + (event.offsetX / picture.clientWidth) * (LAST - FIRST) - power;
    const nearest = sizes.findIndex((size) => Math.log2(size) >= exponent);
    followed = nearest < 0 ? sizes.length - 1 : nearest;
    which.value = String(followed);
    show();
  });
  const markFormat = choices(picker, chips, (index) => {
    chosen = index;
    show();
  }, () => perRow(chips));

  root.append(
    make("p", { class: "soft" }, `${whole(sizes.length)} of the ${whole(data.total)} gradients that are not 0, evenly from the smallest to the largest. Each bar is a power of 2.`),
    make("div", { class: "controls" }, make("label", { for: "scale" }, "Loss scale"), slider, written),
    picker, picture, status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "How many" }, make("h3", {}, "How many"), bars),
      make("section", { "aria-label": "One of them" }, make("h3", {}, "One of them (▲), there and back"),
        make("div", { class: "controls" }, make("label", { for: "which" }, "Smallest to largest"), which), sums)));
  show();
  return show;
});

"use strict";
// Two timelines of the same requests, one above the other: choose a request, walk the steps, and see what each
// way makes of it.

const SLOT = 24; // pixels of a slot's row
const QUEUE = 7; // of each request that waits
const COST = 26; // of the strip with the time of each step

// What one way made of the requests, from what was noted in each step.
class Timeline {
  constructor(recorded, arrivals) {
    this.slots = recorded.slots;
    this.whole = recorded.whole;
    this.milliseconds = recorded.milliseconds;
    this.steps = recorded.milliseconds.length;
    this.starts = [0]; // in milliseconds, of each step, and the end
    for (const time of recorded.milliseconds) this.starts.push(this.starts[this.starts.length - 1] + time);
    this.courses = recorded.courses.map((course, i) => ({
      ...course,
      arrival: arrivals[i],
      read: new Map(course.reads),
      drawn: new Map(course.draws),
      first: course.draws[0][0],
      last: course.draws[course.draws.length - 1][0],
    }));
  }

  // What happens to a request in a step.
  state(i, step) {
    const course = this.courses[i];
    if (step < course.arrival) return "not there yet";
    if (step < course.begin) return "waits";
    if (step > course.last) return "done";
    if (course.read.has(step)) return "reads";
    return course.drawn.has(step) ? "writes" : "waits in its slot";
  }

  // How many tokens it has after a step.
  written(i, step) {
    return this.courses[i].draws.reduce((sum, [at, count]) => (at <= step ? sum + count : sum), 0);
  }

  // From asking: to the slot, to the end of the step with the first token, and to that with the last.
  measures(i) {
    const { arrival, begin, first, last } = this.courses[i];
    const span = (end) => ({ steps: end - arrival, milliseconds: this.starts[end] - this.starts[arrival] });
    const done = span(last + 1);
    const tokens = this.written(i, last);
    return { wait: span(begin), first: span(first + 1), done, tokens, rate: (1000 * tokens) / done.milliseconds };
  }

  ofAll() {
    const each = this.courses.map((_, i) => this.measures(i));
    const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;
    const tokens = each.reduce((sum, one) => sum + one.tokens, 0);
    const span = (name, over) => ({
      steps: over(each.map((one) => one[name].steps)),
      milliseconds: over(each.map((one) => one[name].milliseconds)),
    });
    return {
      all: { steps: this.steps, milliseconds: this.starts[this.steps] },
      wait: span("wait", mean),
      first: span("first", (numbers) => Math.max(...numbers)),
      perStep: tokens / this.steps,
      rate: (1000 * tokens) / this.starts[this.steps],
    };
  }

  // Those in line in a step, the next one first.
  waiting(step) {
    return this.courses.map((_, i) => i).filter((i) => this.state(i, step) === "waits");
  }

  longestQueue() {
    return Math.max(...this.milliseconds.map((_, step) => this.waiting(step).length));
  }
}

function letter(i) {
  return String.fromCharCode(65 + i);
}

function letters(numbers) {
  return numbers.map(letter).join(", ");
}

function spanOf({ steps, milliseconds }) {
  const number = Number.isInteger(steps) ? String(steps) : decimals(steps, 1);
  return [`${number} ${steps === 1 ? "step" : "steps"}`, `${decimals(milliseconds, milliseconds < 100 ? 1 : 0)} ms`];
}

explore((root, data) => {
  const arrivals = data.requests.map((request) => request.arrival);
  const timelines = data.timelines.map((recorded) => new Timeline(recorded, arrivals));
  const counts = timelines.filter((timeline) => timeline.whole).map((timeline) => timeline.slots);
  let place = data.first; // of the number of slots
  let request = 0;
  let step = 0;
  let timer = null;
  let grids = []; // of both timelines: where they are drawn

  const slotChips = counts.map((count) => make("span", { class: "chip", role: "radio" }, String(count)));
  const slotList = make("div", { class: "chips", role: "radiogroup", "aria-label": "Number of slots" }, ...slotChips);
  const chips = data.requests.map(({ prompt, text, arrival }, i) => {
    const name = `${letter(i)}: ${prompt} tokens to read, ${text.length} to write, comes in step ${arrival + 1}`;
    return make("span", { class: "chip", role: "radio", "aria-label": name, title: name }, letter(i));
  });
  const list = make("div", { class: "chips", role: "radiogroup", "aria-label": "Request" }, ...chips);
  const slider = make("input", {
    type: "range", min: "1", max: "1", value: "1", id: "step", class: "steps", oninput: () => goTo(Number(slider.value) - 1),
  });
  const at = make("output", { class: "number" });
  const player = button("Play", play);
  const status = make("p", { class: "status", role: "status" });
  const panels = [0, 1].map(() => ({
    title: make("h3", {}),
    canvas: make("canvas", { class: "timeline", "aria-hidden": "true" }),
    now: make("p", { class: "soft now" }),
    text: make("pre", { class: "text", tabindex: "0" }),
  }));
  const table = make("table", {});

  function shown() {
    return [timelines[2 * place], timelines[2 * place + 1]];
  }

  function longest() {
    return Math.max(...shown().map((timeline) => timeline.steps));
  }

  // The request for which the two differ most, at the step in which the faster one has finished it.
  function begin() {
    const [a, b] = shown();
    const gains = arrivals.map((_, i) => b.measures(i).done.steps - a.measures(i).done.steps);
    request = gains.indexOf(Math.max(...gains));
    step = a.courses[request].last;
  }

  function goTo(wanted) {
    step = Math.min(Math.max(wanted, 0), longest() - 1);
    show();
  }

  function play() {
    if (timer !== null) {
      stop();
      return;
    }
    if (step === longest() - 1) step = -1;
    if (!window.matchMedia("(prefers-reduced-motion: no-preference)").matches) {
      goTo(longest() - 1);
      return;
    }
    player.textContent = "Stop";
    timer = setInterval(() => {
      goTo(step + 1);
      if (step === longest() - 1) stop();
    }, 160);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    player.textContent = "Play";
  }

  function show() {
    markSlots(place);
    markRequest(request);
    slider.max = String(longest());
    slider.value = String(step + 1);
    at.textContent = `step ${step + 1} of ${longest()}`;
    slider.setAttribute("aria-valuetext", at.textContent);
    status.textContent = said();
    shown().forEach((timeline, i) => {
      const name = timeline.whole ? "Waiting for the whole batch" : "Continuous batching";
      panels[i].title.replaceChildren(`${name} `, make("span", { class: "soft" }, `all done after ${timeline.steps} steps`));
      panels[i].now.textContent = happening(timeline);
      showText(panels[i].text, timeline);
    });
    showTable();
    draw();
  }

  function said() {
    const ways = shown().map((timeline) => {
      const state = timeline.state(request, step);
      const tokens = `${timeline.written(request, step)} of ${data.requests[request].text.length} tokens`;
      return `${timeline.whole ? "with whole batches it" : "with continuous batching it"} ${state === "done" ? "is done" : state} (${tokens})`;
    });
    return `Step ${step + 1}, request ${letter(request)}: ${ways.join(", ").replace(/it not there yet/g, "it is not there yet")}.`;
  }

  // One step of a timeline in words.
  function happening(timeline) {
    if (step >= timeline.steps) return "All are done.";
    const parts = [];
    for (const i of arrivals.map((_, number) => number).filter((number) => timeline.courses[number].read.has(step))) {
      const { reads, begin: from } = timeline.courses[i];
      const until = reads.reduce((sum, [when, count]) => (when <= step ? sum + count : sum), 0);
      parts.push(`reads to token ${until} of ${letter(i)}'s prompt${from === step ? ", which has just got its slot" : ""}`);
    }
    const written = timeline.courses.map((_, i) => i).filter((i) => timeline.courses[i].drawn.has(step));
    if (written.length > 0) parts.push(`writes for ${letters(written)}`);
    const waiting = timeline.waiting(step);
    if (waiting.length > 0) parts.push(`${letters(waiting)} ${waiting.length === 1 ? "waits" : "wait"} for a slot`);
    const words = parts.length === 0 ? "nobody is there" : parts.join("; ");
    return `In this step (${decimals(timeline.milliseconds[step], 2)} ms): ${words}.`;
  }

  function showText(place, timeline) {
    const { text } = data.requests[request];
    const [before, now] = [timeline.written(request, step - 1), timeline.written(request, step)];
    const fresh = text.slice(before, now).join("");
    place.setAttribute("aria-label", `What ${letter(request)} has been sent, ${timeline.whole ? "whole batches" : "continuous batching"}`);
    place.replaceChildren(text.slice(0, before).join(""), ...(fresh === "" ? [] : [make("mark", {}, fresh)]));
    if (now === 0) place.append(make("span", { class: "soft" }, "(nothing yet)"));
  }

  // A row of the table: for both ways a value, and perhaps a softer one beside it.
  function line(words, cells) {
    const values = cells.map(([first, second]) => {
      const more = second === undefined ? [] : [" ", make("span", { class: "soft" }, second)];
      return make("td", {}, first, ...more);
    });
    return make("tr", {}, make("th", { scope: "row" }, words), ...values);
  }

  function showTable() {
    const one = shown().map((timeline) => timeline.measures(request));
    const every = shown().map((timeline) => timeline.ofAll());
    const spans = (words, name, pair) => line(words, pair.map((measured) => spanOf(measured[name])));
    const rates = (pair) => line("tokens a second", pair.map((measured) => [whole(measured.rate)]));
    const group = (words) => make("tr", { class: "group" }, make("th", { scope: "rowgroup", colspan: "3" }, words));
    const titles = ["", "continuous", "whole batches"].map((words) => make("th", { scope: "col" }, words));
    table.replaceChildren(
      make("thead", {}, make("tr", {}, ...titles)),
      make("tbody", {}, group(`Request ${letter(request)}, from when it was asked`), spans("to a slot", "wait", one),
        spans("to the first token", "first", one), spans("to the last token", "done", one), rates(one)),
      make("tbody", {}, group(`All ${arrivals.length} requests`), spans("to a slot, mean", "wait", every),
        spans("to the first token, longest", "first", every), spans("until all are done", "all", every), rates(every),
        line("tokens in a step", every.map((measured) => [decimals(measured.perStep, 2)]))),
    );
  }

  function draw() {
    const width = root.clientWidth;
    const edge = width < 520 ? 44 : 62;
    const queue = 8 + QUEUE * Math.max(1, ...shown().map((timeline) => timeline.longestQueue()));
    const cell = (width - edge - 1) / longest();
    const slowest = Math.max(...shown().flatMap((timeline) => timeline.milliseconds));
    grids = shown().map((timeline, i) => {
      const bottom = queue + SLOT * timeline.slots;
      const context = canvasOf(panels[i].canvas, width, bottom + COST + 20);
      context.font = "12px system-ui, sans-serif";
      context.textBaseline = "middle";
      const grid = { context, timeline, edge, cell, queue, bottom };
      drawFrame(grid, width);
      drawQueue(grid);
      timeline.courses.forEach((_, number) => drawCourse(grid, number));
      drawCosts(grid, slowest);
      drawStep(grid);
      return grid;
    });
  }

  function drawFrame({ context, timeline, edge, cell, queue, bottom }, width) {
    context.fillStyle = colour("soft");
    context.textAlign = "right";
    context.fillText(width < 520 ? "line" : "in line", edge - 6, queue / 2);
    for (let slot = 0; slot < timeline.slots; slot++) {
      context.fillText(width < 520 ? String(slot + 1) : `slot ${slot + 1}`, edge - 6, queue + SLOT * (slot + 0.5));
    }
    context.fillText("ms", edge - 6, bottom + COST / 2 + 4);
    context.textAlign = "center";
    for (let tick = 10; tick <= longest(); tick += 10) {
      context.fillText(String(tick), edge + (tick - 0.5) * cell, bottom + COST + 12);
    }
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    for (let slot = 0; slot <= timeline.slots; slot++) {
      const y = Math.round(queue + SLOT * slot) + 0.5;
      context.strokeRect(edge, y, cell * timeline.steps, 0);
    }
  }

  // Those in line, step by step: the next one lowest.
  function drawQueue({ context, timeline, edge, cell, queue }) {
    for (let at = 0; at < timeline.steps; at++) {
      timeline.waiting(at).forEach((number, row) => {
        context.fillStyle = colour(number === request ? "ink" : "line");
        context.fillRect(edge + at * cell, queue - 3 - QUEUE * (row + 1), Math.max(cell - 0.5, 0.5), QUEUE - 1);
      });
    }
  }

  function drawCourse({ context, timeline, edge, cell, queue }, number) {
    const { slot, begin: from, last } = timeline.courses[number];
    const [left, top, wide] = [edge + from * cell, queue + SLOT * slot + 2, (last + 1 - from) * cell];
    const high = SLOT - 4;
    context.fillStyle = colour("line");
    context.fillRect(left, top, wide, high);
    for (let at = from; at <= last; at++) {
      const state = timeline.state(number, at);
      if (state === "waits in its slot") continue;
      context.fillStyle = colour(state === "reads" ? "orange" : "blue");
      context.fillRect(edge + at * cell, top, cell + 0.3, high);
    }
    context.strokeStyle = colour(number === request ? "ink" : "paper");
    context.lineWidth = number === request ? 3 : 1.5;
    context.strokeRect(left, top, wide, high);
    if (wide < 12) return;
    const middle = left + wide / 2;
    context.fillStyle = colour("paper");
    context.beginPath();
    context.arc(middle, top + high / 2, Math.min(8, wide / 2 - 1), 0, 2 * Math.PI);
    context.fill();
    context.fillStyle = colour("ink");
    context.textAlign = "center";
    context.fillText(letter(number), middle, top + high / 2 + 1);
  }

  function drawCosts({ context, timeline, edge, cell, bottom }, slowest) {
    timeline.milliseconds.forEach((time, at) => {
      const high = (time / slowest) * (COST - 4);
      context.fillStyle = colour("soft");
      context.fillRect(edge + at * cell, bottom + COST - high, Math.max(cell - 1, 0.5), high);
    });
  }

  function drawStep({ context, timeline, edge, cell, bottom }) {
    if (step >= timeline.steps) return;
    context.strokeStyle = colour("ink");
    context.lineWidth = 1.5;
    context.strokeRect(edge + step * cell, 1, cell, bottom + COST - 1);
  }

  // A click chooses the step, and the request under it.
  function pick(event, { timeline, edge, cell, queue, bottom }) {
    const at = Math.floor((event.offsetX - edge) / cell);
    if (at < 0 || at >= timeline.steps) return;
    const { offsetY } = event;
    const inSlot = timeline.courses.findIndex(
      ({ slot, begin: from, last }) => slot === Math.floor((offsetY - queue) / SLOT) && from <= at && at <= last,
    );
    const inLine = timeline.waiting(at)[Math.floor((queue - 3 - offsetY) / QUEUE)];
    if (offsetY < queue && inLine !== undefined) request = inLine;
    else if (offsetY < bottom && inSlot >= 0) request = inSlot;
    stop();
    goTo(at);
  }

  const markSlots = choices(slotList, slotChips, (index) => {
    stop();
    place = index;
    goTo(step);
  });
  const markRequest = choices(list, chips, (index) => {
    request = index;
    show();
  }, () => perRow(chips));
  panels.forEach(({ canvas }, i) => canvas.addEventListener("click", (event) => pick(event, grids[i])));

  const key = [["orange", "a part of its prompt is read"], ["blue", "a token is written"], ["line", "waits, in line or in its slot"]];
  const legend = make("p", { class: "soft legend" },
    ...key.flatMap(([name, words]) => [make("span", { class: `swatch ${name}` }), `${words} `]), make("br"), "ms: how long each step took.");
  const intro = "The same requests, asked for before the same steps, written by the same engine in two ways. Choose a request and walk the steps.";
  root.append(
    make("p", { class: "soft" }, intro),
    make("div", { class: "controls" }, make("span", {}, "Slots"), slotList),
    make("div", { class: "controls" }, make("span", {}, "Request"), list),
    ...panels.flatMap(({ title, canvas, now }) => [title, canvas, now]), legend,
    make("div", { class: "controls" },
      button("Back", () => goTo(step - 1)), button("Next step", () => goTo(step + 1), { class: "first" }), player,
      make("label", { for: "step", class: "soft" }, "Step"), slider, at),
    status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "Texts" }, ...panels.flatMap(({ text }, i) => [make("h3", {}, i === 0 ? "Sent so far, continuous" : "Sent so far, whole batches"), text])),
      make("section", { class: "scroll times", "aria-label": "Times" }, table)),
  );
  begin();
  show();
  return draw;
});

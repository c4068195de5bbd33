"use strict";
// Reward against KL: the policy reference · exp(reward / beta) on a few real answers, where it stands in the plane
// for each beta, and where trained policies stand.

const SHOWN = 12; // answers with a bar
const [HIGHEST, LOWEST] = [1, -1.7]; // of log10 beta
const SHAPES = ["circle", "triangle", "square", "diamond", "down", "plus"];

// The softmax's logarithm.
function logSoftmax(numbers) {
  const largest = Math.max(...numbers);
  const sum = numbers.reduce((total, number) => total + Math.exp(number - largest), 0);
  return numbers.map((number) => number - largest - Math.log(sum));
}

// All answers to a prompt that count; policies are log-probabilities on them.
class World {
  constructor({ prompt, answers, logprobs, rewards }) {
    this.prompt = prompt;
    this.answers = answers;
    this.policies = logprobs.map(logSoftmax);
    this.rewards = rewards;
    this.covered = logprobs.map((row) => row.reduce((sum, logprob) => sum + Math.exp(logprob), 0));
  }

  // The policy that has the most reward less beta times KL.
  best(beta, which) {
    return logSoftmax(this.policies[0].map((logprob, i) => logprob + this.rewards[which][i] / beta));
  }

  measures(policy) {
    const over = (value) => policy.reduce((sum, logprob, i) => sum + Math.exp(logprob) * value(logprob, i), 0);
    return {
      kl: Math.max(0, over((logprob, i) => logprob - this.policies[0][i])),
      rewards: this.rewards.map((scores) => over((_, i) => scores[i])),
    };
  }
}

// The mean over some worlds of what a policy in each of them has.
function meanOf(worlds, policyIn) {
  const each = worlds.map((world) => world.measures(policyIn(world)));
  const mean = (value) => each.reduce((sum, one) => sum + value(one), 0) / each.length;
  return { kl: mean((one) => one.kl), rewards: each[0].rewards.map((_, i) => mean((one) => one.rewards[i])) };
}

// The beta whose best policies have this KL; null where none has so much.
function betaFor(worlds, which, kl) {
  let [low, high] = [1e-3, 1e4];
  const at = (beta) => meanOf(worlds, (world) => world.best(beta, which)).kl;
  if (at(low) < kl) return null;
  for (let i = 0; i < 80; i++) {
    const middle = Math.sqrt(low * high);
    if (at(middle) > kl) low = middle;
    else high = middle;
  }
  return high;
}

explore((root, data) => {
  const worlds = data.prompts.map((entry) => new World(entry));
  const names = data.rewards;
  let chosen = 0; // of worlds; the last: all of them
  let which = 0; // of rewards: the one that is climbed
  let exponent = Math.log10(0.3);
  let shownPolicy = 0; // the best one; from 1: of data.policies but the reference

  const worldChips = [...worlds.map(({ prompt }) => prompt), "all"].map((words) => make("span", { class: "chip", role: "radio" }, visible(words)));
  const worldList = make("div", { class: "chips", role: "radiogroup", "aria-label": "Prompt" }, ...worldChips);
  const rewardChips = names.map((words) => make("span", { class: "chip", role: "radio" }, words));
  const rewardList = make("div", { class: "chips", role: "radiogroup", "aria-label": "Reward that is climbed" }, ...rewardChips);
  const policyChips = ["the best for β", ...data.policies.slice(1)].map((words) => make("span", { class: "chip", role: "radio" }, words));
  const policyList = make("div", { class: "chips", role: "radiogroup", "aria-label": "Policy whose answers are shown" }, ...policyChips);
  const slider = make("input", { type: "range", id: "beta", class: "steps", min: String(LOWEST), max: String(HIGHEST), step: "0.02", value: String(exponent), oninput: () => {
    exponent = Number(slider.value);
    shownPolicy = 0;
    show();
  } });
  const said = make("output", { class: "number" });
  const status = make("p", { class: "status", role: "status" });
  const planes = names.map(() => ({ title: make("h3", {}), canvas: make("canvas", { class: "plane", "aria-hidden": "true" }) }));
  const barsTitle = make("h3", {});
  const bars = make("div", { class: "bars answers" });
  const note = make("p", { class: "soft" });

  function beta() {
    return 10 ** exponent;
  }

  function here() {
    return chosen === worlds.length ? worlds : [worlds[chosen]];
  }

  function policyIn(world) {
    return shownPolicy === 0 ? world.best(beta(), which) : world.policies[shownPolicy];
  }

  function policyName() {
    return shownPolicy === 0 ? `by the best policy for β = ${shownBeta()}` : `by ${data.policies[shownPolicy]}`;
  }

  function shownBeta() {
    return decimals(beta(), beta() < 0.1 ? 3 : 2);
  }

  function show() {
    markWorld(chosen);
    markReward(which);
    markPolicy(shownPolicy);
    said.textContent = `β = ${shownBeta()}`;
    slider.value = String(exponent);
    slider.setAttribute("aria-valuetext", shownBeta());
    showBars();
    say();
    draw();
  }

  function say() {
    const { kl, rewards } = meanOf(here(), policyIn);
    const other = names.length === 1 ? "" : `, ${decimals(rewards[1 - which], 2)} by ${names[1 - which]}`;
    const earned = `KL ${decimals(kl, 2)} nats, mean reward ${decimals(rewards[which], 2)} by ${names[which]}${other}.`;
    if (shownPolicy === 0) {
      const objective = rewards[which] - beta() * kl;
      status.textContent = `The best policy for β = ${shownBeta()}: ${earned} Reward − β · KL is ${decimals(objective, 2)}: where the line meets the axis.`;
      return;
    }
    const same = betaFor(here(), which, kl);
    const most = same === null ? null : meanOf(here(), (world) => world.best(same, which)).rewards[which];
    const beyond = most === null ? "No best policy goes so far." : `For the same KL the best policy has ${decimals(most, 2)} (β = ${decimals(same, 2)}).`;
    status.textContent = `${data.policies[shownPolicy]}: ${earned} ${beyond}`;
  }

  function showBars() {
    if (chosen === worlds.length) showPrompts();
    else showAnswers(worlds[chosen]);
  }

  // Answers in a fixed order, so that none jumps while beta is dragged.
  function showAnswers(world) {
    const p = policyIn(world).map(Math.exp);
    const reference = world.policies[0].map(Math.exp);
    const ever = [0, 1].slice(0, names.length).map((number) => world.best(0.05, number));
    const weights = p.map((_, i) => Math.max(...[...world.policies, ...ever].map((policy) => Math.exp(policy[i]))));
    const order = weights.map((_, i) => i).sort((a, b) => weights[b] - weights[a]).slice(0, SHOWN);
    order.sort((a, b) => reference[b] - reference[a]);
    const longest = Math.max(...order.map((i) => Math.max(p[i], reference[i])));
    barsTitle.textContent = `Answers to ${visible(world.prompt)}, ${policyName()}`;
    bars.replaceChildren(...order.map((i) => {
      const reward = world.rewards[which][i];
      const parts = bar(visible(world.answers[i]), null, p[i], longest, reference[i]);
      return make("div", { class: "row" }, ...parts, make("span", { class: "share soft reward" }, decimals(reward, 2)));
    }));
    const rest = world.answers.map((_, i) => i).filter((i) => !order.includes(i));
    const share = rest.reduce((sum, i) => sum + p[i], 0);
    note.textContent = `${rest.length} other answers together ${percent(share)}. Last column: the reward by ${names[which]}; the line in a bar: ${data.policies[0]}. `
      + `These ${world.answers.length} answers have ${percent(Math.min(...world.covered))} or more of what each policy would give.`;
  }

  // The mean reward of each prompt.
  function showPrompts() {
    const earned = worlds.map((world) => world.measures(policyIn(world)).rewards[which]);
    const before = worlds.map((world) => world.measures(world.policies[0]).rewards[which]);
    const bottom = Math.min(0, ...worlds.flatMap((world) => world.rewards[which]));
    const top = Math.max(...worlds.flatMap((world) => world.rewards[which]));
    barsTitle.textContent = `Mean reward of each prompt, ${policyName()}`;
    bars.replaceChildren(...worlds.map((world, i) => {
      const parts = bar(visible(world.prompt), null, earned[i] - bottom, top - bottom, before[i] - bottom);
      parts[2].textContent = decimals(earned[i], 2);
      return make("div", { class: "row" }, ...parts, make("span", {}));
    }));
    note.textContent = `By ${names[which]}; the line in a bar: ${data.policies[0]}. One β for all prompts.`;
  }

  function draw() {
    const exponents = Array.from({ length: 70 }, (_, i) => HIGHEST + 0.5 - (i * (HIGHEST + 0.5 - LOWEST)) / 69);
    const curve = exponents.map((power) => meanOf(here(), (world) => world.best(10 ** power, which)));
    const points = data.policies.map((_, i) => meanOf(here(), (world) => world.policies[i]));
    const now = meanOf(here(), (world) => world.best(beta(), which));
    planes.forEach(({ title, canvas }, number) => {
      const climbed = number === 0;
      const reward = climbed ? which : 1 - which;
      title.replaceChildren(climbed ? `What is climbed: ${names[reward]}` : `The same policies by ${names[reward]}`);
      drawPlane(canvas, { curve, points, now, reward, climbed });
    });
  }

  function drawPlane(canvas, { curve, points, now, reward, climbed }) {
    const width = Math.min(canvas.parentElement.clientWidth, 560);
    const height = 300;
    const [left, bottom] = [40, 34];
    const context = canvasOf(canvas, width, height);
    const every = [...curve, ...points, now];
    const values = every.map((one) => one.rewards[reward]);
    const intercept = now.rewards[reward] - beta() * now.kl;
    if (climbed) values.push(intercept);
    const pad = 0.08 * (Math.max(...values) - Math.min(...values) || 1);
    const [low, high] = [Math.min(...values) - pad, Math.max(...values) + pad];
    const far = 1.08 * Math.max(...every.map((one) => one.kl), 1e-3);
    const x = (kl) => left + (kl / far) * (width - left - 8);
    const y = (value) => 6 + ((high - value) / (high - low)) * (height - bottom - 8);
    drawAxes(context, { x, y, left, far, low, high, height, width });
    const path = (name, dashes, places) => {
      context.strokeStyle = colour(name);
      context.lineWidth = 2.5;
      context.setLineDash(dashes);
      context.beginPath();
      places.forEach(([kl, value], i) => (i === 0 ? context.moveTo(x(kl), y(value)) : context.lineTo(x(kl), y(value))));
      context.stroke();
      context.setLineDash([]);
    };
    path("blue", [], curve.map((one) => [one.kl, one.rewards[reward]]));
    if (climbed) {
      const until = Math.min(far, now.kl + (high - now.rewards[reward]) / beta());
      path("orange", [6, 4], [[0, intercept], [until, intercept + beta() * until]]);
    }
    const places = points.map((point) => [x(point.kl), y(point.rewards[reward])]);
    places.forEach((place, i) => drawPoint(context, place, i));
    nameAll(context, places, width, height - bottom);
    context.fillStyle = colour("orange");
    context.beginPath();
    context.arc(x(now.kl), y(now.rewards[reward]), 6.5, 0, 2 * Math.PI);
    context.fill();
  }

  function drawAxes(context, { x, y, left, far, low, high, height, width }) {
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = colour("soft");
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    const steps = (span) => [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50].find((step) => span / step <= 6) ?? span / 5;
    context.textAlign = "right";
    context.textBaseline = "middle";
    const [down, along] = [steps(high - low), steps(far)];
    for (let tick = Math.ceil(low / down) * down; tick <= high; tick += down) {
      context.fillText(decimals(tick + 0, down < 1 ? 1 : 0).replace("−0.0", "0.0"), left - 6, y(tick));
      context.strokeRect(left, y(tick), width - left - 8, 0);
    }
    context.textAlign = "center";
    for (let tick = 0; tick <= far; tick += along) context.fillText(decimals(tick, along < 1 ? 1 : 0), x(tick), height - 24);
    context.fillText(`KL from ${data.policies[0]} (nats)`, (left + width) / 2, height - 8);
  }

  function drawPoint(context, [x, y], number) {
    const radius = 6;
    const corners = {
      triangle: [[0, -1], [1, 0.8], [-1, 0.8]], down: [[0, 1], [1, -0.8], [-1, -0.8]], square: [[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]],
      diamond: [[0, -1.1], [1.1, 0], [0, 1.1], [-1.1, 0]], plus: [[-1, -0.3], [1, -0.3], [1, 0.3], [-1, 0.3]],
    }[SHAPES[number % SHAPES.length]];
    context.beginPath();
    if (corners === undefined) context.arc(x, y, radius - 1, 0, 2 * Math.PI);
    else corners.forEach(([a, b], i) => (i === 0 ? context.moveTo(x + a * radius, y + b * radius) : context.lineTo(x + a * radius, y + b * radius)));
    context.closePath();
    context.fillStyle = colour("ink");
    context.fill();
    if (number > 0 && number === shownPolicy) {
      context.strokeStyle = colour("orange");
      context.lineWidth = 3;
      context.stroke();
    }
  }

  // Each point's name where it lies on no other name and no other point, as far as that goes.
  function nameAll(context, places, width, height) {
    const taken = places.map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
    const free = (box) => taken.every((other) => box[0] > other[2] || other[0] > box[2] || box[1] > other[3] || other[1] > box[3]);
    context.textAlign = "left";
    context.fillStyle = colour("ink");
    places.forEach(([x, y], number) => {
      const wide = context.measureText(data.policies[number]).width;
      const tries = [[x + 10, y], [x - 10 - wide, y], [x - wide / 2, y + 16], [x - wide / 2, y - 16], [x + 8, y + 14], [x + 8, y - 14]];
      const boxes = tries.map(([left, middle]) => [left, middle - 6, left + wide, middle + 6]);
      const inside = (box) => box[0] > 40 && box[2] < width && box[1] > 0 && box[3] < height;
      const at = Math.max(0, boxes.findIndex((box) => inside(box) && free(box)));
      taken.push(boxes[at]);
      context.fillText(data.policies[number], ...tries[at]);
    });
  }

  const markWorld = choices(worldList, worldChips, (index) => {
    chosen = index;
    show();
  }, () => perRow(worldChips));
  const markReward = choices(rewardList, rewardChips, (index) => {
    which = index;
    show();
  });
  const markPolicy = choices(policyList, policyChips, (index) => {
    shownPolicy = index;
    show();
  }, () => perRow(policyChips));

  const row = (words, list) => make("div", { class: "controls" }, make("span", { class: "soft" }, words), list);
  root.append(
    make("p", { class: "soft" }, "The blue line: the most reward that there is for each KL. The orange point is the best policy for β, and the orange line through it rises by β for each nat."),
    row("Prompt", worldList), ...(names.length > 1 ? [row("Reward that is climbed", rewardList)] : []),
    make("div", { class: "controls" }, make("label", { for: "beta" }, "β, the price of a nat"), slider, said),
    status,
    make("div", { class: "columns" },
      ...planes.map(({ title, canvas }) => make("section", { "aria-label": "Reward against KL" }, title, canvas))),
    make("section", { "aria-label": "Answers" }, row("Show", policyList), barsTitle, bars, note));
  chosen = worlds.length;
  show();
  return draw;
});

"use strict";
// The residual stream of a phrase, read behind each part by the last norm and the head: choose a place, and follow
// a token through the layers.

explore((root, data) => {
  const { tokens, places, vocabulary, columns } = data;
  const [time, depth] = [tokens.length, places.length];
  let position = mostLearned(); // the column, and the row in it
  let place = depth - 1;
  let followed = null; // the token that is followed; null: what comes, or what the model says

  const cells = places.flatMap((_, row) => tokens.map((_, column) => cellOf(row, column)));
  const grid = make("div", { class: "lens", role: "listbox", "aria-label": "Places in the stream: down the layers, across the positions" });
  grid.style.setProperty("--across", time);
  const status = make("p", { class: "status", role: "status" });
  const saysTitle = make("h3", {});
  const says = make("div", { class: "bars says", role: "group", "aria-label": "What it would say" });
  const wayTitle = make("h3", {});
  const way = make("div", {});

  // The position at which the layers are worth most to the token that comes.
  function mostLearned() {
    const gains = columns.map(({ next, p }) => (next === null ? -1 : p[depth - 1][0] - p[0][0]));
    return gains.indexOf(Math.max(...gains));
  }

  // Of a place: the kept tokens, likeliest first, as places in the column's list.
  function ranked(row, column) {
    const p = columns[column].p[row];
    return p.map((_, i) => i).sort((a, b) => p[b] - p[a] || a - b);
  }

  function word(column, i) {
    return vocabulary[columns[column].tokens[i]];
  }

  function quoted(text) {
    return `‹${visible(text)}›`;
  }

  // What comes is the first of a column's tokens, where anything does.
  function comes(column) {
    return columns[column].next === null ? null : 0;
  }

  function cellOf(row, column) {
    const best = ranked(row, column)[0];
    const share = columns[column].p[row][best];
    const right = best === comes(column);
    const name = `${places[row]}, position ${column + 1}: ${spoken(word(column, best))}, ${percent(share)}${right ? ", as it comes" : ""}`;
    const cell = make("span", { class: right ? "said right" : "said", role: "option", "aria-label": name }, visible(word(column, best)));
    cell.style.background = `color-mix(in srgb, var(--blue) ${Math.round(92 * share)}%, var(--paper))`;
    if (share > 0.55) cell.style.color = "var(--on-blue)";
    return cell;
  }

  // The mean of what the tokens that come cost, in nats, if the model ended at this place.
  function lossAt(row) {
    const costs = columns.filter((column) => column.next !== null).map((column) => -Math.log(column.p[row][0]));
    return costs.reduce((a, b) => a + b, 0) / costs.length;
  }

  function fillGrid() {
    const heading = (text, more, kind) => make("span", { class: kind, "aria-hidden": "true" }, text, make("small", {}, more));
    const line = (name, texts, more) => {
      grid.append(heading(name, more, "name"));
      texts.forEach((text) => grid.append(make("span", { class: "given", "aria-hidden": "true" }, text)));
    };
    line("it reads", tokens.map(visible), time > 1 ? "loss" : "");
    places.forEach((name, row) => {
      grid.append(heading(name, time > 1 ? decimals(lossAt(row), 2) : "", "name"));
      grid.append(...cells.slice(row * time, (row + 1) * time));
    });
    line("what comes", columns.map((column) => (column.next === null ? "" : visible(vocabulary[column.next]))), "");
  }

  function show() {
    mark(place * time + position);
    const column = columns[position];
    const target = followed ?? comes(position) ?? ranked(depth - 1, position)[0];
    cells.forEach((cell, i) => cell.classList.toggle("column", i % time === position));
    const order = ranked(place, position);
    const best = order.slice(0, 3).map((i) => `${quoted(word(position, i))} ${percent(column.p[place][i])}`);
    const name = place === 0 ? "With the embedding alone" : `Behind ${places[place]}`;
    const after = column.next === null ? "" : ` What comes is ${quoted(vocabulary[column.next])}.`;
    status.textContent = `${name}, having read up to ${quoted(tokens[position])} (position ${position + 1}), it would say ${best.join(", ")}.${after}`;
    showSays(order, target);
    showWay(target);
  }

  function showSays(order, target) {
    const p = columns[position].p[place];
    const top = order.slice(0, data.best);
    if (comes(position) !== null && !top.includes(comes(position))) top.push(comes(position));
    const focused = says.contains(document.activeElement);
    saysTitle.textContent = `${places[place]}, position ${position + 1}: it would say`;
    says.replaceChildren();
    for (const i of top) {
      const share = `${spoken(word(position, i))}, ${percent(p[i])}${i === comes(position) ? ", as it comes" : ""}: follow it`;
      const [label, track, number] = bar(visible(word(position, i)), null, p[i], 1);
      if (i === comes(position)) label.classList.add("right");
      const row = make("button", {
        type: "button", class: "row", "aria-label": share, "aria-pressed": String(i === target), onclick: () => follow(i),
      }, label, track, number);
      says.append(row);
      if (focused && i === target) row.focus();
    }
    const rest = 1 - top.reduce((sum, i) => sum + p[i], 0);
    says.append(make("p", { class: "soft row wide" }, `all others together ${percent(Math.max(0, rest))}`));
  }

  function follow(i) {
    followed = i;
    show();
  }

  // One token's probability from place to place, and how much each part has added to the stream.
  function showWay(target) {
    const { p } = columns[position];
    wayTitle.textContent = `${quoted(word(position, target))} on its way down the stream`;
    const titles = ["", "its share", "", "added", "length"].map((title) => make("th", { scope: "col" }, title));
    const rows = places.map((name, row) => {
      const [, track, share] = bar("", null, p[row][target], 1);
      const added = row === 0 ? "" : decimals(data.added[row - 1][position], 1);
      const cellsOf = [name, share.textContent, track, added, decimals(data.lengths[row][position], 1)];
      const line = make("tr", { class: row === place ? "here" : "" }, ...cellsOf.map((content) => make("td", {}, content)));
      return line;
    });
    const table = make("table", { class: "way" }, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...rows));
    way.replaceChildren(make("div", { class: "scroll" }, table));
  }

  fillGrid();
  const mark = choices(grid, cells, (index) => {
    if (index % time !== position) followed = null;
    place = Math.floor(index / time);
    position = index % time;
    show();
  }, () => time);
  root.append(
    make("p", { class: "soft" }, "A column is a position of the phrase; from top to bottom its vector passes the parts of the model, and each adds to it. "
      + "Each row reads the vector there with the model's own last norm and head, as if the model ended there. The stronger the colour, the surer; a frame: it is what comes."),
    make("div", { class: "scroll lensed" }, grid), status,
    make("div", { class: "columns" },
      make("section", { "aria-label": "What a place would say" }, saysTitle, says,
        make("p", { class: "soft" }, "Choose a token to follow it on its way.")),
      make("section", { "aria-label": "A token on its way" }, wayTitle, way,
        make("p", { class: "soft" }, "Added: how long the vector is that a part adds to the stream. Length: that of the stream behind it."))));
  show();
  grid.parentElement.scrollLeft = cells[position].offsetLeft - grid.parentElement.clientWidth / 2;
  return () => {};
});

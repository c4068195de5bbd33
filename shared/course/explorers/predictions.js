"use strict";
// A phrase read by several models: what each token cost, and what was expected in its place. A place that is chosen
// in one model's tokens is chosen in all.

explore((root, data) => {
  const dearest = Math.max(...data.models.flatMap(({ places }) => places.map(({ bits }) => bits)), 1);
  const status = make("p", { class: "status", role: "status" });
  const panels = data.models.map(panelOf);
  let from = data.start; // the chosen part of the text, in characters
  let to = data.start + 1;

  function quoted(text) {
    return `‹${visible(text)}›`;
  }

  function bits(number) {
    return `${decimals(number, number < 9.95 ? 2 : 1)} bits`;
  }

  function panelOf(model) {
    const chips = model.tokens.map((token, i) => {
      const cost = i === 0 ? "the first, not predicted" : bits(model.places[i - 1].bits);
      const chip = make("span", { class: "chip cost", role: "option", "aria-label": `${spoken(token)}, ${cost}`, title: cost }, visible(token));
      if (i > 0) {
        const share = model.places[i - 1].bits / dearest;
        chip.style.background = `color-mix(in srgb, var(--blue) ${Math.round(90 * share)}%, var(--paper))`;
        if (share > 0.55) chip.style.color = "var(--on-blue)";
      }
      return chip;
    });
    const list = make("div", { class: "chips costs", role: "listbox", "aria-label": `${model.name}: its tokens` });
    chips.forEach((chip, i) => {
      list.append(chip);
      if (model.tokens[i].endsWith("\n")) list.append(make("span", { class: "break", role: "presentation" }));
    });
    const title = make("h3", {});
    const bars = make("div", { class: "bars" });
    const mark = choices(list, chips, (i) => {
      from = model.begins[i];
      to = from + model.tokens[i].length;
      show();
    }, () => perRow(chips));
    const counts = `${decimals(model.bits_per_byte, 2)} bits per byte; ${whole(model.vocab_size)} tokens in the vocabulary`;
    const section = make("section", { "aria-label": model.name },
      make("h3", {}, model.name, " ", make("span", { class: "soft" }, counts)), list, title, bars);
    return { model, chips, mark, title, bars, section };
  }

  // The tokens that have a share in the chosen part: the places of the first and the last.
  function tokensAt({ begins }) {
    return [from, to - 1].map((place) => begins.findLastIndex((begin) => begin <= place));
  }

  function show() {
    const words = panels.map((panel) => {
      const [first, last] = tokensAt(panel.model);
      panel.mark(first);
      panel.chips.forEach((chip, i) => chip.classList.toggle("part-of", i >= first && i <= last));
      showExpected(panel, first);
      return costOf(panel.model, first, last);
    });
    status.textContent = `${words.join("; ")}.`;
  }

  function costOf({ name, tokens, places }, first, last) {
    const text = quoted(tokens.slice(first, last + 1).join(""));
    if (first === 0) return `${name} begins with ${text}, whose first token it does not predict`;
    const sum = places.slice(first - 1, last).reduce((total, place) => total + place.bits, 0);
    if (last > first) return `${text} costs ${name} ${bits(sum)} in ${last - first + 1} tokens`;
    const { p, rank } = places[first - 1];
    return `${text} costs ${name} ${bits(sum)} (${percent(p)}, number ${whole(rank)} of its list)`;
  }

  function showExpected({ model, title, bars }, i) {
    bars.replaceChildren();
    if (i === 0) {
      title.textContent = "The first token: nothing stands before it";
      return;
    }
    const { expected, p } = model.places[i - 1];
    title.textContent = `Behind ${quoted(model.tokens.slice(0, i).join("").slice(-12))} it expected`;
    const longest = Math.max(...expected.map(([, share]) => share));
    const add = (token, share, comes) => {
      const parts = bar(visible(token), spoken(token) + (comes ? ", as it comes" : ""), share, longest);
      parts[0].classList.toggle("right", comes);
      bars.append(make("div", { class: "row" }, ...parts));
    };
    expected.forEach(([token, share, comes]) => add(token, share, comes));
    const found = expected.some(([, , comes]) => comes);
    if (!found) add(model.tokens[i], p, true);
    const rest = 1 - expected.reduce((sum, [, share]) => sum + share, found ? 0 : p);
    bars.append(make("p", { class: "soft row wide" }, `all others together ${percent(Math.max(0, rest))}`));
  }

  root.append(
    make("p", { class: "soft" }, "Choose a token, in any model's row: the others show the same place of the text. The stronger the blue, the more bits it cost; a frame: it is what comes. "
      + "Bits per byte are those of what all models predict."),
    status, make("div", { class: "vocabularies" }, ...panels.map(({ section }) => section)));
  show();
  return () => {};
});

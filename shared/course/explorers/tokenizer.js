"use strict";
// A playground of tokenizers: the tokens of what is typed, for each vocabulary, and the merges one by one.

const TINTS = 4;

// Bytes as text; those that are no character by themselves as \x and two digits.
function textOf(bytes) {
  const array = Uint8Array.from(bytes);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(array);
  } catch {
    return bytes.map((b) => (b >= 32 && b < 127 ? String.fromCharCode(b) : `\\x${b.toString(16).padStart(2, "0")}`)).join("");
  }
}

async function tokenizerOf(entry) {
  return entry.kind === "characters" ? new Characters(entry) : BytePairs.from(entry);
}

explore((root, data) => {
  const names = data.vocabularies.map((entry) => entry.name);
  const field = make("textarea", { id: "text", rows: "3", spellcheck: "false", oninput: show });
  field.value = data.text;
  const withIds = make("input", { type: "checkbox", id: "ids", onchange: show });
  const panels = names.map((name) => {
    const count = make("p", { class: "soft counts" });
    const chips = make("div", { class: "tokens", role: "listbox", "aria-label": `Tokens of ${name}` });
    const size = data.vocabularies[names.indexOf(name)].size;
    const title = make("h3", {}, name, make("span", { class: "soft" }, ` · vocabulary of ${whole(size)}`));
    return { chips, count, section: make("section", { "aria-label": name }, title, count, chips) };
  });
  const status = make("p", { class: "status", role: "status" });
  const replayed = data.vocabularies.map((entry, i) => i).filter((i) => data.vocabularies[i].kind === "bpe");
  const which = make("select", { id: "which", onchange: () => begin(0) },
    ...replayed.map((i) => make("option", { value: String(i) }, names[i])));
  const steps = make("input", { type: "range", id: "step", min: "0", value: "0", oninput: () => begin(Number(steps.value)) });
  const merge = make("p", { class: "status merge", role: "status" });
  const stage = make("div", { class: "tokens stage" });
  const back = button("Back", () => begin(Number(steps.value) - 1));
  const on = button("Next merge", () => begin(Number(steps.value) + 1), { class: "first" });
  const play = button("Play", () => (timer === null ? start() : stop()));
  let tokenizers = [];
  let timer = null;

  function chipOf(tokenizer, token, place, mark = "") {
    const bytes = tokenizer.bytes(token);
    const id = tokenizer.id(token);
    const words = visible(textOf(bytes));
    const chip = make("span", { class: `piece tint${place % TINTS} ${mark}` }, words);
    if (id === null) chip.classList.add("unknown");
    if (withIds.checked) chip.append(make("small", {}, id === null ? "none" : String(id)));
    return chip;
  }

  function show() {
    stop();
    const text = field.value;
    tokenizers.forEach((tokenizer, i) => {
      const tokens = tokenizer.pieces(text).flat();
      showCounts(panels[i].count, tokenizer, tokens, text);
      const items = tokens.map((token, place) => {
        const chip = chipOf(tokenizer, token, place);
        chip.setAttribute("role", "option");
        chip.addEventListener("pointerenter", () => tell(i, token));
        return chip;
      });
      panels[i].chips.replaceChildren(...items);
      if (items.length > 0) choices(panels[i].chips, items, (place) => tell(i, tokens[place]), () => perRow(items));
    });
    status.textContent = "Point at a token, or walk along them with the arrow keys.";
    begin(0);
  }

  function showCounts(place, tokenizer, tokens, text) {
    const unknown = tokens.filter((token) => tokenizer.id(token) === null).length;
    const characters = [...text].length;
    const mean = tokens.length === 0 ? "–" : decimals(characters / tokens.length, 2);
    const lacking = unknown === 0 ? "" : `; ${unknown} not in the vocabulary: this text has no ids`;
    place.replaceChildren(make("strong", {}, `${whole(tokens.length)} tokens`), `, ${mean} characters per token${lacking}`);
  }

  // What a token is: its id, its bytes, the merge that makes it.
  function tell(i, token) {
    const tokenizer = tokenizers[i];
    const bytes = tokenizer.bytes(token);
    const id = tokenizer.id(token);
    const parts = [`${names[i]}: ‹${visible(textOf(bytes))}› ${id === null ? "has no id here" : `is id ${id}`}`];
    parts.push(`${bytes.length} ${bytes.length === 1 ? "byte" : "bytes"}: ${bytes.join(" ")}`);
    if (tokenizer instanceof BytePairs && token >= 256) {
      const rank = tokenizer.origin.get(token);
      parts.push(`merge ${whole(rank + 1)}: ${pairWords(tokenizer, rank)}`);
    }
    status.textContent = `${parts.join("; ")}.`;
  }

  function pairWords(tokenizer, rank) {
    const [left, right] = [tokenizer.lefts[rank], tokenizer.rights[rank]].map((t) => visible(textOf(tokenizer.bytes(t))));
    return `‹${left}› + ‹${right}›`;
  }

  // The text after so many of the merges that it needs. What the next one joins is framed.
  function begin(step) {
    if (replayed.length === 0) return;
    const tokenizer = tokenizers[Number(which.value)];
    const ranks = tokenizer.ranksOf(field.value);
    const at = Math.min(Math.max(step, 0), ranks.length);
    steps.max = String(ranks.length);
    steps.value = String(at);
    steps.setAttribute("aria-valuetext", `${at} of ${ranks.length} merges`);
    const done = at === 0 ? 0 : ranks[at - 1] + 1;
    const next = at < ranks.length ? ranks[at] : null;
    const pieces = tokenizer.pieces(field.value, done);
    back.disabled = at === 0;
    on.disabled = next === null;
    const made = at === 0 ? null : tokenizer.made[ranks[at - 1]];
    stage.replaceChildren(...pieces.map((tokens) => pieceOf(tokenizer, tokens, next, made)));
    const count = pieces.flat().length;
    const said = at === 0 ? "Every byte is a token" : `Merge ${whole(done)} of the vocabulary, ${pairWords(tokenizer, ranks[at - 1])}`;
    const then = next === null ? "No other merge fits." : `The earliest that fits next is number ${whole(next + 1)}: ${pairWords(tokenizer, next)}.`;
    merge.textContent = `Step ${at} of ${ranks.length}: ${said}; ${whole(count)} tokens. ${then}`;
  }

  function pieceOf(tokenizer, tokens, next, made) {
    const box = make("span", { class: "cut" });
    for (let i = 0; i < tokens.length; i++) {
      const joins = next !== null && tokens[i] === tokenizer.lefts[next] && tokens[i + 1] === tokenizer.rights[next];
      const fresh = tokens[i] === made ? "fresh" : "";
      if (joins) {
        const pair = make("span", { class: "pair" }, chipOf(tokenizer, tokens[i], i, fresh), chipOf(tokenizer, tokens[i + 1], i + 1));
        box.append(pair);
        i += 1;
      } else {
        box.append(chipOf(tokenizer, tokens[i], i, fresh));
      }
    }
    return box;
  }

  function start() {
    if (on.disabled) begin(0);
    play.textContent = "Stop";
    timer = setInterval(() => {
      begin(Number(steps.value) + 1);
      if (on.disabled) stop();
    }, 700);
  }

  function stop() {
    if (timer !== null) clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  root.append(
    make("label", { for: "text", class: "soft" }, "Type any text. Each box is a token; ␣ is a space, ⏎ a line break."),
    field,
    make("div", { class: "controls" }, withIds, make("label", { for: "ids" }, "with ids")),
    status,
    make("div", { class: "vocabularies" }, ...panels.map(({ section }) => section)));
  if (replayed.length > 0) {
    root.append(make("section", { class: "replay", "aria-label": "The merges, one by one" },
      make("h3", {}, "The merges, one by one"),
      make("div", { class: "controls" }, make("label", { for: "which" }, "Vocabulary"), which, steps, back, on, play),
      merge, stage,
      make("p", { class: "soft" }, "A frame holds a piece that the pattern cut: no merge crosses it. A dashed frame: what the next merge joins.")));
    steps.setAttribute("aria-label", "Merges done");
  }
  Promise.all(data.vocabularies.map(tokenizerOf)).then((ready) => {
    tokenizers = ready;
    root.dataset.ready = "";
    show();
  });
  return () => {};
});

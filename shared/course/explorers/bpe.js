"use strict";
// Tokenizers: characters, and byte-level byte-pair encoding from its merges, with the same ids as in Python.

// Whole numbers (int32), packed as `in_planes` of tokenizer.py does.
async function unpacked(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const length = planes.length / 4;
  return Int32Array.from({ length }, (_, i) =>
    planes[i] | (planes[i + length] << 8) | (planes[i + 2 * length] << 16) | (planes[i + 3 * length] << 24));
}

function sumsOf(steps) {
  let sum = 0;
  return steps.map((step) => (sum += step));
}

// One token per character; a token is the character itself.
class Characters {
  constructor(entry) {
    this.idOf = new Map([...entry.chars].map((c, i) => [c, i]));
  }

  // The pieces of a text, each a list of tokens.
  pieces(text) {
    return [[...text]];
  }

  id(token) {
    return this.idOf.get(token) ?? null;
  }

  bytes(token) {
    return [...new TextEncoder().encode(token)];
  }
}

// A token is a number: its byte, or 256 and its place among what merges make.
class BytePairs {
  static async from(entry) {
    const [lefts, rights, made, ids] = await Promise.all(
      [entry.lefts, entry.rights, entry.made, entry.ids].map(unpacked));
    return new BytePairs(entry, { lefts, rights, made: sumsOf(made), ids: sumsOf(ids) });
  }

  constructor(entry, { lefts, rights, made, ids }) {
    this.pattern = new RegExp(entry.pattern, "gu");
    this.nfc = entry.nfc;
    Object.assign(this, { lefts, rights, made, ids });
    this.rankOf = new Map();
    lefts.forEach((left, rank) => this.rankOf.set(this.pairOf(left, rights[rank]), rank));
    this.origin = new Map(); // of a token: the first merge that makes it
    made.forEach((token, rank) => this.origin.has(token) || this.origin.set(token, rank));
    this.known = new Map(); // pieces that were merged already
  }

  pairOf(left, right) {
    return left * this.ids.length + right;
  }

  // The text cut by the pattern; what lies between its matches is a piece, too.
  cut(typed) {
    const text = this.nfc ? typed.normalize("NFC") : typed;
    const cut = [];
    let end = 0;
    for (const match of text.matchAll(this.pattern)) {
      cut.push(text.slice(end, match.index), match[0]);
      end = match.index + match[0].length;
    }
    cut.push(text.slice(end));
    return cut.filter((piece) => piece !== "");
  }

  pieces(text, ranks = Infinity) {
    return this.cut(text).map((piece) => this.merged(piece, ranks));
  }

  // The tokens of a piece after the first `ranks` merges; of all pairs side by side, the one that was learned first
  // is merged, until none is left.
  merged(piece, ranks = Infinity) {
    const key = ranks === Infinity ? piece : `${ranks}:${piece}`;
    if (this.known.has(key)) return this.known.get(key);
    let tokens = [...new TextEncoder().encode(piece)];
    for (;;) {
      const rank = this.lowest(tokens);
      if (rank === null || rank >= ranks) break;
      tokens = this.merge(tokens, rank);
    }
    this.known.set(key, tokens);
    return tokens;
  }

  lowest(tokens) {
    let best = null;
    for (let i = 0; i + 1 < tokens.length; i++) {
      const rank = this.rankOf.get(this.pairOf(tokens[i], tokens[i + 1]));
      if (rank !== undefined && (best === null || rank < best)) best = rank;
    }
    return best;
  }

  merge(tokens, rank) {
    const [left, right] = [this.lefts[rank], this.rights[rank]];
    const result = [];
    for (let i = 0; i < tokens.length; i++) {
      if (tokens[i] === left && tokens[i + 1] === right) {
        result.push(this.made[rank]);
        i += 1;
      } else {
        result.push(tokens[i]);
      }
    }
    return result;
  }

  // The merges that a text needs, in the order in which they were learned.
  ranksOf(text) {
    const used = new Set();
    for (const piece of new Set(this.cut(text))) {
      let tokens = [...new TextEncoder().encode(piece)];
      for (let rank = this.lowest(tokens); rank !== null; rank = this.lowest(tokens)) {
        used.add(rank);
        tokens = this.merge(tokens, rank);
      }
    }
    return [...used].sort((a, b) => a - b);
  }

  id(token) {
    return this.ids[token] < 0 ? null : this.ids[token];
  }

  bytes(token) {
    if (token < 256) return [token];
    const rank = this.origin.get(token);
    return [...this.bytes(this.lefts[rank]), ...this.bytes(this.rights[rank])];
  }
}

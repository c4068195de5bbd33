"use strict";
// Floats of any format, bit by bit: { name, exponent, fraction, infinite, saturates }. exponent, fraction: how many
// bits each has. infinite: whether the highest exponent means inf and nan; where it does not, the last code alone is
// nan. saturates: whether what is too large becomes the largest number, and not inf or nan. A code is the bits read as a whole number; all arithmetic below is exact in JavaScript's doubles.

function biasOf(format) {
  return 2 ** (format.exponent - 1) - 1;
}

// The code's bit for the sign, as a number.
function signOf(format) {
  return 2 ** (format.exponent + format.fraction);
}

// The code of the largest number.
function largestCode(format) {
  return format.infinite ? (2 ** format.exponent - 1) * 2 ** format.fraction - 1 : signOf(format) - 2;
}

// The largest whole p with 2^p <= size, for a size above 0.
function powerOf(size) {
  const guess = Math.floor(Math.log2(size));
  if (2 ** guess > size) return guess - 1;
  return 2 ** (guess + 1) <= size ? guess + 1 : guess;
}

function roundedToEven(number) {
  const below = Math.floor(number);
  const over = number - below;
  if (over === 0.5) return below % 2 === 0 ? below : below + 1;
  return over < 0.5 ? below : below + 1;
}

// What the code stands for.
function valueOf(format, code) {
  const negative = code >= signOf(format);
  const magnitude = code % signOf(format);
  const sign = negative ? -1 : 1;
  if (magnitude > largestCode(format)) {
    return format.infinite && magnitude === largestCode(format) + 1 ? sign * Infinity : NaN;
  }
  const [exponent, digits] = [Math.floor(magnitude / 2 ** format.fraction), magnitude % 2 ** format.fraction];
  const begins = exponent > 0 ? 2 ** format.fraction : 0; // the 1 in front of the fraction
  return sign * (begins + digits) * 2 ** (Math.max(exponent, 1) - biasOf(format) - format.fraction);
}

// Of what is too large.
function codeBeyond(format) {
  return format.saturates ? largestCode(format) : largestCode(format) + 1;
}

// Whether a number lies so far beyond the largest one that it does not become that by rounding alone.
function isTooLarge(format, number) {
  return exactCode(format, number) > largestCode(format);
}

// The code of the nearest number; of two that are equally near, the one whose last bit is 0.
function codeOf(format, number) {
  const sign = number < 0 || Object.is(number, -0) ? signOf(format) : 0;
  if (Number.isNaN(number)) return sign + signOf(format) - 1;
  return sign + (isTooLarge(format, number) ? codeBeyond(format) : exactCode(format, number));
}

// The same without its sign, as if the codes went on beyond the largest number.
function exactCode(format, number) {
  const size = Math.abs(number);
  if (size === 0 || size === Infinity) return size;
  const lowest = 1 - biasOf(format); // the exponent of the numbers that begin with 0.
  const power = Math.max(powerOf(size), lowest);
  const steps = roundedToEven(size / 2 ** (power - format.fraction));
  return (power - lowest) * 2 ** format.fraction + steps;
}

// What a number that is too large becomes, in words.
function beyond(format) {
  return short(valueOf(format, codeBeyond(format)));
}

function rounded(format, number) {
  return valueOf(format, codeOf(format, number));
}

// Codes in the order of their numbers: below zero from -1 down.
function placeOf(format, code) {
  const sign = signOf(format);
  return code >= sign ? sign - code : code;
}

function atPlace(format, place) {
  return valueOf(format, place < 0 ? signOf(format) - place : place);
}

// The bits of a code as a text of 0 and 1.
function bitsOf(format, code) {
  return code.toString(2).padStart(1 + format.exponent + format.fraction, "0");
}

// "sign", "exponent" or "fraction": what the bit at this index says, from the left.
function partOf(format, index) {
  if (index === 0) return "sign";
  return index <= format.exponent ? "exponent" : "fraction";
}

// A number as short as it can be told from its neighbours.
function short(number, digits = 8) {
  if (Number.isNaN(number)) return "nan";
  if (!Number.isFinite(number)) return number < 0 ? "−inf" : "inf";
  const text = String(Number(number.toPrecision(digits)));
  return text.replaceAll("-", "−");
}

// A whole number as an exponent: ⁻¹⁴.
function raised(number) {
  return [...String(number)].map((sign) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign] ?? "⁻").join("");
}

// How far a rounded number is from what it was, as a part of that.
function offBy(number, nearest) {
  if (nearest === number) return "exact";
  if (!Number.isFinite(nearest)) return "lost";
  const share = Math.abs((nearest - number) / number);
  return `${Number((100 * share).toPrecision(2))} %`;
}

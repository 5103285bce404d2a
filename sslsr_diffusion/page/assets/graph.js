"use strict";
// The self-similarity graph of one pixel, and what it is compared by; the same mathematics as the Python operator.

/** Index of a border that is reflected without repeating the edge. */
function reflected(i, n) {
  return i < 0 ? -i : i >= n ? 2 * n - 2 - i : i;
}

/**
 * One row: weights[d] = exp(-|P - P_d|^2 / (C window^2 sigma)), divided by its sum (Chen et al., ACM MM 2024).
 * Window samples outside the search square count as 0, as in the published code.
 *
 * picture: {width, height, data} with 8-bit RGBA data, as ImageData. Returns Float64Array [search^2], row-major.
 */
function graphRow(picture, x, y, { search, window, sigma, normalize = true }) {
  const { width, height, data } = picture;
  const reach = (search - 1) / 2, half = (window - 1) / 2, side = search + 2 * half;
  const square = new Float64Array(side * side * 3); // the search square with a border of zeros for the window
  for (let dy = 0; dy < search; dy++) {
    const line = reflected(y + dy - reach, height) * width;
    for (let dx = 0; dx < search; dx++) {
      const from = 4 * (line + reflected(x + dx - reach, width)), to = 3 * ((dy + half) * side + dx + half);
      for (let c = 0; c < 3; c++) square[to + c] = data[from + c] / 255;
    }
  }
  const centre = 3 * (reach * side + reach), run = 3 * window;
  const row = new Float64Array(search * search);
  let sum = 0;
  for (let dy = 0, n = 0; dy < search; dy++) {
    for (let dx = 0; dx < search; dx++, n++) {
      let distance = 0;
      for (let wy = 0; wy < window; wy++) {
        let a = 3 * ((dy + wy) * side + dx), b = centre + 3 * wy * side;
        for (let i = 0; i < run; i++, a++, b++) {
          const difference = square[a] - square[b];
          distance += difference * difference;
        }
      }
      sum += row[n] = Math.exp(-distance / (3 * window * window * sigma));
    }
  }
  if (normalize) for (let n = 0; n < row.length; n++) row[n] /= sum + 1e-10;
  return row;
}

/** {l1, kl} of two rows: means over their entries, both clamped at 1e-10 for KL(truth || result). */
function rowTerms(result, truth) {
  let l1 = 0, kl = 0;
  for (let n = 0; n < truth.length; n++) {
    l1 += Math.abs(result[n] - truth[n]);
    const b = Math.max(truth[n], 1e-10), a = Math.max(result[n], 1e-10);
    kl += b * Math.log(b / a);
  }
  return { l1: l1 / truth.length, kl: kl / truth.length };
}

/** The `count` most similar places of a row, no two of them, nor one and the pixel itself, closer than `apart`: [{dx, dy, weight}]. */
function mostSimilar(row, search, count, apart) {
  const reach = (search - 1) / 2;
  const order = Array.from(row.keys()).sort((a, b) => row[b] - row[a]);
  const found = [{ dx: 0, dy: 0 }];
  for (const n of order) {
    const place = { dx: (n % search) - reach, dy: Math.floor(n / search) - reach, weight: row[n] };
    if (found.every((other) => Math.max(Math.abs(other.dx - place.dx), Math.abs(other.dy - place.dy)) >= apart)) found.push(place);
    if (found.length > count) break;
  }
  return found.slice(1);
}

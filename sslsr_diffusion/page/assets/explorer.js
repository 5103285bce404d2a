"use strict";
// The explorer of self-similarity graphs: a truth and a result, the pixels at which the loss looks, and the graphs of a clicked one.

const HEAT = [[38, 12, 74], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // dark to bright
const CHANGE = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]]; // less, equal, more

const RED = [255, 59, 48, 255];

/** A colour of a ramp at 0..1. */
function colour(ramp, share) {
  const at = Math.min(1, Math.max(0, share)) * (ramp.length - 1), below = Math.min(ramp.length - 2, Math.floor(at));
  return ramp[below].map((value, c) => Math.round(value + (ramp[below + 1][c] - value) * (at - below)));
}

function bytes(base64) {
  const text = atob(base64), made = new Uint8Array(text.length);
  for (let i = 0; i < made.length; i++) made[i] = text.charCodeAt(i);
  return made;
}

/** The pixels of an embedded picture, as they are in its file: no colour profile, no alpha. */
async function pixels({ name, src, sum }) {
  const [, kind, base64] = src.match(/^data:(.*?);base64,(.*)$/);
  const bitmap = await createImageBitmap(new Blob([bytes(base64)], { type: kind }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const image = element("canvas", { ".width": bitmap.width, ".height": bitmap.height });
  const context = image.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const read = context.getImageData(0, 0, bitmap.width, bitmap.height);
  let total = 0;
  for (let i = 0; i < read.data.length; i += 4) total += read.data[i] + read.data[i + 1] + read.data[i + 2];
  return { name, image, width: bitmap.width, height: bitmap.height, read, intact: total === sum };
}

class Explorer {
  constructor(root, data, pictures) {
    Object.assign(this, { root, data, pictures, width: data.width, height: data.height });
    this.truth = pictures.length - 1;
    this.result = pictures.length - 2;
    this.settings = { ...data.settings };
    const bits = bytes(data.mask);
    this.mask = new Uint8Array(this.width * this.height);
    this.rows = []; // places of the edge pixels, in the order of their terms
    for (let i = 0; i < this.mask.length; i++) if ((this.mask[i] = (bits[i >> 3] >> (7 - (i & 7))) & 1)) this.rows.push(i);
    this.terms = Object.fromEntries(["l1", "kl"].map((term) => [term, new Float32Array(bytes(data[term]).buffer)]));
    this.term = "l1";
    this.overlay = "none";
    this.build();
    this.refresh();
    const worst = this.worst(12), reach = data.settings.search >> 1;
    const whole = ({ x, y }) => x >= reach && y >= reach && x < this.width - reach && y < this.height - reach;
    const first = worst.find(whole) || worst[0] || { x: this.width >> 1, y: this.height >> 1 };
    this.pick(first.x, first.y);
  }

  build() {
    const { data } = this;
    this.status = element("p", { class: "status", role: "status", "aria-live": "polite" });
    this.share = element("p", { class: "soft" });
    this.graphs = element("div", { class: "graphs" });
    this.list = element("ol", { class: "worst" });
    this.refused = element("p", { class: "refused", role: "alert" });
    const view = element("div", { class: "view" }), side = element("div", { class: "side" });
    side.append(element("h2", {}, "Graph of a pixel"), this.place(), this.status, this.graphs, this.fields(), this.refused);
    const overlays = choices("overlay", { none: "none", mask: "edge mask", map: "map of the loss" }, "none", (name) => { this.overlay = name; this.viewer.draw(); });
    const terms = choices("map and list by", { l1: "L1", kl: "KL" }, "l1", (term) => { this.term = term; this.refresh(); });
    const heading = (text, about) => [element("h2", {}, text), element("p", { class: "soft" }, about)];
    const left = element("div", {}, view, element("div", { class: "tools" }, overlays, terms), this.share);
    const below = element("div", {}, ...heading("Worst rows", "Edge pixels whose graphs differ most; each leads to its place."), this.list);
    const row = (...cells) => element("tr", { role: "row" }, ...cells); // roles, because a narrow screen lays rows out as grids
    const numbers = element("table", { role: "table" }, element("tbody", { role: "rowgroup" }, ...data.numbers.map(({ label, text, about }) =>
      row(element("th", { scope: "row", role: "rowheader" }, label), element("td", { role: "cell" }, text), element("td", { class: "soft", role: "cell" }, about)))));
    this.root.append(...data.notes.map((note) => element("p", { class: "note" }, note)), element("div", { class: "two" }, left, side, below),
      ...heading("Numbers of the pair", "As sslsr evaluate gives them."), element("div", { class: "scroll" }, numbers));
    if (data.spectrum) {
      const about = "Height of each frequency over its neighbours, −3 to 12 dB, a curve per axis. A raster of 8 pixels stands out at even marks, one of 16 at any: the graph does not see it.";
      this.root.append(...heading("Spectrum", about), element("div", { class: "spectra", ".innerHTML": data.spectrum }));
    }
    if (this.pictures.some((picture) => !picture.intact)) {
      this.root.prepend(element("p", { class: "note" }, "This browser changes the pixels that a page reads (protection against fingerprints): the graphs are not exact; allow canvas data for this page."));
    }
    this.viewer = new Viewer(view, this.pictures, {
      label: "result and truth, arrow keys move the chosen pixel", pick: (x, y) => this.pick(x, y),
      arrow: (dx, dy) => this.pick(this.x + dx, this.y + dy), paint: (...call) => this.paint(...call),
    });
  }

  place() {
    const number = (axis, most) => element("input", { type: "number", min: 0, max: most - 1, ".onchange": (event) => {
      this[axis] = Math.min(most - 1, Math.max(0, Math.round(event.target.valueAsNumber) || 0));
      this.pick(this.x, this.y, true);
    } });
    this.inputs = { x: number("x", this.width), y: number("y", this.height) };
    return element("div", { class: "fields" }, element("label", {}, "x ", this.inputs.x), element("label", {}, "y ", this.inputs.y));
  }

  fields() {
    const { settings } = this, most = Math.min(63, 2 * Math.min(this.width, this.height) - 1);
    const rules = {
      sigma: ["a positive number", (v) => v > 0 && v < Infinity],
      search: [`an odd number from ${settings.window} to ${most}`, (v) => v % 2 === 1 && v >= this.settings.window && v <= most],
      window: ["an odd number from 1 to the search size", (v) => v % 2 === 1 && v >= 1 && v <= this.settings.search],
      stride: ["a whole number of at least 1", (v) => Number.isInteger(v) && v >= 1],
    };
    const shown = { sigma: "sigma", search: "search size", window: "window size", stride: "stride" };
    const field = (name) => element("label", {}, `${shown[name]} `, element("input", { type: "number", step: name === "sigma" ? "any" : name === "stride" ? 1 : 2,
      value: settings[name], name, ".oninput": (event) => {
        const [wanted, allowed] = rules[name], value = event.target.valueAsNumber, good = allowed(value);
        event.target.setAttribute("aria-invalid", String(!good));
        this.refused.textContent = good ? "" : `${shown[name]}: expected ${wanted}, got ${event.target.value || "nothing"}.`;
        if (!good) return;
        this.settings[name] = value;
        if (name === "stride") this.refresh();
        this.pick(this.x, this.y);
      } }));
    return element("div", { class: "fields" }, ...Object.keys(rules).map(field));
  }

  /** Whether the stride keeps a pixel. */
  kept(x, y) {
    return y % this.settings.stride === x % this.settings.stride;
  }

  /** The rows with the largest terms, none closer to another than half a search area: [{x, y, value}]. */
  worst(count) {
    const values = this.terms[this.term], apart = this.data.settings.search >> 1;
    const least = Float32Array.from(values).sort(), found = [];
    for (const above of [least[Math.max(0, least.length - 5000)], -Infinity]) { // sorting the few highest does, mostly
      found.length = 0;
      const order = [...values.keys()].filter((n) => values[n] >= above).sort((a, b) => values[b] - values[a]);
      for (const n of order) {
        const x = this.rows[n] % this.width, y = Math.floor(this.rows[n] / this.width);
        if (this.kept(x, y) && found.every((other) => Math.hypot(other.x - x, other.y - y) >= apart)) found.push({ x, y, value: values[n] });
        if (found.length === count) return found;
      }
    }
    return found;
  }

  /** What follows from mask, stride and chosen term: the two overlays, the share, the list. */
  refresh() {
    const { width, height } = this, values = this.terms[this.term];
    const mask = new ImageData(width, height), map = new ImageData(width, height);
    const heat = Array.from({ length: 256 }, (_, level) => [...colour(HEAT, level / 255), 255]);
    const sorted = Float32Array.from(values).sort(), top = sorted[Math.floor(0.98 * sorted.length)] || 1;
    let count = 0;
    this.rows.forEach((place, n) => {
      if (!this.kept(place % width, Math.floor(place / width))) return;
      count++;
      mask.data.set(RED, 4 * place);
      map.data.set(heat[Math.min(255, Math.max(0, Math.round((255 * values[n]) / top)))], 4 * place);
    });
    this.layers = Object.fromEntries(Object.entries({ mask, map }).map(([name, image]) => {
      const canvas = element("canvas", { ".width": width, ".height": height });
      canvas.getContext("2d").putImageData(image, 0, 0);
      return [name, canvas];
    }));
    const share = ((100 * count) / (width * height)).toFixed(1);
    this.share.textContent = `The loss looks at ${count} edge pixels of the truth, ${share} % of the picture. The map is at search size ` +
      `${this.data.settings.search}, window ${this.data.settings.window}, sigma ${this.data.settings.sigma}; its brightest colour is ${top.toExponential(1)} and more.`;
    this.list.replaceChildren(...this.worst(12).map(({ x, y, value }) => element("li", {}, element("button", { type: "button", class: "link",
      ".onclick": () => { this.pick(x, y); this.viewer.show(x, y, 6 * devicePixelRatio); this.viewer.canvas.scrollIntoView({ block: "nearest" }); } }, `${x}, ${y}`), ` ${this.term.toUpperCase()} ${value.toExponential(2)}`)));
    if (this.viewer) this.viewer.draw();
  }

  /** Choose a pixel: its graphs, their terms and their most similar places. */
  pick(x, y) {
    this.x = Math.min(this.width - 1, Math.max(0, x));
    this.y = Math.min(this.height - 1, Math.max(0, y));
    Object.assign(this.inputs.x, { value: this.x });
    Object.assign(this.inputs.y, { value: this.y });
    const { search, window } = this.settings;
    this.graph = this.pictures.map((picture) => graphRow(picture.read, this.x, this.y, this.settings));
    this.similar = this.graph.map((row) => mostSimilar(row, search, 5, Math.max(2, window >> 1)));
    const terms = rowTerms(this.graph[this.result], this.graph[this.truth]);
    this.current = { x: this.x, y: this.y, ...terms };
    const looked = !this.mask[this.y * this.width + this.x] ? "no edge pixel, the loss does not look here" : this.kept(this.x, this.y) ? "an edge pixel" : "an edge pixel that the stride leaves out";
    this.status.textContent = `Pixel ${this.x}, ${this.y} (${looked}): L1 ${terms.l1.toExponential(3)}, KL ${terms.kl.toExponential(3)}.`;
    this.drawGraphs();
    this.viewer.draw();
  }

  drawGraphs() {
    const { search } = this.settings, centre = (search * search - 1) / 2;
    const beside = (row) => row.reduce((most, value, n) => (n === centre ? most : Math.max(most, value)), 0);
    const top = Math.max(...this.graph.map(beside)) || 1;
    const change = this.graph[this.result].map((value, n) => value - this.graph[this.truth][n]);
    const figures = this.pictures.map((picture, index) => {
      const places = this.similar[index].slice(0, 3).map(({ dx, dy, weight }) => `${dx}, ${dy}: ${weight.toExponential(1)}`).join("; ");
      return this.figure(picture.name, this.graph[index], (value) => colour(HEAT, value / top), `most similar at ${places}`);
    });
    figures.push(this.figure("result − truth", change, (value) => colour(CHANGE, 0.5 + value / top / 2), "red where the result is more like the pixel"));
    const scale = element("p", { class: "soft" }, `One colour scale, 0 to ${top.toExponential(1)}, the largest weight beside the pixel itself. The difference has it to either side: red where the result is more like the pixel, blue where the truth is.`);
    this.graphs.replaceChildren(...figures, scale);
  }

  figure(name, row, paint, about) {
    const { search } = this.settings, image = new ImageData(search, search);
    row.forEach((value, n) => image.data.set([...paint(value), 255], 4 * n));
    const canvas = element("canvas", { ".width": search, ".height": search, role: "img", "aria-label": `graph, ${name}: ${about}` });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return element("figure", {}, canvas, element("figcaption", {}, element("b", {}, name)));
  }

  paint(context, index, zoom) {
    if (this.overlay !== "none") context.drawImage(this.layers[this.overlay], 0, 0);
    const { search, window } = this.settings, unit = devicePixelRatio / zoom;
    const box = (x, y, side, stroke) => {
      for (const [style, thick] of [["#000c", 4], [stroke, 2]]) {
        context.strokeStyle = style;
        context.lineWidth = thick * unit;
        context.strokeRect(x - (side >> 1), y - (side >> 1), side, side);
      }
    };
    box(this.x, this.y, search, "#fff");
    for (const { dx, dy } of this.similar[index]) box(this.x + dx, this.y + dy, window, "#ffd60a");
    box(this.x, this.y, window, "#ff3b30");
  }
}

async function explore(root, data) {
  const pictures = await Promise.all(data.pictures.map(pixels));
  return new Explorer(root, data, pictures);
}

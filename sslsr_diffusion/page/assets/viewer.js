"use strict";
// Pictures of one size with linked zoom and pan: side by side, or two under one slider. One canvas, plain JavaScript.

/** An element with attributes, properties for those that begin with a dot, and children. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith(".")) made[name.slice(1)] = value;
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Radio buttons in a row: choices is {value: label}. */
function choices(legend, options, chosen, changed) {
  const name = `choice-${choices.count = (choices.count || 0) + 1}`;
  return element("fieldset", { class: "choices" }, element("legend", {}, legend), ...Object.entries(options).map(([value, label]) =>
    element("label", {}, element("input", { type: "radio", name, value, checked: value === chosen, ".onchange": () => changed(value) }), label)));
}

const MARGIN = 14; // CSS pixels to either side of the slider's line that take hold of it

class Viewer {
  /**
   * pictures: [{name, image, width, height}], equally large, at least one. Options: pick(x, y) on a click; arrow(dx, dy) on an arrow
   * key (else they pan); paint(context, index, zoom) draws over a picture, in its own pixels.
   */
  constructor(root, pictures, { pick, arrow, paint, label = "pictures" } = {}) {
    Object.assign(this, { root, pictures, pick, arrow, paint });
    this.width = pictures[0].width;
    this.height = pictures[0].height;
    this.pair = [Math.max(0, pictures.length - 2), pictures.length - 1];
    this.mode = pictures.length > 1 && root.clientWidth < 600 ? "slider" : "side";
    this.split = 0.5;
    this.view = { x: this.width / 2, y: this.height / 2, zoom: 1 };
    this.fitted = true;
    this.pointers = new Map();
    this.build(label);
    new ResizeObserver(() => this.layout()).observe(this.stage);
    this.layout();
  }

  build(label) {
    const button = (text, title, act) => element("button", { type: "button", title, "aria-label": title, ".onclick": act }, text);
    const about = `${label}: ${this.pictures.map((picture) => picture.name).join(", ")}. Plus and minus zoom, 0 fits, 1 is 100 %, arrow keys move.`;
    this.canvas = element("canvas", { tabindex: 0, role: "application", "aria-label": about });
    this.level = element("output", { class: "level", "aria-label": "zoom" });
    this.stage = element("div", { class: "stage" }, this.canvas);
    this.slider = element("input", { type: "range", min: 0, max: 1000, value: 500, class: "split", "aria-label": "slider between the pictures",
      ".oninput": () => { this.split = this.slider.value / 1000; this.draw(); } });
    const tools = element("div", { class: "tools" });
    if (this.pictures.length > 1) {
      tools.append(choices("view", { side: "side by side", slider: "slider" }, this.mode, (mode) => { this.mode = mode; this.layout(); }));
    }
    this.choosers = this.pictures.length > 2 ? ["left", "right"].map((side, place) => this.chooser(side, place)) : [];
    tools.append(...this.choosers);
    tools.append(element("div", { class: "zooms" }, button("−", "zoom out", () => this.zoomBy(1 / 1.5)), this.level,
      button("+", "zoom in", () => this.zoomBy(1.5)), button("fit", "fit the whole picture", () => this.fit()),
      button("100 %", "one picture pixel on one screen pixel", () => this.zoomTo(1))));
    this.root.append(tools, this.stage, this.slider);
    this.listen();
  }

  chooser(side, place) {
    const select = element("select", { ".onchange": () => { this.pair[place] = Number(select.value); this.draw(); } },
      ...this.pictures.map((picture, index) => element("option", { value: index, selected: index === this.pair[place] }, picture.name)));
    return element("label", {}, `${side} `, select);
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), this.at(event));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      const at = this.at(event);
      this.pointers.set(event.pointerId, at);
      this.moved = this.pointers.size > 1;
      const line = this.split * canvas.width;
      this.sliding = this.mode === "slider" && this.pointers.size === 1 && Math.abs(at.x - line) < MARGIN * devicePixelRatio;
    });
    canvas.addEventListener("pointermove", (event) => this.pointers.has(event.pointerId) && this.drag(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerup", (event) => {
      if (this.pointers.delete(event.pointerId) && !this.moved && !this.sliding && this.pick) {
        const { x, y } = this.inPicture(this.at(event));
        if (x >= 0 && y >= 0 && x < this.width && y < this.height) this.pick(Math.floor(x), Math.floor(y));
      }
    });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const acts = { "+": () => this.zoomBy(1.5), "=": () => this.zoomBy(1.5), "-": () => this.zoomBy(1 / 1.5), 0: () => this.fit(), 1: () => this.zoomTo(1) };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in steps || event.key in acts)) return;
    event.preventDefault();
    if (event.key in acts) return acts[event.key]();
    const [dx, dy] = steps[event.key], far = event.shiftKey ? 10 : 1;
    if (this.arrow) return this.arrow(dx * far, dy * far);
    this.move((dx * far * 24) / this.view.zoom, (dy * far * 24) / this.view.zoom);
  }

  drag(event) {
    const { canvas, pointers, view } = this, before = pointers.get(event.pointerId), now = this.at(event);
    if (Math.hypot(now.x - before.x, now.y - before.y) < 3 * devicePixelRatio && !this.moved) return; // a hand that trembles in a click
    this.moved = true;
    if (this.sliding) {
      this.split = Math.min(1, Math.max(0, now.x / canvas.width));
      this.slider.value = Math.round(1000 * this.split);
    } else if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      this.zoomBy(Math.hypot(now.x - other.x, now.y - other.y) / Math.hypot(before.x - other.x, before.y - other.y), other);
    } else {
      this.move((before.x - now.x) / view.zoom, (before.y - now.y) / view.zoom);
    }
    pointers.set(event.pointerId, now);
    this.draw();
  }

  /** A pointer's place on the canvas, in device pixels. */
  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) * devicePixelRatio, y: (event.clientY - box.top) * devicePixelRatio };
  }

  /** Where pictures are shown: [{index, x, y, w, h, from, to}] in device pixels; from..to is the part across that is shown. */
  cells() {
    const { width: w, height: h } = this.canvas, line = this.split * w;
    if (this.mode === "slider") {
      return [{ index: this.pair[0], x: 0, y: 0, w, h, from: 0, to: line }, { index: this.pair[1], x: 0, y: 0, w, h, from: line, to: w }];
    }
    const { columns, rows } = this.shape, gap = 4, cw = (w - gap * (columns - 1)) / columns, ch = (h - gap * (rows - 1)) / rows;
    return this.pictures.map((_, index) => {
      const x = (index % columns) * (cw + gap), y = Math.floor(index / columns) * (ch + gap);
      return { index, x, y, w: cw, h: ch, from: x, to: x + cw };
    });
  }

  inPicture({ x, y }) {
    const cells = this.cells(), { view } = this;
    const cell = cells.find((c) => x >= c.from && x <= c.to && y >= c.y && y <= c.y + c.h) || cells[0];
    return { x: view.x + (x - cell.x - cell.w / 2) / view.zoom, y: view.y + (y - cell.y - cell.h / 2) / view.zoom };
  }

  layout() {
    const width = this.stage.clientWidth, count = this.mode === "side" ? this.pictures.length : 1;
    const columns = Math.max(1, Math.min(count, Math.floor(width / 220)));
    this.shape = { columns, rows: Math.ceil(count / columns) };
    const each = Math.max(140, Math.min((width / columns) * this.height / this.width, 0.72 * screenHeight()));
    const height = Math.round(each * this.shape.rows);
    this.canvas.width = Math.round(width * devicePixelRatio);
    this.canvas.height = Math.round(height * devicePixelRatio);
    this.canvas.style.height = `${height}px`;
    for (const part of [this.slider, ...this.choosers]) part.hidden = this.mode !== "slider";
    if (this.fitted) this.fit();
    this.draw();
  }

  fit() {
    const [cell] = this.cells();
    Object.assign(this.view, { x: this.width / 2, y: this.height / 2, zoom: Math.min(cell.w / this.width, cell.h / this.height) });
    this.fitted = true;
    this.draw();
  }

  move(dx, dy) {
    this.view.x = Math.min(this.width, Math.max(0, this.view.x + dx));
    this.view.y = Math.min(this.height, Math.max(0, this.view.y + dy));
    this.fitted = false;
    this.draw();
  }

  zoomTo(zoom) {
    this.zoomBy(zoom / this.view.zoom);
  }

  /** Zoom by a factor; what is under `at` (device pixels) stays there. */
  zoomBy(factor, at) {
    const { view } = this, before = at && this.inPicture(at);
    view.zoom = Math.min(64, Math.max(0.02, view.zoom * factor));
    this.fitted = false;
    const after = at ? this.inPicture(at) : before;
    if (at) this.move(before.x - after.x, before.y - after.y);
    this.draw();
  }

  /** Bring a pixel into sight. */
  show(x, y, zoom = this.view.zoom) {
    Object.assign(this.view, { x: x + 0.5, y: y + 0.5, zoom: Math.max(zoom, this.view.zoom) });
    this.fitted = false;
    this.draw();
  }

  draw() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.drawNow(); });
  }

  drawNow() {
    const { canvas, view } = this, context = canvas.getContext("2d");
    const cells = this.cells();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (const cell of cells) {
      const left = cell.x + cell.w / 2 - view.x * view.zoom, top = cell.y + cell.h / 2 - view.y * view.zoom;
      context.save();
      context.beginPath();
      context.rect(cell.from, cell.y, cell.to - cell.from, cell.h);
      context.clip();
      context.setTransform(view.zoom, 0, 0, view.zoom, view.zoom === 1 ? Math.round(left) : left, view.zoom === 1 ? Math.round(top) : top);
      context.imageSmoothingEnabled = view.zoom < 1;
      context.imageSmoothingQuality = "high";
      context.drawImage(this.pictures[cell.index].image, 0, 0);
      context.imageSmoothingEnabled = false;
      if (this.paint) this.paint(context, cell.index, view.zoom);
      context.restore();
    }
    if (this.mode === "slider") this.drawLine(context);
    this.level.textContent = `${Math.round(100 * view.zoom)} %`;
    this.name(cells);
  }

  drawLine(context) {
    const x = this.split * this.canvas.width, unit = devicePixelRatio;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#fff";
    context.fillRect(x - unit, 0, 2 * unit, this.canvas.height);
    context.beginPath();
    context.arc(x, this.canvas.height / 2, 9 * unit, 0, 7);
    context.fill();
    context.strokeStyle = "#333";
    context.lineWidth = unit;
    context.stroke();
  }

  /** The names over their pictures. */
  name(cells) {
    const wanted = JSON.stringify([this.mode, cells.map((c) => [c.index, c.x, c.y]), devicePixelRatio]);
    if (wanted === this.named) return;
    this.named = wanted;
    this.stage.querySelectorAll(".name").forEach((old) => old.remove());
    cells.forEach((cell, place) => {
      const label = element("span", { class: "name", "aria-hidden": "true" }, this.pictures[cell.index].name);
      label.style.top = `${cell.y / devicePixelRatio + 6}px`;
      if (this.mode === "slider" && place) label.style.right = "6px";
      else label.style.left = `${cell.x / devicePixelRatio + 6}px`;
      this.stage.append(label);
    });
  }
}

/** Height of the window that a person looks at: a frame around this page is as high as its content, so it tells nothing. */
function screenHeight() {
  return (frameElement ? parent : window).innerHeight;
}

/** In another page's frame: as high as the content, so that there is one thing to scroll. */
function fillFrame() {
  if (!frameElement) return;
  const fill = () => { frameElement.style.height = `${Math.ceil(document.body.getBoundingClientRect().height)}px`; };
  new ResizeObserver(fill).observe(document.body);
}

/** Load pictures by their addresses into `root` as a Viewer. */
async function compare(root, pictures, options) {
  const loaded = await Promise.all(pictures.map(async ({ name, src }) => {
    const image = new Image();
    image.src = src;
    await image.decode();
    return { name, image, width: image.naturalWidth, height: image.naturalHeight };
  }));
  return new Viewer(root, loaded, options);
}

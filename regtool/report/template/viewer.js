"use strict";
// The viewer of the quality page. Voxels are counted from 0, x first; pictures are laid out in millimetres and drawn at the pixels of the screen.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const make = (tag, properties = {}, parent = null) => {
    const element = Object.assign(document.createElement(tag), properties);
    if (parent) parent.append(element);
    return element;
  };
  const pad = (list, filler) => [...list, filler, filler].slice(0, 3);
  const size = pad(data.size, 1), spacing = pad(data.spacing, 1), native = pad(data.native, 1);
  const strides = [1, size[0], size[0] * size[1]];
  const BLOCK = 8, SQUARES = 8, FEW = 8;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // ---- images

  const volumes = new Map();
  async function decoded(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = make("canvas", { width: image.width, height: image.height });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const rgba = context.getImageData(0, 0, image.width, image.height).data;
    const [width, height] = [size[0], size[1]].map((n) => Math.ceil(n / BLOCK) * BLOCK);
    const columns = image.width / width;
    const out = new Uint8Array(size[0] * size[1] * size[2]);
    for (let z = 0, k = 0; z < size[2]; z++) {
      const left = (z % columns) * width, top = Math.floor(z / columns) * height;
      for (let y = 0; y < size[1]; y++) {
        let from = 4 * ((top + y) * image.width + left);
        for (let x = 0; x < size[0]; x++, from += 4) out[k++] = rgba[from];
      }
    }
    return out;
  }
  const volume = (url) => {
    if (!url) return null;
    if (!volumes.has(url)) volumes.set(url, decoded(url));
    return volumes.get(url);
  };
  function lattice(field) {
    if (!field) return null;
    const bytes = Uint8Array.from(atob(field.data), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer), values = new Float32Array(bytes.length / 2);
    for (let k = 0; k < values.length; k++) values[k] = view.getInt16(2 * k, true) * field.scale;
    return { size: pad(field.size, 1), values, shift: field.shift };
  }

  // ---- colours

  const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
  function colours(stops) {
    const list = stops.map(rgb), table = new Uint8Array(3 * 511);
    for (let k = 0; k < 511; k++) {
      const place = (k / 510) * (list.length - 1), low = Math.min(Math.floor(place), list.length - 2);
      for (let c = 0; c < 3; c++) table[3 * k + c] = list[low][c] + (place - low) * (list[low + 1][c] - list[low][c]);
    }
    return table;
  }
  const DIFFERENCE = colours(["#9be7ff", "#2b8cff", "#0a0a0a", "#ff8a1f", "#ffe9a8"]);
  const VOLUME = colours(["#7fd0ff", "#1f5fbf", "#17191c", "#c46a12", "#ffd27a"]);
  const FOLD = rgb("#ff2bd6"), GRID = "#5ee0a0", BEFORE = "#c3c9cf", AFTER = "#ff9d2e", CROSS = "#4aa3ff", LETTER = "#ffd75e";
  const hue = (label) => (data.names.length === 1 ? 50 : (label * 137.5) % 360);

  // ---- what is shown

  const state = {
    cursor: pad(data.cursor, 0), mode: "swipe", after: Boolean(data.frames[0]?.warped), swipe: 0.5, held: false, frame: 0, label: 0,
    grid: false, jacobian: false, labels: Boolean(data.labels_fixed) && data.names.length <= FEW, landmarks: Boolean(data.landmarks), cross: false,
  };
  if (!data.frames.length) state.mode = "fixed";
  let shown = {};
  async function load() {
    const frame = data.frames[state.frame] ?? {};
    const names = ["before", "warped", "jacobian", "folds"];
    const parts = await Promise.all([volume(data.fixed), ...names.map((name) => volume(frame[name]))]);
    const labels = await Promise.all([data.labels_fixed, data.labels_before, data.labels_warped].map(volume));
    shown = { fixed: parts[0], before: parts[1], warped: parts[2], jacobian: parts[3], folds: parts[4], labels, field: lattice(frame.field) };
  }
  const moving = () => (state.after && shown.warped) || shown.before;

  // ---- one plane

  const planes = data.planes.map((plane) => {
    const box = make("div", { className: "plane" }, find("planes"));
    const canvas = make("canvas", { tabIndex: 0 }, make("div", { className: "stage" }, box));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${plane.name} slice`);
    const bottom = make("div", { className: "bottom" }, box);
    const name = make("strong", { textContent: plane.name }, bottom);
    const self = { ...plane, box, canvas, name, columns: size[plane.across], rows: size[plane.down] };
    if (plane.normal !== null) {
      self.slider = make("input", { type: "range", min: 0, max: size[plane.normal] - 1, step: 1 }, bottom);
      self.slider.setAttribute("aria-label", `${plane.name} slice`);
      self.slider.addEventListener("input", () => go(plane.normal, Number(self.slider.value)));
      self.output = make("output", {}, bottom);
      const enlarge = make("button", { type: "button", textContent: "⤢", title: "larger or smaller" }, bottom);
      enlarge.setAttribute("aria-label", `${plane.name} larger or smaller`);
      enlarge.addEventListener("click", () => { self.large = !self.large; draw(); });
    }
    return self;
  });

  const base = (plane) => (plane.normal === null ? 0 : state.cursor[plane.normal] * strides[plane.normal]);
  function pixels(plane, paint, alpha) {
    // paint(voxel, rgba, where) for every voxel of the slice, as it hangs
    const { columns, rows } = plane;
    const image = new ImageData(columns, rows);
    const along = strides[plane.across], down = strides[plane.down], start = base(plane);
    for (let j = 0, where = 0; j < rows; j++) {
      const row = start + (plane.flip[1] ? rows - 1 - j : j) * down;
      for (let i = 0; i < columns; i++, where += 4) {
        image.data[where + 3] = alpha;
        paint(row + (plane.flip[0] ? columns - 1 - i : i) * along, image.data, where);
      }
    }
    const canvas = make("canvas", { width: columns, height: rows });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
  const grey = (plane, values) => pixels(plane, (voxel, out, at) => { out[at] = out[at + 1] = out[at + 2] = values[voxel]; }, 255);
  const fromTable = (out, at, table, k) => { out[at] = table[3 * k]; out[at + 1] = table[3 * k + 1]; out[at + 2] = table[3 * k + 2]; };

  function layOut() {
    // one scale for all planes side by side; below each other where there is no room
    const room = find("planes").clientWidth, high = Math.max(320, Math.min(0.72 * window.innerHeight, 1000)), gap = 12;
    const small = planes.filter((plane) => !plane.large);
    const sum = small.reduce((total, plane) => total + plane.width, 0);
    const beside = (room - gap * (small.length - 1)) / sum, narrow = room < 560;
    const common = narrow ? 0 : Math.min(beside, high / Math.max(...small.map((plane) => plane.height)));
    for (const plane of planes) {
      const alone = Math.min(room / plane.width, high / plane.height);
      plane.box.style.width = `${Math.floor(plane.width * (plane.large || narrow ? alone : common))}px`;
      plane.box.style.order = plane.large ? -1 : 0;
      plane.canvas.style.aspectRatio = `${plane.width} / ${plane.height}`;
    }
  }

  function drawPlane(plane) {
    const { canvas } = plane;
    const ratio = plane.height / plane.width, scale = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(canvas.clientWidth * scale)), height = Math.max(1, Math.round(width * ratio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.clearRect(0, 0, width, height);
    const put = (picture, smooth = true) => {
      context.imageSmoothingEnabled = smooth;
      context.drawImage(picture, 0, 0, width, height);
    };
    const within = (path, action) => { context.save(); context.beginPath(); path(); context.clip(); action(); context.restore(); };
    const mode = state.held ? "fixed" : state.mode, other = moving();
    if (mode === "difference" && other) {
      put(pixels(plane, (voxel, out, at) => fromTable(out, at, DIFFERENCE, 255 + shown.fixed[voxel] - other[voxel]), 255));
    } else {
      put(grey(plane, mode === "moving" && other ? other : shown.fixed));
    }
    if (mode === "swipe" && other) {
      within(() => context.rect(state.swipe * width, 0, width, height), () => put(grey(plane, other)));
    } else if (mode === "checkerboard" && other) {
      const side = Math.max(width, height) / SQUARES;
      within(() => {
        for (let j = 0; j * side < height; j++) for (let i = (j + 1) % 2; i * side < width; i += 2) context.rect(i * side, j * side, side, side);
      }, () => put(grey(plane, other)));
    }
    if (state.jacobian && shown.jacobian) {
      context.globalAlpha = 0.6;
      put(pixels(plane, (voxel, out, at) => fromTable(out, at, VOLUME, clamp(Math.round(255 + (shown.jacobian[voxel] - 128) * (255 / 63.5)), 0, 510)), 255));
      context.globalAlpha = 1;
      if (shown.folds) put(pixels(plane, (voxel, out, at) => { [out[at], out[at + 1], out[at + 2]] = FOLD; out[at + 3] = shown.folds[voxel]; }, 0), false);
    }
    const unit = width / plane.width, line = scale;
    if (state.labels) drawContours(plane, context, line);
    if (state.grid && shown.field) drawGrid(plane, context, unit, line);
    if (state.landmarks && data.landmarks && state.frame === 0) drawLandmarks(plane, context, unit, line);
    if (state.cross) drawCross(plane, context, unit, line);
    if (mode === "swipe" && other) drawHandle(context, width, height, line);
    drawLetters(plane, context, width, height, scale);
    if (plane.slider) {
      const index = state.cursor[plane.normal];
      plane.slider.value = index;
      const there = Math.floor(((index + 0.5) * native[plane.normal]) / size[plane.normal]);
      plane.output.textContent = `slice ${there + 1} of ${native[plane.normal]}`;
    }
  }

  // Millimetres from the left and upper edge of the picture of a place given in voxels along both axes.
  const across = (plane, index) => { const x = (index + 0.5) * spacing[plane.across]; return plane.flip[0] ? plane.width - x : x; };
  const down = (plane, index) => { const y = (index + 0.5) * spacing[plane.down]; return plane.flip[1] ? plane.height - y : y; };

  function stroke(context, path, colour, width, dash = []) {
    context.setLineDash(dash);
    context.lineJoin = context.lineCap = "round";
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke(path);
    context.setLineDash([]);
  }

  const SEGMENTS = { 1: ["LT"], 2: ["TR"], 3: ["LR"], 4: ["RB"], 5: ["LT", "RB"], 6: ["TB"], 7: ["LB"], 8: ["BL"], 9: ["TB"], 10: ["TR", "BL"],
    11: ["RB"], 12: ["LR"], 13: ["TR"], 14: ["LT"] };
  const MIDDLE = { T: [2, 1], R: [3, 2], B: [2, 3], L: [1, 2] }; // of the sides of a cell between four voxel centres, in half voxels
  function outlines(plane, values) {
    // label -> polylines in half voxels of the picture (marching squares, the pieces joined so that dashes run through)
    const { columns, rows } = plane, start = base(plane), ends = new Map();
    const at = (i, j) => values[start + (plane.flip[0] ? columns - 1 - i : i) * strides[plane.across] + (plane.flip[1] ? rows - 1 - j : j) * strides[plane.down]];
    for (let j = 0; j + 1 < rows; j++) for (let i = 0; i + 1 < columns; i++) {
      const corners = [at(i, j), at(i + 1, j), at(i + 1, j + 1), at(i, j + 1)];
      if (corners[0] === corners[1] && corners[0] === corners[2] && corners[0] === corners[3]) continue;
      for (const label of new Set(corners)) {
        if (!label || (state.label && label !== state.label)) continue;
        const mask = corners.reduce((sum, corner, k) => sum + (corner === label ? 1 << k : 0), 0);
        if (!ends.has(label)) ends.set(label, new Map());
        const links = ends.get(label);
        for (const [one, two] of SEGMENTS[mask]) {
          const [a, b] = [one, two].map((side) => (2 * j + MIDDLE[side][1]) * 65536 + 2 * i + MIDDLE[side][0]);
          for (const [from, to] of [[a, b], [b, a]]) links.set(from, [...(links.get(from) ?? []), to]);
        }
      }
    }
    const out = new Map();
    for (const [label, links] of ends) {
      const lines = [], open = [...links.keys()].filter((k) => links.get(k).length === 1);
      for (const begin of [...open, ...links.keys()]) {
        const chain = [begin];
        for (let here = begin, next; (next = links.get(here).pop()) !== undefined; here = next) {
          const back = links.get(next);
          back.splice(back.indexOf(here), 1);
          chain.push(next);
        }
        if (chain.length > 1) lines.push(chain);
      }
      out.set(label, lines);
    }
    return out;
  }
  function drawContours(plane, context, line) {
    const [fixed, before, warped] = shown.labels, width = context.canvas.width, height = context.canvas.height;
    const other = data.frames.length && state.frame === 0 && !state.held ? (state.after ? warped : before) : null;
    for (const [values, dashed] of [[fixed, false], [other, true]]) {
      if (!values) continue;
      for (const [label, lines] of outlines(plane, values)) {
        const path = new Path2D();
        for (const chain of lines) chain.forEach((key, k) => {
          const x = ((key % 65536) / 2 / plane.columns) * width, y = (Math.floor(key / 65536) / 2 / plane.rows) * height;
          if (k) path.lineTo(x, y); else path.moveTo(x, y);
        });
        const many = data.names.length > FEW && !state.label, thick = (many ? 1.1 : 1.5) * line;
        if (!many) stroke(context, path, "rgb(0 0 0 / .55)", 3.2 * line);
        if (dashed) stroke(context, path, `hsl(${hue(label)} 90% ${data.names.length === 1 ? 92 : 80}%)`, thick, [4 * line, 4 * line]);
        else stroke(context, path, `hsl(${hue(label)} 95% 60%)`, thick);
      }
    }
  }

  function drawGrid(plane, context, unit, line) {
    const { size: points, values } = shown.field, total = points[0] * points[1] * points[2];
    const jumps = [1, points[0], points[0] * points[1]], n = plane.normal;
    const place = n === null ? 0 : clamp(((state.cursor[n] + 0.5) * points[n]) / size[n] - 0.5, 0, points[n] - 1);
    const low = Math.floor(place), part = place - low, high = Math.min(low + 1, (n === null ? 1 : points[n]) - 1);
    const length = (axis) => size[axis] * spacing[axis];
    const point = (i, j) => {
      const start = i * jumps[plane.across] + j * jumps[plane.down], step = n === null ? 0 : jumps[n];
      const u = (axis) => (1 - part) * values[axis * total + start + low * step] + part * values[axis * total + start + high * step];
      const x = ((i + 0.5) * length(plane.across)) / points[plane.across] + u(plane.across);
      const y = ((j + 0.5) * length(plane.down)) / points[plane.down] + u(plane.down);
      return [(plane.flip[0] ? plane.width - x : x) * unit, (plane.flip[1] ? plane.height - y : y) * unit];
    };
    const path = new Path2D(), columns = points[plane.across], rows = points[plane.down];
    const run = (count, where) => { for (let k = 0; k < count; k++) { if (k) path.lineTo(...where(k)); else path.moveTo(...where(k)); } };
    for (let j = 0; j < rows; j++) run(columns, (i) => point(i, j));
    for (let i = 0; i < columns; i++) run(rows, (j) => point(i, j));
    stroke(context, path, GRID, 0.9 * line);
  }

  function drawLandmarks(plane, context, unit, line) {
    const n = plane.normal, reach = n === null ? Infinity : Math.max(1.5, (0.02 * size[n] * spacing[n]) / spacing[n]);
    for (const landmark of data.landmarks) {
      const away = n === null ? 0 : Math.abs(landmark.at[n] - state.cursor[n]);
      if (away > reach) continue;
      const x = across(plane, landmark.at[plane.across]) * unit, y = down(plane, landmark.at[plane.down]) * unit;
      for (const [vector, colour, width] of [[landmark.before, BEFORE, 1.2], [landmark.after, AFTER, 2.4]]) {
        if (vector === landmark.after && !data.frames[0].warped) continue;
        const path = new Path2D();
        path.moveTo(x, y);
        path.lineTo(x + vector[plane.across] * unit * (plane.flip[0] ? -1 : 1), y + vector[plane.down] * unit * (plane.flip[1] ? -1 : 1));
        stroke(context, path, "rgb(0 0 0 / .6)", (width + 2) * line);
        stroke(context, path, colour, width * line);
      }
      context.beginPath();
      context.arc(x, y, 2.6 * line, 0, 2 * Math.PI);
      context.fillStyle = "#fff";
      context.fill();
      context.strokeStyle = "#000";
      context.lineWidth = line;
      context.stroke();
    }
  }

  function drawCross(plane, context, unit, line) {
    if (plane.normal === null) return;
    const x = across(plane, state.cursor[plane.across]) * unit, y = down(plane, state.cursor[plane.down]) * unit, path = new Path2D();
    path.moveTo(x, 0); path.lineTo(x, context.canvas.height);
    path.moveTo(0, y); path.lineTo(context.canvas.width, y);
    context.globalAlpha = 0.7;
    stroke(context, path, CROSS, line);
    context.globalAlpha = 1;
  }

  function drawHandle(context, width, height, line) {
    const x = state.swipe * width, path = new Path2D();
    path.moveTo(x, 0); path.lineTo(x, height);
    stroke(context, path, "rgb(0 0 0 / .6)", 3 * line);
    stroke(context, path, "#fff", 1.2 * line);
    text(context, "fixed", x - 6 * line, height - 26 * line, "right", "bottom", 11 * line, "#fff");
    text(context, state.after ? "warped" : "before", x + 6 * line, height - 26 * line, "left", "bottom", 11 * line, "#fff");
  }

  function text(context, words, x, y, align, baseline, pixels, colour) {
    Object.assign(context, { font: `600 ${pixels}px system-ui, sans-serif`, textAlign: align, textBaseline: baseline });
    Object.assign(context, { lineWidth: pixels / 4, strokeStyle: "rgb(0 0 0 / .75)", lineJoin: "round", fillStyle: colour });
    context.strokeText(words, x, y);
    context.fillText(words, x, y);
  }
  function drawLetters(plane, context, width, height, scale) {
    const [left, right, top, bottom] = plane.letters, gap = 5 * scale, high = 13 * scale;
    text(context, left, gap, height / 2, "left", "middle", high, LETTER);
    text(context, right, width - gap, height / 2, "right", "middle", high, LETTER);
    text(context, top, width / 2, gap, "center", "top", high, LETTER);
    text(context, bottom, width / 2, height - gap, "center", "bottom", high, LETTER);
  }

  let waiting = false;
  function draw() {
    if (waiting || !shown.fixed) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      layOut();
      planes.forEach(drawPlane);
      for (const [id, on] of [["difference", state.mode === "difference"], ["jacobian", state.jacobian], ["labels", state.labels], ["landmarks", state.landmarks]]) find(`legend-${id}`).hidden = !on;
      const shift = (state.grid && shown.field?.shift) || 0;
      find("legend-grid").hidden = !state.grid;
      find("legend-grid").textContent = "grid: where the points of a regular grid on the fixed image are read in the moving one, x + u(x)"
        + (shift ? `; a shift of ${shift.toFixed(1)} mm that all points share is left out` : "");
      find("swipe-choice").hidden = state.mode !== "swipe";
      find("swipe").value = state.swipe;
      document.documentElement.dataset.ready = "yes";
    });
  }
  function go(axis, index) {
    const next = clamp(Math.round(index), 0, size[axis] - 1);
    if (next !== state.cursor[axis]) { state.cursor[axis] = next; draw(); }
  }

  // ---- controls

  function choices(id, type, entries, current, change) {
    const inputs = new Map();
    for (const [value, words, able] of entries) {
      const label = make("label", {}, find(id));
      const input = make("input", { type, name: id, value, disabled: !able, checked: current(value) }, label);
      make("span", { textContent: words }, label);
      input.addEventListener("change", () => { change(value, input.checked); draw(); });
      inputs.set(value, input);
    }
    return inputs;
  }
  const first = data.frames[0] ?? {}, able = Boolean(first.before);
  const modes = choices("modes", "radio",
    [["swipe", "Swipe", able], ["checkerboard", "Checkerboard", able], ["difference", "Difference", able], ["fixed", "Fixed", true], ["moving", "Moving", able]],
    (value) => value === state.mode, (value) => { state.mode = value; });
  const states = choices("states", "radio", [["before", "before", able], ["after", "after", Boolean(first.warped)]],
    (value) => (value === "after") === state.after, (value) => { state.after = value === "after"; });
  const layers = choices("overlays", "checkbox",
    [["grid", "Grid", first.field], ["jacobian", "Jacobian", first.jacobian], ["labels", "Contours", data.labels_fixed], ["landmarks", "Landmarks", data.landmarks],
      ["cross", "Cross hair", planes.length > 1]].filter((entry) => entry[2]),
    (value) => state[value], (value, on) => { state[value] = on; });
  find("overlays").hidden = !layers.size;
  find("states").hidden = !able;
  const KEYS = { g: "grid", j: "jacobian", c: "labels", l: "landmarks", x: "cross" };
  find("swipe").addEventListener("input", (event) => { state.swipe = Number(event.target.value); draw(); });

  if (data.frames.length > 1) {
    data.frames.forEach((frame, k) => make("option", { value: k, textContent: frame.name }, find("time")));
    find("time-choice").hidden = false;
    find("time").addEventListener("change", async (event) => { state.frame = Number(event.target.value); await load(); draw(); });
  }
  if ((data.names ?? []).length > 1) {
    ["all", ...data.names].forEach((name, k) => make("option", { value: k, textContent: name }, find("label")));
    find("label-choice").hidden = false;
    find("label").addEventListener("change", (event) => { state.label = Number(event.target.value); draw(); });
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    const key = event.key.toLowerCase(), press = (input) => { if (input && !input.disabled) input.click(); };
    if (key === "f") { if (!state.held) { state.held = true; draw(); } }
    else if (key === "b") press(states.get(state.after ? "before" : "after"));
    else if (KEYS[key]) press(layers.get(KEYS[key]));
    else if (/^[1-5]$/.test(key)) press([...modes.values()][Number(key) - 1]);
  });
  const release = () => { if (state.held) { state.held = false; draw(); } };
  document.addEventListener("keyup", (event) => { if (event.key.toLowerCase() === "f") release(); });
  window.addEventListener("blur", release);

  for (const plane of planes) {
    const { canvas, normal } = plane;
    const indices = (event) => {
      const box = canvas.getBoundingClientRect();
      const x = clamp((event.clientX - box.left) / box.width, 0, 1), y = clamp((event.clientY - box.top) / box.height, 0, 1);
      const pick = (part, count, flip) => clamp(Math.floor((flip ? 1 - part : part) * count), 0, count - 1);
      const index = [...state.cursor];
      index[plane.across] = pick(x, plane.columns, plane.flip[0]);
      index[plane.down] = pick(y, plane.rows, plane.flip[1]);
      return { x, index };
    };
    let pressed = null;
    canvas.addEventListener("pointerdown", (event) => { pressed = { x: event.clientX, y: event.clientY, moved: false }; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      const { x, index } = indices(event);
      readout(index);
      if (!pressed) return;
      pressed.moved ||= Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > 3;
      if (!pressed.moved) return;
      if (state.mode === "swipe") { state.swipe = x; draw(); }
      else { go(plane.across, index[plane.across]); go(plane.down, index[plane.down]); }
    });
    canvas.addEventListener("pointerup", (event) => {
      if (pressed && !pressed.moved) { const { index } = indices(event); go(plane.across, index[plane.across]); go(plane.down, index[plane.down]); }
      pressed = null;
    });
    canvas.addEventListener("pointercancel", () => { pressed = null; });
    canvas.addEventListener("pointerleave", () => { find("readout").textContent = "\u00a0"; });
    if (normal === null) continue;
    let turned = 0;
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey) return;
      event.preventDefault();
      turned += event.deltaMode === 0 ? event.deltaY / 40 : event.deltaY;
      const steps = Math.trunc(turned);
      turned -= steps;
      if (steps) go(normal, state.cursor[normal] + clamp(steps, -5, 5));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -Infinity, End: Infinity }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      go(normal, clamp(state.cursor[normal] + step, 0, size[normal] - 1));
    });
  }
  function readout(index) {
    const place = data.origin.map((o, row) => o + data.matrix[row].reduce((sum, m, k) => sum + m * index[k], 0));
    const voxel = index[0] + index[1] * strides[1] + index[2] * strides[2];
    const parts = [`${place.map((p) => p.toFixed(1)).join(", ")} mm (LPS)`];
    if (shown.jacobian) {
      const octaves = ((shown.jacobian[voxel] - 128) * 2) / 127;
      parts.push(shown.folds?.[voxel] ? "folds here" : `Jacobian determinant ${(2 ** octaves).toFixed(2)}`);
    }
    find("readout").textContent = parts.join("   ");
  }
  for (const button of document.querySelectorAll("[data-landmark]")) {
    button.addEventListener("click", () => {
      data.landmarks[button.dataset.landmark].at.forEach((index, axis) => go(axis, index));
      if (!state.landmarks) layers.get("landmarks").click();
      if (!state.cross && layers.get("cross")) layers.get("cross").click();
      find("viewer").scrollIntoView({ block: "start" });
      draw();
    });
  }
  await load();
  find("viewer").hidden = false;
  new ResizeObserver(draw).observe(find("planes"));
})();

// The page of a collection. Names are untrusted: they reach the page as textContent and as parts of
// addresses that are percent-encoded, and plotly is given numbers and colours only.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const count = data.names.length;

// What Python wrote

function bytes(id) {
  const text = atob(element(id).textContent);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}
const floats = (id) => new Float32Array(bytes(id).buffer);
const neighbourIndex = new Uint32Array(bytes("index").buffer);
const neighbourCosine = floats("cosine");
const perClip = neighbourIndex.length / count;
const seconds = element("seconds") ? floats("seconds") : null;
const lowerNames = data.names.map((name) => name.toLowerCase());
const cache = new Map();
function once(id) {
  if (!cache.has(id)) cache.set(id, floats(id));
  return cache.get(id);
}

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Pictures: grey tiles of sheets, coloured when they are drawn

const MAGMA = [[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100],
  [251, 135, 97], [254, 194, 135], [252, 253, 191]];
const SHADES = Array.from({length: 256}, (_, shade) => {
  const place = shade / 255 * (MAGMA.length - 1), low = Math.min(Math.floor(place), MAGMA.length - 2);
  return MAGMA[low].map((value, i) => value + (place - low) * (MAGMA[low + 1][i] - value));
});
const sheets = new Map();
const KEPT_SHEETS = 24;

function sheet(number) {
  let image = sheets.get(number);
  if (!image) {
    image = new Image();
    image.src = "data:image/jpeg;base64," + element(`sheet-${number}`).textContent;
    if (sheets.size >= KEPT_SHEETS) sheets.delete(sheets.keys().next().value);
    sheets.set(number, image);
  }
  return image.decode().then(() => image);
}

async function draw(canvas, clip) {
  const {across, count: perSheet, width, height} = data.sheet;
  canvas.width = width;
  canvas.height = height;
  canvas.dataset.clip = clip;
  canvas.hidden = !data.pictures;
  if (!data.pictures) return;
  const image = await sheet(Math.floor(clip / perSheet));
  if (canvas.dataset.clip !== String(clip)) return; // another clip was asked for meanwhile
  const tile = clip % perSheet, context = canvas.getContext("2d", {willReadFrequently: true});
  const x = tile % across * width, y = Math.floor(tile / across) * height;
  context.drawImage(image, x, y, width, height, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data.set(SHADES[pixels.data[i]], i);
  context.putImageData(pixels, 0, 0);
}

// Sounds

function address(clip) {
  if (data.audio === "embed") {
    const sound = element(`audio-${clip}`);
    return sound && URL.createObjectURL(new Blob([bytes(sound.id)], {type: "audio/mpeg"}));
  }
  const name = data.odd[clip] ?? data.names[clip].split("/").map(encodeURIComponent).join("/");
  return `${data.base}/${name}`;
}

const player = element("player");
function play(clip) {
  if (player.src.startsWith("blob:")) URL.revokeObjectURL(player.src);
  element("problem").textContent = "";
  const source = data.audio === "none" ? null : address(clip);
  player.hidden = !source;
  if (!source) {
    player.removeAttribute("src");
    return;
  }
  player.src = source;
  player.play().catch((error) => {
    if (error.name !== "AbortError") element("problem").textContent = unplayable(); // not the next click
  });
}
const unplayable = () => data.audio === "embed" ? "This clip cannot be played." :
  "The browser cannot play this file: it is not where it was when the page was made, or of a kind that " +
  "browsers do not know. A page made with --audio embed carries the sound.";

// Colours

const PALETTE = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e08214", "#7f6bb3",
  "#35978f", "#b15928", "#f4a6c0", "#8cbf3f", "#1f4e79", "#c2a5cf", "#5c8a3a", "#d94801", "#80cdc1", "#a0522d",
  "#6a51a3"];
const OTHER = "#9a9a94";
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
let groups = []; // {label, colour, clips: Uint32Array, visible}
let column = 0;

function group() {
  const {categories} = data.columns[column], values = once(`column-${column}`);
  if (!categories) {
    const clips = [...values.keys()];
    groups = [
      {label: "no value", colour: OTHER, clips: clips.filter((i) => isNaN(values[i])), visible: true},
      {scale: true, clips: clips.filter((i) => !isNaN(values[i])), visible: true},
    ].filter((part) => part.clips.length);
    return;
  }
  const shown = Math.min(categories.length, PALETTE.length);
  const lists = Array.from({length: shown + 1}, () => []);
  values.forEach((value, clip) => lists[value < shown ? value : shown].push(clip));
  groups = lists.map((clips, i) => ({
    label: i < shown ? categories[i] : categories.length > shown ? `${categories.length - shown} others` : "no value",
    colour: i < shown ? PALETTE[i] : OTHER, clips, visible: true,
  })).filter((part) => part.clips.length);
}

function drawLegend() {
  const legend = element("legend");
  legend.replaceChildren();
  for (const part of groups) {
    if (part.scale) {
      let low = Infinity, high = -Infinity;
      const values = once(`column-${column}`);
      for (const i of part.clips) { low = Math.min(low, values[i]); high = Math.max(high, values[i]); }
      const scale = make("div", "scale"), ends = make("div", "ends number");
      scale.style.background = `linear-gradient(to right, ${VIRIDIS.join(",")})`;
      ends.append(make("span", "", +low.toPrecision(4)), make("span", "", +high.toPrecision(4)));
      legend.append(scale, ends);
      continue;
    }
    const button = make("button"), dot = make("span", "dot");
    dot.style.background = part.colour;
    button.append(dot, make("span", "label", part.label), make("span", "faint number", part.clips.length));
    button.setAttribute("aria-pressed", part.visible);
    button.title = "click: hide or show; double click: this one alone, or all";
    button.onclick = () => { part.visible = !part.visible; drawLegend(); drawMap(); };
    button.ondblclick = () => {
      const alone = groups.every((other) => other.visible === (other === part));
      for (const other of groups) other.visible = alone || other === part;
      drawLegend();
      drawMap();
    };
    legend.append(button);
  }
}

// The map

const map = element("map");
let mapId = data.maps[0].id, selected = null, matches = [];
const size = Math.max(3, Math.min(9, 200 / Math.sqrt(count)));
// One pixel of WebGL for each of the screen: plotly takes twice as many each way, and has them smoothed by the
// browser too, though its points have smooth edges of their own
const ratio = Math.min(4, Math.max(1, devicePixelRatio));
const {getContext} = HTMLCanvasElement.prototype;
HTMLCanvasElement.prototype.getContext = function (kind, options) {
  return getContext.call(this, kind, {...options, antialias: false});
};

function points(clips) {
  const places = once(`map-${mapId}`), x = new Float32Array(clips.length), y = new Float32Array(clips.length);
  clips.forEach((clip, i) => { x[i] = places[2 * clip]; y[i] = places[2 * clip + 1]; });
  return {x, y};
}

let traceClips = []; // of each trace, for events
function drawMap() {
  const text = getComputedStyle(document.body).color, values = once(`column-${column}`);
  const traces = [];
  traceClips = [];
  const add = (clips, marker, more = {}) => {
    traces.push({type: "scattergl", mode: "markers", hoverinfo: "none", showlegend: false, ...points(clips), marker, ...more});
    traceClips.push(clips);
  };
  for (const part of groups) {
    const colour = part.scale ? {
      color: part.clips.map((clip) => values[clip]), colorscale: VIRIDIS.map((c, i) => [i / (VIRIDIS.length - 1), c]),
    } : {color: part.colour};
    add(part.clips, {size, opacity: matches.length ? 0.25 : 0.8, ...colour}, {visible: part.visible});
  }
  if (matches.length) add(matches, {size: size + 2, color: text, symbol: "circle-open", line: {width: 1.5}});
  if (selected !== null) {
    const near = neighbours(selected).map(([clip]) => clip);
    add(near, {size: size + 6, color: text, symbol: "circle-open", line: {width: 1.5}});
    add([selected], {size: size + 8, color: "#c44e2d", line: {width: 2, color: text}});
  }
  const axis = {visible: false, zeroline: false, showgrid: false};
  return Plotly.react(map, traces, {
    margin: {l: 0, r: 0, t: 0, b: 0}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    xaxis: axis, yaxis: {...axis, scaleanchor: "x"}, hovermode: "closest", hoverdistance: 12, dragmode: "pan",
    uirevision: mapId, showlegend: false,
  }, {scrollZoom: true, displayModeBar: false, responsive: true, doubleClick: "reset", plotGlPixelRatio: ratio});
}

const clipOf = (event) => traceClips[event.points[0].curveNumber][event.points[0].pointIndex];
const tip = element("tip");
function showTip(event) {
  const clip = clipOf(event), [canvas, name, about] = tip.children;
  tip.hidden = false;
  name.textContent = data.names[clip];
  about.textContent = describe(clip);
  draw(canvas, clip);
  const {clientX: x, clientY: y} = event.event, box = tip.getBoundingClientRect();
  tip.style.left = `${x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - box.height - 4))}px`;
}

function describe(clip) {
  const parts = data.columns.map(({name, categories}, i) => {
    const value = once(`column-${i}`)[clip];
    return isNaN(value) ? "" : `${name}: ${categories ? categories[value] : +value.toPrecision(5)}`;
  });
  if (seconds && !isNaN(seconds[clip])) parts.push(`${seconds[clip].toFixed(1)} s`);
  return parts.filter(Boolean).join(" · ");
}

// Lists

function neighbours(clip) {
  return Array.from({length: perClip}, (_, i) => [neighbourIndex[clip * perClip + i], neighbourCosine[clip * perClip + i]]);
}

function row(clip, cosine) {
  const button = make("button", data.pictures ? "row" : "row plain");
  button.dataset.clip = clip;
  if (data.pictures) {
    const canvas = make("canvas");
    draw(canvas, clip);
    button.append(canvas);
  }
  const name = data.names[clip], cut = name.lastIndexOf("/") + 1, label = make("span", "name", name.slice(cut));
  if (cut) label.append(make("span", "under", name.slice(0, cut - 1)));
  button.append(label, make("span", "number", cosine === undefined ? "" : cosine.toFixed(4)));
  button.title = name;
  button.setAttribute("aria-current", clip === selected);
  button.onclick = () => select(clip);
  return button;
}

function open(tab) {
  for (const name of ["neighbours", "duplicates", "matches"]) {
    element(name).hidden = name !== tab;
    element(`tab-${name}`).setAttribute("aria-selected", name === tab);
  }
}

const LISTED = 100;
function listDuplicates() {
  const list = element("duplicates");
  element("tab-duplicates").textContent = `near-duplicates (${data.groups})`;
  list.append(make("div", "note", data.groups ?
    `Groups linked by a cosine of ${data.threshold} or more, and the highest in each.` :
    `No two clips have a cosine of ${data.threshold} or more.`));
  const more = make("button", "row plain", "show more");
  let shown = 0;
  more.onclick = () => {
    more.remove();
    for (const [cosine, clips] of data.duplicates.slice(shown, shown + LISTED)) {
      const box = make("div", "group");
      clips.slice(0, LISTED).forEach((clip, i) => box.append(row(clip, i ? undefined : cosine)));
      if (clips.length > LISTED) box.append(make("div", "note", `and ${clips.length - LISTED} more`));
      list.append(box);
    }
    shown += LISTED;
    if (shown < data.duplicates.length) list.append(more);
  };
  more.onclick();
}

// What people do

function select(clip, stay = true) {
  selected = clip;
  element("hint").hidden = true;
  element("clip").hidden = false;
  element("name").textContent = data.names[clip];
  element("about").textContent = describe(clip);
  draw(element("picture"), clip);
  element("neighbours").replaceChildren(...neighbours(clip).map(([other, cosine]) => row(other, cosine)));
  for (const node of document.querySelectorAll(".row")) node.setAttribute("aria-current", node.dataset.clip === String(clip));
  if (!stay) open("neighbours");
  drawMap();
  play(clip);
}

function search(text) {
  const terms = text.toLowerCase().split(/\s+/).filter(Boolean);
  matches = [];
  if (terms.length) lowerNames.forEach((name, clip) => { if (terms.every((term) => name.includes(term))) matches.push(clip); });
  const tab = element("tab-matches");
  tab.hidden = !terms.length;
  tab.textContent = `found (${matches.length})`;
  element("matches").replaceChildren(...matches.slice(0, LISTED).map((clip) => row(clip)));
  if (matches.length > LISTED) element("matches").append(make("div", "note", `and ${matches.length - LISTED} more`));
  open(terms.length ? "matches" : "neighbours");
  drawMap();
}

function fill(id, options, onchange) {
  element(id).replaceChildren(...options.map((name, i) => Object.assign(make("option", "", name), {value: i})));
  element(id).onchange = () => onchange(Number(element(id).value));
}

element("title").textContent = document.title;
element("count").textContent = `${count.toLocaleString("en")} clips`;
fill("maps", data.maps.map(({name}) => name), (i) => { mapId = data.maps[i].id; drawMap(); });
fill("columns", data.columns.map(({name}) => name), (i) => { column = i; group(); drawLegend(); drawMap(); });
for (const tab of ["neighbours", "duplicates", "matches"]) element(`tab-${tab}`).onclick = () => open(tab);
let typing = 0;
element("search").oninput = (event) => {
  clearTimeout(typing);
  typing = setTimeout(() => search(event.target.value), 120);
};
element("search").onkeydown = (event) => { if (event.key === "Enter" && matches.length) select(matches[0]); };
element("neighbours").append(make("div", "note", "of the clip that is chosen, by the cosine of their embeddings"));
listDuplicates();
open("neighbours");
group();
drawLegend();
drawMap().then(() => {
  map.on("plotly_hover", showTip);
  map.on("plotly_unhover", () => { tip.hidden = true; });
  map.on("plotly_click", (event) => select(clipOf(event), false));
  document.body.dataset.ready = "true";
});
matchMedia("(prefers-color-scheme: dark)").onchange = drawMap;
})();

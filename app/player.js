// Runs once for each player on the page, as `js_on_load` of gr.HTML, which gives `element`, `props` and `watch`.
// `props.value` is what player_value of player.py wrote. All text of the answer goes into the page as textContent.

const root = element.querySelector(".player");
const kept = { opacity: 0.7, isOverlayOn: true }; // what the person has set outlives the answer
let shown = null; // the answer that is drawn now, with its nodes
let tick = 0; // of the animation while the video plays

function node(tag, attributes, ...children) {
  const isSvg = ["svg", "rect", "line"].includes(tag);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function seconds(time) {
  return `${time.toFixed(time < 9.95 ? 2 : 1)} s`;
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

// The two sampled frames around a time, and the weight of the second.
function around(time, times) {
  let next = times.findIndex((each) => each > time);
  if (next === 0) return [0, 0, 0];
  if (next < 0) return [times.length - 1, times.length - 1, 0];
  const step = times[next] - times[next - 1];
  return [next - 1, next, step > 0 ? (time - times[next - 1]) / step : 0];
}

function nearest(time, times) {
  const [before, after, weight] = around(time, times);
  return weight < 0.5 ? before : after;
}

// Time, whether or not there is a video to ask for it.

function now() {
  return shown.video ? shown.video.currentTime : shown.time;
}

function seek(time) {
  shown.time = time;
  if (shown.video) shown.video.currentTime = time;
  draw();
}

// From little to much attention: clear, then violet, orange, pale yellow, readable on dark and on light pictures.
const STOPS = [[60, 15, 110], [205, 60, 75], [252, 150, 30], [252, 250, 170]];

function colour(level) {
  const place = (level / 255) * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  const mixed = STOPS[low].map((value, channel) => value + (place - low) * (STOPS[low + 1][channel] - value));
  return [...mixed, (level * level) / 255]; // levels are square roots: how much covers the picture is in proportion
}

// The heat map of a time, one pixel for each place that the query can look at.
function heat(time) {
  const { attention, times } = shown.answer;
  const [before, after, weight] = around(time, times);
  const map = new ImageData(attention.columns, attention.rows);
  for (let place = 0; place < attention.columns * attention.rows; place++) {
    const level = (1 - weight) * attention.levels[before][place] + weight * attention.levels[after][place];
    map.data.set(colour(level), 4 * place);
  }
  const small = node("canvas", { width: attention.columns, height: attention.rows });
  small.getContext("2d").putImageData(map, 0, 0);
  return small;
}

function draw() {
  const { answer, canvas } = shown;
  const time = now();
  const pixels = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * pixels));
  const height = Math.max(1, Math.round(canvas.clientHeight * pixels));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  const [scaleX, scaleY] = [width / answer.width, height / answer.height];
  const [top, left, boxHeight, boxWidth] = answer.box;
  const box = [left * scaleX, top * scaleY, boxWidth * scaleX, boxHeight * scaleY];
  if (!shown.video) drawFrame(pen, nearest(time, answer.times), box);
  if (answer.attention && kept.isOverlayOn) {
    pen.globalAlpha = kept.opacity;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(heat(time), ...box);
    pen.globalAlpha = 1;
    drawBox(pen, box, pixels);
  }
  mark(time);
}

// Where no video plays, the frame that the model saw stands in its place.
function drawFrame(pen, index, box) {
  const image = shown.frames[index];
  if (image && image.complete && image.naturalWidth) pen.drawImage(image, ...box);
}

// The part of the picture that the model saw: a light line on a dark one is seen on any picture.
function drawBox(pen, box, pixels) {
  for (const [style, width] of [["rgba(0, 0, 0, 0.6)", 3], ["rgba(255, 255, 255, 0.9)", 1]]) {
    pen.strokeStyle = style;
    pen.lineWidth = width * pixels;
    pen.strokeRect(box[0] + pixels, box[1] + pixels, box[2] - 2 * pixels, box[3] - 2 * pixels);
  }
}

// Playhead, and which frame and which segment are shown now.
function mark(time) {
  const { answer, playhead, frameButtons, segmentButtons, subtitle } = shown;
  if (playhead) playhead.style.left = `${100 * Math.min(1, time / answer.duration)}%`;
  const current = nearest(time, answer.times);
  frameButtons.forEach((button, index) => markCurrent(button, index === current));
  const segment = answer.segments.findLastIndex((each) => each.start <= time + 0.001);
  segmentButtons.forEach((button, index) => markCurrent(button, index === segment));
  if (subtitle) subtitle.textContent = segment < 0 ? "" : answer.segments[segment].text;
}

function markCurrent(button, isCurrent) {
  if (isCurrent) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
}

function animate() {
  cancelAnimationFrame(tick);
  draw();
  if (shown.video && !shown.video.paused && !shown.video.ended) tick = requestAnimationFrame(animate);
}

// Parts of the player.

function stage(answer) {
  const canvas = node("canvas", { class: "heat", "aria-hidden": "true" });
  // As wide as there is room for, but a portrait clip not taller than the window is good for.
  const shape = `aspect-ratio: ${answer.width} / ${answer.height}; --aspect: ${answer.width / answer.height}`;
  const made = node("div", { class: "stage", style: shape });
  if (answer.video) made.append(videoOf(answer));
  made.append(canvas);
  return made;
}

function videoOf(answer) {
  const video = node("video", {
    src: answer.video.url,
    controls: true,
    playsinline: true,
    muted: true, // an overlay is looked at over and over
    preload: "auto",
    loop: answer.duration < 10,
    "aria-label": "The clip",
    // The overlay would not come along into full screen; subtitles do.
    controlslist: answer.attention ? "nofullscreen nodownload" : "nodownload",
    disablepictureinpicture: true,
  });
  video.muted = true;
  if (answer.vtt) {
    const src = URL.createObjectURL(new Blob([answer.vtt], { type: "text/vtt" }));
    video.append(node("track", { kind: "subtitles", label: "Captions", srclang: "en", src, default: true }));
  }
  for (const name of ["play", "seeked", "timeupdate", "loadeddata", "pause"]) video.addEventListener(name, animate);
  video.addEventListener("error", () => {
    if (!shown || shown.video !== video) return;
    render({ ...answer, video: null, note: "Your browser cannot play this file; below are the frames that were read." });
  });
  return video;
}

function controls(answer) {
  const box = node("input", {
    type: "checkbox",
    class: "show-heat",
    checked: kept.isOverlayOn,
    onchange: (event) => {
      kept.isOverlayOn = event.target.checked;
      draw();
    },
  });
  const slider = node("input", {
    type: "range",
    class: "opacity",
    min: 0,
    max: 100,
    value: 100 * kept.opacity,
    oninput: (event) => {
      kept.opacity = event.target.value / 100;
      draw();
    },
  });
  return node(
    "div",
    { class: "controls" },
    node("label", {}, box, "Show where the model looked"),
    node("label", {}, "Strength", slider),
  );
}

// One bar for each time; frames of one time (a still picture) share theirs.
function chart(answer) {
  const shares = new Map();
  answer.times.forEach((time, index) => {
    shares.set(time, (shares.get(time) || 0) + answer.attention.shares[index]);
  });
  const times = [...shares.keys()].sort((one, other) => one - other);
  const gaps = times.slice(1).map((time, index) => time - times[index]);
  const width = Math.max(4, Math.min(1000, (700 / answer.duration) * Math.min(answer.duration, ...gaps)));
  const most = Math.max(...shares.values());
  const bars = times.map((time) => {
    const height = (96 * shares.get(time)) / most;
    const middle = (1000 * time) / answer.duration;
    const x = Math.min(1000 - width, Math.max(0, middle - width / 2));
    return node("rect", { x, y: 100 - height, width, height });
  });
  const peak = times.find((time) => shares.get(time) === most);
  const label = `Attention over time: most at ${seconds(peak)}, ${percent(most)} of all`;
  const svg = node("svg", { viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img", "aria-label": label });
  svg.append(...bars);
  const playhead = node("div", { class: "playhead", "aria-hidden": "true" });
  const plot = node("div", { class: "plot" }, svg, playhead);
  plot.addEventListener("pointerdown", (event) => {
    const area = plot.getBoundingClientRect();
    seek((answer.duration * (event.clientX - area.left)) / area.width);
  });
  const axis = node(
    "div",
    { class: "axis", "aria-hidden": "true" },
    node("span", {}, seconds(0)),
    node("span", {}, `most: ${percent(most)} at ${seconds(peak)}`),
    node("span", {}, seconds(answer.duration)),
  );
  return node("section", { class: "over-time" }, node("h3", {}, "Attention over time"), plot, axis);
}

function strip(answer) {
  const buttons = answer.frames.map((source, index) => {
    const time = seconds(answer.times[index]);
    const share = answer.attention ? percent(answer.attention.shares[index]) : null;
    const label = `Frame ${index + 1} of ${answer.frames.length}, at ${time}${share ? `, attention ${share}` : ""}`;
    return node(
      "button",
      { type: "button", "aria-label": label, onclick: () => seek(answer.times[index]) },
      node("img", { src: source, alt: "", onload: () => shown && !shown.video && draw() }),
      node("span", {}, time),
    );
  });
  const heading = node("h3", {}, `What the model saw: ${answer.frames.length} frames`);
  return node("section", { class: "strip" }, heading, node("div", { class: "row" }, ...buttons));
}

function segments(answer) {
  const items = answer.segments.map((segment) => {
    const span = `${seconds(segment.start)} – ${seconds(segment.end)}`;
    const button = node(
      "button",
      { type: "button", onclick: () => seek(segment.start) },
      node("span", { class: "span" }, span),
      node("span", { class: "caption" }, segment.text || "(no words)"),
    );
    return node("li", {}, button);
  });
  return node("section", { class: "segments" }, node("h3", {}, "Captions"), node("ol", {}, ...items));
}

function render(answer) {
  cancelAnimationFrame(tick);
  const time = shown && answer && shown.answer.id === answer.id ? now() : 0;
  shown = null;
  if (!answer) {
    root.replaceChildren();
    return;
  }
  const place = stage(answer);
  const parts = [place];
  if (answer.note) parts.push(node("p", { class: "note", role: "status" }, answer.note));
  const subtitle = !answer.video && answer.segments.length ? node("p", { class: "subtitle" }) : null;
  if (subtitle) parts.push(subtitle);
  if (answer.attention) parts.push(controls(answer), chart(answer));
  if (answer.segments.length) parts.push(segments(answer));
  parts.push(strip(answer));
  root.replaceChildren(...parts);
  shown = {
    answer,
    time,
    subtitle,
    video: root.querySelector("video"),
    canvas: root.querySelector("canvas"),
    playhead: root.querySelector(".playhead"),
    frames: [...root.querySelectorAll(".strip img")],
    frameButtons: [...root.querySelectorAll(".strip button")],
    segmentButtons: [...root.querySelectorAll(".segments button")],
  };
  if (time > 0) seek(time);
  draw();
}

new ResizeObserver(() => shown && draw()).observe(root);
watch("value", () => render(props.value));
render(props.value);

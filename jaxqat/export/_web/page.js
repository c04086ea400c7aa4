// Runs the networks of network.json in the browser. Pixels are those that Python sees: an image of
// the network's own size is taken as it is; a larger or smaller one is scaled by its shorter side
// and cropped in the middle.

const REPEATS = 5; // Runs of which the median is shown as the time per image.
const SHOWN = 3; // Classes of each network.

const byId = (id) => document.getElementById(id);
const say = (text) => { byId("status").textContent = text; };

function element(name, text, parent) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// Draw an image, a video's frame or a bitmap on a canvas of the network's size.
function draw(source, width, height, [rows, columns]) {
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // Behind what is transparent.
  context.fillRect(0, 0, columns, rows);
  const scale = Math.min(width / columns, height / rows);
  const [w, h] = [columns * scale, rows * scale];
  context.drawImage(source, (width - w) / 2, (height - h) / 2, w, h, 0, 0, columns, rows);
  return canvas;
}

// Pixels of a canvas, channels last; grey as Pillow computes it (ITU-R 601-2, in 16 bits).
function pixelsOf(canvas, channels) {
  const rgba = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const pixels = new Uint8Array((rgba.length / 4) * channels);
  for (let i = 0; i < rgba.length / 4; i++) {
    const [r, g, b] = rgba.subarray(4 * i, 4 * i + 3);
    if (channels === 1) pixels[i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
    else pixels.set([r, g, b], 3 * i);
  }
  return pixels;
}

function normalized(pixels, { mean, std }) {
  const channels = mean.length;
  return Float32Array.from(pixels, (p, i) => (p / 255 - mean[i % channels]) / std[i % channels]);
}

function softmax(logits) {
  const top = Math.max(...logits);
  const powers = Array.from(logits, (x) => Math.exp(x - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

// A network of network.json in a session of ONNX Runtime.
class Network {
  static async open(ort, info, entry) {
    const network = new Network();
    Object.assign(network, { ort, info, entry });
    network.session = await ort.InferenceSession.create(entry.file, { executionProviders: ["wasm"] });
    const row = element("tr", undefined, byId("networks").tBodies[0]);
    element("th", entry.name, row).scope = "row";
    element("td", entry.bytes.toLocaleString("en"), row);
    network.cell = element("td", "–", row);
    await network.logits(new Uint8Array(info.shape.reduce((a, b) => a * b)), 1); // Warms up.
    return network;
  }

  async logits(pixels, repeats) {
    const { ort, info, entry, session } = this;
    const isRaw = entry.input === "uint8";
    const data = isRaw ? pixels : normalized(pixels, info.normalization);
    const tensor = new ort.Tensor(isRaw ? "uint8" : "float32", data, [1, ...info.shape]);
    const times = [];
    let results;
    for (let i = 0; i < repeats; i++) {
      const start = performance.now();
      results = await session.run({ [session.inputNames[0]]: tensor });
      times.push(performance.now() - start);
    }
    this.cell.textContent = median(times).toFixed(1);
    return Array.from(results[session.outputNames[0]].data);
  }
}

// Classify a canvas by every network, and show it in a list item.
async function classify(networks, info, canvas, name, item, repeats = REPEATS) {
  const pixels = pixelsOf(canvas, info.shape[2]);
  const found = {};
  for (const network of networks) found[network.entry.name] = await network.logits(pixels, repeats);
  item.replaceChildren(canvas);
  for (const [network, logits] of Object.entries(found)) {
    const part = element("div", undefined, item);
    element("h2", network, part);
    const shares = softmax(logits);
    const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a] || a - b);
    for (const index of order.slice(0, SHOWN)) {
      const line = element("p", undefined, part);
      const label = info.labels[index] ?? index;
      element("span", `${label}: ${(100 * shares[index]).toFixed(2)} %`, line);
      const bar = element("meter", undefined, line);
      bar.value = shares[index];
      bar.setAttribute("aria-hidden", "true");
    }
  }
  element("p", name, item).className = "name";
  item.logits = found; // For programs: logits by network.
}

async function classifyBlob(networks, info, blob, name) {
  const item = element("li");
  byId("results").prepend(item);
  try {
    const bitmap = await createImageBitmap(blob, {
      colorSpaceConversion: "none", premultiplyAlpha: "none",
    });
    const canvas = draw(bitmap, bitmap.width, bitmap.height, info.shape);
    await classify(networks, info, canvas, name, item);
  } catch (error) {
    item.remove();
    say(`${name}: cannot be read as an image (${error.message}).`);
  }
}

async function toggleCamera(networks, info, enqueue) {
  const video = byId("video");
  if (video.srcObject) {
    video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    video.hidden = true;
    byId("camera").textContent = "Camera";
    return;
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
  } catch (error) {
    say(`There is no camera, or it is not allowed (${error.message}).`);
    return;
  }
  video.hidden = false;
  byId("camera").textContent = "Stop the camera";
  await video.play();
  const item = element("li");
  byId("results").prepend(item);
  while (video.srcObject) {
    const canvas = draw(video, video.videoWidth, video.videoHeight, info.shape);
    await enqueue(() => classify(networks, info, canvas, "camera", item, 1));
    await new Promise(requestAnimationFrame);
  }
}

async function start() {
  const info = await (await fetch("network.json")).json();
  const ort = await import(info.runtime);
  // Threads need a page that is isolated from other origins.
  if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  const [rows, columns, channels] = info.shape;
  byId("about").textContent = `${info.name}: images of ${columns}×${rows} pixels, `
    + `${channels === 1 ? "grey" : "in colour"}, ${info.labels.length || "unnamed"} classes. `
    + "Nothing leaves this computer.";
  const networks = [];
  for (const entry of info.networks) networks.push(await Network.open(ort, info, entry));
  byId("networks").hidden = false;

  let queue = Promise.resolve(); // One image after the other: a session runs one at a time.
  const enqueue = (task) => (queue = queue.then(task));
  const add = (blob, name) => enqueue(() => classifyBlob(networks, info, blob, name));
  const addAll = (files) => { for (const file of files) add(file, file.name); };
  byId("files").addEventListener("change", (event) => addAll(event.target.files));
  const drop = byId("drop");
  const over = (event) => { event.preventDefault(); drop.classList.toggle("over", event.type === "dragover"); };
  for (const type of ["dragover", "dragleave", "drop"]) drop.addEventListener(type, over);
  drop.addEventListener("drop", (event) => addAll(event.dataTransfer.files));
  byId("camera").addEventListener("click", () => toggleCamera(networks, info, enqueue));
  for (const { file, label } of info.examples) {
    const button = element("button", undefined, element("li", undefined, byId("examples")));
    button.type = "button";
    Object.assign(element("img", undefined, button), { src: file, alt: label, title: label });
    button.addEventListener("click", async () => add(await (await fetch(file)).blob(), label));
  }
  byId("offer").hidden = !info.examples.length;
  say("Ready.");
}

start().catch((error) => say(`The page cannot start: ${error.message}`));

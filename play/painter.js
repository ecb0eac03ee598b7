// The given picture, and a mask painted on it. `props.value` is null or {image, mask}, both data: URIs; no mask is null.
const part = (role) => element.querySelector(`[data-role=${role}]`);
const stage = element.querySelector('.stage');
const picture = stage.querySelector('img');
const canvas = stage.querySelector('canvas');
const pen = canvas.getContext('2d', {willReadFrequently: true});
const PAINT = '#ff3b30'; // the canvas is half transparent, see style.css

let base = null; // the mask that was given, as an image
let strokes = []; // what was painted on it: {points, width, erase}, in pixels of the picture

function load(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

function read(file) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(file);
  });
}

function paintBase() {
  pen.drawImage(base, 0, 0, canvas.width, canvas.height);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(PAINT.slice(at, at + 2), 16));
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.set([red, green, blue, pixels.data[i] >= 128 ? 255 : 0], i);
  }
  pen.putImageData(pixels, 0, 0);
}

function paint({points, width, erase}) {
  pen.globalCompositeOperation = erase ? 'destination-out' : 'source-over';
  pen.strokeStyle = PAINT;
  pen.lineWidth = width;
  pen.lineCap = pen.lineJoin = 'round';
  pen.beginPath();
  points.forEach(([x, y]) => pen.lineTo(x, y));
  if (points.length === 1) pen.lineTo(points[0][0] + 0.01, points[0][1]);
  pen.stroke();
  pen.globalCompositeOperation = 'source-over';
}

function repaint() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (base) paintBase();
  strokes.forEach(paint);
}

// White where there is paint, black elsewhere; null when nothing is painted.
function mask() {
  if (!canvas.width || !pen.getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value)) return null;
  const copy = Object.assign(document.createElement('canvas'), {width: canvas.width, height: canvas.height});
  const ink = copy.getContext('2d');
  ink.drawImage(canvas, 0, 0);
  for (const [operation, colour] of [['source-in', 'white'], ['destination-over', 'black']]) {
    ink.globalCompositeOperation = operation;
    ink.fillStyle = colour;
    ink.fillRect(0, 0, copy.width, copy.height);
  }
  return copy.toDataURL();
}

let told = null; // what is in props.value from here
function tell(image) {
  told = image ? {image, mask: mask()} : null;
  props.value = told;
}

// A file that the browser cannot show is sent all the same: the server judges it.
async function show(image, given) {
  const shown = image && (await load(image).catch(() => null));
  stage.hidden = !shown;
  part('tools').hidden = !image;
  part('mask-file').hidden = !shown;
  picture.src = shown ? image : '';
  [canvas.width, canvas.height] = shown ? [shown.naturalWidth, shown.naturalHeight] : [0, 0];
  base = shown && given ? await load(given) : null;
  strokes = [];
  if (shown) repaint();
}

part('picture').addEventListener('change', async (event) => {
  if (!event.target.files.length) return;
  const image = await read(event.target.files[0]);
  await show(image, null);
  tell(image);
});

part('mask').addEventListener('change', async (event) => {
  if (!event.target.files.length || stage.hidden) return;
  base = await load(await read(event.target.files[0])).catch(() => null);
  strokes = [];
  repaint();
  tell(picture.src);
});

function place(event) {
  const scale = canvas.width / canvas.clientWidth;
  return [event.offsetX * scale, event.offsetY * scale];
}

canvas.addEventListener('pointerdown', (event) => {
  canvas.setPointerCapture(event.pointerId);
  const width = (part('width').value / 100) * canvas.width;
  strokes.push({points: [place(event)], width, erase: part('erase').checked});
  paint(strokes.at(-1));
});
canvas.addEventListener('pointermove', (event) => {
  if (!canvas.hasPointerCapture(event.pointerId)) return;
  strokes.at(-1).points.push(place(event));
  paint({...strokes.at(-1), points: strokes.at(-1).points.slice(-2)});
});
canvas.addEventListener('lostpointercapture', () => tell(picture.src));

part('undo').addEventListener('click', () => {
  strokes.pop();
  repaint();
  tell(picture.src);
});
part('clear').addEventListener('click', () => {
  [base, strokes] = [null, []];
  repaint();
  tell(picture.src);
});
part('remove').addEventListener('click', () => {
  part('picture').value = part('mask').value = '';
  show(null, null);
  tell(null);
});

watch('value', () => {
  const {image, mask} = props.value ?? {};
  if (image !== told?.image || mask !== told?.mask) show(image, mask);
});
show(props.value?.image, props.value?.mask);

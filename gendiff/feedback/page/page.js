// The labelling page.  Every mark is one line of the file of labels: it is shown at once, waits in a queue that this
// browser keeps, and leaves the queue when the server has it on disk.

const LABELS = ["malign", "undecided", "benign"];
const SYMBOLS = { malign: "✕", undecided: "?", benign: "✓" };
const FILTERS = ["all", "unmarked", ...LABELS];
const IDLE = 30, POLL = 1000, PATIENCE = 10000, BATCH = 60, MOST_COLUMNS = 40, STRIP = 24, BORDER = 3, GAP = 8, SQUEEZE = 0.75;

const $ = (id) => document.getElementById(id);
const session = kept(sessionStorage, "session") ?? keep(sessionStorage, "session", random());
const rater = new URLSearchParams(location.search).get("rater") ?? "";

let about; // what /state said
let label = new Map(); // content hash -> label
let known = new Set(); // ids of the marks that are counted
let history = []; // marks that undo takes back, oldest first: those found at the start, then this page's
let storedSeconds = 0; // the rater's, in the file or on its way
let next = 0; // number of the next mark of the file
let queue = []; // lines on their way
let view = []; // indices of the samples shown, fixed until the filter is chosen again
let filter = "all", cursor = 0, columns = 8, rows = 1;
let enough = false;
let meaning = ""; // as it stands in the file, or on its way there
let notice = "", heard = ""; // what the server says of its file; the notice that was clicked away

// --- small things

function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");
}

function kept(storage, name) {
  try { return storage.getItem("gendiff:" + name); } catch { return null; }
}

function keep(storage, name, value) {
  try { value === null ? storage.removeItem("gendiff:" + name) : storage.setItem("gendiff:" + name, value); } catch { /* private window */ }
  return value;
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A field can cut an emoji in half, which is no text that the server stores.
const wellFormed = (text) => new TextDecoder().decode(new TextEncoder().encode(text.trim()));
const pageSize = () => columns * rows;
const here = () => about.samples[view[cursor]];
const number = (value) => value.toLocaleString("en");

function percent(part, all) {
  const rounded = Math.round((100 * part) / all);
  if (part && !rounded) return "<1 %";
  return part < all && rounded === 100 ? ">99 %" : rounded + " %";
}

// --- the clock: time between signs of life, at most IDLE seconds each, nothing while hidden

const clock = {
  last: performance.now(), active: 0,
  lap() { // moves what has passed into `active`
    const now = performance.now();
    if (this.last !== null) this.active += Math.min((now - this.last) / 1000, IDLE);
    this.last = document.hidden ? null : now;
  },
  take() { // seconds since the last mark
    this.lap();
    const seconds = Math.round(this.active * 1000) / 1000;
    this.active = 0;
    return seconds;
  },
  now() {
    const open = this.last === null ? 0 : Math.min((performance.now() - this.last) / 1000, IDLE);
    return storedSeconds + this.active + open;
  },
};

function showClock() {
  const total = Math.floor(clock.now());
  const minutes = Math.floor(total / 60) % 60, hours = Math.floor(total / 3600);
  const two = (value) => String(value).padStart(2, "0");
  $("clock").value = (hours ? hours + ":" + two(minutes) : minutes) + ":" + two(total % 60);
}

// --- marks

function countOnce(mark) {
  if (known.has(mark.id)) return false;
  known.add(mark.id);
  storedSeconds += mark.seconds;
  return true;
}

function apply(mark) {
  mark.label === null ? label.delete(mark.hash) : label.set(mark.hash, mark.label);
}

function remember(mark, before) {
  if (mark.undoes) history = history.filter((each) => each.id !== mark.undoes);
  else history.push({ ...mark, before });
}

function record(marks) {
  for (const mark of marks) {
    countOnce(mark);
    remember(mark, label.get(mark.hash) ?? null);
    apply(mark);
  }
  send(marks);
  showMarks();
}

function newMark(index, value, seconds, group = "", undoes = "") {
  const [sample, hash] = about.samples[index];
  const id = session + "-" + random();
  return { type: "mark", sample, hash, label: value, seconds, rater: about.rater, session, time: new Date().toISOString(), id, group, undoes };
}

function markHere(value) {
  if (!view.length || (label.get(here()[1]) ?? null) === value) return;
  record([newMark(view[cursor], value, clock.take())]);
  $("say").textContent = `${here()[0]} ${value ?? "unmarked"}`;
}

function cycleHere() {
  if (!view.length) return;
  markHere(LABELS[(LABELS.indexOf(label.get(here()[1])) + 1) % LABELS.length]);
}

function markRest() {
  const start = Math.floor(cursor / pageSize()) * pageSize(), seen = new Set();
  const open = view.slice(start, start + pageSize()).filter((i) => {
    const hash = about.samples[i][1], first = !label.has(hash) && !seen.has(hash);
    seen.add(hash);
    return first;
  });
  const group = random();
  if (open.length) record(open.map((i, k) => newMark(i, "benign", k ? 0 : clock.take(), group)));
  $("say").textContent = `${open.length} samples benign`;
}

function undo() {
  const last = history.at(-1);
  if (!last) return;
  const undone = last.group ? history.filter((each) => each.group === last.group) : [last];
  const index = about.samples.findIndex(([, hash]) => hash === last.hash);
  // What another page has said since then stays.
  const current = undone.filter((each) => (label.get(each.hash) ?? null) === each.label);
  history = history.filter((each) => !undone.includes(each));
  const where = new Map(about.samples.map(([, hash], i) => [hash, i]));
  record(current.map((each, k) => newMark(where.get(each.hash), each.before, k ? 0 : clock.take(), "", each.id)));
  $("say").textContent = current.length ? "undone" : "another page has marked this sample since: nothing undone";
  goTo(index);
}

// --- the queue, and the way to the server and back; one request at a time, so that answers come in order

const queueName = () => `queue:${about.set}:`;

function saveQueue() {
  keep(localStorage, queueName() + session, queue.length ? JSON.stringify(queue) : null);
}

function adoptQueues() { // what an earlier page of these samples could not send
  let names = [];
  try { names = Object.keys(localStorage).filter((name) => name.startsWith("gendiff:" + queueName())); } catch { return; }
  for (const name of names) {
    const lines = JSON.parse(localStorage.getItem(name));
    queue.push(...lines);
    localStorage.removeItem(name);
    for (const line of lines.filter((each) => each.type === "mark" && each.rater === about.rater)) {
      if (countOnce(line)) remember(line, label.get(line.hash) ?? null);
      apply(line);
    }
  }
  saveQueue();
}

function send(lines) {
  queue.push(...lines);
  saveQueue();
  showSaved();
  sync();
}

let busy = false;
async function sync() {
  if (busy) return;
  busy = true;
  const lines = queue.slice(0, BATCH);
  let sent = false;
  try {
    const address = `/lines?since=${next}&rater=${encodeURIComponent(about.rater)}`;
    const posted = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(lines), keepalive: true };
    const signal = AbortSignal.timeout(PATIENCE); // a dead tunnel gives no answer at all
    const answer = await fetch(address, { signal, cache: "no-store", priority: "high", ...(lines.length ? posted : {}) });
    if (!answer.ok) throw new Error(await explain(answer));
    queue.splice(0, lines.length);
    saveQueue();
    sent = true;
    learn(await answer.json());
    warn(notice === heard ? "" : notice + " (click to hide)");
  } catch (error) {
    warn((offline(error) ? lost() : error.message) + waiting());
  }
  busy = false;
  showSaved();
  if (queue.length && sent) sync();
}

async function explain(answer) {
  if (answer.status !== 401) return `Not stored: ${await answer.text()}.`;
  return "The page was started anew: open the address that was printed then, at this port.";
}

const waiting = () => (queue.length ? ` Waiting in this browser, and not lost: ${queue.length}.` : "");

const offline = (error) => error instanceof TypeError || error.name === "TimeoutError";

function lost() {
  if (enough && !queue.length) return "No connection. There are labels enough and all are stored: most likely the page was closed for that.";
  return "No connection: trying again every second. You can go on marking.";
}

function learn(news) {
  let changed = false;
  for (const mark of news.marks) {
    countOnce(mark); // another page's: it counts, but this page's undo leaves it
    changed ||= (label.get(mark.hash) ?? null) !== mark.label;
    apply(mark);
  }
  for (const line of queue) if (line.type === "mark" && line.rater === about.rater) apply(line);
  next = news.next;
  enough = news.enough;
  notice = news.notice;
  if (document.activeElement !== $("meaning") && !queue.some((line) => line.type === "meaning")) $("meaning").value = meaning = news.meaning;
  $("finish").hidden = !about.need;
  $("finish").disabled = !enough;
  if (changed) showMarks();
}

function warn(text) {
  $("banner").textContent = text;
  $("banner").hidden = !text;
}

function showSaved() {
  $("saved").value = queue.length ? `${queue.length} waiting` : "all saved";
}

// --- showing

function choose(name) { // also fixes the list anew
  const before = view[cursor];
  filter = name;
  const fits = ([, hash]) => name === "all" || (name === "unmarked" ? !label.has(hash) : label.get(hash) === name);
  view = about.samples.map((each, i) => (fits(each) ? i : -1)).filter((i) => i >= 0);
  cursor = Math.max(0, view.findIndex((i) => i >= (before ?? 0)));
  layout();
}

function goTo(index) {
  if (!view.includes(index)) choose("all");
  cursor = view.indexOf(index);
  showPage();
}

function move(steps) {
  if (!view.length) return;
  cursor = Math.min(view.length - 1, Math.max(0, cursor + steps));
  showPage();
}

function turn(pages) {
  const last = Math.floor((view.length - 1) / pageSize()), page = Math.floor(cursor / pageSize()) + pages;
  if (page < 0 || page > last) return;
  cursor = page * pageSize();
  showPage();
}

function setColumns(wanted) {
  columns = Math.min(MOST_COLUMNS, Math.max(1, wanted));
  keep(localStorage, "columns:" + about.columns, columns);
  layout();
}

function layout() { // as many rows as fit, or one more if that squeezes the pictures only a little
  const box = $("grid").parentElement, width = (box.clientWidth - 32 - GAP * (columns - 1)) / columns - 2 * BORDER;
  const frame = STRIP + 2 * BORDER + GAP, height = box.clientHeight - 16 + GAP;
  rows = Math.max(1, Math.floor(height / (SQUEEZE * width + frame)));
  $("grid").style.setProperty("--columns", columns);
  $("grid").style.setProperty("--height", Math.min(width, Math.max(SQUEEZE * width, height / rows - frame)) + "px");
  $("grid").classList.toggle("dense", width < 130);
  $("columns").value = columns === 1 ? "1 column" : `${columns} columns`;
  showPage(true);
}

let shown = "";
function showPage(anew = false) {
  const size = pageSize(), page = Math.floor(cursor / size), pages = Math.max(1, Math.ceil(view.length / size));
  const indices = view.slice(page * size, (page + 1) * size), key = indices.join();
  if (anew || key !== shown) {
    $("grid").replaceChildren(...indices.map(tile));
    shown = key;
    prefetch(key, view.slice((page + 1) * size, (page + 2) * size));
  }
  $("empty").hidden = view.length > 0;
  $("page").value = `page ${number(page + 1)} of ${number(pages)}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page + 1 >= pages;
  showMarks();
  $("grid").querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
}

async function prefetch(key, indices) { // the next page's pictures, once this page has its own
  await Promise.allSettled(Array.from($("grid").querySelectorAll("img"), (image) => image.decode()));
  if (key !== shown) return;
  for (const i of indices) Object.assign(new Image(), { fetchPriority: "low" }).src = address(i);
}

const address = (index, whole = false) => `/sample/${about.samples[index][1]}` + (whole ? "?whole" : "");

function tile(index) {
  const [id] = about.samples[index];
  const image = make("img", { src: address(index), alt: "", decoding: "async", draggable: false });
  image.onload = () => image.classList.toggle("small", image.naturalWidth < 200 && about.kind === "image");
  image.onerror = () => { image.classList.add("broken"); image.alt = "this sample cannot be read any more"; };
  const picture = make("div", { className: about.backed ? "picture backed" : "picture" }, image);
  const buttons = LABELS.map((name) => {
    const button = make("button", { type: "button", className: name, textContent: SYMBOLS[name], title: name, tabIndex: -1 });
    button.onclick = (event) => { event.stopPropagation(); select(index); markHere(name); };
    return button;
  });
  const strip = make("div", { className: "strip" }, make("span", { title: id }, make("bdi", { textContent: id })), ...buttons);
  const element = make("div", { className: "tile", id: "tile-" + index }, picture, strip);
  element.setAttribute("role", "option");
  element.onclick = () => { select(index); cycleHere(); };
  return element;
}

function select(index) {
  cursor = view.indexOf(index);
  $("grid").focus({ preventScroll: true });
  showMarks();
}

function showMarks() {
  for (const element of $("grid").children) {
    const index = Number(element.id.slice(5)), [id, hash] = about.samples[index], value = label.get(hash);
    element.className = "tile " + (value ?? "");
    element.setAttribute("aria-label", `${id}, ${value ?? "unmarked"}`);
    element.setAttribute("aria-selected", index === view[cursor]);
  }
  view.length ? $("grid").setAttribute("aria-activedescendant", "tile-" + view[cursor]) : $("grid").removeAttribute("aria-activedescendant");
  $("undo").disabled = !history.length;
  showCounts();
  showLarge();
}

function showCounts() {
  const all = about.samples.length, counts = { all, unmarked: all, malign: 0, undecided: 0, benign: 0 };
  for (const [, hash] of about.samples) {
    const value = label.get(hash);
    if (value) { counts[value] += 1; counts.unmarked -= 1; }
  }
  for (const button of $("filters").children) {
    const name = button.dataset.filter, part = counts[name];
    button.setAttribute("aria-pressed", name === filter);
    button.lastChild.textContent = name === "all" ? number(part) : `${number(part)} · ${percent(part, all)}`;
  }
  LABELS.forEach((name, k) => { $("meter").children[k].style.width = (100 * counts[name]) / all + "%"; });
  if (!about.need) return;
  const [malign, benign] = about.need;
  $("need").value = enough ? "enough labels" : `wanted: ${counts.malign} / ${malign} malign, ${counts.benign} / ${benign} benign`;
}

function showLarge() {
  if (!$("large").open || !view.length) return;
  const [id, hash] = here(), value = label.get(hash), source = address(view[cursor], true);
  if (!$("whole").src.endsWith(source)) $("whole").src = source;
  $("whole").className = about.backed ? "backed" : "";
  $("whole").onload = () => $("whole").classList.toggle("small", $("whole").naturalWidth < 400 && about.kind === "image");
  $("large").className = value ?? "";
  $("caption").textContent = id;
  $("verdict").textContent = value ? `${SYMBOLS[value]} ${value}` : "unmarked";
}

function enlarge() {
  if (!view.length) return;
  $("large").open ? $("large").close() : $("large").showModal();
  showLarge();
}

// --- keys

const KEYS = {
  m: () => { markHere("malign"); move(1); },
  u: () => { markHere("undecided"); move(1); },
  b: () => { markHere("benign"); move(1); },
  B: markRest,
  " ": cycleHere,
  Backspace: () => markHere(null),
  Delete: () => markHere(null),
  z: undo,
  ArrowLeft: () => move(-1),
  ArrowRight: () => move(1),
  ArrowUp: () => move(-columns),
  ArrowDown: () => move(columns),
  Home: () => move(-view.length),
  End: () => move(view.length),
  n: () => turn(1),
  PageDown: () => turn(1),
  p: () => turn(-1),
  PageUp: () => turn(-1),
  "+": () => setColumns(columns + 1),
  "=": () => setColumns(columns + 1),
  "-": () => setColumns(columns - 1),
  f: () => choose(FILTERS[(FILTERS.indexOf(filter) + 1) % FILTERS.length]),
  g: firstUnmarked,
  Enter: enlarge,
  e: () => $("meaning").focus(),
};

function firstUnmarked() {
  const index = about.samples.findIndex(([, hash]) => !label.has(hash));
  if (index >= 0) goTo(index);
  $("say").textContent = index >= 0 ? about.samples[index][0] : "everything is marked";
}

function onKey(event) {
  clock.lap();
  const place = event.target;
  if (place.tagName === "INPUT") {
    if (event.key === "Escape" || event.key === "Enter") $("grid").focus();
    return;
  }
  if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); undo(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || !about) return;
  if (place.tagName === "BUTTON" && (event.key === " " || event.key === "Enter")) return; // the button's own
  const action = KEYS[event.key] ?? (/^[1-9]$/.test(event.key) ? () => setColumns(Number(event.key)) : null);
  if (!action) return;
  event.preventDefault();
  action();
}

// --- start

async function start() {
  const answer = await fetch("/state" + (rater ? "?rater=" + encodeURIComponent(rater) : ""), { cache: "no-store" });
  if (!answer.ok) throw new Error(await explain(answer));
  about = await answer.json();
  about.backed = about.kind === "point" || about.kind === "trajectory";
  for (const mark of about.marks) {
    if (!countOnce(mark)) continue;
    remember(mark, label.get(mark.hash) ?? null);
    apply(mark);
  }
  document.title = `${about.place.split(/[\\/]/).filter(Boolean).at(-1)} · labels`;
  $("rater").value = about.rater;
  $("saved").title = about.labels;
  columns = Number(kept(localStorage, "columns:" + about.columns) ?? about.columns);
  $("filters").append(...FILTERS.map(filterButton));
  learn(about);
  adoptQueues();
  choose("all");
  cursor = Math.max(0, about.samples.findIndex(([, hash]) => !label.has(hash)));
  layout(); // again, since the counts take room
  showClock();
  $("grid").focus();
  sync();
  setInterval(sync, POLL);
}

function filterButton(name) {
  const symbol = make("i", { textContent: SYMBOLS[name] ?? "", className: SYMBOLS[name] ? name : "", hidden: !SYMBOLS[name] });
  const button = make("button", { type: "button" }, symbol, name, make("small"));
  button.dataset.filter = name;
  button.onclick = () => { choose(name); $("grid").focus(); };
  return button;
}

function saveMeaning() {
  const text = wellFormed($("meaning").value);
  if (text === meaning) return;
  meaning = text;
  send([{ type: "meaning", text, rater: about.rater, session, time: new Date().toISOString() }]);
}

$("meaning").onchange = saveMeaning;
$("rater").onchange = () => { location.search = "?rater=" + encodeURIComponent(wellFormed($("rater").value)); };
$("banner").onclick = () => { heard = notice; if (about) sync(); };
$("previous").onclick = () => turn(-1);
$("next").onclick = () => turn(1);
$("fewer").onclick = () => setColumns(columns - 1);
$("more").onclick = () => setColumns(columns + 1);
$("undo").onclick = undo;
$("rest").onclick = markRest;
$("finish").onclick = () => fetch("/finish", { method: "POST" });
$("large").onclick = () => $("large").close();
document.addEventListener("keydown", onKey);
document.addEventListener("click", (event) => { // the keyboard goes back to the samples, unless it was the keyboard
  if (event.detail && event.target.closest("button")) $("grid").focus({ preventScroll: true });
});
for (const sign of ["pointermove", "pointerdown", "wheel", "visibilitychange"]) document.addEventListener(sign, () => clock.lap(), { passive: true });
addEventListener("resize", () => about && layout());
setInterval(showClock, 500);
start().catch((error) => warn(offline(error) ? "No connection: reload this page when there is one." : error.message));

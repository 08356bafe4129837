// What the pages do beside being read: keys, selection, copying, and following what changes. All of it works without.

const root = document.documentElement;
const main = document.getElementById("main");
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const stored = (name, value) => {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* A browser may keep nothing. */ }
  return null;
};
const base = root.dataset.events.replace(/\/events$/, "");
root.classList.add("scripted");

// The theme.
const asked = stored("theme");
if (asked) root.dataset.theme = asked;
const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function turnTheme() {
  root.dataset.theme = isDark() ? "light" : "dark";
  stored("theme", root.dataset.theme);
}
document.getElementById("theme").addEventListener("click", turnTheme);

// Saying something to a screen reader, at most every ten seconds unless the user asked.
let saidAt = -Infinity;
function say(text, isAnswer = true) {
  if (!isAnswer && performance.now() - saidAt < 10_000) return;
  saidAt = performance.now();
  document.getElementById("say").textContent = text;
}

// Copying.
async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`copied ${what}`);
  } catch { say("the browser refused to copy"); }
}
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await copy(button.dataset.copy, button.dataset.copy);
  const before = button.innerHTML;
  button.textContent = "copied";
  setTimeout(() => { button.innerHTML = before; }, 1200);
});

// Times: pages hold absolute ones.
const UNITS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
function showTimes(from = document) {
  for (const time of all("time[datetime]", from)) {
    const passed = (Date.now() - Date.parse(time.dateTime)) / 1000;
    if (!Number.isFinite(passed)) continue;
    const [length, unit] = UNITS.find(([seconds]) => passed >= seconds) ?? [1, "s"];
    time.title ||= time.textContent;
    const text = `${Math.max(0, Math.floor(passed / length))} ${unit} ago`;
    if (time.textContent !== text) time.textContent = text;
  }
}
function remember(from = document) {
  for (const row of all("table[data-live] tbody > tr[id]", from)) row.dataset.source ??= row.outerHTML;
}
remember();
showTimes();
setInterval(showTimes, 10_000);

// Forms of choices send themselves.
for (const form of all("[data-submits]")) {
  form.addEventListener("change", (event) => {
    // Whoever writes where a curve begins may go on to where it ends.
    if (!event.target.matches("[data-end]")) form.submit();
  });
}
// What is empty stays out of the address.
document.addEventListener("formdata", (event) => {
  if (event.target.method !== "get") return;
  for (const [name, value] of [...event.formData]) if (!value) event.formData.delete(name);
}, true);

// Selection.
const chosen = document.getElementById("chosen");
const picked = () => all("#rows input[type=checkbox]:checked").map((box) => box.value);
const compareAddress = (names) => `${base}/compare?of=${names.map(encodeURIComponent).join("+")}`;
// What has the curve that a row stands on: the run that saved a version, or its model.
const curveOf = (name, row) => {
  const run = name.includes("/") ? null : row?.querySelector("td a[href*='/r/']");
  return run ? decodeURIComponent(run.getAttribute("href").split("/r/")[1]) : name.split(":")[0];
};
const diffAddress = (a, b) => `${base}/diff?a=${encodeURIComponent(a)}&b=${encodeURIComponent(b)}`;
const number = (name) => Number(name.split(":v")[1] ?? 0);
function showChosen() {
  if (!chosen) return;
  const names = picked();
  chosen.hidden = !names.length;
  chosen.querySelector("strong").textContent = `${names.length} selected`;
  const diff = chosen.querySelector("[data-do=d]");
  if (diff) {
    diff.hidden = names.length !== 2;
    const [a, b] = [...names].sort((one, other) => number(one) - number(other));
    if (names.length === 2) diff.href = diffAddress(a, b);
  }
  const compare = chosen.querySelector("[data-do=c]");
  compare.href = compareAddress([...new Set(all("#rows input[type=checkbox]:checked").map((box) => curveOf(box.value, box.closest("tr"))))]);
}
document.addEventListener("change", (event) => { if (event.target.closest("#rows")) showChosen(); });
chosen?.addEventListener("click", (event) => {
  if (event.target.closest("[data-do=y]")) copy(picked().join(" "), "the references");
});
document.getElementById("selection")?.addEventListener("submit", (event) => event.preventDefault());
showChosen();

// Modules fold.
for (const head of all("table.tree tr.module th")) {
  const body = head.closest("tbody");
  head.tabIndex = 0;
  head.setAttribute("aria-expanded", "true");
  const fold = () => head.setAttribute("aria-expanded", String(!body.classList.toggle("folded")));
  head.addEventListener("click", fold);
  head.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation();
    fold();
  });
  if (all("table.tree tbody tr").length > 500) fold();
}
function openTarget() {
  let name = location.hash.slice(1);
  try { name = decodeURIComponent(name); } catch { /* It is no address of ours. */ }
  const target = name && document.getElementById(name);
  target?.closest?.("tbody")?.classList.remove("folded");
}
addEventListener("hashchange", openTarget);
openTarget();

// Statistics of tensors: only of rows that are seen, two at a time.
const waiting = [];
let asking = 0;
async function nextStatistics() {
  const one = waiting.shift();
  if (!one) return;
  asking += 1;
  try {
    const answer = await fetch(one.dataset.stats);
    if (answer.ok) {
      const found = await answer.json();
      const told = (value) => (value === null ? "-" : value.toPrecision(3));
      const norm = one.querySelector("[data-stat=norm]");
      norm.textContent = found.nonfinite === found.elements && found.elements ? "" : told(found.norm);
      if (found.nonfinite) norm.insertAdjacentHTML("beforeend", ` <span class="bad">${Number(found.nonfinite)} NaN or inf</span>`);
      one.querySelector("[data-stat=zeros]").textContent = `${(100 * found.zeros).toFixed(1)}%`;
      const place = one.querySelector("[data-stat=picture]");
      place.innerHTML = found.picture;
      place.title = `mean ${told(found.mean)}, std ${told(found.std)}, ${told(found.least)} to ${told(found.most)}`;
    }
  } catch { /* The page is read without them. */ }
  asking -= 1;
  nextStatistics();
}
if ("IntersectionObserver" in globalThis) {
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      waiting.push(entry.target);
      if (asking < 2) nextStatistics();
    }
  });
  for (const row of all("tr[data-stats]")) seen.observe(row);
}

// Zooming: dragging over a curve asks for the page with that part. Its address has both ends, so it can be sent.
const svgLine = (name, attributes) => {
  const found = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  return found;
};
// Between a place of the picture, and the place on the axis that is drawn there.
function axisOf(chart) {
  const [left, right] = chart.dataset.across.split(" ").map(Number);
  const [first, last] = chart.dataset.axis.split(" ").map(Number);
  const { width, height } = chart.viewBox.baseVal;
  const drawn = (event) => {
    const box = chart.getBoundingClientRect();
    return Math.max(left, Math.min(right, width * (event.clientX - box.left) / box.width));
  };
  const value = (x) => first + (last - first) * (x - left) / (right - left);
  return { first, last, height, drawn, value, place: (at) => left + (right - left) * (at - first) / (last - first) };
}
function zoom(from, to, hash = "") {
  const digits = Math.max(0, Math.ceil(2 - Math.log10(to - from)));
  const there = new URL(location.href);
  there.searchParams.set("from", Number(from.toFixed(digits)));
  there.searchParams.set("to", Number(to.toFixed(digits)));
  there.hash = hash;
  location.href = there;
}
const isZoomed = () => Boolean(document.querySelector("[data-key=Escape]"));
function moveAlong(step) {
  const asked = new URL(location.href).searchParams;
  const drawn = document.querySelector("svg[data-axis]")?.dataset.axis.split(" ") ?? [];
  const [first, last] = ["from", "to"].map((name, i) => Number((asked.get(name) ?? "").replace(/^v/, "") || drawn[i]));
  const span = last - first;
  if (!(span > 0)) return;
  if (step) zoom(first + step * span / 2, last + step * span / 2);
  else zoom(first + span / 4, last - span / 4);
}

// Curves: a value under the pointer, a version behind a click, a part by dragging, all of it by a double click.
const DRAGGED = 6;
const bound = new WeakSet();
function bindCharts() {
  for (const chart of all("svg[data-axis]")) if (!bound.has(chart)) bindChart(chart);
}
function bindChart(chart) {
  bound.add(chart);
  const { first, last, height, drawn, value, place } = axisOf(chart);
  if (!(last > first)) return;
  const figure = chart.closest("figure");
  const points = JSON.parse(figure.dataset.points || "[]");
  const output = figure.querySelector("output");
  const cursor = svgLine("line", { class: "cursor", y1: 0, y2: height });
  const chosenPart = svgLine("rect", { class: "chosen-part", y: 0, height });
  const nearest = (event) => {
    const x = value(drawn(event));
    return points.reduce((one, other) => (Math.abs(other[0] - x) < Math.abs(one[0] - x) ? other : one));
  };
  let begun, opening;
  const isDragged = (event) => begun && Math.abs(event.clientX - begun.clientX) > DRAGGED;
  const stop = () => { begun = undefined; chosenPart.remove(); };
  chart.addEventListener("pointerdown", (event) => {
    // A finger moves a picture that is wider than the screen.
    if (event.button || (event.pointerType === "touch" && chart.matches(".curves"))) return;
    event.preventDefault();
    begun = { clientX: event.clientX, x: drawn(event) };
    chart.setPointerCapture(event.pointerId);
  });
  chart.addEventListener("pointermove", (event) => {
    if (points.length && output) {
      const [version, y] = nearest(event);
      output.textContent = `v${version}  ${y.toPrecision(4)}`;
      cursor.setAttribute("x1", place(version));
      cursor.setAttribute("x2", place(version));
      chart.append(cursor);
    }
    if (!isDragged(event)) { chosenPart.remove(); return; }
    const ends = [begun.x, drawn(event)].sort((one, other) => one - other);
    chosenPart.setAttribute("x", ends[0]);
    chosenPart.setAttribute("width", ends[1] - ends[0]);
    chart.append(chosenPart);
  });
  chart.addEventListener("pointerup", (event) => {
    const [from, to] = begun ? [value(begun.x), value(drawn(event))].sort((one, other) => one - other) : [0, 0];
    // Of many curves the one that was dragged over is shown again.
    if (isDragged(event) && to > from) zoom(from, to, figure.matches(".small") ? figure.id : "");
    else if (begun && figure.dataset.chart && points.length) {
      const open = () => { location.href = `${figure.dataset.chart}/v${nearest(event)[0]}`; };
      // A second click may follow, which shows the whole curve.
      if (isZoomed()) opening = setTimeout(open, 350); else open();
    }
    stop();
  });
  chart.addEventListener("dblclick", () => { clearTimeout(opening); follow("[data-key=Escape]"); });
  chart.addEventListener("pointercancel", stop);
  chart.addEventListener("pointerleave", () => { if (output) output.textContent = ""; cursor.remove(); });
}
bindCharts();

// Following what changes: one stream for a browser. The tab that holds the lock listens and tells the others.
const fresh = { wanted: false, running: false, state: root.dataset.state };
const live = document.getElementById("live");
function patchRows(mine, other) {
  const before = new Map(all(":scope > tr[id]", mine).map((row) => [row.id, row]));
  const rows = all(":scope > tr", other).map((row) => {
    const old = row.id && before.get(row.id);
    if (!old) return row;
    const box = old.querySelector("input[type=checkbox]");
    if (old.dataset.source === row.dataset.source) return old;
    const next = row.querySelector("input[type=checkbox]");
    if (box && next) next.checked = box.checked;
    if (old.classList.contains("current")) row.classList.add("current");
    return row;
  });
  mine.replaceChildren(...rows);
}
async function refresh() {
  if (fresh.running || document.hidden) { fresh.wanted = true; return; }
  fresh.running = true;
  fresh.wanted = false;
  try {
    const answer = await fetch(location.href, { cache: "no-cache", credentials: "same-origin" });
    if (answer.ok) {
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      root.dataset.state = page.documentElement.dataset.state;
      for (const part of all("[data-live]", page)) {
        const mine = document.getElementById(part.id);
        if (!mine) { if (part.id === "rows") { location.reload(); return; } continue; }
        if (part.tagName === "TABLE") {
          const active = document.activeElement;
          const focused = mine.contains(active) ? active.closest("tr[id]")?.id : undefined;
          for (const row of all("tbody > tr[id]", part)) row.dataset.source = row.outerHTML;
          patchRows(mine.tBodies[0], part.tBodies[0]);
          if (focused && !mine.contains(document.activeElement)) {
            const kind = active.tagName === "INPUT" ? "input" : "a";
            document.getElementById(focused)?.querySelector(kind)?.focus({ preventScroll: true });
          }
        } else if (mine.tagName === "FIGURE" || part.tagName === "FIGURE") {
          mine.replaceWith(document.adoptNode(part));
        } else if (mine.innerHTML !== part.innerHTML) {
          const isAtEnd = mine.scrollTop + mine.clientHeight >= mine.scrollHeight - 4;
          mine.replaceChildren(...part.childNodes);
          if (mine.classList.contains("log") && isAtEnd) mine.scrollTop = mine.scrollHeight;
        }
      }
      bindCharts();
      showTimes();
      showChosen();
      say("the page was brought up to date", false);
    } else {
      fresh.failed = true;
    }
  } catch {
    fresh.failed = true;
  }
  if (fresh.failed) {
    // The page is older than what is told of it, so it is asked for again.
    fresh.failed = false;
    setTimeout(() => { fresh.running = false; refresh(); }, 5000);
    return;
  }
  setTimeout(() => { fresh.running = false; if (fresh.wanted || root.dataset.state !== fresh.state) refresh(); }, 1000);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && fresh.wanted) refresh(); });
function isLive(yes) { live.hidden = !yes; }
const seen = (event) => {
  fresh.state = event[root.dataset.follows];
  if (root.dataset.state !== fresh.state) refresh();
};
function listen(tell) {
  const stream = new EventSource(root.dataset.events);
  stream.onopen = () => tell({ open: true });
  stream.onerror = () => tell({ open: false });
  stream.onmessage = (event) => tell({ event: JSON.parse(event.data) });
  return stream;
}
if (document.querySelector("[data-live]")) {
  if (navigator.locks && "BroadcastChannel" in globalThis) {
    const channel = new BroadcastChannel(`torch-registry ${location.host}${base}`);
    const heard = (message) => {
      if ("open" in message) isLive(message.open);
      if (message.event) seen(message.event);
      if (message.who) channel.postMessage({ open: !live.hidden });
    };
    channel.onmessage = (event) => heard(event.data);
    navigator.locks.request(`torch-registry ${location.host}${base}`, () => {
      listen((message) => { heard(message); channel.postMessage(message); });
      return new Promise(() => {});
    });
    channel.postMessage({ who: true });
  } else {
    setInterval(refresh, 5000);
  }
}

// Keys: single ones, never with a modifier or while typing, and they can be turned off.
const keys = document.getElementById("keys");
const keysOn = document.getElementById("keys-on");
keysOn.checked = stored("keys") !== "off";
keysOn.addEventListener("change", () => stored("keys", keysOn.checked ? "on" : "off"));
const TOLD = [
  ["/", "find"], ["g m, g r, g l, g s", "go to the models, runs, lineage, storage"], ["j, k", "next row, row before"],
  ["Enter", "open the row"], ["x", "select the row"], ["d", "diff of the two selected rows, or with the version before"],
  ["c", "compare curves of what is selected"], ["y", "copy the references"], ["e", "copy the command"],
  ["[, ]", "older, newer"], ["1 to 5", "the parts of a version's page"], ["u", "up"],
  ["+", "zoom into the middle of the curve"], ["←, →", "move along a zoomed curve"], ["Escape", "the whole curve"],
  ["t", "change the theme"], ["?", "these keys"],
];
for (const [key, what] of TOLD) {
  const row = keys.querySelector("tbody").insertRow();
  row.innerHTML = "<th scope=row><kbd></kbd></th><td></td>";
  row.querySelector("kbd").textContent = key;
  row.cells[1].textContent = what;
}
let isGoing = false;
// A row of versions says its number alone, and its table the model.
const rows = () => all("#rows tbody tr[data-reference], #rows[data-of] tbody tr");
const referenceOf = (row) => row?.dataset.reference ?? (row && row.closest("table").dataset.of + row.id);
const chosenReference = () => referenceOf(here() ?? document.querySelector("h1[data-reference]"));
function current(step) {
  const found = rows();
  if (!found.length) return;
  const at = found.findIndex((one) => one.classList.contains("current"));
  const next = found[Math.max(0, Math.min(found.length - 1, at + step))];
  for (const one of found) one.classList.toggle("current", one === next);
  next.querySelector("a").focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}
const here = () => rows().find((one) => one.classList.contains("current"));
function follow(selector) {
  const link = document.querySelector(selector);
  if (link) link.click();
  return Boolean(link);
}
function diffOfThis() {
  const names = picked();
  if (names.length === 2) return chosen.querySelector("[data-do=d]").click();
  const title = document.querySelector("h1[data-before]");
  if (title) return void (location.href = diffAddress(title.dataset.before, title.dataset.reference));
  const found = rows(), i = found.indexOf(here());
  const [one, before] = [found[i], found[i + 1]].map(referenceOf);
  if (one?.includes(":") && before) location.href = diffAddress(before, one);
  return undefined;
}
const ACTIONS = {
  "/": () => document.getElementById("find").select(),
  "?": () => keys.showModal(),
  t: turnTheme,
  j: () => current(1),
  k: () => current(-1),
  x: () => { here()?.querySelector("input[type=checkbox]")?.click(); },
  d: diffOfThis,
  c: () => {
    const name = chosenReference();
    if (picked().length) chosen.querySelector("[data-do=c]").click();
    else if (name) location.href = compareAddress([curveOf(name, here())]);
  },
  y: () => {
    const text = picked().join(" ") || chosenReference();
    if (text) copy(text, "the references");
  },
  e: () => { const button = document.querySelector(".again [data-copy]"); if (button) copy(button.dataset.copy, "the command"); },
  g: () => { isGoing = true; setTimeout(() => { isGoing = false; }, 1500); },
  "+": () => moveAlong(0),
  ArrowLeft: () => moveAlong(-1),
  ArrowRight: () => moveAlong(1),
  u: () => { if (!follow("[data-key=u]") && location.pathname !== `${base}/`) location.href = `${base}/`; },
};
const PLACES = { m: "/", r: "/runs", l: "/lineage", s: "/storage", c: "/compare", d: "/data" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || keys.open) return;
  if (event.target.closest("input:not([type=checkbox]), select, textarea, [contenteditable]")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (!keysOn.checked && event.key !== "?") return;
  if (isGoing && PLACES[event.key]) { isGoing = false; location.href = base + PLACES[event.key]; event.preventDefault(); return; }
  const action = ACTIONS[event.key] ?? (document.querySelector(`[data-key="${CSS.escape(event.key)}"]`) ? () => follow(`[data-key="${CSS.escape(event.key)}"]`) : null);
  // Arrows scroll what is wider than the screen.
  if (!action || (event.key.startsWith("Arrow") && (!isZoomed() || event.target.closest(".scroll")))) return;
  event.preventDefault();
  action();
});

// A log is read from its end.
for (const log of all(".log")) log.scrollTop = log.scrollHeight;

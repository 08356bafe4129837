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
  form.addEventListener("change", () => {
    for (const field of form.elements) if (field.name && !field.value) field.disabled = true;
    form.submit();
  });
}

// Selection.
const chosen = document.getElementById("chosen");
const picked = () => all("#rows input[type=checkbox]:checked").map((box) => box.value);
const compareAddress = (names) => `${base}/compare?of=${names.map(encodeURIComponent).join("+")}`;
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
  const models = [...new Set(names.map((name) => (name.includes("/") ? name : name.split(":")[0])))];
  compare.href = compareAddress(names.some((name) => name.includes("/")) ? names : models);
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

// The chart: a value under the pointer, a version behind a click, a part by dragging.
function bindCharts() {
for (const figure of all("[data-points]:not([data-bound])")) {
  figure.dataset.bound = "";
  const points = JSON.parse(figure.dataset.points || "[]");
  const chart = figure.querySelector(".chart");
  const output = figure.querySelector("output");
  if (points.length < 2 || !chart) continue;
  const first = points[0][0], last = points[points.length - 1][0];
  const nearest = (event) => {
    const box = chart.getBoundingClientRect();
    const x = first + (last - first) * (event.clientX - box.left) / box.width;
    return points.reduce((one, other) => (Math.abs(other[0] - x) < Math.abs(one[0] - x) ? other : one));
  };
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", "0");
  cursor.setAttribute("y2", "120");
  chart.addEventListener("pointermove", (event) => {
    const [version, value] = nearest(event);
    output.textContent = `v${version}  ${value.toPrecision(4)}`;
    const x = String(1000 * (version - first) / (last - first));
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    chart.append(cursor);
  });
  chart.addEventListener("pointerleave", () => { output.textContent = ""; cursor.remove(); });
  chart.addEventListener("click", (event) => { location.href = `${figure.dataset.chart}/v${nearest(event)[0]}`; });
}
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
        } else if (mine.tagName === "FIGURE") {
          mine.replaceWith(document.adoptNode(part));
          bindCharts();
        } else if (mine.innerHTML !== part.innerHTML) {
          const isAtEnd = mine.scrollTop + mine.clientHeight >= mine.scrollHeight - 4;
          mine.replaceChildren(...part.childNodes);
          if (mine.classList.contains("log") && isAtEnd) mine.scrollTop = mine.scrollHeight;
        }
      }
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
let isGoing = false;
const rows = () => all("#rows tbody tr[data-reference]");
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
  const [one, before] = [found[i]?.dataset, found[i + 1]?.dataset];
  if (one && before && one.reference.includes(":")) location.href = diffAddress(before.reference, one.reference);
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
  c: () => { if (picked().length) chosen.querySelector("[data-do=c]").click(); else { const name = (here() ?? document.querySelector("h1[data-reference]"))?.dataset.reference; if (name) location.href = compareAddress([name.includes("/") ? name : name.split(":")[0]]); } },
  y: () => { const names = picked(); const one = (here() ?? document.querySelector("h1[data-reference]"))?.dataset.reference; if (names.length || one) copy(names.length ? names.join(" ") : one, "the references"); },
  e: () => { const button = document.querySelector(".again [data-copy]"); if (button) copy(button.dataset.copy, "the command"); },
  g: () => { isGoing = true; setTimeout(() => { isGoing = false; }, 1500); },
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
  if (!action) return;
  event.preventDefault();
  action();
});

// A log is read from its end.
for (const log of all(".log")) log.scrollTop = log.scrollHeight;

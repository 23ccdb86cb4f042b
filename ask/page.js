"use strict";
/* The program of the page that `python -m ask --page` writes. The page comes with the text and the
   answers; this lights up what was fetched. #run is a JSON object: settings, per sentence its
   tokens and the whole sentence that it is a piece of, per decode step the position of its token.
   #data holds arrays of 16-bit numbers. A "fetch" is one KV head of one layer in one step; they are
   in the order of steps, layers, heads. Per fetch:
     changes    how many sentences enter or leave the head's selection after its step before;
                which ones: `gap`, from one number to the next
     entries    how many sentences are listed, the best of them (all, if run.listed is null);
                `sentence`, `taken`, `attention`, `score`, `place` (0: the best) have one each
     near       how many sentences were taken because they are the sink or recent
     sink_tokens, recent_tokens, far_tokens         how many tokens were taken
     covered; 16 times dense_sentence, dense_mass   dense attention, with --dense
   Text is only ever set as textContent, so none of it can become markup. */

const element = id => document.getElementById(id);
const run = JSON.parse(element("run").textContent);
const S = run.sentences.length, L = run.layers, H = run.heads, budget = run.budget;
const CHOICES = ["layer", "head", "light", "part"];       // the <select>s
const state = {token: 0, layer: "all", head: "all", light: "attention", part: 1, sentence: 0};
const data = {};            // name -> Uint16Array
const sets = [];            // fetch -> sentence numbers, exactly what fetched() returned
const first = [0], start = [0];         // fetch -> its first entry; sentence -> its first position
const spans = [...document.querySelectorAll("#text .s")];           // one per sentence
const tokens = [...document.querySelectorAll(".token")];            // buttons, one per token
let view = null;                        // what compute() found for the state
let playing = 0, saving = 0;            // timers

async function unpack() {
  const packed = Uint8Array.from(atob(element("data").textContent), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = new Uint8Array(await new Response(stream).arrayBuffer());
  let offset = 0, next = 0;
  for (const [name, n] of run.arrays) {                   // n low bytes, then n high bytes
    const [low, high] = [raw.subarray(offset), raw.subarray(offset += n)];
    data[name] = Uint16Array.from({length: n}, (_, i) => low[i] | high[i] << 8);
    offset += n;
  }
  const heads = Array.from({length: L * H}, () => new Set());
  for (let fetch = 0; fetch < run.steps.length * L * H; fetch++) {
    const taken = heads[fetch % (L * H)];
    for (let n = data.changes[fetch], s = 0; n > 0; n--) {
      s += data.gap[next++];
      if (!taken.delete(s)) taken.add(s);
    }
    sets.push(Uint16Array.from(taken));
    first.push(first[fetch] + data.entries[fetch]);
  }
  run.sentences.forEach(([n], s) => start.push(start[s] + n));
}

const share = x => (x / 255) ** 2;
const upperHalf = x => new Float32Array(Uint32Array.of(x << 16).buffer)[0];   // of a float's bits
const percent = x => (100 * x).toFixed(x < 0.0995 ? 1 : 0) + "%";
const sum = list => list.reduce((total, x) => total + x, 0);
const wholeOf = s => run.sentences[s]?.[1];
/* One fetch as an object; `set` is what it takes with the chosen part of the budget. */
function read(fetch) {
  const masses = run.dense ? data.dense_mass.length / sets.length : 0;
  const range = (from, to) => Array.from({length: to - from}, (_, i) => from + i);
  const entries = range(first[fetch], first[fetch + 1]).map(i => ({
    s: data.sentence[i], taken: data.taken[i], rank: data.place[i] - data.near[fetch] + 1,
    score: upperHalf(data.score[i]), attention: share(data.attention[i])}));
  const dense = range(fetch * masses, (fetch + 1) * masses).map(i => ({
    s: data.dense_sentence[i], mass: share(data.dense_mass[i])}));
  let places = Math.floor(budget / state.part) - 1;       // one is for the token itself
  const best = entries.filter(entry => (places -= entry.taken) > -entry.taken);
  const set = new Set(state.part > 1 ? best.map(entry => entry.s) : sets[fetch]);
  return {number: fetch, set, entries, dense};
}

/* Everything that is shown for the chosen token, layer and head. */
function compute() {
  const position = Number(tokens[state.token].value), step = run.steps.indexOf(position);
  const fetches = [];
  for (let i = 0; i < L * H && step >= 0; i++)
    if (["all", String(Math.floor(i / H))].includes(state.layer) &&
        ["all", String(i % H)].includes(state.head)) fetches.push(read(step * L * H + i));
  let oldest = start.findIndex(p => p > position) - 1;    // the oldest recent sentence
  while (oldest > 0 && position + 1 - start[oldest] < run.recent) oldest--;
  const [count, full, attention, dense, missed] = [0, 0, 0, 0, 0].map(() => new Float32Array(S));
  for (const fetch of fetches) {
    for (const s of sets[fetch.number]) full[s]++;
    for (const s of fetch.set) count[s]++;
    for (const {s, attention: x} of fetch.entries)
      if (fetch.set.has(s)) attention[s] = Math.max(attention[s], x);
    for (const {s, mass} of fetch.dense) {
      dense[s] = Math.max(dense[s], mass);
      if (!fetch.set.has(s) && s > 0 && s < oldest) missed[s] = Math.max(missed[s], mass);
    }
  }
  view = {fetches, position, oldest, count, full, attention, dense,
    missed: missed.map(mass => mass < (fetches.length > 1 ? 0.05 : 0.01) ? 0 : mass)};
  view.light = brightness();
}

const isNear = s => s === 0 || (s >= view.oldest && start[s] <= view.position);
/* How bright each sentence is, 0 to 1; 0: not fetched or, for the dense cache, ignored. */
function brightness() {
  const {count, attention, dense} = view;
  const values = state.light === "heads" ? count : state.light === "dense"
    ? dense.map(x => x < 0.005 ? 0 : x) : attention.map((x, s) => count[s] && Math.max(x, 1e-4));
  const most = Math.max(...values.filter((_, s) => !isNear(s)), 1e-4);
  return values.map(x => Math.sqrt(Math.min(1, x / most)));
}

// -------------------------------------------------------------------------------------- showing

function add(parent, tag, text, className) {
  const child = document.createElement(tag);
  child.textContent = text ?? "";
  child.className = className ?? "";
  return parent.appendChild(child);
}

function showText() {
  spans.forEach((span, s) => {
    const label = {0: "sink", [Math.max(1, view.oldest)]: "recent"}[s];
    const classes = {
      s: true, whole: wholeOf(s) !== wholeOf(s - 1), later: start[s] > view.position,
      near: isNear(s), lit: view.light[s] > 0 && !isNear(s), missed: view.missed[s] > 0,
      lost: view.full[s] > 0 && !view.count[s], label: label && view.fetches.length};
    span.className = Object.keys(classes).filter(name => classes[name]).join(" ");
    span.dataset.label = label;
    span.style.setProperty("--heat", 0.07 + 0.6 * view.light[s]);
    span.setAttribute("aria-current", s === state.sentence);
  });
}

/* The whole text from top to bottom: what is lit on the left, what was missed on the right. */
function showMap() {
  const map = element("map"), style = getComputedStyle(map), draw = map.getContext("2d");
  const scale = (map.height = map.clientHeight) / element("text").scrollHeight;
  const [blue, orange, grey] = ["--blue", "--orange", "--soft"].map(x => style.getPropertyValue(x));
  spans.forEach((span, s) => {
    const top = span.offsetTop * scale, tall = Math.max(2, span.offsetHeight * scale);
    draw.fillStyle = isNear(s) ? grey : `rgb(${blue} / ${view.light[s]})`;
    draw.fillRect(0, top, 9, tall);
    draw.fillStyle = orange;
    if (view.missed[s]) draw.fillRect(9, top, 5, tall);
  });
}

/* The sentences with the largest values, each inside the whole sentence that it is a piece of. */
function showList(id, values, n, format) {
  const best = [...values.keys()].filter(s => values[s] > 0 && !isNear(s));
  best.sort((a, b) => values[b] - values[a]);
  element(id).replaceChildren();
  for (const s of best.slice(0, n)) {
    const button = add(add(element(id), "li"), "button");
    add(button, "span", format(values[s]), "number");
    const line = add(button, "span");
    for (let i = Math.max(0, s - 2); i < s + 3; i++)
      if (wholeOf(i) === wholeOf(s)) add(line, i === s ? "b" : "span", spans[i].textContent);
    button.onclick = () => update({sentence: s}, true);
  }
  if (!best.length) add(element(id), "li", "none", "soft");
}

function showLists() {
  const {fetches, count, attention, dense, missed} = view, one = fetches.length === 1;
  const ranks = new Float32Array(S), from = one ? "" : ", in one head";
  if (one) for (const {s, rank} of fetches[0].entries) if (count[s]) ranks[s] = 1 / rank;
  const [title, values, format] = {
    attention: [`Most attention${from}`, attention, percent],
    heads: one ? ["Best ranked", ranks, x => `rank ${Math.round(1 / x)}`]
      : ["Fetched by most heads", count, x => `${x} heads`],
    dense: [`Most attention in the dense cache${from}`, dense, percent]}[state.light];
  element("best-title").textContent = title;
  showList("best", values, 8, format);
  showList("missed", missed, 5, percent);
}

const mean = name => sum(view.fetches.map(({number}) => data[name][number])) / view.fetches.length;

function showSummary() {
  const {fetches, count} = view, n = fetches.length, token = tokens[state.token].textContent;
  const far = count.filter((x, s) => x > 0 && !isNear(s)), each = Math.round(sum(far) / n);
  const who = n === 1 ? "this KV head fetched" : `each of ${n} KV heads fetched about`;
  let text = `To predict “${token}”, ${who} ${each} of ${S} sentences and pieces`;
  if (n > 1) text += `, ${far.length} different ones`;
  const full = view.full.filter((x, s) => x > 0 && !isNear(s)).length;
  const least = percent(Math.min(...fetches.map(({number}) => data.covered?.[number])) / 1e4);
  if (state.part > 1) text += `; ${full - far.length} of ${full} are lost, if no query changes`;
  else if (run.dense) text += ". In the dense cache, what a head attended to has " +
    percent(mean("covered") / 1e4) + " of its weight" + (n > 1 ? ` (mean), at least ${least}` : "");
  if (n === 0) text = `“${token}” comes from the prefill: exact attention, nothing is fetched`;
  element("now").textContent = `token ${state.token + 1} of ${tokens.length}`;
  element("summary").textContent = text + ".";
}

function showBudget() {
  const places = Math.floor(budget / state.part), sizes = {self: 1};
  let free = places - 1;
  for (const name of ["sink", "recent", "far"]) {
    sizes[name] = Math.min(free, mean(name + "_tokens") || 0);
    free -= sizes[name];
  }
  element("budget-title").textContent = `The budget: ${places} tokens per head`;
  for (const [name, size] of Object.entries({...sizes, free})) {
    element("bar-" + name).style.width = `${100 * size / places}%`;
    element("size-" + name).textContent = Number(size.toFixed(1));
  }
}

function showSentence() {
  const s = state.sentence, n = run.sentences[s][0], near = isNear(s), dense = view.dense[s];
  const taken = view.fetches.filter(fetch => fetch.set.has(s));
  const rows = taken.map(fetch => [fetch.number, fetch.entries.find(entry => entry.s === s)]);
  rows.sort(([, a], [, b]) => (b?.attention ?? 0) - (a?.attention ?? 0));
  element("quote").textContent = spans[s].textContent;
  element("facts").textContent = `Number ${s} (from 0), ${n} tokens from position ${start[s]}. ` +
    `Fetched by ${taken.length} of ${view.fetches.length} heads` + (near ? ", always" : "") +
    (dense ? `; dense attention: up to ${percent(dense)}.` : ".");
  element("rows").replaceChildren();
  for (const [number, entry] of rows) {
    const row = add(element("rows"), "tr"), layer = Math.floor(number / H) % L;
    const known = entry && [near ? "near" : entry.rank, near ? "∞" : entry.score.toPrecision(2),
      entry.taken, percent(entry.attention)];
    for (const cell of [layer, number % H, ...known ?? [`> ${run.listed}`]]) add(row, "td", cell);
  }
}

/* Change the state and show it. reveal: scroll to the chosen sentence. */
function update(changes, reveal) {
  spans[state.sentence].tabIndex = -1;
  Object.assign(state, changes);
  spans[state.sentence].tabIndex = 0;
  compute();
  for (const part of [showText, showMap, showLists, showSummary, showBudget, showSentence]) part();
  tokens.forEach((button, i) => {
    button.setAttribute("aria-checked", i === state.token);
    button.tabIndex = i === state.token ? 0 : -1;
  });
  for (const id of [...CHOICES, "token"]) element(id).value = state[id];
  element("answers").scrollTop = tokens[state.token].offsetTop - 60;
  if (reveal) element("text").scrollTop = spans[state.sentence].offsetTop - 120;
  clearTimeout(saving);                                   // the address becomes a link to this view
  saving = setTimeout(() => history.replaceState(null, "", "#" + new URLSearchParams(state)), 300);
}

// --------------------------------------------------------------------------------------- acting

const goTo = token => update({token: Math.min(Math.max(token, 0), tokens.length - 1)});

function play() {
  const last = () => state.token === tokens.length - 1;
  clearInterval(playing);
  playing = playing || last() ? 0 : setInterval(() => last() ? play() : goTo(state.token + 1), 900);
  element("play").textContent = playing ? "Pause" : "Play";
}

/* Left and right: the next token or, in the text, the next lit sentence. Up and down: the next
   sentence of the text. */
function pressed(event) {
  const step = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
  const vertical = /Up|Down/.test(event.key), inside = selector => event.target.closest(selector);
  const others = event.altKey || event.ctrlKey || inside("select, input, #heads-table");
  if (!step || others || (vertical && !inside("#text"))) return;
  event.preventDefault();
  let s = state.sentence + step;
  while (spans[s] && !vertical && !spans[s].matches(".lit")) s += step;
  if (!inside("#text")) goTo(state.token + step);
  else if (spans[s]) update({sentence: s});
  if (inside(".token")) tokens[state.token].focus();
  if (inside("#text")) spans[state.sentence].focus();
}

/* Take the state from the page's address; without a sentence in it, choose the brightest one. */
function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1)), changes = {};
  for (const id of [...CHOICES, "token"]) {
    if (!element(id).disabled) element(id).value = given.get(id) ?? state[id];
    changes[id] = element(id).value || state[id];         // "": there is no such choice
  }
  update({...changes, token: Number(changes.token)});
  const s = parseInt(given.get("sentence"));
  if (spans[s]) update({sentence: s}, true);
  else element("best").querySelector("button")?.click();
}

async function main() {
  await unpack();
  spans.forEach((span, s) => { span.onclick = () => update({sentence: s}); });
  tokens.forEach((button, i) => { button.onclick = () => goTo(i); });
  for (const id of CHOICES) element(id).onchange = ({target}) => update({[id]: target.value});
  element("token").oninput = ({target}) => goTo(Number(target.value));
  element("play").onclick = play;
  state.token = Math.max(0, tokens.findIndex(button => run.steps.includes(Number(button.value))));
  readAddress();
  addEventListener("keydown", pressed);
  addEventListener("resize", showMap);
  addEventListener("hashchange", readAddress);
  document.body.dataset.ready = "yes";
}

main().catch(error => {
  element("summary").textContent = `This page needs a browser of 2023 or later (${error.message}).`;
  throw error;
});

// Data: of each row `w` the tokens' texts (numbers in `texts`; a list is a control token), `p` and `q`
// their log-probabilities in thousandths (student, teacher; null without a context), `c` candidates
// (text, p, q in ten-thousandths, flat); `ask`, `said`, `demo`, `feed`, `read` numbers in `long`.
// Foreign text enters by textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { row: null, token: 0, low: data.scale[0], high: data.scale[1], rows: [] };
const strongest = Math.max(...data.rows.map((row) => Math.abs(row.grpo)), 1e-9);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function advantage(row, i) {
  return row.q === null ? null : (row.q[i] - row.p[i]) / 1000;
}

function share(row, i) {
  const value = advantage(row, i);
  if (value === null) return null;
  return value < 0 ? Math.max(-1, -value / state.low) : Math.min(1, value / state.high);
}

function signed(value, digits = 2) {
  if (value === null) return "–";
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return value < 0 ? `−${text}` : `+${text}`;
}

function percent(tenThousandths) {
  if (tenThousandths === 0) return "< 0.01 %";
  return `${(tenThousandths / 100).toFixed(tenThousandths < 1000 ? 2 : 1)} %`;
}

// What is white or cannot be seen gets a sign: · ↵ → and the code of a control character.
function plain(number) {
  const text = data.texts[number];
  if (Array.isArray(text)) return `⟨${text[0]}⟩`;
  return text.replace(/ /g, "·").replace(/\n/g, "↵").replace(/\t/g, "→")
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu, (c) => `⟨U+${c.codePointAt(0).toString(16).toUpperCase()}⟩`);
}

function write(element, number) {
  if (Array.isArray(data.texts[number])) {
    element.append(make("span", "special", data.texts[number][0]));
    return element;
  }
  for (const piece of plain(number).split(/([·↵→]+|⟨U\+[0-9A-F]+⟩)/)) {
    if (piece) element.append(/^([·↵→]|⟨U\+)/.test(piece) ? make("span", "white", piece) : piece);
  }
  return element;
}

// The sign without colour: a bar below where the teacher disagrees, above where it agrees more.
function paint(element, value) {
  const back = colour(value ?? 0);
  const size = value === null || Math.abs(value) < 0.08 ? 0 : Math.abs(value) < 0.5 ? 2 : 4;
  element.style.backgroundColor = css(back);
  element.style.color = ink(back);
  element.style.boxShadow = size ? `inset 0 ${value < 0 ? -size : size}px 0 ${ink(back)}` : "none";
}

function tokenSpan(row, i, value) {
  const span = write(make("span", "token"), row.w[i]);
  span.dataset.i = i;
  paint(span, value);
  span.addEventListener("mouseenter", () => choose(row, i, false));
  return span;
}

function showTokens(row) {
  const spans = row.w.map((_, i) => {
    const span = tokenSpan(row, i, share(row, i));
    span.id = `token-${i}`;
    span.setAttribute("role", "option");
    span.setAttribute("aria-label", `${plain(row.w[i])}, ${signed(advantage(row, i))}`);
    span.addEventListener("focus", () => choose(row, i, false));
    span.addEventListener("click", () => choose(row, i, true));
    return span;
  });
  const rest = row.total - row.w.length;
  if (rest > 0) spans.push(make("span", "soft", ` … ${rest} more tokens`));
  $("tokens").replaceChildren(...lines(row, spans));
  $("same").replaceChildren(...lines(row, row.w.map((_, i) => tokenSpan(row, i, row.grpo / strongest))));
}

// A line of the response is a line on the page.
function lines(row, spans) {
  return spans.flatMap((span, i) => {
    const text = data.texts[row.w[i]];
    return typeof text === "string" && text.endsWith("\n") ? [span, make("br")] : [span];
  });
}

function fill(id, number, nothing) {
  const known = number !== null;
  $(id).textContent = known ? data.long[number] : nothing;
  $(id).classList.toggle("nothing", !known);
}

function showRow(row) {
  const title = $("one-title");
  title.textContent = `Response ${row.n + 1} to ${row.id}`;
  const kind = { passed: "passed", failed: "failed" }[row.verdict] ?? "other";
  title.append(make("span", `badge ${kind}`, `${row.verdict === "passed" ? "●" : "○"} ${row.verdict}, reward ${row.reward}`));
  $("ask").textContent = data.long[row.ask].map(([role, content]) => (role === "user" ? content : `[${role}] ${content}`)).join("\n\n");
  $("sdpo-label").textContent = row.q === null
    ? "SDPO: nothing to show the teacher, no signal" : "SDPO: log q/p of each token";
  $("grpo-label").textContent = `GRPO: ${signed(row.grpo)} for every token`;
  fill("demo", row.demo, "none");
  fill("feed", row.feed, row.demo === null ? "none" : "none, a demonstration was there");
  fill("said", row.said, "nothing");
  $("said-block").hidden = row.said === null || row.said === row.feed;
  $("read-block").hidden = row.read === null;
  fill("read", row.read, "");
  showTokens(row);
}

function value(name, text) {
  const holder = make("div", "", name);
  holder.append(make("b", "", text));
  return holder;
}

function showToken(row, i) {
  const head = make("strong", "", `Token ${i + 1} of ${row.total}: `);
  head.append(write(make("span", "token"), row.w[i]));
  const values = make("div", "values");
  values.append(value("log q/p, SDPO", signed(advantage(row, i))), value("advantage, GRPO", signed(row.grpo)),
    value("log p, student", signed(row.p[i] / 1000)));
  if (row.q !== null) values.append(value("log q, teacher", signed(row.q[i] / 1000)));
  $("token").replaceChildren(head, values, candidateTable(row, i));
}

function candidateTable(row, i) {
  const table = make("table"), flat = row.c[i], step = row.q === null ? 2 : 3;
  const head = table.createTHead().insertRow();
  for (const name of ["Student", "Likeliest tokens", row.q === null ? "" : "Teacher"]) head.append(make("th", "", name));
  head.querySelectorAll("th").forEach((th) => (th.scope = "col"));
  const body = table.createTBody(), known = [];
  for (let at = 0; at < flat.length; at += step) known.push(flat.slice(at, at + step));
  if (!known.some(([text]) => text === row.w[i])) {
    known.push([row.w[i], ...[row.p, row.q].filter(Boolean).map((x) => Math.round(1e4 * Math.exp(x[i] / 1000)))]);
  }
  for (const [text, p, q] of known) {
    const line = body.insertRow();
    if (text === row.w[i]) line.className = "sampled";
    const left = line.insertCell(), middle = line.insertCell(), right = line.insertCell();
    left.append(percent(p), bar(p, "student"));
    middle.append(write(make("span"), text));
    if (q !== undefined) right.append(bar(q, "teacher"), percent(q));
  }
  return table;
}

function bar(tenThousandths, who) {
  const element = make("span", `bar ${who}`);
  element.style.width = `calc((100% - 84px) * ${tenThousandths / 1e4})`; // beside the number
  return element;
}

// Scrolls the box of the tokens, never the page under the reader's eyes.
function reveal(span) {
  const box = span.parentElement, top = span.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + span.offsetHeight > box.scrollTop + box.clientHeight) {
    box.scrollTop = top - box.clientHeight / 2;
  }
}

function choose(row, i, focus) {
  const changed = row !== state.row;
  state.row = row;
  state.token = Math.max(0, Math.min(i, row.w.length - 1));
  if (changed) showRow(row);
  for (const span of $("tokens").querySelectorAll(".token")) {
    const mine = Number(span.dataset.i) === state.token;
    span.setAttribute("aria-selected", String(mine));
    span.tabIndex = mine ? 0 : -1;
    if (mine) reveal(span);
    if (mine && focus) span.focus({ preventScroll: true });
  }
  showToken(row, state.token);
  markMatrices();
}

// Where student and teacher differ most.
function loudest(row) {
  if (row.q === null) return 0;
  const sizes = row.w.map((_, i) => Math.abs(advantage(row, i)));
  return sizes.indexOf(Math.max(...sizes));
}

function loudestRow(rows) {
  const size = (row) => (row.q === null ? -1 : Math.abs(advantage(row, loudest(row))));
  return rows.reduce((best, row) => (size(row) > size(best) ? row : best));
}

function turn(rows) {
  const at = state.rows.indexOf(state.row) + rows;
  if (state.rows[at]) choose(state.rows[at], loudest(state.rows[at]), false);
}

function move(rows, tokens, focus) {
  const at = state.rows.indexOf(state.row) + rows;
  const row = state.rows[Math.max(0, Math.min(at, state.rows.length - 1))];
  if (row) choose(row, state.token + tokens, focus);
}

function keys(event, focus) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e6], End: [0, 1e6] };
  const asked = moves[event.key];
  if (!asked || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  move(...asked, focus);
  // A token that takes the focus is read out by itself; a place in the picture is not.
  $("say").textContent = focus ? "" : $("sdpo").getAttribute("aria-label");
}

const matrices = [
  new Matrix($("sdpo"), share, (row, i) => choose(row, i, true), hoverCell),
  new Matrix($("grpo"), (row) => row.grpo / strongest, (row, i) => choose(row, i, true), hoverCell),
];

function hoverCell(place) {
  if (!place) { $("cell").textContent = ""; return; }
  const { row, i } = place;
  $("cell").textContent = `Response ${row.n + 1} to ${row.id}, ${row.verdict}. Token ${i + 1}: ${plain(row.w[i])}  SDPO ${signed(advantage(row, i))}, GRPO ${signed(row.grpo)}`;
}

function drawMatrices() {
  for (const matrix of matrices) matrix.draw(state.rows);
  markMatrices();
}

function markMatrices() {
  const grouped = $("sort").value === "n";
  for (const matrix of matrices) matrix.mark(state.row, state.token, grouped);
  if (!state.row) return;
  const { row, token } = state;
  $("sdpo").setAttribute("aria-label", `Response ${row.n + 1}, ${row.verdict}, token ${token + 1}: ${plain(row.w[token])}, ${signed(advantage(row, token))}`);
}

const SORTS = {
  n: (row) => row.n,
  reward: (row) => -row.reward,
  total: (row) => -row.total,
  least: (row) => (row.q === null ? 1e9 : Math.min(...row.w.map((_, i) => advantage(row, i)))),
  most: (row) => (row.q === null ? 1e9 : -Math.max(...row.w.map((_, i) => advantage(row, i)))),
  mean: (row) => (row.q === null ? 1e9 : -row.w.reduce((sum, _, i) => sum + Math.abs(advantage(row, i)), 0) / row.w.length),
};

function select() {
  const prompt = $("by-prompt").value, verdict = $("by-verdict").value, context = $("by-context").value;
  const key = SORTS[$("sort").value];
  state.rows = data.rows.filter((row) => (prompt === "" || row.ask === Number(prompt))
    && (verdict === "" || row.verdict === verdict)
    && (context === "" || (context === "none" ? row.q === null : row[context] !== null)));
  state.rows.sort((a, b) => key(a) - key(b) || a.n - b.n);
  $("count").textContent = `${state.rows.length} of ${data.rows.length} responses`;
  $("one").hidden = state.rows.length === 0;
  drawMatrices();
  if (state.rows.length && !state.rows.includes(state.row)) {
    const first = state.row === null ? loudestRow(state.rows) : state.rows[0];
    choose(first, loudest(first), false);
  }
}

function rescale() {
  const low = Number($("low").value), high = Number($("high").value);
  if (low < 0) state.low = low;
  if (high > 0) state.high = high;
  repaint();
}

function repaint() {
  $("legend").style.background = gradient();
  $("legend").setAttribute("aria-label", `Colours from red at ${state.low} and below to blue at ${state.high} and above`);
  const row = state.row;
  if (row) { showTokens(row); choose(row, state.token, false); }
  drawMatrices();
}

function about() {
  const { meta, rows } = data, taught = rows.filter((row) => row.q !== null);
  const all = taught.flatMap((row) => row.w.map((_, i) => Math.abs(advantage(row, i))));
  const passed = rows.filter((row) => row.verdict === "passed").length;
  const strong = all.filter((x) => x > 1).length;
  $("about").textContent = `${meta.run} after step ${meta.step} (${meta.objective}; teacher: ${meta.teacher}; temperature ${meta.temperature}). `
    + `${rows.length} responses, ${passed} passed, ${taught.length} with a context; `
    + `|log q/p| > 1 on ${all.length ? ((100 * strong) / all.length).toFixed(1) : 0} % of their tokens.`;
  $("legend-text").append(make("span", "", "▁ teacher: less likely"), make("span", "", "more likely ▔"));
  $("grpo-title").textContent = `GRPO: reward − mean, full at ±${strongest.toFixed(2)}`;
  const seen = new Map(rows.map((row) => [row.ask, row.id]));
  for (const [ask, id] of seen) {
    const option = make("option", "", `${id}: ${data.long[ask].at(-1)[1].slice(0, 48)}`);
    option.value = ask;
    $("by-prompt").append(option);
  }
}

about();
$("low").value = state.low;
$("high").value = state.high;
for (const id of ["by-prompt", "by-verdict", "by-context", "sort"]) $(id).addEventListener("change", select);
for (const id of ["low", "high"]) $(id).addEventListener("change", rescale);
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
$("tokens").addEventListener("keydown", (event) => keys(event, true));
$("sdpo").addEventListener("keydown", (event) => keys(event, false));
document.addEventListener("themechange", repaint);
window.addEventListener("resize", drawMatrices);
select();
repaint();

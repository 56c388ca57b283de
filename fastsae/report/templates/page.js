"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const state = { coder: Object.keys(data.coders)[0], shown: [], latent: null };
const word = (id) => data.words[id];

function element(tag, text, classes) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (classes) made.className = classes;
  return made;
}

const percent = (share) => (100 * share >= 0.01 ? (100 * share).toPrecision(2) : (100 * share).toExponential(0)) + " %";
const hint = (record) => (record.up || []).slice(0, 4).map((pair) => word(pair[0]).trim()).join(" ")
  || record.contexts.slice(0, 4).map((c) => word(c.tokens[c.peak]).trim()).join(" ");

function matches(record, query) {
  if (!query) return true;
  if (/^\d+$/.test(query)) return String(record.latent).startsWith(query);
  const tokens = [...(record.up || []).map((pair) => pair[0]), ...record.contexts.map((c) => c.tokens[c.peak])];
  return tokens.some((id) => word(id).toLowerCase().includes(query));
}

function list() {
  const query = at("search").value.trim().toLowerCase(), order = at("order").value;
  const exact = (record) => String(record.latent) === query;
  state.shown = data.coders[state.coder].filter((record) => matches(record, query));
  state.shown.sort((a, b) => exact(b) - exact(a) || (order === "latent" ? a.latent - b.latent : b[order] - a[order]));
  at("list").replaceChildren(...state.shown.map((record) => {
    const row = element("div");
    row.id = "row-" + record.latent;
    row.setAttribute("role", "option");
    row.append(element("b", record.latent), element("span", hint(record)));
    row.onclick = () => select(record.latent);
    return row;
  }));
  if (!state.shown.length) {
    const advice = /^\d+$/.test(query) ? " To include it: fastsae report RUN --latents " + query : "";
    at("list").append(element("p", "None of " + data.coders[state.coder].length + " latents shown here matches." + advice, "note"));
  }
  if (!state.shown.some((record) => record.latent === state.latent) || (query && exact(state.shown[0] || {}))) {
    state.latent = state.shown.length ? state.shown[0].latent : null;
  }
  detail();
}

function select(latent) {
  state.latent = latent;
  detail();
}

function detail() {
  for (const row of at("list").children) {
    if (row.id) row.setAttribute("aria-selected", row.id === "row-" + state.latent);
  }
  const row = at("row-" + state.latent), box = at("list");
  if (row && (row.offsetTop < box.scrollTop + box.offsetTop || row.offsetTop + row.offsetHeight > box.scrollTop + box.offsetTop + box.clientHeight)) {
    box.scrollTop = row.offsetTop - box.offsetTop - box.clientHeight / 2;
  }
  const record = data.coders[state.coder].find((other) => other.latent === state.latent);
  if (!record) return at("detail").replaceChildren(element("p", "No latent chosen.", "note"));
  history.replaceState(null, "", "#" + encodeURIComponent(state.coder) + "/" + record.latent);
  const facts = "fires on " + percent(record.density) + " of tokens · mean " + record.mean + " · largest " + record.largest;
  at("detail").replaceChildren(element("div", state.coder + " / " + record.latent, "name"), element("div", facts, "note"),
    ...contexts(record), ...histogram(record), ...promoted(record), ...nearest(record));
}

function contexts(record) {
  const lines = record.contexts.map((context) => {
    const line = element("div", undefined, "context");
    line.append(element("i", context.acts[context.peak]));
    context.tokens.forEach((id, i) => {
      const token = element("span", word(id), i === context.peak ? "peak" : "");
      if (context.acts[i]) {
        token.style.setProperty("--a", Math.round(15 + 65 * context.acts[i] / record.largest));
        token.title = context.acts[i];
      }
      line.append(token);
    });
    return line;
  });
  return [element("h3", lines.length ? "Strongest contexts" : "Never fired on these tokens"), ...lines];
}

function histogram(record) {
  if (!record.histogram.length) return [];
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  const bins = record.histogram, most = Math.max(...bins);
  svg.setAttribute("viewBox", "0 0 " + bins.length * 10 + " 60");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "bars");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "histogram of activations from 0 to " + record.largest);
  bins.forEach((count, i) => {
    const bar = document.createElementNS(space, "rect"), height = count ? Math.max(1, 58 * count / most) : 0;
    for (const [key, value] of Object.entries({ x: i * 10 + 1, y: 60 - height, width: 8, height })) bar.setAttribute(key, value);
    bar.append(document.createElementNS(space, "title"));
    bar.firstChild.textContent = count;
    svg.append(bar);
  });
  return [element("h3", "Activations, from 0 to " + record.largest), svg];
}

function promoted(record) {
  if (!record.up) return [];
  const pair = element("div", undefined, "pair");
  for (const [title, tokens] of [["Promoted tokens", record.up], ["Suppressed tokens", record.down]]) {
    const side = element("div"), row = element("div", undefined, "tokens");
    for (const [id, logit] of tokens) {
      const token = element("span", word(id));
      token.append(element("small", (logit > 0 ? "+" : "") + logit));
      row.append(token);
    }
    side.append(element("h3", title), row);
    pair.append(side);
  }
  return [pair];
}

function nearest(record) {
  const row = element("div", undefined, "tokens");
  for (const [latent, cosine] of record.near) {
    const here = data.coders[state.coder].some((other) => other.latent === latent);
    const token = element(here ? "button" : "span", latent);
    if (here) token.onclick = () => { at("search").value = ""; state.latent = latent; list(); };
    token.append(element("small", cosine));
    row.append(token);
  }
  return [element("h3", "Nearest latents (cosine of decoder rows)"), row];
}

function move(step) {
  const i = state.shown.findIndex((record) => record.latent === state.latent);
  const next = state.shown[Math.min(Math.max(i + step, 0), state.shown.length - 1)];
  if (next) select(next.latent);
}

function turn(step) {
  const names = Object.keys(data.coders), i = names.indexOf(state.coder);
  choose(names[(i + step + names.length) % names.length]);
}

function choose(coder) {
  state.coder = at("coder").value = coder;
  state.latent = null;
  list();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select");
  if (event.key === "/" && !typing) { event.preventDefault(); at("latents").scrollIntoView(); at("search").focus({ preventScroll: true }); at("search").select(); }
  else if (event.key === "Escape" && typing) event.target.blur();
  else if (event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey) return;
  else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && (typing || at("list").contains(event.target))) { event.preventDefault(); move(event.key === "ArrowDown" ? 1 : -1); }
  else if (!typing && (event.key === "j" || event.key === "k")) move(event.key === "j" ? 1 : -1);
  else if (!typing && (event.key === "[" || event.key === "]")) turn(event.key === "]" ? 1 : -1);
});

at("coder").append(...Object.keys(data.coders).map((name) => element("option", name)));
at("coder").onchange = () => choose(at("coder").value);
at("search").oninput = at("order").onchange = list;

function fromAddress() {
  const [coder, latent] = decodeURIComponent(location.hash.slice(1)).split(/\/(?=\d+$)/);
  if (latent === undefined || !data.coders[coder]) return false;
  state.coder = at("coder").value = coder;
  state.latent = Number(latent);
  return true;
}
const linked = fromAddress();
window.addEventListener("hashchange", () => { if (fromAddress()) list(); });
const address = location.hash;
list();
if (!linked) history.replaceState(null, "", address || location.pathname + location.search);
else at("latents").scrollIntoView();

"use strict";
// The list of examples. Every text becomes a text node; nothing here makes HTML of a string.

const run = JSON.parse(document.getElementById("run").textContent);
const sources = [...document.querySelectorAll("script.piece")];
const [box, said, more, form] = ["list", "said", "more", "filter"].map((id) => document.getElementById(id));
const AT_ONCE = 50;
const KEPT = 20; // pieces in memory
const pieces = new Map();
const index = [];
let found = [];
let turn = 0;

const pause = () => new Promise((resolve) => setTimeout(resolve));
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const signed = (n) => (n > 0 ? `+${n}` : `−${-n}`);
const number = (n, digits = 2) => n.toFixed(digits).replace("-", "−");
const mean = (values) => (values.length ? values.reduce((a, b) => a + b) / values.length : null);

function make(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

function piece(n) {
  if (!pieces.has(n)) {
    pieces.set(n, JSON.parse(sources[n].textContent));
    if (pieces.size > KEPT) pieces.delete(pieces.keys().next().value);
  }
  return pieces.get(n);
}

const whole = (entry) => piece(Math.floor(entry.place / run.size))[entry.place % run.size];

function strings(value) {
  if (typeof value === "string") return [value];
  return value && typeof value === "object" ? Object.values(value).flatMap(strings) : [];
}

function entryOf(example, place) {
  const marks = example.answers.map((own) => own.map((one) => [one.score, one.verdicts.map((v) => v.met)]));
  const asked = example.messages.filter((message) => message.role === "user").at(-1)?.content ?? "";
  return {
    place,
    task: example.task,
    id: example.id,
    link: `#${example.task}/${encodeURIComponent(example.id).replaceAll("%2F", "/")}`,
    asks: asked.slice(0, 200).replace(/\s+/g, " "),
    tags: example.tags ?? [],
    scores: example.answers.map((own) => mean(own.map((one) => one.score).filter((score) => score !== null))),
    answered: example.answers.map((own) => own.length > 0),
    wrong: example.answers.some((own) => own.some((one) => one.score !== null && one.score <= 0)),
    cut: example.answers.some((own) => own.some((one) => one.finish_reason === "length" && !one.logprobs)),
    seen: run.seen.includes(`${example.task}/${example.id}`),
    changed: new Set(marks.map((own) => JSON.stringify(own))).size > 1,
    unscored: marks.some((own) => !own.length || own.some(([score, met]) => score === null || met.includes(null))),
  };
}

/** More is better, of losses too; null where it is not known. */
function worth(entry, model, before) {
  const values = [entry.scores[model], ...(before === undefined ? [] : [entry.scores[before]])];
  if (values.includes(null)) return null;
  return (values[0] - (values[1] ?? 0)) * (run.losses.includes(entry.task) ? -1 : 1);
}

function sorted(entries, order) {
  const [kind, model] = order.split(":");
  if (!kind) return entries;
  const before = kind === "gain" || kind === "loss" ? 0 : undefined;
  const sign = kind === "best" || kind === "gain" ? -1 : 1;
  const keyed = entries.map((entry) => [worth(entry, Number(model), before), entry]);
  keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (a - b));
  return keyed.map(([, entry]) => entry);
}

async function refresh() {
  const mine = ++turn;
  const only = index.filter((entry) => entry.link === location.hash);
  if (only.length) return show(only, true);
  const { search, task, tag, show: kind, order } = Object.fromEntries(new FormData(form));
  let entries = index.filter(
    (entry) =>
      (!task || entry.task === task) && (!tag || entry.tags.includes(tag)) && (!kind || entry[kind]),
  );
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  if (words.length) {
    const matching = [];
    let last = -1;
    for (const entry of entries) {
      const n = Math.floor(entry.place / run.size);
      if (n !== last) {
        last = n;
        await pause();
        if (mine !== turn) return;
      }
      const text = strings(whole(entry)).join("\n").toLowerCase();
      if (words.every((word) => text.includes(word))) matching.push(entry);
    }
    entries = matching;
  }
  show(sorted(entries, order), false);
}

function show(entries, isOne) {
  found = entries;
  box.replaceChildren();
  extend();
  form.hidden = isOne;
  if (isOne) {
    said.replaceChildren("One example. ", make("a", { href: "#examples" }, "Show all"));
    box.firstChild.open = true;
    document.getElementById("examples").scrollIntoView();
  }
}

function extend() {
  const from = box.childElementCount;
  box.append(...found.slice(from, from + AT_ONCE).map(row));
  const shown = Math.min(from + AT_ONCE, found.length);
  said.textContent = found.length
    ? `${shown.toLocaleString("en")} of ${count(found.length, "example")} shown` +
      (found.length < index.length ? `; there are ${index.length.toLocaleString("en")}.` : ".")
    : "No example matches.";
  more.hidden = shown === found.length;
}

function scoreOf(entry, model) {
  if (!entry.answered[model]) return ["open", "no answer"];
  return entry.scores[model] === null ? ["open", "unscored"] : ["", number(entry.scores[model])];
}

function row(entry) {
  const marks = run.models.map((name, model) => {
    const [kind, text] = scoreOf(entry, model);
    return make("span", { class: `key m${model % 6} ${kind}`, title: name }, text);
  });
  const about = [entry.task, entry.id, ...entry.tags];
  const flags = [
    entry.changed && run.models.length > 1 ? "changed between models" : "",
    entry.unscored ? "not wholly scored" : "",
    entry.cut ? "cut at the longest" : "",
    entry.seen ? "stands in the training text" : "",
  ].filter(Boolean);
  const details = make(
    "details",
    { class: "example" },
    make(
      "summary",
      {},
      make("span", { class: "asks", dir: "auto" }, entry.asks || "(no question)"),
      make("span", { class: "marks" }, ...marks),
      make("span", { class: "about" }, about.join(" · "), flags.length ? make("span", { class: "open" }, ` · ${flags.join(" · ")}`) : ""),
    ),
  );
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(...body(entry));
  });
  return details;
}

function body(entry) {
  const example = whole(entry);
  const repeats = Math.max(...example.answers.map((own) => own.length), 1);
  const area = make("div", {});
  const draw = (repeat) => {
    const own = example.answers.map((answers) => answers[repeat]);
    area.replaceChildren(make("div", { class: "sides" }, ...own.map(answer)), ...criteria(own));
  };
  const choice = make("select", {}, ...Array.from({ length: repeats }, (_, n) => make("option", { value: n }, `${n + 1} of ${repeats}`)));
  choice.addEventListener("change", () => draw(Number(choice.value)));
  draw(0);
  const { reference } = example;
  const isKnown = reference !== undefined && reference !== null && reference !== "";
  return [
    make("p", { class: "quiet" }, make("a", { href: entry.link }, "Link to this example")),
    ...example.messages.map((message) => told(message.role, message.content)),
    isKnown ? told("reference", typeof reference === "string" ? reference : JSON.stringify(reference, null, 1)) : "",
    make("h3", {}, run.models.length > 1 ? "Answers" : "Answer"),
    repeats > 1 ? make("p", {}, make("label", {}, "Answer ", choice)) : "",
    area,
  ];
}

const told = (who, text) =>
  make("div", { class: "turn" }, make("div", { class: "who" }, who[0].toUpperCase() + who.slice(1)), make("div", { class: "text", dir: "auto" }, text));

function answer(one, model) {
  const head = make("strong", { class: `key m${model % 6}` }, run.models[model]);
  const card = make("div", { class: `answer m${model % 6}` }, head);
  if (!one) {
    card.append(make("p", { class: "open" }, "There is no answer: it counts neither as right nor as wrong."));
    return card;
  }
  const range = one.bounds ? `, it lies between ${number(one.bounds[0])} and ${number(one.bounds[1])}` : "";
  card.append(" ", one.score === null ? make("span", { class: "open" }, `unscored${range}`) : make("span", {}, `score ${number(one.score)}`, points(one.verdicts)));
  const text = one.text ?? "";
  const end = text.lastIndexOf("</think>");
  if (end >= 0) {
    const thought = text.slice(0, end).replace("<think>", "").trim();
    card.append(make("details", {}, make("summary", { class: "quiet" }, "Thinking, not judged"), make("div", { class: "text quiet", dir: "auto" }, thought)));
  }
  const rest = (end >= 0 ? text.slice(end + "</think>".length) : text).trim();
  card.append(make("div", { class: "text", dir: "auto" }, rest || (one.logprobs ? "(Nothing is written: likelihoods are compared.)" : "(The answer is empty.)")));
  for (const line of remarks(one)) card.append(make("p", { class: "quiet" }, line));
  return card;
}

function points(verdicts) {
  const most = verdicts.reduce((sum, one) => sum + Math.max(one.points, 0), 0);
  const got = verdicts.reduce((sum, one) => sum + (one.met ? one.points : 0), 0);
  return most ? ` (${String(got).replace("-", "−")} of ${most} points)` : "";
}

function remarks(one) {
  const table = (title, values) =>
    Object.keys(values ?? {}).length ? `${title}: ${Object.entries(values).map(([key, value]) => `${key} ${number(value)}`).join(", ")}` : "";
  return [
    one.reason ?? "",
    one.finish_reason === "length" ? "Cut off at the limit of tokens." : "",
    table("Log-probabilities in nats", one.logprobs),
    table("Parts", one.parts),
  ].filter(Boolean);
}

function verdictOf(met, points) {
  if (met === null || met === undefined) return ["open", `unscored: could ${points > 0 ? "earn" : "cost"} ${signed(points)}`];
  if (points > 0) return met ? ["yes", `met: earns ${signed(points)}`] : ["no", `not met: earns 0 of ${points}`];
  return met ? ["bad", `met, and it should not be: costs ${signed(points)}`] : ["yes", "not met, as it should be: costs nothing"];
}

function criteria(answers) {
  const rows = new Map();
  answers.forEach((one, model) => {
    for (const verdict of one?.verdicts ?? []) {
      const key = JSON.stringify([verdict.points, verdict.criterion]);
      if (!rows.has(key)) rows.set(key, { ...verdict, sides: [] });
      rows.get(key).sides[model] = verdict;
    }
  });
  if (!rows.size) return [];
  const nodes = [...rows.values()].map(({ criterion, points, sides }) => {
    const words = new Set(sides.filter((one) => one && one.met !== null).map((one) => one.met));
    const cells = run.models.map((name, model) => {
      const one = sides[model];
      const [kind, text] = one ? verdictOf(one.met, points) : ["open", "not judged"];
      const label = run.models.length > 1 ? `${name}: ` : "";
      const why = one ? one.explanation || "no reason given" : "";
      return make("div", { class: `side m${model % 6}` }, make("span", { class: "quiet" }, label), make("strong", { class: kind }, text), make("div", { class: "text quiet", dir: "auto" }, why));
    });
    const differs = words.size > 1 ? make("span", { class: "open" }, " (the models differ)") : "";
    const title = make("p", { dir: "auto" }, make("span", { class: `points ${points < 0 ? "bad" : ""}` }, signed(points)), " ", criterion, differs);
    return make("div", { class: "criterion" }, title, make("div", { class: "sides" }, ...cells));
  });
  return [make("h3", {}, `${count(rows.size, "criterion").replace(/criterions$/, "criteria")}`), ...nodes];
}

function tags() {
  const { task } = Object.fromEntries(new FormData(form));
  const counts = new Map();
  for (const entry of index) {
    if (!task || entry.task === task) for (const tag of entry.tags) counts.set(tag, (counts.get(tag) ?? 0) + 1);
  }
  const before = form.elements.tag.value;
  const options = [...counts].sort(([a], [b]) => (a < b ? -1 : 1)).map(([tag, n]) => make("option", { value: tag }, `${tag} (${n})`));
  form.elements.tag.replaceChildren(make("option", { value: "" }, "all"), ...options);
  form.elements.tag.value = counts.has(before) ? before : "";
}

async function begin() {
  for (let n = 0; n < sources.length; n += 1) {
    piece(n).forEach((example, place) => index.push(entryOf(example, n * run.size + place)));
    if (n % 5 === 4) {
      said.textContent = `Reading ${count(index.length, "example")} ...`;
      await pause();
    }
  }
  let wait = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (event.target.name === "task") tags();
    clearTimeout(wait);
    wait = setTimeout(refresh, event.target.name === "search" ? 250 : 0);
  });
  more.addEventListener("click", extend);
  addEventListener("hashchange", refresh);
  tags();
  await refresh();
  document.body.dataset.ready = "yes";
}

if (form) begin();

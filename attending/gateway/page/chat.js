/** The chat page: what happens when. */

import { answer as answers, modelCard, post, ServerError } from "/page/stream.js";
import { allowed, Store } from "/page/store.js";
import { TurnView } from "/page/turn.js";
import { $, announce, ask, count, el, grow, iconButton, sends } from "/page/view.js";

const KEEP_EVERY_MS = 2000; // while an answer is written
const MODEL_AGAIN_SECONDS = 5;
const BOTTOM_PIXELS = 60;
const SPOKEN_CHARACTERS = 600; // longer answers are announced, not read out
const DRAFT = "attending.draft", CURRENT = "attending.current"; // in sessionStorage: of this tab

let model = null;
let current = null; // the conversation on the page
let views = []; // of its turns
let isFollowing = true; // the end of the log stays in sight
let lastTop = 0;
const running = new Map(); // conversation -> {controller, since}
const isWide = matchMedia("(min-width: 900px)"); // room for the sidebar
const notices = new Map(); // kind -> paragraph
const store = new Store({ onTrouble: (text) => notice("storage", text), onOther: otherTab });

// ---- the tab's own memory, which may be forbidden too: then a reload begins with an empty page ----

const tabGet = (key) => allowed(() => sessionStorage.getItem(key)) ?? "";
const tabSet = (key, value) => allowed(() => sessionStorage.setItem(key, value));

// ---- above the log: the model's card and notices ----

function notice(kind, text, ...more) {
  if (text) notices.set(kind, el("p", {}, text, ...more));
  else notices.delete(kind);
  $("notice").replaceChildren(...notices.values());
  $("notice").hidden = notices.size === 0;
  if (text) announce(text);
}

async function loadModel() {
  try {
    model = await modelCard();
  } catch (error) {
    const link = el("a", { href: "/" }, "Sign in again");
    if (error.status === 401) return notice("model", "Your session has ended. ", link);
    const wait = error.retryAfter ?? MODEL_AGAIN_SECONDS;
    $("model").textContent = "No model yet";
    if (!notices.has("model")) notice("model", `${error.message} The page keeps trying.`);
    setTimeout(loadModel, wait * 1000);
    return;
  }
  notice("model", "");
  $("model").textContent = model.id;
  const context = model.max_model_len ? `${count(model.max_model_len)} tokens of context` : "";
  const facts = [context, model.licence && `Licence ${model.licence}`].filter(Boolean);
  $("facts").replaceChildren(...facts.map((fact) => el("span", {}, fact)));
  const pairs = [["Source", model.source], ["Note", model.note]].filter(([, value]) => value);
  $("more").replaceChildren(
    ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { dir: "auto" }, value)]),
  );
}

// ---- the log ----

function follow() {
  if (isFollowing) $("log").scrollTop = current.turns.length ? $("log").scrollHeight : 0;
}

function redraw() {
  const runs = running.get(current);
  $("empty").hidden = current.turns.length > 0;
  const same = current.turns.findIndex((turn, index) => !views[index]?.shows(turn));
  for (const view of views.splice(same < 0 ? current.turns.length : same)) view.node.remove();
  for (const turn of current.turns.slice(views.length)) {
    views.push(new TurnView(turn, acts));
    $("turns").append(views.at(-1).node);
  }
  views.forEach((view, index) => {
    const isLast = index === views.length - 1;
    view.update({ isRunning: isLast && Boolean(runs), isLast, since: runs?.since ?? null });
  });
  $("jump").hidden = isFollowing = true;
  lastTop = 0;
  follow();
  controls();
}

function controls() {
  const isRunning = running.has(current);
  $("stop").hidden = !isRunning;
  $("send").hidden = isRunning;
  $("send").disabled = !$("input").value.trim();
  tabSet(CURRENT, current.id);
  const rows = store.list().map((conversation) => {
    const isHere = conversation.id === current.id;
    const open = () => {
      show(store.get(conversation.id));
      drawer(false);
      $("input").focus();
    };
    const title = el("button", { type: "button", class: "title", dir: "auto", click: open });
    title.append(conversation.title);
    if (isHere) title.setAttribute("aria-current", "true");
    const name = conversation.title;
    const item = el("li", { class: running.has(conversation) ? "live" : "" }, title);
    item.append(iconButton("edit", `Rename ${name}`, () => rename(conversation)));
    item.append(iconButton("bin", `Delete ${name}`, () => remove(conversation)));
    return item;
  });
  $("conversations").replaceChildren(...rows);
  $("clear").hidden = rows.length === 0;
}

function show(conversation) {
  current = conversation;
  redraw();
}

function newChat() {
  show(store.create());
  drawer(false);
  $("input").focus();
}

// ---- conversations ----

function otherTab(id, isDeleted) {
  const conversation = store.get(id);
  const isHere = current.id === id;
  if (isDeleted) {
    running.get(conversation)?.controller.abort();
    store.delete(id);
    if (isHere) {
      newChat();
      notice("other", "This conversation was deleted in another tab.");
    }
    return controls();
  }
  // What is being written or edited here stays; `save` makes it a conversation of its own.
  if (running.has(conversation) || (isHere && views.some((view) => view.isEdited))) return;
  const fresh = store.reread(id);
  if (isHere && fresh) show(fresh);
  else controls();
}

function keep(conversation) {
  conversation.updated = Date.now();
  if (store.save(conversation)) return true;
  otherTab(conversation.id, true);
  return false;
}

async function rename(conversation) {
  const choices = [["rename", "Rename", "strong"]];
  const title = "Rename this conversation";
  const { choice, answer } = await ask({ title, field: conversation.title, choices });
  // While the dialog was open, another tab may have gone on.
  const latest = running.has(conversation) ? conversation : store.reread(conversation.id);
  if (choice && answer && latest) {
    latest.title = answer;
    store.save(latest);
    if (current.id === latest.id) show(latest);
  }
  controls();
  $("input").focus();
}

async function remove(conversation) {
  const choices = [["delete", "Delete", "strong danger"]];
  const text = `“${conversation.title}” is removed from this browser. This cannot be undone.`;
  const { choice } = await ask({ title: "Delete this conversation?", text, choices });
  if (choice) {
    running.get(conversation)?.controller.abort();
    store.delete(conversation.id);
    if (conversation.id === current.id) show(store.create());
    announce("Conversation deleted");
  }
  controls();
  $("input").focus();
}

function forgetAll() {
  for (const run of running.values()) run.controller.abort();
  store.clear();
  tabSet(DRAFT, "");
  notice("storage", "");
  show(store.create());
}

async function removeAll() {
  const choices = [["delete", "Delete all", "strong danger"]];
  const text = "Every conversation is removed from this browser. This cannot be undone.";
  const { choice } = await ask({ title: "Delete all conversations?", text, choices });
  if (choice) {
    forgetAll();
    announce("All conversations deleted");
  }
  $("input").focus();
}

async function leave() {
  const text = "Your conversations stay in this browser for whoever uses it next, unless deleted now.";
  const choices = [
    ["delete", "Delete and sign out", "danger"],
    ["keep", "Sign out", "strong"],
  ];
  const { choice } = await ask({ title: "Sign out?", text, choices });
  if (!choice) return $("input").focus();
  for (const run of running.values()) run.controller.abort();
  if (choice === "delete") forgetAll();
  try {
    await post("/logout", {});
  } catch (error) {
    if (error.status !== 401) return notice("leave", `You are still signed in. ${error.message}`);
  }
  location.assign("/");
}

// ---- questions and answers ----

const acts = {
  isBusy: () => running.has(current),
  retry(turn) {
    answerTo(current, turn);
    $("input").focus();
  },
  edit(turn, question) {
    // A title that nobody has changed follows its question.
    if (current.title === titleOf(turn.question)) current.title = titleOf(question);
    Object.assign(turn, { question, answer: null });
    answerTo(current, turn);
  },
  restart(turn) {
    newChat();
    $("input").value = turn.question;
    typed();
  },
};

const titleOf = (question) => Array.from(question.split("\n")[0]).slice(0, 60).join("");

function explained(error) {
  const { status, code, message } = error;
  const until = error.retryAfter === null ? null : Date.now() + error.retryAfter * 1000;
  const found = { kind: "other", title: "No answer.", message, until };
  const isTooLong = status === 400 && (/context/.test(code) || /context|too long/i.test(message));
  if (!(error instanceof ServerError)) found.message = "The page failed. Reload it and try again.";
  else if (status === 401) {
    const way = "Sign in in the new tab, come back and retry; your question is kept here.";
    Object.assign(found, { kind: "signed out", title: "Your session has ended.", message: way });
  } else if (isTooLong) {
    const way = `${message} A new chat leaves out what was said before.`;
    Object.assign(found, { kind: "too long", title: "Too long for this model.", message: way });
  } else if (status === 429) found.title = "The server is busy.";
  else if (status === 503) found.title = "The server is not ready.";
  else if (status === 0) found.title = "The answer did not arrive.";
  return found;
}

function requestFor(conversation, turn) {
  const { system, ...sampling } = store.settings;
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const earlier of conversation.turns.slice(0, conversation.turns.indexOf(turn))) {
    if (!earlier.answer?.content) continue; // Templates want questions and answers in turns.
    messages.push({ role: "user", content: earlier.question });
    messages.push({ role: "assistant", content: earlier.answer.content });
  }
  messages.push({ role: "user", content: turn.question });
  return { model: model.id, messages, ...sampling };
}

function take(answer, piece, now) {
  if (piece.reasoning || piece.content) {
    answer.firstSeconds ??= now;
    answer.lastSeconds = now;
    answer.pieces += 1;
  }
  if (piece.content && answer.reasoning) answer.reasoningSeconds ??= now - answer.firstSeconds;
  answer.reasoning += piece.reasoning;
  answer.content += piece.content;
  answer.finish = piece.finish ?? answer.finish;
  answer.usage = piece.usage ?? answer.usage;
}

async function answerTo(conversation, turn) {
  if (running.has(conversation)) return;
  const run = { controller: new AbortController(), since: performance.now() };
  const answer = { state: "running", content: "", reasoning: "", pieces: 0, usage: null };
  turn.answer = answer;
  conversation.turns.length = conversation.turns.indexOf(turn) + 1;
  running.set(conversation, run);
  keep(conversation);
  redraw();
  let keptAt = Date.now();
  try {
    if (!model) model = await modelCard();
    for await (const piece of answers(requestFor(conversation, turn), run.controller.signal)) {
      take(answer, piece, (performance.now() - run.since) / 1000);
      if (Date.now() - keptAt > KEEP_EVERY_MS) {
        keptAt = Date.now();
        keep(conversation);
      }
      if (conversation === current) views.at(-1).update({ isRunning: true, isLast: true, since: run.since });
    }
    answer.state = "done";
  } catch (error) {
    answer.state = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.state === "failed") answer.error = explained(error);
  }
  if (answer.reasoning) answer.reasoningSeconds ??= answer.lastSeconds - answer.firstSeconds;
  running.delete(conversation);
  ended(conversation, answer);
}

function ended(conversation, answer) {
  if (store.get(conversation.id) === conversation) keep(conversation); // else it was deleted
  if (conversation === current) {
    views.at(-1).update({ isRunning: false, isLast: true });
    const text = answer.content.length <= SPOKEN_CHARACTERS ? answer.content : "";
    if (answer.state === "failed") announce(`${answer.error.title} ${answer.error.message}`);
    else announce(answer.state === "stopped" ? "Stopped" : `The answer is complete. ${text}`);
  }
  controls();
}

function send() {
  const question = $("input").value.trim();
  if (!question || running.has(current)) return;
  current.title ||= titleOf(question);
  if (!isWide.matches) $("card").open = false;
  const turn = { question, answer: null };
  current.turns.push(turn);
  $("input").value = "";
  typed();
  notice("other", "");
  announce("Sent");
  answerTo(current, turn);
}

function stop() {
  running.get(current)?.controller.abort();
  $("input").focus();
}

function typed() {
  grow($("input"));
  $("send").disabled = !$("input").value.trim();
  tabSet(DRAFT, $("input").value);
}

// ---- drawer, colours, settings ----

function drawer(isOpen) {
  document.body.classList.toggle("drawer", isOpen);
  $("shade").hidden = !isOpen;
  $("main").inert = isOpen;
  $("menu").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("close").focus();
}

function colours(isFlipped) {
  const root = document.documentElement;
  if (isFlipped) {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    allowed(() => localStorage.setItem("attending.theme", root.dataset.theme));
  }
  $("theme").setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
}

function settingsDialog() {
  const dialog = $("settings");
  const fields = [...dialog.querySelectorAll("[name]")];
  const mark = () => $("settings-open").classList.toggle("on", Object.keys(store.settings).length > 0);
  mark();
  $("settings-open").addEventListener("click", () => {
    for (const field of fields) field.value = store.settings[field.name] ?? "";
    dialog.showModal();
  });
  dialog.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => $("input").focus());
  dialog.querySelector("form").addEventListener("submit", () => {
    const filled = fields.filter((field) => field.value.trim());
    const value = (field) => (field.name === "system" ? field.value : Number(field.value));
    store.settings = Object.fromEntries(filled.map((field) => [field.name, value(field)]));
    mark();
    announce("Settings saved");
  });
}

function listen() {
  const on = (id, kind, act) => $(id).addEventListener(kind, act);
  on("new", "click", newChat);
  on("clear", "click", removeAll);
  on("leave", "click", leave);
  on("stop", "click", stop);
  on("theme", "click", () => colours(true));
  on("menu", "click", () => drawer(true));
  for (const id of ["close", "shade"]) on(id, "click", () => (drawer(false), $("menu").focus()));
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  on("input", "input", typed);
  on("input", "keydown", (event) => {
    if (!sends(event)) return;
    event.preventDefault();
    send();
  });
  on("examples", "click", ({ target }) => {
    if (target.tagName !== "BUTTON") return;
    $("input").value = target.textContent;
    send();
    $("input").focus();
  });
  on("log", "scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("log");
    const isAtEnd = scrollHeight - scrollTop - clientHeight < BOTTOM_PIXELS;
    // Only going up ends following: the text may have grown since the page itself scrolled.
    isFollowing = isAtEnd || (isFollowing && scrollTop >= lastTop);
    lastTop = scrollTop;
    $("jump").hidden = isFollowing || !current.turns.length;
  });
  on("jump", "click", () => {
    isFollowing = true;
    follow();
    $("input").focus();
  });
  addEventListener("keydown", (event) => {
    const isCommand = event.ctrlKey || event.metaKey;
    if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") {
      event.preventDefault();
      newChat();
    } else if (event.key === "Escape" && !event.isComposing && !document.querySelector("[open]:modal")) {
      if (document.body.classList.contains("drawer")) (drawer(false), $("menu").focus());
      else stop();
    }
  });
  addEventListener("pagehide", () => running.forEach((_, conversation) => keep(conversation)));
  isWide.addEventListener("change", () => drawer(false));
  const sizes = new ResizeObserver(follow);
  for (const id of ["turns", "log"]) sizes.observe($(id));
  setInterval(() => views.at(-1)?.tick(), 500);
}

current = store.get(tabGet(CURRENT)) ?? store.create();
listen();
settingsDialog();
colours(false);
$("card").open = isWide.matches || !current.turns.length;
$("input").value = tabGet(DRAFT);
redraw();
typed();
$("input").focus();
loadModel();

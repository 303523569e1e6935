/** A question and its answer on the page. */

import { Prose } from "/page/markdown.js";
import { $, copyButton, count, el, grow, iconButton, seconds, sends } from "/page/view.js";

/** The line below an answer: how long it took, and why it ended. */
function measures(answer) {
  const { usage, firstSeconds, lastSeconds, pieces } = answer;
  const parts = [];
  const tokens = usage?.completion_tokens ?? pieces;
  if (tokens) parts.push(`${usage ? "" : "about "}${count(tokens)} tokens`);
  if (tokens > 1 && lastSeconds > firstSeconds) {
    parts.push(`${((tokens - 1) / (lastSeconds - firstSeconds)).toFixed(1)} tokens/s`);
  }
  if (firstSeconds != null) parts.push(`first after ${firstSeconds.toFixed(2)} s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const found = cached ? ` (${count(cached)} from the cache)` : "";
    parts.push(`prompt of ${count(usage.prompt_tokens)} tokens${found}`);
  }
  return parts.join(" · ");
}

/** How an answer ended, where it did not simply end. */
function ending({ state, finish, content }, isRunning) {
  if (isRunning || state === "failed") return "";
  const left = content ? "" : " Nothing was answered, so the model is not sent this question again.";
  if (state === "stopped") return `Stopped.${left}`;
  if (state === "running") {
    return `Unfinished: the page was closed, or another tab is still writing it.${left}`;
  }
  if (finish === "length") return `Cut at the limit: the answer is not complete.${left}`;
  return content ? "" : "The model ended without an answer.";
}

/** The two articles of a turn; `acts` are retry, edit, restart and isBusy. */
export class TurnView {
  #turn;
  #drawn;
  #acts;
  #isRunning = false;
  #reasoned = document.createTextNode("");

  /** Drawn by `update`; `node` is to be put on the page. */
  constructor(turn, acts) {
    this.#turn = turn;
    this.#acts = acts;
    this.#drawn = { ...turn };
    this.bubble = el("div", { class: "bubble", dir: "auto" }, turn.question);
    this.editButton = iconButton("edit", "Edit this question", () => this.#edit());
    this.askedActions = el("div", { class: "actions" }, this.editButton);
    this.askedActions.append(copyButton("Copy this question", () => turn.question));
    this.asked = el("article", { class: "asked", "aria-label": "Question" });
    this.asked.append(this.bubble, this.askedActions);

    this.summary = el("summary");
    const reasoning = el("div", { class: "reasoning", dir: "auto" }, this.#reasoned);
    this.reasoning = el("details", { hidden: "" }, this.summary, reasoning);
    const body = el("div", { class: "prose" });
    this.prose = new Prose(body);
    this.status = el("p", { class: "status" });
    this.ending = el("p", { class: "ending" });
    this.error = el("div", { class: "error", hidden: "" });
    this.stats = el("span", { class: "stats" });
    this.retryButton = iconButton("retry", "Retry: answer again", () => acts.retry(turn));
    this.copyButton = copyButton("Copy this answer", () => turn.answer?.content ?? "");
    const actions = el("div", { class: "actions" }, this.copyButton, this.retryButton);
    this.foot = el("div", { class: "below" }, this.stats, actions);
    this.answered = el("article", { class: "answer", "aria-label": "Answer" });
    this.answered.append(this.reasoning, body, this.status, this.ending, this.error, this.foot);
    this.node = el("section", { class: "turn" }, this.asked, this.answered);
  }

  /** Whether it was made for this turn, this question and this answer. */
  shows(turn) {
    const { question, answer } = this.#drawn;
    return turn === this.#turn && turn.question === question && turn.answer === answer;
  }

  /** Whether its question is being edited: then it must stay on the page. */
  get isEdited() {
    return Boolean(this.form);
  }

  /** Show what has come since; `since` is when the request began, if it is under way. */
  update({ isRunning, isLast, since = null }) {
    const answer = this.#turn.answer ?? { state: "stopped", content: "", reasoning: "" };
    this.#isRunning = isRunning;
    this.since = since;
    this.reasoning.hidden = !answer.reasoning;
    const added = answer.reasoning.slice(this.#reasoned.length);
    if (added) this.#reasoned.appendData(added);
    this.prose.show(answer.content);
    this.answered.setAttribute("aria-busy", String(isRunning));
    this.foot.hidden = isRunning;
    this.copyButton.hidden = !answer.content;
    this.retryButton.hidden = !isLast || Boolean(answer.error);
    this.stats.textContent = isRunning ? "" : measures(answer);
    this.ending.textContent = ending(answer, isRunning);
    this.node.classList.toggle("last", isLast);
    this.#fail(isRunning ? null : answer.error, isLast);
    this.tick();
  }

  /** Seconds that pass. */
  tick() {
    const answer = this.#turn.answer;
    const isThinking = this.#isRunning && !answer.content;
    const elapsed = this.since === null ? 0 : (performance.now() - this.since) / 1000;
    const waits = `Waiting for the model… ${Math.floor(elapsed)} s`;
    this.status.textContent = isThinking && !answer.reasoning ? waits : "";
    if (answer?.reasoning) {
      const spent = answer.reasoningSeconds ?? elapsed - (answer.firstSeconds ?? 0);
      this.summary.textContent = `Reasoning${isThinking ? "…" : ""} ${seconds(Math.max(0, spent))}`;
      this.summary.classList.toggle("live", isThinking);
    }
    if (this.wait && answer?.error) {
      const left = Math.ceil((answer.error.until - Date.now()) / 1000);
      this.wait.textContent = left > 0 ? `Try again in ${left} s.` : "You can try again now.";
    }
  }

  #fail(error, isLast) {
    this.error.hidden = !error;
    this.wait = null;
    if (!error) return this.error.replaceChildren();
    this.wait = error.until ? el("p") : null;
    const buttons = el("div", { class: "buttons" });
    const add = (label, click) => buttons.append(el("button", { type: "button", click }, label));
    if (error.kind === "signed out") {
      // Another tab, so that nothing on this page is lost.
      buttons.append(el("a", { href: "/", target: "_blank", class: "strong" }, "Sign in again"));
    }
    if (isLast) add("Retry", () => this.#acts.retry(this.#turn));
    if (isLast && error.kind === "too long") {
      add("Ask in a new chat", () => this.#acts.restart(this.#turn));
    }
    const note = this.#turn.answer.content ? null : el("p", { class: "quiet" },
      "Until it is answered, this question is not part of what the model is sent later.");
    const parts = [el("b", {}, error.title), el("p", {}, error.message), this.wait, note, buttons];
    this.error.replaceChildren(...parts.filter(Boolean));
  }

  #edit() {
    if (this.form || this.#acts.isBusy()) return;
    const area = el("textarea", { "aria-label": "Edit your question", dir: "auto", rows: "1" });
    Object.assign(area, { value: this.#turn.question, spellcheck: false });
    const close = () => {
      this.form.replaceWith(this.bubble);
      this.form = null;
      this.askedActions.hidden = false;
    };
    const cancel = () => {
      close();
      this.editButton.focus();
    };
    const submit = (event) => {
      event.preventDefault();
      if (!area.value.trim() || this.#acts.isBusy()) return;
      close();
      this.#acts.edit(this.#turn, area.value.trim());
      $("input").focus();
    };
    const buttons = el("div", { class: "buttons" });
    buttons.append(el("p", { class: "quiet" }, "What follows is replaced."));
    buttons.append(el("button", { type: "button", class: "plain", click: cancel }, "Cancel"));
    buttons.append(el("button", { type: "submit", class: "strong" }, "Send"));
    this.form = el("form", { class: "editing", submit }, area, buttons);
    area.addEventListener("input", () => grow(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) {
        event.stopPropagation();
        cancel();
      } else if (sends(event)) submit(event);
    });
    this.bubble.replaceWith(this.form);
    this.askedActions.hidden = true;
    grow(area);
    area.focus();
  }
}

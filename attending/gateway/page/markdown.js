/** Answers as Markdown: the server renders and cleans it; here it is cleaned once more and shown. */

import { post } from "/page/stream.js";
import { copyButton, el } from "/page/view.js";

const PAUSE_MS = 150; // between two renderings of an answer that is still being written
const FAILURES = 3; // of an answer's renderings, until it stays plain text
const TAGS = new Set(
  ("A B BLOCKQUOTE BR CODE DEL EM H1 H2 H3 H4 H5 H6 HR I LI OL P PRE S STRONG SUB SUP TABLE TBODY " +
    "TD TH THEAD TR UL").split(" "),
);
const ATTRIBUTES = new Set(["href", "title", "start", "align", "class"]);
const LANGUAGE = /^language-([\w+#.-]{1,30})$/;

async function toHtml(text) {
  const { html } = await (await post("/page/render", { texts: [text] })).json();
  return html[0];
}

/** The top elements of some HTML without anything that could act. It is parsed in a document of
 * its own, in which nothing runs or loads. */
function cleaned(html) {
  const { body } = new DOMParser().parseFromString(String(html), "text/html");
  for (const node of body.querySelectorAll("*")) {
    if (!TAGS.has(node.tagName)) {
      node.remove();
      continue;
    }
    for (const { name, value } of [...node.attributes]) {
      const isKept = ATTRIBUTES.has(name) && (name !== "class" || LANGUAGE.test(value));
      if (!isKept) node.removeAttribute(name);
    }
    if (node.tagName !== "A" || !node.hasAttribute("href")) continue;
    if (!/^(?:https?|mailto):/i.test(node.getAttribute("href"))) node.removeAttribute("href");
    Object.assign(node, { target: "_blank", rel: "noopener noreferrer nofollow" });
  }
  return [...body.children];
}

/** A top element as it is shown: code can be copied, tables scroll, each block has its direction. */
function dressed(node) {
  if (node.tagName === "PRE") {
    const code = node.textContent;
    const language = LANGUAGE.exec(node.firstElementChild?.className ?? "")?.[1] ?? "code";
    node.tabIndex = 0;
    const bar = el("div", { class: "bar" }, el("span", {}, language));
    bar.append(copyButton("Copy this code", () => code));
    return el("div", { class: "code", dir: "ltr" }, bar, node);
  }
  node.setAttribute("dir", "auto");
  if (node.tagName === "TABLE") {
    const scroll = { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table" };
    return el("div", scroll, node);
  }
  for (const inner of node.querySelectorAll("pre, table")) {
    const { parentNode, nextSibling } = inner;
    parentNode.insertBefore(dressed(inner), nextSibling);
  }
  return node;
}

/** A node that shows a text as it grows: plain until its HTML arrives, and never an older one. */
export class Prose {
  #node;
  #wanted = "";
  #shown = null;
  #blocks = []; // the HTML of each child: what has not changed keeps its selection and scrolling
  #isPlain = true;
  #isBusy = false;
  #failures = 0;

  /** Shows in `node`, which belongs to it from now on. */
  constructor(node) {
    this.#node = node;
  }

  /** Show this text soon; the last one asked for is the one that stays. */
  show(text) {
    if (text === this.#wanted) return;
    this.#wanted = text;
    if (this.#isPlain) this.#plain();
    if (!this.#isBusy) this.#render();
  }

  #plain() {
    this.#isPlain = true;
    this.#blocks = [];
    this.#node.classList.add("unrendered");
    this.#node.textContent = this.#wanted;
  }

  async #render() {
    this.#isBusy = true; // one at a time: an older rendering cannot arrive after a newer one
    while (this.#shown !== this.#wanted && this.#failures < FAILURES) {
      const text = this.#wanted;
      let pause = PAUSE_MS;
      try {
        this.#html(await toHtml(text));
        this.#shown = text;
        this.#failures = 0;
      } catch {
        this.#failures += 1;
        this.#plain();
        pause = 1000 * this.#failures;
      }
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
    this.#isBusy = false;
  }

  #html(html) {
    const nodes = cleaned(html);
    const blocks = nodes.map((node) => node.outerHTML);
    if (this.#isPlain) this.#node.replaceChildren();
    this.#node.classList.remove("unrendered");
    this.#isPlain = false;
    let same = 0;
    while (same < blocks.length && blocks[same] === this.#blocks[same]) same += 1;
    while (this.#node.children.length > same) this.#node.lastElementChild.remove();
    this.#node.append(...nodes.slice(same).map(dressed));
    this.#blocks = blocks;
  }
}

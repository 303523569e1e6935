/** What the page is made of: elements, buttons, dialogs, announcements. */

/** An element; attributes are set as given, functions listen, null is left out. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** The element with this id. */
export const $ = (id) => document.getElementById(id);

/** One of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A small button that shows a drawing and is called `label`. */
export function iconButton(name, label, click) {
  const attributes = { type: "button", class: "icon", "aria-label": label, title: label, click };
  return el("button", attributes, icon(name));
}

/** Have screen readers say this, when they are done with what they say. */
export function announce(text) {
  $("announce").textContent = text;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages without TLS have no clipboard; the old way still works there.
  }
  const before = document.activeElement;
  const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  before?.focus();
  return isDone;
}

/** A button that copies what `text` gives. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const isDone = await copy(text());
    announce(isDone ? "Copied" : "This browser does not allow copying");
    if (!isDone) return;
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/**
 * Ask in a dialog. `choices` are [value, label, class]; `field`, if any, is the text to be changed.
 * Gives {choice, answer}; the choice is null when the dialog was closed.
 */
export function ask({ title, text = "", field = null, choices }) {
  const dialog = $("question");
  const form = dialog.querySelector("form");
  const input = form.elements.answer;
  $("question-title").textContent = title;
  $("question-text").textContent = text;
  $("question-field").hidden = field === null;
  input.value = field ?? "";
  input.disabled = field === null;
  const buttons = choices.map(([value, label, kind]) =>
    el("button", { type: "submit", value, class: kind }, label),
  );
  const cancel = el("button", { type: "button", class: "plain", click: () => dialog.close() });
  cancel.append("Cancel");
  form.querySelector(".buttons").replaceChildren(cancel, ...buttons);
  dialog.returnValue = "";
  dialog.showModal();
  if (field === null) cancel.focus();
  else input.select();
  return new Promise((resolve) => {
    const closed = () => resolve({ choice: dialog.returnValue || null, answer: input.value.trim() });
    dialog.addEventListener("close", closed, { once: true });
  });
}

/** Make a text field as high as its text, up to a third of the window. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight / 3)}px`;
}

/** Whether Enter in a text field means "send": not with Shift, not while an input method composes. */
export function sends(event) {
  const isComposing = event.isComposing || event.keyCode === 229; // 229: Safari's way to say so
  return event.key === "Enter" && !event.shiftKey && !isComposing;
}

/** A number for people. */
export const count = (number) => number.toLocaleString("en");

/** Seconds for people. */
export const seconds = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;

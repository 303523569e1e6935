/**
 * Conversations and settings, in this browser only.
 *
 * Each conversation has a key of its own, so tabs share them; what a tab did not read it never
 * overwrites. Memory is this tab's truth: when storage is full or forbidden, the chat goes on.
 *
 * A conversation is {id, title, updated, turns}, a turn {question, answer}, an answer {state,
 * content, reasoning, ...}.
 */

const PREFIX = "attending.chat.";
const SETTINGS = "attending.settings";

/** What `act` gives, or null where the browser forbids it. */
export function allowed(act) {
  try {
    return act();
  } catch {
    return null;
  }
}

/** A random name; crypto.randomUUID does not exist on pages without TLS. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A conversation, or null for what is damaged: not ours to repair, left where it is. */
function parsed(raw) {
  const value = allowed(() => JSON.parse(raw));
  return Array.isArray(value?.turns) && typeof value.title === "string" ? value : null;
}

/** Everything that outlives a reload. */
export class Store {
  #memory = new Map();
  #raw = new Map(); // what this tab last read or wrote: anything else there is another tab's
  #storage = null;
  #onTrouble;

  /** `onTrouble` is told, in a sentence, why nothing can be kept; `onOther` which id another tab
   * has changed or, with true, deleted. */
  constructor({ onTrouble, onOther }) {
    this.#onTrouble = onTrouble;
    try {
      this.#storage = localStorage;
      for (const key of Object.keys(localStorage)) {
        if (key.startsWith(PREFIX)) this.reread(key.slice(PREFIX.length));
      }
    } catch {
      this.#storage = null;
      onTrouble("This browser forbids storage: conversations are lost when this tab is closed.");
    }
    addEventListener("storage", ({ key }) => {
      const ids = key === null ? [...this.#raw.keys()] : [key.slice(PREFIX.length)];
      if (key !== null && !key.startsWith(PREFIX)) return;
      for (const id of ids) onOther(id, this.#storage.getItem(PREFIX + id) === null);
    });
  }

  /** A conversation as it was last kept, by whichever tab; null if there is none. */
  reread(id) {
    const raw = this.#storage?.getItem(PREFIX + id) ?? null;
    if (raw === (this.#raw.get(id) ?? null)) return this.get(id) ?? null; // newer, if storage is full
    const conversation = parsed(raw);
    if (!conversation) return null;
    this.#raw.set(id, raw);
    this.#memory.set(id, conversation);
    return conversation;
  }

  /** A new conversation; kept from its first `save` on. */
  create() {
    return { id: newId(), title: "", updated: 0, turns: [] };
  }

  /** All of them, newest first. */
  list() {
    return [...this.#memory.values()].sort((a, b) => b.updated - a.updated);
  }

  /** One of them. */
  get(id) {
    return this.#memory.get(id);
  }

  /**
   * Keep a conversation. False: another tab has deleted it, and it stays deleted. If another tab
   * has changed it, this tab's becomes a conversation of its own.
   */
  save(conversation) {
    try {
      const there = this.#storage?.getItem(PREFIX + conversation.id) ?? null;
      const known = this.#raw.get(conversation.id) ?? null;
      if (this.#storage && there === null && known !== null) return false;
      if (there !== known) {
        const id = conversation.id;
        Object.assign(conversation, { id: newId(), title: `${conversation.title} (this tab)` });
        this.#memory.delete(id);
        this.reread(id);
      }
      this.#memory.set(conversation.id, conversation);
      if (!this.#storage) return true;
      const raw = JSON.stringify(conversation);
      this.#storage.setItem(PREFIX + conversation.id, raw);
      this.#raw.set(conversation.id, raw);
    } catch {
      this.#onTrouble(
        "This browser's storage is full: what is new is lost when this tab is closed. " +
          "Delete old conversations to make room.",
      );
    }
    return true;
  }

  /** Forget one, here and in storage. */
  delete(id) {
    this.#memory.delete(id);
    this.#raw.delete(id);
    this.#storage?.removeItem(PREFIX + id);
  }

  /** Forget all, also those that other tabs have added or that cannot be read. */
  clear() {
    const keys = this.#storage ? Object.keys(this.#storage) : [];
    for (const key of keys) if (key.startsWith(PREFIX)) this.#storage.removeItem(key);
    this.#memory.clear();
    this.#raw.clear();
  }

  #settings = null;

  /** What is sent with every question; {} at first. */
  get settings() {
    if (this.#settings) return this.#settings;
    return allowed(() => JSON.parse(this.#storage.getItem(SETTINGS))) ?? {};
  }

  set settings(values) {
    this.#settings = values;
    try {
      this.#storage?.setItem(SETTINGS, JSON.stringify(values));
    } catch {
      this.#onTrouble("This browser's storage is full: the settings hold for this tab only.");
    }
  }
}

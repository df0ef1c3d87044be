/**
 * What is shown of a session: its messages, each once and in its place, answers that grow, and when it was said.
 *
 * A message is known by its id or, before the history has brought it, by its message_id or its turn. The log stays at its
 * end while the visitor is there, and where it is while the visitor reads something earlier.
 */

import { button, el, icon } from './dom.js';
import { MarkdownView } from './markdown.js';

/** @typedef {import('./texts/en.js').Texts} Texts */
/** @typedef {import('./service.js').History} History */
/** @typedef {ReturnType<typeof createTranscript>} Transcript */
/** @typedef {ReturnType<typeof createAnswer>} Answer */

const PAINT_MS = 100;
const NEAR_PX = 60;
const PAUSE_MS = 3_600_000;

/** One message as the log shows it. */
export class Message {
  text = '';
  /** @type {string | undefined} its id in the transcript */
  id;
  /** @type {number | undefined} its place in the transcript, once it has one */
  seq;
  /** @type {string | undefined} */
  turnId;
  /** @type {string | undefined} the id under which it was sent */
  messageId;
  /** @type {Date | undefined} */
  at;
  body = el('div', { class: 'text', dir: 'auto' });
  // A line below the text, for what becomes of it.
  #meta = el('div', { class: 'meta' });
  #view;

  /** @param {Texts} t @param {'user' | 'assistant'} role @param {string} [text]  all of it */
  constructor(t, role, text) {
    this.role = role;
    const who = el('span', { class: 'sr' }, role === 'user' ? t.you : t.agent);
    this.node = el('div', { class: `message ${role}` }, who, this.body, this.#meta);
    this.#view = role === 'assistant' ? new MarkdownView(this.body) : null;
    if (text !== undefined) this.show(text, true);
  }

  /** @param {string} text @param {boolean} [whole]  nothing follows */
  show(text, whole = false) {
    this.text = text;
    if (this.#view) this.#view.show(text, whole);
    else this.body.textContent = text;
  }

  /** Say below it what is happening to it. @param {string} text  empty: nothing */
  note(text) {
    this.node.classList.remove('failed');
    this.#meta.textContent = text;
  }

  /** Say below it why it failed. @param {string} why @param {HTMLButtonElement} retry */
  fail(why, retry) {
    this.node.classList.add('failed');
    this.#meta.replaceChildren(why, retry);
  }
}

/**
 * An answer that is being written: deltas are shown at most every PAINT_MS, and dots until there are some.
 * @param {Texts} t
 */
function createAnswer(t) {
  const message = new Message(t, 'assistant');
  const dots = el('div', { class: 'dots' }, el('i', {}), el('i', {}), el('i', {}));
  let text = '';
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  message.node.prepend(dots);
  const paint = (whole = false) => {
    timer = undefined;
    dots.hidden = text !== '';
    message.show(text, whole);
  };
  /** @param {string} now */
  const grow = (now) => {
    text = now;
    timer ??= setTimeout(paint, PAINT_MS);
  };
  const end = () => {
    clearTimeout(timer);
    dots.remove();
  };
  return {
    message,
    /** @param {string} delta */
    add: (delta) => grow(text + delta),
    /** Forget the text so far: it comes anew. */
    clear: () => grow(''),
    /** @param {string} response @returns {string} what is to be read out: the words without their Markdown */
    finish(response) {
      end();
      text = response;
      paint(true);
      message.note('');
      // The end of a very long answer may not be laid out yet.
      return `${t.agent} ${message.body.innerText || text}`;
    },
    /**
     * It ends without a response.
     * @param {boolean} keep  show the text so far, as stopped @returns {boolean} whether there is any
     */
    stop(keep) {
      end();
      if (!keep || !text) return false;
      paint(true);
      message.note(t.stopped);
      return true;
    },
  };
}

/**
 * @param {object} options
 * @param {Texts} options.t
 * @param {string} options.lang
 * @param {string} options.greeting
 * @param {string | null} options.sessionId  the session to be shown; null: none has begun
 * @param {(before: number | null) => Promise<History>} options.load  a page of the session's history
 * @param {(text: string) => void} options.announce
 */
export function createTranscript({ t, lang, greeting, sessionId, load, announce }) {
  const welcome = new Message(t, 'assistant', greeting).node;
  // A live region would be read out with each delta: whole answers are announced instead.
  const log = el('div', { class: 'log', role: 'log', tabindex: '0', 'aria-live': 'off', 'aria-label': t.conversation }, welcome);
  const latest = button(t.latest, 'latest', icon('M12 5v14M6 13l6 6 6-6'), t.latest);
  const earlier = button(t.earlier, 'pill more');
  /** @type {Message[]} in order; those without a place in the transcript last */
  let messages = [];
  /** @type {number | null} the cursor of the page before the first message */
  let before = null;

  let atEnd = true;
  const nearEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  const toEnd = () => {
    atEnd = true;
    log.scrollTop = log.scrollHeight;
    latest.hidden = true;
  };
  const changed = () => {
    if (atEnd) toEnd();
    else latest.hidden = nearEnd();
  };
  new MutationObserver(changed).observe(log, { childList: true, subtree: true, characterData: true });
  new ResizeObserver(changed).observe(log);
  log.addEventListener('scroll', () => (latest.hidden = atEnd = nearEnd()), { passive: true });
  latest.hidden = true;
  latest.addEventListener('click', toEnd);

  /** The time, over the first message and after each pause. */
  function showTimes() {
    for (const old of log.querySelectorAll('.time')) old.remove();
    let last = NaN;
    for (const { node, at } of messages) {
      const said = at ? at.getTime() : NaN;
      if (!at || Number.isNaN(said)) continue;
      if (!(said - last < PAUSE_MS)) node.before(el('time', { class: 'note time', datetime: at.toISOString() }, inWords(at, lang)));
      last = said;
    }
  }

  /** Put a message in its place. @param {Message} message @param {number} [seq]  without it: at the end */
  function place(message, seq = Infinity) {
    messages = messages.filter((one) => one !== message);
    const next = messages.findIndex((one) => seq < (one.seq ?? Infinity));
    if (next < 0) {
      log.append(message.node);
      messages.push(message);
    } else {
      messages[next].node.before(message.node);
      messages.splice(next, 0, message);
    }
  }

  /** @param {History} page */
  function merge(page) {
    for (const { id, role, content, seq, turn_id, message_id, created_at } of page.messages) {
      if (role !== 'user' && role !== 'assistant') continue;
      let message = messages.find((one) => one.id === id || (one.seq === undefined && one.role === role
        && ((message_id !== undefined && one.messageId === message_id) || one.turnId === turn_id)));
      if (message?.id === id) continue;
      message ??= new Message(t, role, content);
      Object.assign(message, { id, seq, turnId: turn_id, messageId: message_id ?? message.messageId, at: message.at ?? new Date(created_at) });
      place(message, seq);
    }
    showTimes();
  }

  /** @param {number | null} cursor */
  function offerEarlier(cursor) {
    before = cursor;
    if (cursor === null) earlier.remove();
    else welcome.after(earlier);
  }

  earlier.addEventListener('click', async () => {
    earlier.disabled = true;
    const of = transcript.sessionId;
    try {
      const page = await load(before);
      if (of !== transcript.sessionId) return;
      const fromEnd = log.scrollHeight - log.scrollTop;
      merge(page);
      offerEarlier(page.next_before);
      // What the visitor was reading stays where it was.
      log.scrollTop = log.scrollHeight - fromEnd;
      (earlier.isConnected ? earlier : log).focus({ preventScroll: true });
    } catch {
      announce(t.notLoaded);
    } finally {
      earlier.disabled = false;
    }
  });

  const transcript = {
    /** The session whose messages are shown. */
    sessionId,
    log,
    /** The button that leads to the end of the log, shown while that is out of sight. */
    latest,
    toEnd,
    /** @param {string} [messageId] */
    find: (messageId) => messages.find((one) => messageId && one.messageId === messageId),
    /** @param {string} turnId */
    hasTurn: (turnId) => messages.some((one) => one.turnId === turnId),
    /** @param {Message} message */
    moveToEnd: (message) => place(message),
    /**
     * Show a message of the visitor's at the end.
     * @param {string} text @param {Partial<Pick<Message, 'messageId' | 'turnId' | 'at'>>} facts
     */
    addQuestion(text, facts) {
      const message = Object.assign(new Message(t, 'user', text), facts);
      place(message);
      showTimes();
      return message;
    },
    /** Show at the end that an answer is being written. @param {string} [turnId] */
    addAnswer(turnId) {
      const answer = createAnswer(t);
      answer.message.turnId = turnId;
      place(answer.message);
      return answer;
    },
    /**
     * End an answer that has no response.
     * @param {Answer} answer @param {boolean} [keep]  show the text so far, as stopped
     * @returns {boolean} whether any is shown
     */
    stopAnswer(answer, keep = false) {
      if (answer.stop(keep)) return true;
      messages = messages.filter((one) => one !== answer.message);
      answer.message.node.remove();
      return false;
    },
    /** Take the newest page of the history. @param {History} page */
    takeNewest(page) {
      const first = messages.every((one) => one.seq === undefined);
      merge(page);
      if (first) offerEarlier(page.next_before);
    },
    /** Show nothing but the greeting. @param {string | null} next  the session that follows */
    clear(next) {
      transcript.sessionId = next;
      messages = [];
      before = null;
      log.replaceChildren(welcome);
      latest.hidden = true;
    },
    /**
     * A session was over, and another took its place: its messages stay on the page, and these begin the next.
     * @param {string} next @param {...Message} kept
     */
    startNext(next, ...kept) {
      transcript.sessionId = next;
      // A first message has nothing before it.
      const told = messages.length > kept.length;
      messages = kept;
      offerEarlier(null);
      if (told) kept[0].node.before(el('p', { class: 'note' }, t.ended));
    },
  };
  return transcript;
}

/**
 * @param {Date} at @param {string} lang
 * @returns {string} the time, and the day unless it is today, as the visitor writes it in that language
 */
function inWords(at, lang) {
  const today = at.toDateString() === new Date().toDateString();
  const spoken = navigator.languages.find((one) => one.slice(0, 2) === lang.slice(0, 2)) ?? lang;
  /** @type {Intl.DateTimeFormatOptions} */
  const form = { hour: 'numeric', minute: '2-digit', ...(today ? {} : { weekday: 'short', day: 'numeric', month: 'short' }) };
  try {
    return at.toLocaleString(spoken || undefined, form);
  } catch {
    // The page's lang is no language.
    return at.toLocaleString(undefined, form);
  }
}

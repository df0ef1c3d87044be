/**
 * The open chat: the transcript, what is being answered, and the box to write in.
 *
 * What always holds: every message is shown once, whether this tab sent it, another one did, or the transcript brought it;
 * a message that was sent keeps its message_id until it is answered, over reloads too; no state is without a way on.
 */

import { AgentError } from './service.js';
import { button, el, icon, sheet } from './dom.js';
import { MarkdownView } from './markdown.js';
import { randomHex } from './session.js';
import { STYLE } from './styles.js';

/** @typedef {import('./texts.js').Texts} Texts */
/** @typedef {import('./service.js').Message} Message */
/** @typedef {import('./service.js').TurnEvent} TurnEvent */
/** @typedef {{show: (focus: boolean) => void, hide: () => void, wake: () => void, remove: () => void}} Panel */
/**
 * @typedef {object} Entry  a message on the page
 * @property {HTMLElement} node
 * @property {HTMLElement} meta  the line below its text
 * @property {'user' | 'assistant'} role
 * @property {(text: string, whole?: boolean) => void} show  whole: nothing follows
 * @property {number} [seq]  its place in the transcript, once it is there
 * @property {string} [id]
 * @property {string} [turnId]
 * @property {string} [messageId]
 * @property {Date} [at]  when it was said
 */
/**
 * @typedef {Omit<import('./widget.js').MountOptions, 'texts'> & {element: HTMLElement, root: ShadowRoot, frame: HTMLElement,
 *   launcher: HTMLElement, t: Texts, arrived: () => void, session: import('./session.js').SessionManager, service: import('./service.js').AgentService,
 *   refused: (error: unknown) => boolean, closed: () => void}} PanelOptions
 */

const PAINT_MS = 100;
const NEAR_PX = 60;
const PAUSE_MS = 3_600_000; // after which the time is told again

/** @param {PanelOptions} options @returns {Panel} */
export function createPanel({ agent, title, greeting, lang, t, target, root, frame, launcher, session, service, refused, closed, arrived }) {
  const inline = Boolean(target);

  const heading = el('h2', { id: 'title' }, title || t.title);
  const again = button(t.again, 'again', icon('M12 20h8M4.5 15.6 15.2 4.9a1.8 1.8 0 0 1 2.6 0l1.3 1.3a1.8 1.8 0 0 1 0 2.6L8.4 19.5l-4.600.7z'));
  const shut = button(t.close, 'shut', icon('M6 6l12 12M18 6 6 18'));
  const bar = el('div', { class: 'bar', hidden: '' });
  const log = el('div', { class: 'log', role: 'log', tabindex: '0', 'aria-live': 'off', 'aria-label': t.conversation });
  const status = el('div', { class: 'sr', role: 'status' });
  const box = /** @type {HTMLTextAreaElement} */ (
    el('textarea', { rows: '1', placeholder: t.placeholder, 'aria-label': t.message, enterkeyhint: 'send', maxlength: '32000' })
  );
  const arrow = icon('M12 19.5v-15M5.5 11 12 4.5l6.5 6.5');
  const square = icon('M7.5 7.5h9v9h-9z');
  square.classList.add('square');
  const send = button(t.send, 'send', arrow);
  send.type = 'submit';
  const latest = button(t.latest, 'latest', icon('M12 5v14M6 13l6 6 6-6'), t.latest);
  latest.hidden = true;
  const form = /** @type {HTMLFormElement} */ (el('form', {}, latest, el('div', { class: 'box' }, box, send)));
  const panel = el('section', { class: 'panel', id: 'panel', role: inline ? 'region' : 'dialog', 'aria-labelledby': 'title', hidden: '' },
    el('header', {}, heading, again, ...(inline ? [] : [shut])), bar, log, form);
  root.adoptedStyleSheets.push(sheet(STYLE));
  frame.prepend(panel, status); // an answer is read out when the chat is closed, too
  launcher.setAttribute('aria-controls', 'panel');

  /** @type {Entry[]} the messages of this session, in order; those without a place in the transcript last */
  let entries = [];
  let shownSession = session.findSessionId();
  /** @type {{stop: AbortController, messageId: string} | null} the message that this tab waits for */
  let current = null;
  /** @type {AbortController | null} */
  let feed = null;
  /** @type {Entry | null} an answer that somebody else's message gets */
  let followed = null;

  // --- what is on the page ---

  const near = () => log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
  let atEnd = true; // and then the log stays there, whatever changes
  const toEnd = () => {
    atEnd = true;
    log.scrollTop = log.scrollHeight;
    latest.hidden = true;
  };
  const settle = () => {
    if (atEnd) toEnd();
    else latest.hidden = near();
  };
  new MutationObserver(settle).observe(log, { childList: true, subtree: true, characterData: true });
  new ResizeObserver(settle).observe(log);
  /** @param {string} text */
  const announce = (text) => {
    status.textContent = '';
    setTimeout(() => (status.textContent = text), 50); // the same words twice are two announcements
  };

  /** @param {'user' | 'assistant'} role @param {string} [text] @returns {Entry} */
  function bubble(role, text) {
    const body = el('div', { class: 'text', dir: 'auto' });
    const meta = el('div', { class: 'meta' });
    const node = el('div', { class: `message ${role}` }, el('span', { class: 'sr' }, role === 'user' ? t.you : t.agent), body, meta);
    const view = role === 'assistant' ? new MarkdownView(body) : null;
    /** @type {Entry['show']} */
    const show = (shown, whole = false) => {
      if (view) view.show(shown, whole);
      else body.textContent = shown;
    };
    if (text !== undefined) show(text, true);
    return { node, meta, role, show };
  }

  /** @param {Entry} entry @returns {Entry} */
  function append(entry) {
    entries.push(entry);
    log.append(entry.node);
    return entry;
  }

  const welcome = bubble('assistant', greeting || t.greeting).node;
  log.append(welcome);

  /** Show messages of the transcript, each once and in its place. @param {Message[]} messages */
  function merge(messages) {
    for (const { id, role, content, seq, turn_id, message_id, created_at } of messages) {
      if (role !== 'user' && role !== 'assistant') continue;
      let entry = entries.find((one) => one.id === id || (one.seq === undefined && one.role === role
        && ((message_id !== undefined && one.messageId === message_id) || one.turnId === turn_id)));
      if (entry?.id === id) continue;
      if (entry) entries.splice(entries.indexOf(entry), 1);
      else entry = bubble(role, content);
      Object.assign(entry, { id, seq, turnId: turn_id, messageId: message_id ?? entry.messageId, at: entry.at ?? new Date(created_at) });
      const at = entries.findIndex((one) => one.seq === undefined || one.seq > seq);
      if (at < 0) {
        log.append(entry.node);
        entries.push(entry);
      } else {
        entries[at].node.before(entry.node);
        entries.splice(at, 0, entry);
      }
    }
    tellTimes();
  }

  /** When it was said, over the first message and wherever there was a pause. */
  function tellTimes() {
    for (const old of log.querySelectorAll('.time')) old.remove();
    let before = NaN;
    for (const { node, at } of entries) {
      const said = at ? at.getTime() : NaN;
      if (!at || Number.isNaN(said)) continue;
      if (!(said - before < PAUSE_MS)) node.before(el('time', { class: 'note time', datetime: at.toISOString() }, inWords(at, lang)));
      before = said;
    }
  }

  const more = button(t.earlier, 'pill more');
  /** @type {number | null} */
  let moreBefore = null;
  more.addEventListener('click', async () => {
    more.disabled = true;
    const of = shownSession;
    try {
      const page = await service.history({ before: moreBefore });
      if (of !== shownSession) return;
      const fromEnd = log.scrollHeight - log.scrollTop;
      merge(page.messages);
      offerMore(page.next_before);
      log.scrollTop = log.scrollHeight - fromEnd; // what the visitor was reading stays where it was
      if (more.isConnected) more.focus({ preventScroll: true });
      else log.focus({ preventScroll: true });
    } catch {
      announce(t.notLoaded);
    } finally {
      more.disabled = false;
    }
  });
  /** @param {number | null} before */
  function offerMore(before) {
    moreBefore = before;
    if (before === null) more.remove();
    else welcome.after(more);
  }

  /** A line below the header, with what can be done about it. @param {string} text @param {...HTMLButtonElement} actions */
  function tell(text, ...actions) {
    bar.hidden = !text;
    bar.replaceChildren(...(text ? [el('p', {}, text), ...actions] : []));
  }
  const connection = () => {
    const asking = bar.querySelector('.main'); // a question stays until it is answered
    if (!asking) tell(navigator.onLine === false ? t.offline : '');
  };

  const working = () => Boolean(current || followed);
  function dress() {
    const stop = working();
    box.dir = box.value ? 'auto' : ''; // an empty box would be left to right, and its placeholder too
    send.replaceChildren(stop ? square : arrow);
    send.setAttribute('aria-label', stop ? t.stop : t.send);
    send.title = stop ? t.stop : t.send;
    send.type = stop ? 'button' : 'submit';
    send.setAttribute('aria-disabled', String(!stop && !box.value.trim())); // `disabled` would take the focus away
    log.setAttribute('aria-busy', String(stop));
  }

  // --- answers as they come ---

  /** An answer that is being written. */
  function answering() {
    const dots = el('div', { class: 'dots' }, el('i', {}), el('i', {}), el('i', {}));
    const entry = bubble('assistant');
    let text = '';
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    entry.node.prepend(dots);
    append(entry);
    const paint = (whole = false) => {
      timer = undefined;
      dots.hidden = text !== '';
      entry.show(text, whole);
    };
    return {
      entry,
      /** @param {string} more */
      add(more) {
        text += more;
        timer ??= setTimeout(() => paint(), PAINT_MS);
      },
      clear() {
        text = '';
        timer ??= setTimeout(() => paint(), PAINT_MS);
      },
      /** @param {string} whole */
      finish(whole) {
        clearTimeout(timer);
        dots.remove();
        text = whole;
        paint(true);
        entry.meta.textContent = '';
        // What is read out are the words, not their Markdown; the end of a very long answer may be on its way still.
        const shown = /** @type {HTMLElement | null} */ (entry.node.querySelector('.text'));
        announce(`${t.agent} ${shown?.innerText || whole}`);
      },
      /** Ended without an answer: what was said so far is shown as stopped, or not at all. @param {boolean} keep @returns {boolean} whether it is shown */
      drop(keep) {
        clearTimeout(timer);
        dots.remove();
        const shown = keep && text !== '';
        if (shown) paint(true);
        entry.meta.textContent = shown ? t.stopped : '';
        if (!shown) {
          entries = entries.filter((one) => one !== entry);
          entry.node.remove();
        }
        return shown;
      },
    };
  }

  /** Send a message that is on the page; each attempt has the same message_id. @param {Entry} entry @param {string} text */
  async function deliver(entry, text) {
    const messageId = /** @type {string} */ (entry.messageId);
    const stop = new AbortController();
    current = { stop, messageId };
    closeFeed();
    const keep = (failed = false) => session.keepPending({ sessionId: session.getSessionId(), messageId, text, failed });
    keep();
    shownSession = session.findSessionId();
    entry.node.classList.remove('failed');
    entry.meta.textContent = t.sending;
    const answer = answering();
    dress();
    /** @param {string} why */
    const over = (why) => {
      answer.drop(false);
      keep(true);
      fail(entry, text, why);
    };
    try {
      for await (const event of service.streamMessage(agent, text, { messageId, signal: stop.signal })) {
        switch (event.type) {
          case 'turn.started':
            entry.turnId = answer.entry.turnId = event.turn_id;
            entry.meta.textContent = '';
            break;
          case 'text.delta':
            answer.add(event.text);
            break;
          case 'log.reset':
            answer.clear();
            break;
          case 'session.replaced':
            replaced(entry, answer.entry);
            keep();
            break;
          case 'connection.lost':
            (entry.turnId ? answer.entry : entry).meta.textContent = navigator.onLine === false ? t.offline
              : event.wait_s > 3 ? t.wait.replace('{seconds}', String(Math.ceil(event.wait_s))) : t.reconnecting;
            break;
          case 'connection.restored':
            answer.entry.meta.textContent = entry.meta.textContent = '';
            break;
          case 'turn.completed':
            answer.finish(event.response);
            session.keepPending(null);
            if (panel.hidden) arrived();
            break;
          case 'turn.cancelled':
            entry.meta.textContent = answer.drop(true) ? '' : t.stopped;
            session.keepPending(null);
            break;
          case 'turn.failed':
            over(event.code);
        }
      }
    } catch (error) {
      if (stop.signal.aborted) answer.drop(false);
      else if (!refused(error)) over(error instanceof AgentError ? error.code : 'failed');
    } finally {
      if (current?.stop === stop) current = null;
      dress();
      if (!stop.signal.aborted) openFeed();
    }
  }

  /** @param {Entry} entry @param {string} text @param {string} code */
  function fail(entry, text, code) {
    const why = /** @type {Record<string, string>} */ (/** @type {unknown} */ (t))[code] ?? t.failed;
    const retry = button(t.retry, 'retry');
    retry.addEventListener('click', () => {
      if (working()) return;
      box.focus();
      log.append(entry.node);
      entries = [...entries.filter((one) => one !== entry), entry];
      void deliver(entry, text);
    });
    entry.node.classList.add('failed');
    entry.meta.replaceChildren(why, retry);
    announce(`${why} ${t.retry}`);
  }

  /** The session was over: what is shown above belongs to it, and these belong to the next. @param {...Entry} kept */
  function replaced(...kept) {
    shownSession = session.getSessionId();
    const told = entries.length > kept.length; // a first message has nothing before it
    entries = kept;
    offerMore(null);
    if (told) kept[0].node.before(el('p', { class: 'note' }, t.ended));
  }

  // --- what happens elsewhere ---

  const closeFeed = () => {
    feed?.abort();
    feed = null;
  };

  /** Follow the session while the visitor looks at it: one connection per visible tab. */
  function openFeed() {
    if (feed || current || panel.hidden || document.hidden) return;
    const sessionId = session.findSessionId();
    if (sessionId !== shownSession) clear();
    if (!sessionId) return;
    feed = new AbortController();
    void follow(feed.signal).finally(() => panel.hidden || resume());
  }

  /** @param {AbortSignal} signal */
  async function follow(signal) {
    /** @type {ReturnType<typeof answering> | null} */
    let answer = null;
    let turnId = '';
    const refresh = async () => {
      const of = shownSession;
      try {
        const page = await service.history();
        if (of !== shownSession || signal.aborted) return;
        const first = entries.every((one) => one.seq === undefined);
        merge(page.messages);
        if (first) offerMore(page.next_before);
        connection();
      } catch {
        const retry = button(t.retry, 'pill');
        retry.addEventListener('click', () => (tell(''), closeFeed(), openFeed()));
        if (!signal.aborted) tell(t.notLoaded, retry);
      }
    };
    const end = () => {
      answer = followed = null;
      dress();
    };
    try {
      for await (const event of service.watch({ signal })) {
        switch (event.type) {
          case 'feed.opened':
          case 'log.reset':
            await refresh();
            if (resume()) return;
            break;
          case 'turn.started':
            turnId = event.turn_id;
            answer?.drop(false);
            end();
            if (entries.some((one) => one.turnId === turnId)) break;
            if (event.message !== undefined && !entries.some((one) => one.messageId && one.messageId === event.message_id)) {
              Object.assign(append(bubble('user', event.message)), { turnId, messageId: event.message_id });
            }
            answer = answering();
            answer.entry.turnId = turnId;
            followed = answer.entry;
            dress();
            break;
          case 'text.delta':
            answer?.add(event.text);
            break;
          case 'turn.completed':
            if (!answer) break;
            answer.finish(event.response);
            end();
            await refresh(); // for the question
            break;
          case 'turn.failed':
          case 'turn.cancelled':
            answer?.drop(event.type === 'turn.cancelled');
            end();
            break;
          case 'connection.lost':
            if (navigator.onLine === false) connection();
        }
      }
    } finally {
      /** @type {ReturnType<typeof answering> | null} */ (answer)?.drop(false);
      end();
    }
  }

  /** Go on with the message that waits for its answer, of an earlier page or of another tab: by its id it is answered once. */
  function resume() {
    const pending = session.findPending();
    if (!pending || current) return false;
    let entry = entries.find((one) => one.messageId === pending.messageId);
    if (entry?.seq !== undefined) {
      session.keepPending(null); // it was answered
      return false;
    }
    if (pending.failed && entry) return false;
    if (!entry) {
      entry = bubble('user', pending.text);
      entry.messageId = pending.messageId;
      append(entry);
    }
    if (!pending.failed) {
      void deliver(entry, pending.text);
      return true;
    }
    fail(entry, pending.text, 'failed');
    return false;
  }

  /** Show nothing but the greeting: a new conversation. */
  function clear() {
    shownSession = session.findSessionId();
    entries = [];
    moreBefore = null;
    log.replaceChildren(welcome);
    latest.hidden = true;
    dress();
  }

  const changed = () => {
    if (document.hidden || panel.hidden) return;
    if (session.findSessionId() !== shownSession && !current) {
      closeFeed();
      clear();
    }
    if (!resume()) openFeed();
  };
  const onVisible = () => (document.hidden ? closeFeed() : changed());
  const stopListening = session.onChange(changed);
  document.addEventListener('visibilitychange', onVisible);
  addEventListener('offline', connection);
  addEventListener('online', connection);

  // --- what the visitor does ---

  /** @type {Promise<void> | null} a conversation that is being ended: what is said meanwhile is the first word of the next */
  let ending = null;
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    if (ending) await ending;
    const text = box.value.trim();
    if (!text || working()) return;
    box.value = '';
    grow();
    const entry = bubble('user', text);
    entry.messageId = randomHex(16);
    if (session.findSessionId() !== shownSession) clear();
    append(entry);
    entry.at = new Date();
    tellTimes();
    toEnd();
    void deliver(entry, text);
  });
  send.addEventListener('click', async (event) => {
    if (!working()) return;
    event.preventDefault();
    send.setAttribute('aria-disabled', 'true');
    try {
      // Nothing runs yet, or not any more: then it is this tab that stops asking.
      if (!(await service.cancel(agent)) && current) {
        const { stop, messageId } = current;
        const entry = entries.find((one) => one.messageId === messageId);
        stop.abort();
        session.keepPending(null);
        if (entry) entry.meta.textContent = t.stopped;
      }
    } catch {
      announce(t.reconnecting);
    }
    dress();
    box.focus();
  });
  const grow = () => {
    if (CSS.supports('field-sizing', 'content')) return;
    box.style.height = '0';
    box.style.height = `${box.scrollHeight}px`;
  };
  box.addEventListener('input', () => (dress(), grow()));
  box.addEventListener('keydown', (event) => {
    // Shift+Enter makes a new line; while words are being composed (229 in Safari), Enter takes the one that is proposed.
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    form.requestSubmit();
  });
  const beginAnew = async () => {
    current?.stop.abort();
    closeFeed();
    if (working()) await service.cancel(agent).catch(() => {});
    await service.endSession().catch(() => session.clearSession()); // the gateway times it out by itself
    current = ending = null;
    tell('');
    clear();
    box.focus();
  };
  again.addEventListener('click', () => {
    const yes = button(t.againYes, 'pill main');
    const no = button(t.againNo, 'pill');
    yes.addEventListener('click', () => {
      yes.disabled = true;
      ending = beginAnew();
    });
    no.addEventListener('click', () => {
      tell('');
      connection();
      again.focus();
    });
    tell(t.againQuestion, yes, no);
    no.focus();
  });
  latest.addEventListener('click', () => {
    toEnd();
    box.focus();
  });
  log.addEventListener('scroll', () => {
    atEnd = near();
    latest.hidden = atEnd;
  }, { passive: true });
  shut.addEventListener('click', () => (hide(), closed()));
  panel.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || inline || event.isComposing) return;
    event.stopPropagation();
    hide();
    closed();
  });

  /** What the keyboard of a phone leaves of the screen. */
  const screen = globalThis.visualViewport;
  const fit = () => {
    if (!screen || screen.scale > 1.01) return;
    panel.style.setProperty('--screen-top', `${screen.offsetTop}px`);
    panel.style.setProperty('--screen-height', `${screen.height}px`);
  };
  for (const kind of ['resize', 'scroll']) screen?.addEventListener(kind, fit);

  function hide() {
    if (panel.hidden || inline) return;
    const focused = panel.contains(root.activeElement);
    panel.hidden = true;
    launcher.setAttribute('aria-expanded', 'false');
    closeFeed();
    if (focused) launcher.focus();
  }
  /** @param {boolean} focus */
  function show(focus) {
    const first = panel.hidden;
    panel.hidden = false;
    launcher.setAttribute('aria-expanded', 'true');
    fit();
    connection();
    dress();
    if (first) {
      toEnd();
      openFeed();
    }
    if (focus) box.focus();
  }
  function remove() {
    current?.stop.abort();
    closeFeed();
    stopListening();
    document.removeEventListener('visibilitychange', onVisible);
    removeEventListener('offline', connection);
    removeEventListener('online', connection);
    for (const kind of ['resize', 'scroll']) screen?.removeEventListener(kind, fit);
    panel.remove();
    status.remove();
  }
  return { show, hide, wake: () => void resume(), remove };
}

/** @param {Date} at @param {string} [lang] @returns {string} the time, and the day if it is not today; as the visitor writes it in that language */
function inWords(at, lang = '') {
  const today = at.toDateString() === new Date().toDateString();
  const spoken = navigator.languages.find((one) => one.slice(0, 2) === lang.slice(0, 2)) ?? lang;
  /** @type {any} */
  const form = { hour: 'numeric', minute: '2-digit', ...(today ? {} : { weekday: 'short', day: 'numeric', month: 'short' }) };
  try {
    return at.toLocaleString(spoken || undefined, form);
  } catch {
    return at.toLocaleString(undefined, form); // the page's lang is no language
  }
}

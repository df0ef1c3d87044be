/**
 * The open chat: puts transcript, delivery, feed and composer together, and decides what goes on when.
 *
 * What always holds: every message is shown once, whether this tab sent it, another one did, or the history brought it; a
 * message that was sent keeps its message_id until it is answered, over reloads too; every failure shows a way to go on.
 */

import { createComposer } from './composer.js';
import { createDelivery } from './delivery.js';
import { button, el, icon, sheet } from './dom.js';
import { createFeed } from './feed.js';
import { randomHex } from './session.js';
import { STYLE } from './styles.js';
import { createTranscript } from './transcript.js';
// Used by the transcript. A browser that finds it named here asks for it at once, instead of import by import.
import './markdown.js';

/** @typedef {import('./texts/en.js').Texts} Texts */
/** @typedef {ReturnType<typeof createNotices>} Notices */
/** @typedef {ReturnType<typeof createPanel>} Panel */
/**
 * @typedef {object} PanelOptions
 * @property {string} agent
 * @property {string} [title]
 * @property {string} [greeting]
 * @property {boolean} inline  in an element of the page: always open
 * @property {string} lang
 * @property {Texts} t
 * @property {ShadowRoot} root
 * @property {HTMLElement} frame
 * @property {HTMLElement} launcher
 * @property {import('./session.js').SessionManager} session
 * @property {import('./service.js').AgentService} service
 * @property {(error: unknown) => boolean} refused  takes the chat away if the error means that it may not be here
 * @property {() => void} closed  the visitor closed it
 * @property {() => void} arrived  an answer came while it was closed
 */

/** What the chat says beside the conversation: a line below the header, and words for screen readers. @param {Texts} t */
function createNotices(t) {
  const bar = el('div', { class: 'bar', hidden: '' });
  const status = el('div', { class: 'sr', role: 'status' });
  /** Show a line. @param {string} text  empty: none @param {...HTMLButtonElement} actions  what can be done about it */
  const tell = (text, ...actions) => {
    bar.hidden = !text;
    bar.replaceChildren(...(text ? [el('p', {}, text), ...actions] : []));
  };
  return {
    bar,
    status,
    tell,
    /** Say whether the browser is offline, unless a question waits for its answer. */
    tellConnection: () => bar.querySelector('.main') || tell(navigator.onLine === false ? t.offline : ''),
    /** Have a screen reader say it. @param {string} text */
    announce(text) {
      status.textContent = '';
      // After a moment, for the same words twice are two announcements.
      setTimeout(() => (status.textContent = text), 50);
    },
  };
}

/** @param {PanelOptions} options */
export function createPanel({ agent, title, greeting, inline, lang, t, root, frame, launcher, session, service, refused, closed, arrived }) {
  const notices = createNotices(t);
  const { announce, tell, tellConnection } = notices;
  const transcript = createTranscript({
    t,
    lang,
    greeting: greeting || t.greeting,
    sessionId: session.findSessionId(),
    load: (before) => service.history({ before }),
    announce,
  });
  const composer = createComposer({ t, submit, stop });
  const delivery = createDelivery({
    agent,
    t,
    service,
    session,
    transcript,
    announce,
    refused,
    began: () => feed.close(),
    ended(stopped) {
      dress();
      if (!stopped) openFeed();
    },
    answered: () => panel.hidden && arrived(),
    retry(message) {
      if (working()) return;
      composer.focus();
      transcript.moveToEnd(message);
      void delivery.send(message);
    },
  });
  const feed = createFeed({
    t,
    service,
    transcript,
    notices,
    resume: delivery.resume,
    changed: dress,
    ended: () => panel.hidden || delivery.resume(),
    reopen() {
      feed.close();
      openFeed();
    },
  });

  const again = button(t.again, 'again', icon('M12 20h8M4.5 15.6 15.2 4.9a1.8 1.8 0 0 1 2.6 0l1.3 1.3a1.8 1.8 0 0 1 0 2.6L8.4 19.5l-4.600.7z'));
  const shut = button(t.close, 'shut', icon('M6 6l12 12M18 6 6 18'));
  composer.form.prepend(transcript.latest);
  const panel = el('section', { class: 'panel', id: 'panel', role: inline ? 'region' : 'dialog', 'aria-labelledby': 'title', hidden: '' },
    el('header', {}, el('h2', { id: 'title' }, title || t.title), again, ...(inline ? [] : [shut])), notices.bar, transcript.log, composer.form);
  root.adoptedStyleSheets.push(sheet(STYLE));
  // The status stands outside the panel, so that an answer is read out when the chat is closed, too.
  frame.prepend(panel, notices.status);
  launcher.setAttribute('aria-controls', 'panel');

  function working() {
    return delivery.busy || feed.answering;
  }
  function dress() {
    composer.show(working());
    transcript.log.setAttribute('aria-busy', String(working()));
  }

  // --- which session is shown and followed ---

  function clear() {
    transcript.clear(session.findSessionId());
    dress();
  }
  /** Another tab may have begun the next conversation. */
  function showSession() {
    if (session.findSessionId() !== transcript.sessionId) clear();
  }
  /** Follow the session, if the visitor looks at it and nothing is on its way. */
  function openFeed() {
    if (feed.isOpen || delivery.busy || panel.hidden || document.hidden) return;
    showSession();
    if (transcript.sessionId) feed.open();
  }
  /** Something may have happened elsewhere, or while nobody looked. */
  function catchUp() {
    if (document.hidden || panel.hidden) return;
    if (session.findSessionId() !== transcript.sessionId && !delivery.busy) {
      feed.close();
      clear();
    }
    if (!delivery.resume()) openFeed();
  }

  // --- what the visitor does ---

  /** @type {Promise<void> | null} a conversation that is being ended: what is said meanwhile belongs to the next */
  let ending = null;
  async function submit() {
    if (ending) await ending;
    const text = working() ? '' : composer.take();
    if (!text) return;
    showSession();
    const message = transcript.addQuestion(text, { messageId: randomHex(16), at: new Date() });
    transcript.toEnd();
    void delivery.send(message);
  }
  async function stop() {
    await delivery.cancel().catch(() => announce(t.reconnecting));
    dress();
    composer.focus();
  }
  async function beginAnew() {
    const answering = working();
    delivery.stop();
    feed.close();
    if (answering) await service.cancel(agent).catch(() => {});
    // A session that cannot be ended now times out at the gateway.
    await service.endSession().catch(() => session.clearSession());
    ending = null;
    tell('');
    clear();
    composer.focus();
  }
  again.addEventListener('click', () => {
    const yes = button(t.againYes, 'pill main');
    const no = button(t.againNo, 'pill');
    yes.addEventListener('click', () => {
      yes.disabled = true;
      ending = beginAnew();
    });
    no.addEventListener('click', () => {
      tell('');
      tellConnection();
      again.focus();
    });
    tell(t.againQuestion, yes, no);
    no.focus();
  });
  transcript.latest.addEventListener('click', composer.focus);
  shut.addEventListener('click', () => (hide(), closed()));
  panel.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape' || inline || event.isComposing) return;
    event.stopPropagation();
    hide();
    closed();
  });

  /** Fill what the keyboard of a phone leaves of the screen. */
  function fit() {
    const screen = globalThis.visualViewport;
    if (!screen || screen.scale > 1.01) return;
    panel.style.setProperty('--screen-top', `${screen.offsetTop}px`);
    panel.style.setProperty('--screen-height', `${screen.height}px`);
  }
  function hide() {
    if (panel.hidden || inline) return;
    const focused = panel.contains(root.activeElement);
    panel.hidden = true;
    launcher.setAttribute('aria-expanded', 'false');
    feed.close();
    if (focused) launcher.focus();
  }

  // --- what the page does ---

  const gone = new AbortController();
  const { signal } = gone;
  signal.addEventListener('abort', session.onChange(catchUp));
  document.addEventListener('visibilitychange', () => (document.hidden ? feed.close() : catchUp()), { signal });
  for (const kind of ['offline', 'online']) addEventListener(kind, tellConnection, { signal });
  for (const kind of ['resize', 'scroll']) globalThis.visualViewport?.addEventListener(kind, fit, { signal });

  return {
    hide,
    /** @param {boolean} focus */
    show(focus) {
      const first = panel.hidden;
      panel.hidden = false;
      launcher.setAttribute('aria-expanded', 'true');
      fit();
      tellConnection();
      dress();
      if (first) {
        transcript.toEnd();
        openFeed();
      }
      if (focus) composer.focus();
    },
    /** Go on with a message that waits for its answer, without being shown. */
    wake: () => void delivery.resume(),
    remove() {
      delivery.stop();
      feed.close();
      gone.abort();
      panel.remove();
      notices.status.remove();
    },
  };
}

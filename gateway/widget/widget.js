/**
 * The chat widget of the session gateway: one plain ES module, no build step, no dependencies.
 *
 *   <script type="module" src="https://gateway.example/widget.js" data-agent="support"></script>
 *
 * Owns: the visitor's session id, the calls to the gateway, and a chat panel in a shadow root.
 * Always holds: message text reaches the page as text only, never as HTML; a message that is sent again keeps its
 * message_id, so the gateway never runs a finished turn twice; a session that ended never leaves the visitor stuck.
 */

/** @typedef {{id?: string, role: string, content: string, created_at?: string}} Message */
/** @typedef {{messages: Message[], next_before: string | number | null}} History  messages, oldest first */
/** @typedef {{agent: string, title?: string, greeting?: string, base?: string, target?: HTMLElement}} MountOptions */

const HISTORY_TIMEOUT_MS = 15_000;
const SEND_TIMEOUT_MS = 300_000; // longer than the gateway lets a turn wait and run: the gateway's own error comes first

/** @param {number} bytes @returns {string} that many random bytes as hex (works on plain http too, unlike randomUUID) */
const randomHex = (bytes) =>
  Array.from(crypto.getRandomValues(new Uint8Array(bytes)), (byte) => byte.toString(16).padStart(2, '0')).join('');

/** What the gateway answered instead of a result (RFC 9457), or `unreachable` when there was no answer at all. */
export class AgentError extends Error {
  /** @param {{code: string, title: string, status?: number, retryAfter?: number | null}} problem  retryAfter in seconds */
  constructor({ code, title, status = 0, retryAfter = null }) {
    super(title);
    this.name = 'AgentError';
    this.code = code;
    this.title = title;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The visitor's session id: in localStorage, or in memory where storage is blocked or there is no window. */
export class SessionManager {
  static #instances = new Map();
  #key;
  /** @type {string | null} */
  #memory = null;

  /** @param {string} key  the name in localStorage */
  constructor(key) {
    this.#key = key;
  }

  /** One per agent, because the gateway binds a session to its agent. @param {string} [agentId] @returns {SessionManager} */
  static getInstance(agentId = '') {
    const key = agentId ? `gateway_session:${agentId}` : 'gateway_session';
    if (!this.#instances.has(key)) this.#instances.set(key, new SessionManager(key));
    return this.#instances.get(key);
  }

  /** @returns {string | null} the id if this visitor has one; makes none */
  findSessionId() {
    let found = this.#memory;
    try {
      found = localStorage.getItem(this.#key) ?? found;
    } catch {
      // storage is blocked, or there is no window
    }
    return found !== null && /^[A-Za-z0-9_.:-]{16,255}$/.test(found) ? found : null;
  }

  /** @returns {string} the id, made up on first use; it is the secret of the session, hence 128 random bits */
  getSessionId() {
    const found = this.findSessionId();
    if (found) return found;
    const made = `session_${Date.now()}_${randomHex(16)}`;
    try {
      localStorage.setItem(this.#key, made);
    } catch {
      this.#memory = made;
    }
    return made;
  }

  /** Forget the id: the next message begins a new session. */
  clearSession() {
    this.#memory = null;
    try {
      localStorage.removeItem(this.#key);
    } catch {
      // blocked storage held nothing
    }
  }

  /** @returns {{website_domain: string, user_agent: string, timestamp: string}} */
  getSessionMetadata() {
    return {
      website_domain: globalThis.location?.hostname ?? '',
      user_agent: globalThis.navigator?.userAgent ?? '',
      timestamp: new Date().toISOString(),
    };
  }
}

/** The gateway's HTTP calls. Every failure is an AgentError. */
export class AgentService {
  #base;
  #session;

  /** @param {{base?: string, session?: SessionManager}} [options] */
  constructor({ base = new URL('.', import.meta.url).href, session = SessionManager.getInstance() } = {}) {
    this.#base = base.replace(/\/+$/, '');
    this.#session = session;
  }

  /**
   * Send one message and wait for the answer. To send it again after an error, pass the same messageId.
   * Where the session has ended, the message opens a new one.
   * @param {string} agentId @param {string} message @param {{messageId?: string}} [options]
   * @returns {Promise<{response: string, metadata: Record<string, unknown>}>}
   */
  async sendMessage(agentId, message, { messageId = randomHex(16) } = {}) {
    const sessionId = this.#session.getSessionId();
    const send = () =>
      this.#call('POST', `/api/chat/${encodeURIComponent(agentId)}/message`, SEND_TIMEOUT_MS, {
        message,
        session_id: this.#session.getSessionId(),
        message_id: messageId,
        metadata: this.#session.getSessionMetadata(),
      });
    try {
      return await send();
    } catch (error) {
      if (error.status !== 410) throw error;
      // another tab may have begun the next session already: then join it
      if (this.#session.findSessionId() === sessionId) this.#session.clearSession();
      return send();
    }
  }

  /**
   * The newest messages of a session, or those before a cursor. A session without messages yet is empty, not an error.
   * @param {string | null} [sessionId] @param {string | number | null} [before]  next_before of the page after it
   * @returns {Promise<History>}
   */
  async history(sessionId = this.#session.findSessionId(), before = null) {
    const empty = { messages: [], next_before: null };
    if (!sessionId) return empty;
    const query = before === null ? '' : `?before=${encodeURIComponent(before)}`;
    try {
      return await this.#call('GET', `/api/sessions/${encodeURIComponent(sessionId)}/messages${query}`, HISTORY_TIMEOUT_MS);
    } catch (error) {
      if (error.status === 404 || error.status === 410) return empty;
      throw error;
    }
  }

  /** End the session, at the gateway and here. Harmless where there is none. */
  async endSession() {
    const sessionId = this.#session.findSessionId();
    if (!sessionId) return;
    try {
      await this.#call('POST', `/api/sessions/${encodeURIComponent(sessionId)}/end`, HISTORY_TIMEOUT_MS);
    } catch (error) {
      if (error.status !== 404 && error.status !== 410) throw error;
    }
    this.#session.clearSession();
  }

  async #call(method, path, timeoutMs, body) {
    let response;
    let answer;
    try {
      response = await fetch(this.#base + path, {
        method,
        headers: body && { 'Content-Type': 'application/json' },
        body: body && JSON.stringify(body),
        signal: AbortSignal.timeout(timeoutMs),
      });
      answer = await response.text();
    } catch {
      throw new AgentError({ code: 'unreachable', title: 'No connection to the chat.' });
    }
    let json = null;
    try {
      json = JSON.parse(answer);
    } catch {
      // a proxy's error page, say: handled as an answer without a body
    }
    if (response.ok && json) return json;
    const seconds = Number(json?.retry_after ?? response.headers.get('Retry-After') ?? NaN);
    throw new AgentError({
      code: json?.code ?? 'bad_answer',
      title: json?.title ?? 'The chat did not answer as expected.',
      status: response.status,
      retryAfter: Number.isFinite(seconds) ? seconds : null,
    });
  }
}

/**
 * Put the chat on the page: a launcher button and a panel, in a shadow root. The transcript comes back by itself.
 * The host page may set the CSS variables --chat-accent and --chat-on-accent.
 * @param {MountOptions} options
 * @returns {{element: HTMLElement, open: () => void, close: () => void, remove: () => void}}
 */
export function mount({ agent, title = 'Chat with us', greeting = 'Hello! How can we help?', base, target }) {
  const session = SessionManager.getInstance(agent);
  const service = new AgentService({ base, session });

  const button = (attributes, content) => el('button', { type: 'button', class: 'plain', ...attributes }, content);
  const bubble = (role, text) => el('div', { class: `message ${role}`, dir: 'auto' }, text);
  const welcome = bubble('assistant', greeting);
  const log = el('div', { class: 'log', role: 'log', tabindex: '0', 'aria-label': 'Conversation' }, welcome);
  const box = el('textarea', { rows: '1', placeholder: 'Write a message', 'aria-label': 'Message', enterkeyhint: 'send' });
  const submit = el('button', { class: 'send', 'aria-label': 'Send' }, icon('M12 20V5M5 12l7-7 7 7'));
  const form = el('form', {}, box, submit);
  const again = button({ title: 'End this chat and begin a new one' }, 'New chat');
  const shut = button({ 'aria-label': 'Close the chat' }, icon('M6 6l12 12M18 6 6 18'));
  const header = el('header', {}, el('h2', {}, title), again, shut);
  const panel = el('section', { id: 'panel', role: 'dialog', 'aria-label': title, hidden: '' }, header, log, form);
  const launcher = button(
    { class: 'launcher', 'aria-label': title, 'aria-expanded': 'false', 'aria-controls': 'panel' },
    icon('M20 4H4v12h4v4l5-4h7z'),
  );
  const element = el('div', {});
  const root = element.attachShadow({ mode: 'open' });
  const sheet = new CSSStyleSheet(); // unlike a style element, it works under a strict Content-Security-Policy
  sheet.replaceSync(STYLE);
  root.adoptedStyleSheets = [sheet];
  root.append(panel, launcher);

  let busy = false;
  const setBusy = (value) => {
    busy = value;
    submit.disabled = value;
    again.disabled = value;
  };
  const add = (node) => {
    log.append(node);
    log.scrollTop = log.scrollHeight;
    return node;
  };

  /** Put one page of the transcript below the greeting; where more is left, or loading failed, offer a button. */
  async function restore(before = null) {
    const sessionId = session.findSessionId();
    const answered = before === null ? log.querySelectorAll('.answered') : []; // the newest page will have these again
    let nodes = [];
    let more = null;
    try {
      const page = await service.history(sessionId, before);
      nodes = page.messages.filter(({ role }) => role !== 'system').map(({ role, content }) => bubble(role, content));
      if (page.next_before != null) more = { label: 'Show earlier messages', before: page.next_before };
    } catch {
      more = { label: 'Earlier messages could not be loaded. Try again', before };
    }
    if (sessionId !== session.findSessionId()) return; // a new chat began meanwhile
    if (nodes.length) for (const node of answered) node.remove();
    const fromEnd = log.scrollHeight - log.scrollTop;
    if (more) {
      const load = button({ class: 'plain more' }, more.label);
      load.addEventListener('click', () => {
        load.remove();
        void restore(more.before);
      });
      nodes.unshift(load);
    }
    welcome.after(...nodes);
    log.scrollTop = log.scrollHeight - fromEnd; // what the visitor was reading stays where it was
  }

  /** Send a message that is already on the page; every further attempt uses the same node and message_id. */
  async function deliver(node, text, messageId) {
    const sessionId = session.findSessionId();
    const dots = el('div', { class: 'dots', role: 'img', 'aria-label': 'The answer is on its way' }, '•••');
    setBusy(true);
    node.classList.add('waiting');
    add(dots);
    try {
      await restored; // first, so that no message is shown a second time as part of the transcript
      const { response } = await service.sendMessage(agent, text, { messageId });
      if (sessionId !== null && sessionId !== session.findSessionId()) {
        node.before(el('p', { class: 'note' }, 'The earlier chat has ended. This is a new one.'));
      }
      node.classList.add('answered');
      dots.remove();
      add(bubble('assistant answered', response));
    } catch (error) {
      const wait = error.retryAfter ? ` Please wait ${Math.ceil(error.retryAfter)} s.` : '';
      const retry = button({}, 'Try again');
      const failure = el('p', { class: 'failure' }, `${error.title ?? 'Not sent.'}${wait} `, retry);
      retry.addEventListener('click', () => {
        if (busy) return;
        failure.remove();
        box.focus();
        void deliver(node, text, messageId);
      });
      dots.remove();
      node.after(failure);
      failure.scrollIntoView({ block: 'nearest' });
    } finally {
      node.classList.remove('waiting');
      setBusy(false);
    }
  }

  form.addEventListener('submit', (event) => {
    event.preventDefault();
    const text = box.value.trim();
    if (!text || busy) return;
    box.value = '';
    void deliver(add(bubble('user', text)), text, randomHex(16));
  });
  box.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return; // Shift+Enter makes a new line
    event.preventDefault();
    form.requestSubmit();
  });
  again.addEventListener('click', async () => {
    setBusy(true);
    try {
      await service.endSession();
    } catch {
      session.clearSession(); // the gateway times it out by itself; the visitor need not wait for that
    }
    log.replaceChildren(welcome);
    setBusy(false);
    box.focus();
  });

  const show = (visible) => {
    panel.hidden = !visible;
    launcher.setAttribute('aria-expanded', String(visible));
    (visible ? box : launcher).focus();
    if (visible) log.scrollTop = log.scrollHeight;
  };
  launcher.addEventListener('click', () => show(panel.hidden));
  shut.addEventListener('click', () => show(false));
  panel.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') show(false);
  });

  (target ?? document.body).append(element);
  const restored = restore();
  return { element, open: () => show(true), close: () => show(false), remove: () => element.remove() };
}

/**
 * @param {string} tag @param {Record<string, string>} attributes @param {...(Node | string)} children  strings become text
 * @returns {any}
 */
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** @param {string} strokes  an SVG path on a grid of 24 by 24 @returns {SVGElement} */
function icon(strokes) {
  const namespace = 'http://www.w3.org/2000/svg';
  const svg = document.createElementNS(namespace, 'svg');
  const path = document.createElementNS(namespace, 'path');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  path.setAttribute('d', strokes);
  svg.append(path);
  return svg;
}

const STYLE = `
:host { --accent: var(--chat-accent, #1f6f54); --on-accent: var(--chat-on-accent, #fff);
  --paper: #fff; --ink: #1c2321; --soft: #5b6662; --line: #dfe5e2; --bubble: #eff3f1; --alarm: #a3261b;
  all: initial; color-scheme: light; font: 400 15px/1.5 system-ui, sans-serif; color: var(--ink); }
@media (prefers-color-scheme: dark) {
  :host { --paper: #171d1b; --ink: #e7edea; --soft: #9fada8; --line: #2e3835; --bubble: #242d2a; --alarm: #ff9d92;
    color-scheme: dark; } }
* { box-sizing: border-box; margin: 0; font: inherit; color: inherit; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
svg { display: block; width: 22px; height: 22px; fill: none; stroke: currentColor; stroke-width: 1.9;
  stroke-linecap: round; stroke-linejoin: round; }
button { border: 0; background: none; padding: 0; cursor: pointer; }
button:disabled { opacity: .45; cursor: default; }
.launcher { position: fixed; z-index: 2147483000; right: 20px; bottom: 20px; width: 58px; height: 58px; display: grid;
  place-items: center; border-radius: 50%; background: var(--accent); color: var(--on-accent);
  box-shadow: 0 6px 22px rgb(0 0 0 / .28); transition: transform .15s; }
.launcher:hover { transform: scale(1.06); }
section { position: fixed; z-index: 2147483001; right: 20px; bottom: 92px; width: 384px; height: min(620px, 100dvh - 116px);
  display: flex; flex-direction: column; overflow: hidden; background: var(--paper); border: 1px solid var(--line);
  border-radius: 18px; box-shadow: 0 18px 60px rgb(0 0 0 / .26); }
header { display: flex; align-items: center; gap: 6px; padding: 12px 12px 12px 18px; background: var(--accent);
  color: var(--on-accent); }
h2 { flex: 1; font-weight: 600; font-size: 16px; }
.plain { padding: 5px 9px; border-radius: 9px; font-size: 13px; text-decoration: underline; text-underline-offset: 3px; }
.plain:hover { background: rgb(128 128 128 / .18); }
header .plain { text-decoration: none; }
header :focus-visible { outline-color: var(--on-accent); outline-offset: -2px; }
.log { flex: 1; overflow-y: auto; overscroll-behavior: contain; padding: 16px; display: flex;
  flex-direction: column; gap: 8px; }
.log:focus-visible { outline-offset: -3px; }
.message { max-width: 84%; padding: 9px 13px; border-radius: 16px; white-space: pre-wrap; overflow-wrap: anywhere; }
.assistant { align-self: flex-start; background: var(--bubble); border-bottom-left-radius: 5px; }
.user { align-self: flex-end; background: var(--accent); color: var(--on-accent); border-bottom-right-radius: 5px;
  transition: opacity .2s; }
.waiting { opacity: .6; }
.dots { align-self: flex-start; padding: 2px 12px; font-size: 20px; letter-spacing: 3px; color: var(--soft);
  animation: breathe 1.2s ease-in-out infinite; }
.more, .note { align-self: center; color: var(--soft); font-size: 13px; }
.failure { align-self: flex-end; color: var(--alarm); font-size: 13px; text-align: right; }
form { display: flex; align-items: flex-end; gap: 8px; padding: 12px; border-top: 1px solid var(--line); }
textarea { flex: 1; min-height: 42px; max-height: 130px; padding: 9px 13px; resize: none; field-sizing: content;
  font-size: 16px; line-height: 22px; border: 1px solid var(--line); border-radius: 14px; background: var(--paper); }
textarea:focus-visible { outline-offset: -2px; }
textarea::placeholder { color: var(--soft); opacity: 1; }
.send { flex: none; width: 42px; height: 42px; display: grid; place-items: center; border-radius: 50%;
  background: var(--accent); color: var(--on-accent); }
@keyframes breathe { 50% { opacity: .25; } }
@media (max-width: 480px) {
  section { inset: 0; width: auto; height: 100dvh; border: 0; border-radius: 0; } }
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
`;

/** @type {HTMLScriptElement | null | undefined}  the tag that put this module on the page, if it asks for a chat */
const tag = globalThis.document?.querySelector('script[data-agent][src*="widget.js"]');
if (tag) {
  const { agent, title, greeting } = tag.dataset;
  const start = () => mount({ agent, title, greeting });
  if (document.body) start();
  else document.addEventListener('DOMContentLoaded', start);
}
